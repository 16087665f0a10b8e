"""--check_dataset --sample: the first training examples, as text to read."""

from collections.abc import Iterator

import numpy as np
import tensorflow.compat.v1 as tf

from config import DatasetSource, ModelConfig
from data.encoders import Encoder, load_encoder, special_ids
from data.files import write_text
from errors import UserError
from input_pipeline.errors import explain_input_error
from input_pipeline.order import interleave_schedule
from inputs import train_input_fn

_RULE = "=" * 80


def write_samples(config: ModelConfig, number: int, path: str) -> None:
    """Write what a run's first `number` training examples show the model to `path`, each under its dataset's name.

    Raises:
        UserError: where the datasets can't be read, the ids of eos and padding are not known or `path` can't be
            written.
    """
    sources = config.datasets
    encoders = {source.dataset.id: _encoder(source) for source in sources}
    schedule = interleave_schedule([source.weight for source in sources])
    examples = []
    for index, tokens in enumerate(_first_examples(config, number)):
        source = sources[schedule[index % len(schedule)]]
        encoder = encoders[source.dataset.id]
        text = _text(encoder, tokens.tolist(), config) if encoder else " ".join(map(str, tokens))
        title = f'example {index + 1}: dataset "{source.dataset.id}", {source.sampling_mode}, {len(tokens)} tokens'
        examples.append(f"{_RULE}\n{title}\n{_RULE}\n{text}\n")
    write_text(path, "\n".join(examples))


def _encoder(source: DatasetSource) -> Encoder | None:
    return None if source.dataset.tokenizer_path is None else load_encoder(source.dataset)


def _text(encoder: Encoder, tokens: list[int], config: ModelConfig) -> str:
    """The tokens' text; that of a masked language model shows its masks, which the tokenizer need not know."""
    if not config.mlm_training:
        return encoder.decode(tokens)
    pieces: list[list[int]] = [[]]
    for token in tokens:
        if token == config.mlm_mask_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return "[MASK]".join(map(encoder.decode, pieces))


def _first_examples(config: ModelConfig, number: int) -> Iterator[np.ndarray]:
    """The inputs, int [n_ctx], of the first training examples."""
    input_fn = train_input_fn(config, special_ids(config))
    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
        iterator = tf.data.make_initializable_iterator(input_fn({"batch_size": 1}))
        features, _ = iterator.get_next()
        try:
            session.run(iterator.initializer)
            for _ in range(number):
                yield session.run(features["inputs"])[0]
        except tf.errors.OpError as error:
            mistake: UserError | None = explain_input_error(error, config)
            raise mistake or error from error
