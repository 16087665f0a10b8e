"""Decoding: cached equals uncached logits, and every rule of the loop, on one device and on meshes."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from mesh import mtf
from mesh.randomness import make_key
from models import gpt
from models.context import Context
from models.dims import make_dims
from sample import Sampling, decode, draw, filter_logits
from tests.reference_entmax import numpy_entmax
from tests.tiny import MtfSession, random_tokens, tiny_config

FLOAT = mtf.VariableDType(tf.float32)
EOS = 0


@pytest.mark.parametrize(
    ("mesh_shape", "layout"),
    [
        ("x:1", ""),
        ("x:2", "memory_length:x"),
        ("x:2,y:2", "batch:x,heads:y,intermediate_expanded:y,vocab:y"),
    ],
)
def test_cached_decoding_gives_the_logits_of_the_whole_sequence(tmp_path: Path, mesh_shape: str, layout: str) -> None:
    config = tiny_config(tmp_path)
    tokens = random_tokens(4, config.n_ctx)

    def build(mesh: mtf.Mesh) -> dict:
        dims = make_dims(config, 4)
        inputs = mtf.import_tf_tensor(mesh, tokens, mtf.Shape([dims.batch, dims.sequence]))
        whole = Context(config, mesh, dims, FLOAT, keep_states_until=mtf.constant(mesh, 0, dtype=tf.int32))
        uncached = gpt.logits(whole, inputs)
        states = {name: mtf.zeros_like(state) for name, state in whole.states.items()}
        cached = []
        for position in range(config.n_ctx):
            at = mtf.constant(mesh, position, dtype=tf.int32)
            one = Context(config, mesh, dims, FLOAT, position=at, states=states)
            token = mtf.import_tf_tensor(mesh, tokens[:, position], mtf.Shape([dims.batch]))
            cached.append(gpt.logits(one, token))
            states = one.states
        return {"uncached": uncached, "cached": cached, "filled": whole.states, "written": states}

    got = MtfSession(mesh_shape, layout).run(build)
    np.testing.assert_allclose(np.stack(got["cached"], axis=1), got["uncached"], atol=1e-5)
    for name, state in got["filled"].items():
        np.testing.assert_allclose(got["written"][name], state, atol=1e-5, err_msg=name)


BATCH, SEQUENCE, VOCAB = mtf.Dimension("batch", 4), mtf.Dimension("sequence", 10), mtf.Dimension("vocab", 12)
PROMPTS = random_tokens(4, SEQUENCE.size, vocab=VOCAB.size)
LENGTHS = np.array([3, 5, 10, 1], np.int32)


def counting_step(mesh: mtf.Mesh):
    """A language model for which token t is followed by t + 1, by far the likeliest; and eos by eos."""
    after = np.where(np.arange(VOCAB.size) == EOS, EOS, (np.arange(VOCAB.size) + 1) % VOCAB.size)
    table = 20 * np.eye(VOCAB.size, dtype=np.float32)[after]

    def step(token: mtf.Tensor, position: mtf.Tensor, states: list) -> tuple[mtf.Tensor, list]:
        rows = mtf.import_tf_tensor(mesh, table, mtf.Shape([mtf.Dimension("token", VOCAB.size), VOCAB]))
        one_hot = mtf.one_hot(token, mtf.Dimension("token", VOCAB.size))
        return mtf.einsum([one_hot, rows], mtf.Shape([BATCH, VOCAB])), states

    return step


def flat_step(mesh: mtf.Mesh):
    """A language model for which every token is equally likely."""

    def step(token: mtf.Tensor, position: mtf.Tensor, states: list) -> tuple[mtf.Tensor, list]:
        return mtf.zeros(mesh, mtf.Shape([BATCH, VOCAB])), states

    return step


def run_decode(step, sampling: Sampling, mesh_shape: str = "x:1", layout: str = "") -> tuple[np.ndarray, np.ndarray]:
    def build(mesh: mtf.Mesh) -> tuple[mtf.Tensor, mtf.Tensor]:
        prompts = mtf.import_tf_tensor(mesh, PROMPTS, mtf.Shape([BATCH, SEQUENCE]))
        lengths = mtf.import_tf_tensor(mesh, LENGTHS, mtf.Shape([BATCH]))
        return decode(prompts, lengths, [], step(mesh), make_key(mesh, sampling.seed, 0), sampling, EOS)

    return MtfSession(mesh_shape, layout).run(build)


def counted(prompt: list[int], new_tokens: int) -> tuple[list[int], int]:
    """The continuation of `counting_step` written out: count up, stop before eos."""
    text = list(prompt)
    while len(text) < min(SEQUENCE.size, len(prompt) + new_tokens):
        following = EOS if text[-1] == EOS else (text[-1] + 1) % VOCAB.size
        if following == EOS:
            break
        text.append(following)
    return text + [EOS] * (SEQUENCE.size - len(text)), len(text)


@pytest.mark.parametrize("new_tokens", [None, 2])
def test_rows_stop_at_eos_at_their_limit_and_at_the_context(new_tokens: int | None) -> None:
    tokens, lengths = run_decode(counting_step, Sampling(temperature=0, max_new_tokens=new_tokens))
    for row in range(BATCH.size):
        text, length = counted(PROMPTS[row, : LENGTHS[row]].tolist(), new_tokens or SEQUENCE.size)
        assert tokens[row].tolist() == text
        assert lengths[row] == length


def test_draws_depend_on_the_seed_and_not_on_the_mesh() -> None:
    tokens, lengths = run_decode(flat_step, Sampling(temperature=1.0, seed=1))
    split = run_decode(flat_step, Sampling(temperature=1.0, seed=1), "x:2,y:2", "batch:x,vocab:y")
    other, _ = run_decode(flat_step, Sampling(temperature=1.0, seed=2))
    np.testing.assert_array_equal(tokens, split[0])
    np.testing.assert_array_equal(lengths, split[1])
    assert (tokens != other).any()
    for row in range(BATCH.size):
        np.testing.assert_array_equal(tokens[row, : LENGTHS[row]], PROMPTS[row, : LENGTHS[row]])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.5), [3]),
        (Sampling(temperature=1.0, top_p=0.7), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.1), [3]),
        (Sampling(temperature=0.1, top_p=0.99), [3]),  # a low temperature gathers the probability
        (Sampling(temperature=1.0, top_k=3, top_p=0.95), [0, 1, 3]),
    ],
)
def test_filter_logits_keeps_the_tokens_that_may_be_drawn(sampling: Sampling, kept: list[int]) -> None:
    probabilities = np.array([[0.1, 0.25, 0.05, 0.6]])
    with tf.Graph().as_default(), tf.Session() as session:
        got = session.run(filter_logits(tf.constant(np.log(probabilities), tf.float32), sampling))[0]
    assert [i for i in range(4) if got[i] > -1e20] == kept
    expected = np.log(probabilities[0, kept] / probabilities.max()) / sampling.temperature  # a constant is no matter
    np.testing.assert_allclose(got[kept], expected, rtol=1e-5, atol=1e-6)


def entmax_of(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What tokens are drawn with, from numpy's entmax: top-k before it, top-p by it."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = np.where(logits >= np.sort(logits)[-sampling.top_k], logits, -1e30)
    probabilities = numpy_entmax(logits)
    if sampling.top_p < 1:
        likelier = np.array([probabilities[probabilities > p].sum() for p in probabilities])
        probabilities = np.where(likelier < sampling.top_p, probabilities, 0)
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, entmax=True),
        Sampling(temperature=0.5, entmax=True),
        Sampling(temperature=1.0, entmax=True, top_k=2),
        Sampling(temperature=1.0, entmax=True, top_p=0.8),
        Sampling(temperature=1e-30, entmax=True),
    ],
)
def test_draws_follow_the_probabilities_of_entmax(sampling: Sampling) -> None:
    rows, given = 20_000, np.array([0.0, 2.0, 1.5, -1.0, 2.5, -400.0], np.float32)
    batch, vocab = mtf.Dimension("batch", rows), mtf.Dimension("vocab", given.size)

    def build(mesh: mtf.Mesh) -> mtf.Tensor:
        logits = mtf.broadcast(mtf.import_tf_tensor(mesh, given, mtf.Shape([vocab])), mtf.Shape([batch, vocab]))
        return draw(logits, make_key(mesh, 1, 0), sampling)

    expected = entmax_of(given, sampling)
    shares = np.bincount(MtfSession().run(build), minlength=given.size) / rows
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / rows))
    assert not shares[expected == 0].any() and (expected == 0).sum() >= 2


def test_entmax_sampling_draws_the_same_on_any_mesh() -> None:
    sampling = Sampling(temperature=1.0, seed=1, entmax=True)
    one, several = (run_decode(flat_step, sampling, *mesh) for mesh in ((), ("x:2,y:2", "batch:x,vocab:y")))
    np.testing.assert_array_equal(one[0], several[0])
    likeliest = Sampling(temperature=0, entmax=True)
    np.testing.assert_array_equal(
        run_decode(counting_step, likeliest)[0], run_decode(counting_step, Sampling(temperature=0))[0]
    )


def test_draws_follow_the_probabilities() -> None:
    rows, probabilities = 20_000, np.array([0.1, 0.2, 0.3, 0.4])
    batch, vocab = mtf.Dimension("batch", rows), mtf.Dimension("vocab", 4)

    def build(mesh: mtf.Mesh) -> mtf.Tensor:
        logits = mtf.import_tf_tensor(mesh, np.log(probabilities).astype(np.float32), mtf.Shape([vocab]))
        logits = mtf.broadcast(logits, mtf.Shape([batch, vocab]))
        return draw(logits, make_key(mesh, 1, 0), Sampling(temperature=0.5))

    expected = probabilities**2 / (probabilities**2).sum()  # temperature 0.5 squares them
    shares = np.bincount(MtfSession().run(build), minlength=4) / rows
    np.testing.assert_allclose(shares, expected, atol=4 * np.sqrt(0.25 / rows))
