"""Batches out of record files: their content, their order, what a resumed run sees, what evaluation scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from data.encoders import SpecialIds
from errors import UserError
from inputs import (
    count_eval_examples,
    eval_input_fn,
    predict_input_fn,
    train_input_fn,
)
from tests.record_files import (
    SPECIAL,
    batches,
    batches_from,
    column,
    config_of,
    entry,
    explained,
    numbered_chunks,
    plain_session_config,
    write_records,
)

# Documents whose joined text is 1 0 11 12 0 21 22 23 0 31 32 0: the third of them brings its own eos.
DOCUMENTS = [[1], [11, 12], [21, 22, 23, 0], [31, 32]]
JOINED = [1, 0, 11, 12, 0, 21, 22, 23, 0, 31, 32, 0]


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """30 records of 5 tokens in three files; their glob."""
    for number in range(3):
        write_records(tmp_path / f"c_{number}_10.tfrecords", numbered_chunks(10 * number, 10))
    return tmp_path / "c_*.tfrecords"


def test_chunks_become_inputs_and_labels_one_token_apart(chunks: Path) -> None:
    first = batches(train_input_fn(config_of([entry(chunks)]), SPECIAL), 1)[0]
    assert first.keys() == {"inputs", "labels"}
    assert first["inputs"].dtype == first["labels"].dtype == np.int32
    assert first["inputs"].shape == first["labels"].shape == (4, 4)
    np.testing.assert_array_equal(first["inputs"], first["inputs"][:, :1] + np.arange(4))
    np.testing.assert_array_equal(first["labels"], first["inputs"] + 1)


def test_training_sees_every_record_once_an_epoch_in_an_order_of_its_own(chunks: Path) -> None:
    input_fn = train_input_fn(config_of([entry(chunks)]), SPECIAL)
    order = [token // 10 for token in column(batches(input_fn, 15))]
    assert sorted(order[:30]) == sorted(order[30:]) == list(range(30))
    assert order[:30] != order[30:] != sorted(order[30:])
    assert [token // 10 for token in column(batches(input_fn, 15))] == order  # another graph, another session
    other_seed = train_input_fn(config_of([entry(chunks)], seed=2), SPECIAL)
    assert [token // 10 for token in column(batches(other_seed, 15))] != order
    in_order = train_input_fn(config_of([entry(chunks)], shuffle_input_filenames=False), SPECIAL)
    assert [token // 10 for token in column(batches(in_order, 15))] == [*range(30), *range(30)]


MODES: dict[str, dict[str, Any]] = {
    "chunks": {},
    "in file order": {"shuffle_input_filenames": False},
    "partial removed": {"remove_partial_sequences": True},
    "documents": {"mode": "documents_random", "stitch": 3},
    "fixed": {"mode": "documents_fixed", "stitch": 3},
    "mixture": {"mixture": True},
}


def mode_config(chunks: Path, mode: str = "chunks", stitch: int = 1, mixture: bool = False, **changes: Any) -> Any:
    datasets = [entry(chunks, mode, stitch, 0.7)]
    if mixture:
        datasets.append(entry(chunks, "documents_random", 2, 0.3))
    return config_of(datasets, model_path=str(chunks.parent / "model"), **changes)


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_of_a_step_depends_on_the_step_alone(chunks: Path, mode: str) -> None:
    input_fn = train_input_fn(mode_config(chunks, **MODES[mode]), SPECIAL)
    straight, early, late = batches_from(input_fn, [0, 1, 9], 12)
    for resumed, step in ((early, 1), (late, 9)):
        for got, expected in zip(resumed, straight[step:], strict=False):
            np.testing.assert_array_equal(got["inputs"], expected["inputs"])
            np.testing.assert_array_equal(got["labels"], expected["labels"])


class Recorder(tf.train.SessionRunHook):
    """Keeps the inputs of every step by the step's number."""

    def __init__(self, inputs: tf.Tensor, step: tf.Tensor, seen: dict[int, bytes]) -> None:
        self.fetches, self.seen = (inputs, step), seen

    def before_run(self, run_context: tf.train.SessionRunContext) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(self.fetches)

    def after_run(self, run_context: tf.train.SessionRunContext, run_values: tf.train.SessionRunValues) -> None:
        inputs, step = run_values.results
        assert self.seen.setdefault(int(step), inputs.tobytes()) == inputs.tobytes()


