"""Which dataset and which record comes when."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.order import interleave_schedule, ordered_elements
from tests.record_files import numbered_chunks, plain_session, write_records


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
            ordered_elements(files, counts, tf.data.TFRecordDataset, seed, shuffle, first)
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
    monkeypatch.setattr("input_pipeline.order.BLOCK_ELEMENTS", 4)
    counts = [3, 0, 7, 1]
    numbers = np.cumsum([0, *counts])
    files = [
        write_records(tmp_path / f"x_{i}.tfrecords", numbered_chunks(int(numbers[i]), counts[i])) for i in range(4)
    ]
    starts = [0, 1, 3, 4, 7, 8, 10, 11, 12, 21, 22, 23]
    order, *others = record_numbers(files, counts, starts, 44, seed=1, shuffle=True)
    epochs = [order[start : start + 11] for start in (0, 11, 22, 33)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(11))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for first, other in zip(starts[1:], others, strict=True):
        assert other[: 44 - first] == order[first:]
    assert record_numbers(files, counts, [0], 11, seed=2, shuffle=True) != epochs[:1]
    assert record_numbers(files, counts, [9], 13, seed=1, shuffle=False) == [[9, 10, *range(11)]]
