"""Which dataset and which record comes when."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.order import interleave_schedule, ordered_elements
from input_pipeline.sampling import _records_in
from input_pipeline.segments import segment_starts
from tests.record_files import numbered_chunks, plain_session, write_records, write_serialized


def test_turns_follow_the_weights() -> None:
    assert interleave_schedule([0.7]).tolist() == [0]
    assert interleave_schedule([0.1, 0.1]).tolist() == [0, 1]
    assert interleave_schedule([3, 1]).tolist() == [0, 0, 0, 1]
    assert interleave_schedule([0.5, 0.25, 0.25]).tolist() == [0, 1, 0, 2]
    assert len(interleave_schedule([1, 1 / 3])) == pytest.approx(
        100_000, abs=1
    )  # 0.3333333333333333 has no short cycle


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_dataset_stays_within_one_sample_of_its_share(weights: list[int]) -> None:
    schedule = interleave_schedule([weight / 10 for weight in weights])
    given_so_far = np.cumsum(schedule[:, None] == np.arange(len(weights)), axis=0)
    fair = np.arange(1, len(schedule) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(given_so_far - fair).max() < 1
    np.testing.assert_array_equal(given_so_far[-1] * sum(weights), len(schedule) * np.array(weights))


def record_numbers(
    files: list[str], counts: list[int], starts: Sequence[int], number: int, seed: int, shuffle: bool
) -> list[list[int]]:
    """For each of `starts`, the numbers of the `number` records from that position of the order on."""
    found = []
    with tf.Graph().as_default(), plain_session() as session:
        first = tf.placeholder(tf.int64, [])
        iterator = tf.data.make_initializable_iterator(
            ordered_elements(files, counts, segment_starts(files, counts), _records_in, seed, shuffle, first)
        )
        element = iterator.get_next()
        for start in starts:
            session.run(iterator.initializer, {first: start})
            records = [tf.train.Example.FromString(session.run(element)) for _ in range(number)]
            found.append([record.features.feature["text"].int64_list.value[0] // 10 for record in records])
    return found


def test_every_epoch_is_another_permutation_and_any_position_can_be_sought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("order.BLOCK_ELEMENTS", 4), ("segments.BLOCK_ELEMENTS", 4), ("segments.SEGMENT_BYTES", 1)):
        monkeypatch.setattr(f"input_pipeline.{name}", value)
    counts = [3, 0, 37, 1]
    numbers = np.cumsum([0, *counts])
    files = [
        write_records(tmp_path / f"x_{i}.tfrecords", numbered_chunks(int(numbers[i]), counts[i])) for i in range(4)
    ]
    parts = [len(starts) for starts in segment_starts(files, counts)]
    assert parts == [1, 1, 10, 1]
    starts = [0, 1, 3, 4, 7, 8, 10, 11, 12, 40, 41, 60, 83]
    order, *others = record_numbers(files, counts, starts, 164, seed=1, shuffle=True)
    epochs = [order[start : start + 41] for start in (0, 41, 82, 123)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(41))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for epoch in epochs:  # a file is not passed through from its beginning to its end: blocks are near to other blocks
        blocks = [np.mean(epoch[start : start + 4]) for start in range(0, 40, 4)]
        assert np.corrcoef(blocks, range(10))[0, 1] < 0.9
    for first, other in zip(starts[1:], others, strict=True):
        assert other[: 164 - first] == order[first:]
    assert record_numbers(files, counts, [0], 41, seed=2, shuffle=True) != epochs[:1]
    assert record_numbers(files, counts, [39], 43, seed=1, shuffle=False) == [[39, 40, *range(41)]]


def test_parts_begin_where_records_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("input_pipeline.segments.BLOCK_ELEMENTS", 2)
    monkeypatch.setattr("input_pipeline.segments.SEGMENT_BYTES", 1000)
    random = np.random.default_rng(0)
    records = [bytes(random.integers(0, 2, size)) for size in random.integers(0, 3000, 40)]
    records[20] = bytes(200_000)  # longer than what is looked at in one go
    path = write_serialized(tmp_path / "x.tfrecords", records)
    bounds = np.cumsum([0, *(len(record) + 16 for record in records)])
    size = int(bounds[-1])
    [starts] = segment_starts([path], [len(records)])
    expected = {int(bounds[bounds >= size * part // 20].min()) for part in range(20)} - {size}
    assert starts == sorted(expected) and len(starts) > 4
    assert segment_starts([path], [2]) == [[0]]
    with tf.Graph().as_default(), plain_session() as session:
        ranges = tf.constant([*zip(starts, [*starts[1:], tf.int64.max], strict=True)][::-1], tf.int64)
        element = tf.data.make_one_shot_iterator(_records_in(tf.constant(path), ranges)).get_next()
        found = [session.run(element) for _ in records]
    numbers = [np.flatnonzero(bounds == start)[0] for start in [*starts, size]]
    assert found == [record for i in reversed(range(len(starts))) for record in records[numbers[i] : numbers[i + 1]]]