def trivial_estimator(model_dir: Path, seen: dict[int, bytes], tpu: bool) -> tf.estimator.Estimator:
    def model_fn(features: Any, labels: Any, mode: str, params: Any) -> Any:
        step = tf.train.get_global_step()
        weight = tf.get_variable("weight", [], initializer=tf.zeros_initializer())
        with tf.control_dependencies([tf.identity(step)]):
            before = tf.identity(step)
        with tf.control_dependencies([before]):
            train_op = tf.group(weight.assign_add(1.0), step.assign_add(1))
        hooks = [Recorder(features["inputs"], before, seen)]
        if tpu:
            return tf.estimator.tpu.TPUEstimatorSpec(mode, loss=weight + 0.0, train_op=train_op, training_hooks=hooks)
        return tf.estimator.EstimatorSpec(mode, loss=weight + 0.0, train_op=train_op, training_hooks=hooks)

    how: dict[str, Any] = {"model_dir": str(model_dir), "session_config": plain_session_config()}
    if tpu:
        run_config = tf.estimator.tpu.RunConfig(**how)
        return tf.estimator.tpu.TPUEstimator(
            model_fn, config=run_config, use_tpu=False, train_batch_size=4, params={"layout": "none"}
        )
    return tf.estimator.Estimator(model_fn, config=tf.estimator.RunConfig(**how), params={"batch_size": 4})


@pytest.mark.parametrize(("tpu", "mode"), [(False, "chunks"), (True, "mixture")], ids=["Estimator", "TPUEstimator"])
def test_a_resumed_estimator_reads_what_an_uninterrupted_one_reads(
    chunks: Path, tmp_path: Path, tpu: bool, mode: str
) -> None:
    config = mode_config(chunks, **MODES[mode])
    input_fn = train_input_fn(config, SPECIAL)
    straight = [batch["inputs"].tobytes() for batch in batches(input_fn, 9)]
    assert len(set(straight)) == 9
    seen: dict[int, bytes] = {}
    for stop in (4, 9):
        trivial_estimator(tmp_path, seen, tpu).train(input_fn, max_steps=stop)
    assert seen == dict(enumerate(straight))


