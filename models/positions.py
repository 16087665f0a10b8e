"""Position embeddings."""

from mesh import mtf
from mesh.operations import embedding_lookup
from models.context import Context

POSITION_STDDEV = 0.01  # GPT-2


def learned_positions(ctx: Context) -> mtf.Tensor:
    """A learned vector for each position, from wpe [n_ctx, embd]: [sequence, embd], or [embd] in a decoding step."""
    dims = ctx.dims
    wpe = ctx.normal("wpe", [dims.embed_sequence, dims.embd], POSITION_STDDEV)
    if ctx.position is not None:
        return embedding_lookup(wpe, ctx.position, name="position_lookup")
    if dims.sequence.size < dims.embed_sequence.size:
        wpe = mtf.slice(wpe, 0, dims.sequence.size, dims.embed_sequence.name)
    return mtf.rename_dimension(wpe, dims.embed_sequence.name, dims.sequence.name)
