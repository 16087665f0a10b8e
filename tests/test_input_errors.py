"""Mistakes in data: those found before a graph is built, and those that reading the records brings to light."""

from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

from errors import UserError
from inputs import eval_input_fn, explain_input_error, train_input_fn, verify_inputs
from tests.record_files import (
    SPECIAL,
    config_of,
    damage,
    entry,
    example,
    explained,
    numbered_chunks,
    write_records,
    write_serialized,
)


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """Three records of 5 tokens; their glob."""
    write_records(tmp_path / "c_0.tfrecords", numbered_chunks(0, 3))
    return tmp_path / "c_*.tfrecords"


def test_token_ids_outside_the_vocabulary_are_errors(tmp_path: Path) -> None:
    write_records(tmp_path / "c_0.tfrecords", [[1, 2, 3, 1000, 1000], [1, 2, 3, 4, 1001]])
    config = config_of([entry(tmp_path / "c_*")])
    expected = "token id 1001 in a record of path is outside the vocabulary (n_vocab 1000, padding_id 1000)"
    assert expected in explained(train_input_fn(config, SPECIAL))
    assert "token id 1001 in a record of eval_path" in explained(eval_input_fn(config, SPECIAL, 3, None))


def test_foreign_and_damaged_records_are_explained(tmp_path: Path) -> None:
    config = config_of([entry(tmp_path / "x_*")])
    whole = [example(text=range(1, 6)) for _ in range(3)]
    path = write_serialized(tmp_path / "x_0.tfrecords", [*whole, example(ids=range(5))])
    assert "a record of path has no int64 feature `text`" in explained(train_input_fn(config, SPECIAL))

    words = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"text"]))
    other = tf.train.Example(features=tf.train.Features(feature={"text": words})).SerializeToString()
    write_serialized(tmp_path / "x_0.tfrecords", [*whole, other])
    assert "--check_dataset names it" in explained(train_input_fn(config, SPECIAL))
    write_serialized(tmp_path / "x_0.tfrecords", [*whole, b"no example"])
    assert f"{path}: a record is no tf.train.Example" in explained(train_input_fn(config, SPECIAL), config)

    write_serialized(tmp_path / "x_0.tfrecords", whole)
    damage(path, -10)
    assert "a tfrecords file is damaged or cut short" in explained(eval_input_fn(config, SPECIAL, 3, None))
    assert f"{path} can't be read: corrupted record" in explained(train_input_fn(config, SPECIAL), config)

    assert explain_input_error(tf.errors.DataLossError(None, None, "Unable to open table file model.ckpt-1")) is None
    assert explain_input_error(tf.errors.InvalidArgumentError(None, None, "Incompatible shapes")) is None
    assert explain_input_error(ValueError("<input error>no</input error>")) is None


@pytest.mark.parametrize(("named", "what"), [(3000, "fewer"), (1300, "more")])
def test_a_name_that_tells_a_false_count_is_an_error(tmp_path: Path, named: int, what: str) -> None:
    path = write_records(tmp_path / f"x_0_{named}.tfrecords", [[500] * 70] * 2500)
    config = config_of([entry(tmp_path / "x_*")], n_ctx=69)
    sentence = explained(train_input_fn(config, SPECIAL), number=1000)
    assert f"{path} holds {what} than the {named} that its name or an earlier count says" in sentence


def test_quotes_in_a_dataset_id_come_back_whole(tmp_path: Path) -> None:
    write_records(tmp_path / "it's_0.tfrecords", [[1, 2, 3, 4, 2000]])
    sentence = explained(train_input_fn(config_of([entry(tmp_path / "it's_*")]), SPECIAL))
    assert sentence.startswith(f'dataset "{tmp_path}/it\'s_*": token id 2000')


def refusal(config: Any, evaluate: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        verify_inputs(config, SPECIAL, evaluate)
    return str(caught.value)


def test_inputs_are_verified_before_a_graph_is_built(chunks: Path, tmp_path: Path) -> None:
    verify_inputs(config_of([entry(chunks)]), SPECIAL, evaluate=False)
    verify_inputs(config_of([entry(chunks)]), SPECIAL, evaluate=True)
    nowhere = entry(tmp_path / "nothing_*")
    lines = refusal(config_of([nowhere, entry(chunks), [*entry(tmp_path / "neither_*")[:1], "", 1, "chunks", 1.0]]))
    assert lines.splitlines() == [
        f'path "{tmp_path}/{name}_*" of dataset "{tmp_path}/{name}_*" matches no file; give the path or glob of its '
        "tfrecords"
        for name in ("nothing", "neither")
    ]
    only_train = config_of([[str(chunks), "", 1, "chunks", 1.0]])
    verify_inputs(only_train, SPECIAL, evaluate=False)
    assert "eval_path of dataset" in refusal(only_train, evaluate=True)
    assert "is empty" in refusal(only_train, evaluate=True)
    assert "datasets is empty" in refusal(config_of([], no_dataset=True))
    assert "the first record holds 5 tokens, and sampling mode chunks needs n_ctx + 1 = 9" in refusal(
        config_of([entry(chunks)], n_ctx=8)
    )
    assert "remove_partial_sequences removes all of them" in refusal(
        config_of([entry(chunks)], n_ctx=8, remove_partial_sequences=True)
    )
    write_records(tmp_path / "empty_0.tfrecords", [])
    assert "1 in all, without one record" in refusal(config_of([entry(tmp_path / "empty_*")]))
    assert "token id 1004, outside the vocabulary" in refusal(
        config_of([entry(write_records(tmp_path / "high.tfrecords", [[0, 1000, 2, 3, 1004]]))])
    )
    assert f'is a folder; give the glob of its files, for example "{tmp_path}/*.tfrecords"' in refusal(
        config_of([entry(tmp_path)])
    )
    write_serialized(tmp_path / "foreign.tfrecords", [example(ids=range(5))])
    assert "no int64 feature `text` (it has ['ids'])" in refusal(config_of([entry(tmp_path / "foreign.tfrecords")]))


def test_what_a_record_leaves_unread_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_records(tmp_path / "long_0.tfrecords", [list(range(11))])
    verify_inputs(config_of([entry(tmp_path / "long_*")]), SPECIAL, evaluate=False)
    assert (
        "records of 11 tokens give 2 windows of n_ctx + 1 = 5; the last 2 tokens of each are never read" in caplog.text
    )