class LoseWorker(tf.train.SessionRunHook):
    """Fails once, after the step that reaches `step`, as a session does whose worker is gone."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def before_run(self, run_context: Any) -> tf.train.SessionRunArgs:
        return tf.train.SessionRunArgs(tf.train.get_global_step())

    def after_run(self, run_context: Any, run_values: Any) -> None:
        if self.step is not None and run_values.results >= self.step:
            self.step = None
            raise tf.errors.AbortedError(None, None, "the worker is gone")


def test_a_session_recovered_inside_a_run_reads_on_from_its_checkpoint(chunks: Path, tmp_path: Path) -> None:
    input_fn = train_input_fn(mode_config(chunks, **MODES["fixed"]), SPECIAL)
    straight = [batch["inputs"].tobytes() for batch in batches(input_fn, 12)]
    seen: dict[int, bytes] = {}
    saver = tf.train.CheckpointSaverHook(str(tmp_path), save_steps=3)
    trivial_estimator(tmp_path, seen, tpu=False).train(input_fn, max_steps=12, hooks=[saver, LoseWorker(8)])
    assert seen == dict(enumerate(straight))  # steps 6 and 7, lost with the worker, are read again and are the same


def test_weights_decide_how_often_a_dataset_is_drawn(tmp_path: Path) -> None:
    datasets = []
    for number, weight in enumerate((0.5, 0.3, 0.2)):
        write_records(tmp_path / f"w{number}_0.tfrecords", [[100 * number + place for place in range(5)]] * 7)
        datasets.append(entry(tmp_path / f"w{number}_*", weight=weight))
    drawn = np.array([token // 100 for token in column(batches(train_input_fn(config_of(datasets), SPECIAL), 25))])
    so_far = np.cumsum(drawn[:, None] == np.arange(3), axis=0)
    assert so_far[-1].tolist() == [50, 30, 20]
    assert np.abs(so_far - np.arange(1, 101)[:, None] * [0.5, 0.3, 0.2]).max() < 1


def test_longer_chunks_give_consecutive_windows(tmp_path: Path) -> None:
    write_records(tmp_path / "long_0.tfrecords", [list(range(100, 111)), list(range(200, 211))])
    config = config_of([entry(tmp_path / "long_*")], shuffle_input_filenames=False)
    expected = [100, 104, 200, 204]  # 11 tokens: windows of 5 that share a token, 2 tokens left over
    assert column(batches(train_input_fn(config, SPECIAL), 2)) == expected * 2
    (resumed,) = batches_from(train_input_fn(config, SPECIAL), [1], 1, batch_size=3)
    assert column(resumed) == [204, 100, 104]
    assert column(batches(eval_input_fn(config, SPECIAL, 1, None), 1)) == expected
    assert count_eval_examples(config, SPECIAL) == 4


def test_partial_sequences_are_removed_or_refused(tmp_path: Path) -> None:
    records = [*numbered_chunks(0, 2), [5, 6, 7, 8], *numbered_chunks(2, 2), list(range(40, 49))]
    write_records(tmp_path / "p_0.tfrecords", records)
    how = {"shuffle_input_filenames": False, "model_path": str(tmp_path / "model")}
    kept = config_of([entry(tmp_path / "p_*")], remove_partial_sequences=True, **how)
    assert column(batches(train_input_fn(kept, SPECIAL), 3)) == [0, 10, 20, 30, 40, 44, 0, 10, 20, 30, 40, 44]
    assert column(batches(eval_input_fn(kept, SPECIAL, 1, None), 1)) == [0, 10, 20, 30]
    assert count_eval_examples(kept, SPECIAL) == 6
    assert json.loads((tmp_path / "model" / "window_counts.json").read_text())
    refused = config_of([entry(tmp_path / "p_*")], **how)
    assert "a record of path holds 4 tokens, and sampling mode chunks needs 5" in explained(
        train_input_fn(refused, SPECIAL)
    )
    assert "remove_partial_sequences" in explained(eval_input_fn(refused, SPECIAL, 3, None))


def test_random_windows_are_cut_from_documents_joined_by_one_eos(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", DOCUMENTS)
    config = config_of([entry(tmp_path / "d_*", "documents_random", 4)], shuffle_input_filenames=False)
    found = batches(train_input_fn(config, SPECIAL), 25)
    windows = [
        [*row, label[-1]] for batch in found for row, label in zip(batch["inputs"], batch["labels"], strict=True)
    ]
    places = [JOINED.index(first) if first else -1 for first, *_ in windows]
    assert all(window == JOINED[place : place + 5] for window, place in zip(windows, places, strict=True) if place >= 0)
    possible = {tuple(JOINED[place : place + 5]) for place in range(8)}
    assert {tuple(window) for window in windows} == possible  # 100 draws reach all 8 places


def windows_to_the_end(text: list[int]) -> list[list[int]]:
    """Windows of 5 that share a token with the one before; the last ends where the text does."""
    return [text[min(start, len(text) - 5) :][:5] for start in range(0, len(text) - 1, 4)]


def test_fixed_windows_use_every_token_of_groups_of_documents(tmp_path: Path) -> None:
    documents = [[100 * number + place for place in range(1, 4 + 5 * number % 11)] for number in range(1, 9)]
    documents[2].append(0)
    write_records(tmp_path / "d_0.tfrecords", documents[:7])
    write_records(tmp_path / "d_1.tfrecords", documents[7:])
    joined = [document if document[-1] == 0 else [*document, 0] for document in documents]
    groups = [sum(joined[first:last], []) for first, last in ((0, 3), (3, 7), (7, 8))]  # the 7th is left over
    expected = [window for group in groups for window in windows_to_the_end(group)]
    entries = [entry(tmp_path / "d_*", "documents_fixed", 3)]
    config = config_of(entries, shuffle_input_filenames=False, model_path=str(tmp_path / "model"))
    found = batches(train_input_fn(config, SPECIAL), len(expected), batch_size=1)
    assert [[*batch["inputs"][0], batch["labels"][0, -1]] for batch in found] == expected
    assert {token for window in expected for token in window} == {token for text in joined for token in text}

    (tmp_path / "d_0.tfrecords").write_bytes(b"")  # counted anew, and not the other
    write_records(tmp_path / "d_0.tfrecords", documents[:3])
    counts = json.loads((tmp_path / "model" / "window_counts.json").read_text())
    batches(train_input_fn(config, SPECIAL), 1)
    recounted = json.loads((tmp_path / "model" / "window_counts.json").read_text())
    assert counts.items() <= recounted.items() and len(recounted) == len(counts) + 1 == 3
    train_input_fn(config_of([entry(tmp_path / "d_1*", "documents_fixed", 1)], model_path=config.model_path), SPECIAL)


def test_short_groups_are_named_before_training(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", [[1, 2, 3], [4, 5], [6], [7], [8, 9]])
    config = config_of([entry(tmp_path / "d_*", "documents_fixed", 2)], model_path=str(tmp_path / "model"))
    train_input_fn(config, SPECIAL)  # 7 and 7 tokens: 6, 7 and the left over 8, 9 are one group
    config = config_of([entry(tmp_path / "d_*", "documents_fixed", 1)], model_path=str(tmp_path / "model"))
    with pytest.raises(UserError, match="1 documents in a row of .*d_0.tfrecords, the shortest of 1 tokens, hold 2 in"):
        train_input_fn(config, SPECIAL)


def test_a_stitch_that_cannot_fill_a_window_is_named(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", [[1], [2]])
    config = config_of([entry(tmp_path / "d_*", "documents_random", 2)])
    sentence = explained(train_input_fn(config, SPECIAL))
    assert "2 documents in a row of path, the shortest of 1 tokens, hold 4 in all" in sentence
    assert "stitch (now 2) so that stitch * (tokens of the shortest document + 1) >= n_ctx + 1" in sentence


def test_evaluation_reads_in_file_order_and_fills_the_last_batch_with_padding(chunks: Path) -> None:
    config = config_of([entry(chunks)])
    assert count_eval_examples(config, SPECIAL) == 30
    input_fn = eval_input_fn(config, SPECIAL, 9, None)
    found = batches(input_fn, 99)
    assert [int(batch["weights"].sum()) for batch in found] == [16] * 7 + [8, 0]
    assert column(found[:7]) + column(found[7:8])[:2] == [10 * number for number in range(30)]
    np.testing.assert_array_equal(found[7]["weights"], [[1] * 4] * 2 + [[0] * 4] * 2)
    np.testing.assert_array_equal(found[7]["inputs"][2:], np.full([2, 4], 1000))
    assert found[0]["weights"].dtype == np.float32 and found[0]["label_bytes"].dtype == np.int32
    (again,) = batches_from(eval_input_fn(config, SPECIAL, 3, None), [5], 99)  # whatever the step
    assert len(again) == 3
    for got, expected in zip(again, found, strict=False):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])


def test_evaluation_takes_turns_until_every_dataset_is_used_up(tmp_path: Path) -> None:
    write_records(tmp_path / "a_0.tfrecords", numbered_chunks(0, 2))
    write_records(tmp_path / "b_0.tfrecords", numbered_chunks(10, 4))
    config = config_of([entry(tmp_path / "a_*"), entry(tmp_path / "b_*", weight=0.5)])
    found = batches(eval_input_fn(config, SPECIAL, 2, None), 9)
    assert column(found) == [0, 10, 100, 110, 120, 130, 1000, 1000]
    assert count_eval_examples(config, SPECIAL) == 6


def test_evaluation_of_documents_scores_every_token_but_the_first_once(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", DOCUMENTS[:3])
    write_records(tmp_path / "d_1.tfrecords", DOCUMENTS[3:])
    config = config_of([entry(tmp_path / "d_*", "documents_random", 7)])
    assert count_eval_examples(config, SPECIAL) == 3
    (batch,) = batches(eval_input_fn(config, SPECIAL, 1, None), 9)
    np.testing.assert_array_equal(batch["inputs"][:3], [[1, 0, 11, 12], [0, 21, 22, 23], [0, 31, 32, 0]])
    np.testing.assert_array_equal(batch["labels"][:3], [[0, 11, 12, 0], [21, 22, 23, 0], [31, 32, 0, 1000]])
    assert batch["labels"][batch["weights"] == 1].tolist() == JOINED[1:]


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_windows_do_not_depend_on_how_many_documents_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("input_pipeline.sampling._DOCUMENTS_AT_ONCE", at_once)
    documents = [[10 * number + place for place in range(1, 2 + number % 7)] for number in range(40)]
    write_records(tmp_path / "d_0.tfrecords", documents)
    config = config_of([entry(tmp_path / "d_*", "documents_random", 3)])
    joined = [token for document in documents for token in (*document, 0)]
    steps = -(-count_eval_examples(config, SPECIAL) // 4)
    found = batches(eval_input_fn(config, SPECIAL, steps, None), 99)
    assert [int(x) for batch in found for x in batch["labels"][batch["weights"] == 1]] == joined[1:]


def test_labels_know_their_bytes_and_padding_is_not_scored(tmp_path: Path) -> None:
    write_records(tmp_path / "c_0.tfrecords", [[5, 6, 7, 1000, 1000], [7, 0, 9, 3, 2]])
    config = config_of([entry(tmp_path / "c_*")])
    lengths = np.arange(8) * 2  # of tokens 0 ... 7: the tokenizer knows fewer than n_vocab
    (batch,) = batches(eval_input_fn(config, SPECIAL, 1, lengths), 9, batch_size=2)
    np.testing.assert_array_equal(batch["labels"], [[6, 7, 1000, 1000], [0, 9, 3, 2]])
    np.testing.assert_array_equal(batch["weights"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(batch["label_bytes"], [[12, 14, 0, 0], [0, 0, 6, 4]])


@pytest.mark.parametrize(
    ("padding_id", "token_bytes", "scored"),
    [
        (7, None, [1, 0, 1, 1]),  # a token of its own, as far as anyone knows
        (7, np.array([0] * 8), [1, 0, 1, 1]),  # a special token
        (7, np.array([1] * 8), [1, 1, 1, 1]),  # GPT-Neo's default padding 0 is GPT-2's "!"
        (0, None, [1, 1, 1, 1]),  # the end of a text is something to predict
    ],
)
def test_only_a_token_that_is_nothing_but_padding_goes_unscored(
    tmp_path: Path, padding_id: int, token_bytes: np.ndarray | None, scored: list[int]
) -> None:
    write_records(tmp_path / "c_0.tfrecords", [[5, 6, 7, 0, 8]])
    config = config_of([entry(tmp_path / "c_*")], padding_id=padding_id)
    found = batches(eval_input_fn(config, SpecialIds(0, padding_id), 1, token_bytes), 1, batch_size=1)
    assert found[0]["weights"].tolist() == [scored]


def test_prompts_are_filled_up_to_whole_batches() -> None:
    found = batches(predict_input_fn([[5], [6, 7, 8], [9, 9]], 2, 4, 1000), 9)
    np.testing.assert_array_equal(found[0]["inputs"], [[5, 1000, 1000, 1000], [6, 7, 8, 1000]])
    np.testing.assert_array_equal(found[1]["inputs"], [[9, 9, 1000, 1000], [1000] * 4])
    assert [batch["prompt_length"].tolist() for batch in found] == [[1, 3], [2, 4]]
    assert [batch["prompt_number"].tolist() for batch in found] == [[0, 1], [2, 3]]
    for prompts, reason in (
        ([], "there is no prompt"),
        ([[1], []], "prompt 2 holds 0"),
        ([[1] * 5], "prompt 1 holds 5"),
    ):
        with pytest.raises(UserError, match=reason):
            predict_input_fn(prompts, 2, 4, 1000)
