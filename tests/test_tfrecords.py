"""Finding record files and counting their records."""

from pathlib import Path

import pytest

from errors import UserError
from input_pipeline import tfrecords
from input_pipeline.tfrecords import count_records, find_files
from tests.record_files import write_records


def test_files_come_in_numeric_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_records(tmp_path / f"x_{number}.tfrecords", [[1]])
    found = find_files(str(tmp_path / "x_*.tfrecords"), "path", "x")
    assert [Path(path).name for path in found] == ["x_1.tfrecords", "x_2.tfrecords", "x_10.tfrecords"]


@pytest.mark.parametrize("name", ["x_0", "x_3", "x_0_3", "x_2019_12", "x", "x_1_0"])
def test_a_small_file_is_counted_whatever_its_name(tmp_path: Path, name: str) -> None:
    assert count_records([write_records(tmp_path / f"{name}.tfrecords", [[1, 2], [3], [4]])]) == [3]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("x_0_2000", 2000),
        ("x_1_0_2090", 2090),
        ("x_0", 2100),
        ("x_2019_12", 2100),
        ("x_0_0", 2100),
        ("x_0_90000", 2100),
    ],
)
def test_the_count_in_a_large_files_name_is_believed_where_the_size_agrees(
    tmp_path: Path, name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tfrecords, "_CHUNK_BYTES", 1 << 16)  # so that headers lie across the ends of what is read
    path = write_records(tmp_path / f"{name}.tfrecords", [[500] * (50 + number % 60) for number in range(2100)])
    assert Path(path).stat().st_size > tfrecords._HEAD_BYTES
    assert count_records([path]) == [count]


def test_an_empty_file_holds_no_records_and_damaged_ones_are_named(tmp_path: Path) -> None:
    assert count_records([write_records(tmp_path / "empty.tfrecords", [])]) == [0]
    cut = tmp_path / "cut.tfrecords"
    cut.write_bytes(Path(write_records(tmp_path / "whole.tfrecords", [[1], [2]])).read_bytes()[:-3])
    with pytest.raises(
        UserError, match=r"cut.tfrecords can't be read: it is cut short or damaged after 1 whole records"
    ):
        count_records([str(cut)])
    text = tmp_path / "text.tfrecords"
    text.write_text("this is no record file, however long")
    with pytest.raises(UserError, match=r"text.tfrecords is not a tfrecords file"):
        count_records([str(text)])
