"""--check_dataset: what it counts, what it finds fault with, and that it leaves the caller's graph alone."""

from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.encoders import load_encoder_from
from input_pipeline.report import DatasetReport, SplitReport, check_dataset
from input_pipeline.samples import write_samples
from inputs import train_input_fn
from tests.record_files import (
    SPECIAL,
    batches,
    config_of,
    damage,
    entry,
    example,
    numbered_chunks,
    write_records,
    write_serialized,
)


def only_problem(report: DatasetReport) -> str:
    """The one problem of every split, the same in all."""
    assert not report.ok
    (problem,) = {problem for split in report.splits for problem in split.problems}
    assert f"PROBLEM: {problem}" in report.text() and "do NOT fit" in report.text()
    return problem


def line(split: SplitReport, word: str) -> str:
    (found,) = [line for line in split.lines if word in line]
    return found


def test_the_report_of_good_chunks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        write_records(tmp_path / f"c_{number}_10.tfrecords", numbered_chunks(10 * number, 10))
    write_records(tmp_path / "e_0_3.tfrecords", [[7, 8, 9, 1000, 1000]] * 3)
    report = check_dataset(config_of([[str(tmp_path / "c_*"), str(tmp_path / "e_*"), 1, "chunks", 1.0]]))
    assert report.ok and report.notes == ()
    train, evaluation = report.splits
    assert (train.tally.files, train.tally.records, train.tally.tokens) == (2, 20, 100)
    assert (train.tally.min_id, train.tally.max_id) == (0, 194)
    assert (evaluation.tally.records, evaluation.tally.min_id, evaluation.tally.max_id) == (3, 7, 1000)
    assert evaluation.tally.outside == 0  # padding is no stranger
    assert "training files" in train.title and "evaluation files" in evaluation.title
    assert line(train, "files") == "files 2, records 20, tokens 100, 100.0% of all training tokens"
    assert line(train, "samples") == "20 samples of n_ctx + 1 tokens; 0 tokens (0.0%) unread"
    assert line(train, "begins") == "begins: ids 0, 1, 2, 3, 4"
    assert "the datasets fit the model" in report.text()
    assert "check tiny: 100%" in capfd.readouterr().err


def test_lengths_are_told_by_their_quantiles(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", [[1] * size for size in range(1, 101)])
    report = check_dataset(config_of([entry(tmp_path / "d_*", "documents_random", 3)]))
    assert report.splits[0].tally.quantiles() == [1, 5, 25, 50, 75, 95, 100]
    assert "0% 1, 5% 5, 25% 25, 50% 50, 75% 75, 95% 95, 100% 100" in report.text()
    assert "4 records are shorter than n_ctx + 1 = 5" in report.text()


def test_shares_of_tokens_and_of_samples(tmp_path: Path) -> None:
    write_records(tmp_path / "a_0.tfrecords", numbered_chunks(0, 30))
    write_records(tmp_path / "b_0.tfrecords", numbered_chunks(0, 10))
    report = check_dataset(config_of([[str(tmp_path / f"{name}_*"), "", 1, "chunks", 0.5] for name in "ab"]))
    assert [line(split, "files ").split(", ")[-1] for split in report.splits] == [
        "75.0% of all training tokens",
        "25.0% of all training tokens",
    ]
    assert all("50.0% of the samples" in split.title for split in report.splits)
    assert report.ok and "no eval_path" in report.notes[0]


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write_records(tmp_path / "c_0.tfrecords", [[1, 2, 1000, 1001, 1002], [1, 2, 3, 4, -1]])
    problem = only_problem(check_dataset(config_of([entry(tmp_path / "c_*")])))
    assert problem.startswith("3 tokens are outside the vocabulary: ids go from -1 to 1002, and n_vocab is 1000")


def test_short_and_long_chunks(tmp_path: Path) -> None:
    write_records(tmp_path / "c_0.tfrecords", [list(range(11)), list(range(9)), list(range(5)), [1]])
    config = config_of([entry(tmp_path / "c_*")])
    report = check_dataset(config)
    assert only_problem(report).startswith("2 records hold fewer than the 9 tokens")
    assert line(report.splits[0], "samples") == "4 samples of n_ctx + 1 tokens; 8 tokens (30.8%) unread"

    removed = check_dataset(config_of([entry(tmp_path / "c_*")], remove_partial_sequences=True))
    assert removed.ok
    assert line(removed.splits[0], "samples") == "5 samples of n_ctx + 1 tokens; 3 tokens (11.5%) unread"

    hopeless = check_dataset(config_of([entry(tmp_path / "c_*")], remove_partial_sequences=True, n_ctx=11))
    assert "no record holds n_ctx + 1 = 12 tokens; lower n_ctx to 10" in only_problem(hopeless)


@pytest.mark.parametrize(("stitch", "enough"), [(3, True), (2, False)])
def test_stitch_is_judged_by_the_shortest_document_and_its_eos(tmp_path: Path, stitch: int, enough: bool) -> None:
    write_records(tmp_path / "d_0.tfrecords", [[1, 2, 3, 4], [5, 0], [6, 7]])  # [5, 0] brings its own eos: 2 tokens
    report = check_dataset(config_of([entry(tmp_path / "d_*", "documents_random", stitch)]))
    assert report.ok == enough
    if not enough:
        assert "hold 4 tokens, fewer than n_ctx + 1 = 5; stitch 3 is enough" in only_problem(report)


def test_unreadable_files_are_named_and_the_others_still_read(tmp_path: Path) -> None:
    write_records(tmp_path / "x_0.tfrecords", numbered_chunks(0, 3))
    damage(write_records(tmp_path / "x_1.tfrecords", numbered_chunks(3, 3)), -10)
    (tmp_path / "x_2.tfrecords").write_text("these are no records at all")
    words = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"text"]))
    foreign = tf.train.Example(features=tf.train.Features(feature={"text": words})).SerializeToString()
    write_serialized(tmp_path / "x_3.tfrecords", [foreign])
    write_serialized(tmp_path / "x_4.tfrecords", [example(ids=[1, 2])])
    report = check_dataset(config_of([entry(tmp_path / "x_*")]))
    assert not report.ok
    assert report.splits[0].tally.files == 5
    problems = "\n".join(report.splits[0].problems)
    assert f"{tmp_path}/x_1.tfrecords can't be read: corrupted record" in problems
    assert f"{tmp_path}/x_2.tfrecords can't be read" in problems
    assert f"{tmp_path}/x_3.tfrecords: a record is no tf.train.Example with an int64 `text`" in problems
    assert "1 records have no int64 feature `text`, or an empty one" in problems
    assert "x_0" not in problems


def test_missing_and_empty_files(tmp_path: Path) -> None:
    report = check_dataset(config_of([entry(tmp_path / "none_*")]))
    assert 'none_*" matches no file' in report.text() and not report.ok
    write_records(tmp_path / "empty_0.tfrecords", [])
    assert only_problem(check_dataset(config_of([entry(tmp_path / "empty_*")]))).startswith("there is no record")
    nothing = check_dataset(config_of([], no_dataset=True))
    assert not nothing.ok and "datasets is empty" in nothing.text()


@pytest.mark.parametrize(("name", "is_believed"), [("x_0_3000", True), ("x_0_2500", False), ("x_0_90000", False)])
def test_a_wrong_count_in_a_name_is_a_problem_where_training_would_believe_it(
    tmp_path: Path, name: str, is_believed: bool
) -> None:
    write_records(tmp_path / f"{name}.tfrecords", [[500] * 70] * 2500)
    report = check_dataset(config_of([entry(tmp_path / "x_*")], n_ctx=69))
    assert report.ok != is_believed
    if is_believed:
        assert "holds 2500 records and its name says 3000" in only_problem(report)


def byte_level_tokenizer(path: Path) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer.save(str(path))
    return str(path)


def test_the_sample_is_decoded_and_the_tokenizer_tells_the_special_ids(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer.json")
    ids = load_encoder_from(tokenizer).encode("Grüße,\nWelt " * 40)
    write_records(tmp_path / "d_0.tfrecords", [ids])
    dataset: dict[str, Any] = {"id": "greetings", "path": str(tmp_path / "d_*"), "tokenizer_path": tokenizer}
    config = config_of([[dataset, 1, "documents_random", 1.0]], eos_id=None, padding_id=None)
    report = check_dataset(config)
    assert report.ok
    begins = line(report.splits[0], "begins")
    assert begins.startswith('begins: "Grüße,\\nWelt Grüße,\\nWelt ')
    assert "padding_id 1)" in report.text()


def test_unknown_special_ids_are_noted_and_nothing_counts_as_padding(tmp_path: Path) -> None:
    write_records(tmp_path / "d_0.tfrecords", [[1, 2, 3]])
    config = config_of([entry(tmp_path / "d_*", "documents_random", 2)], eos_id=None, padding_id=None)
    report = check_dataset(config)
    assert report.ok
    assert "the ids of eos and padding are not known" in report.notes[0]
    assert "stitch is not judged" in report.text()


def test_a_glob_named_twice_is_read_once_and_the_callers_graph_stays_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_records(tmp_path / "c_0.tfrecords", numbered_chunks(0, 300))
    size = Path(path).stat().st_size
    with tf.Graph().as_default() as graph:
        constant = tf.constant(7)
        before = graph.as_graph_def()
        report = check_dataset(config_of([entry(tmp_path / "c_*"), entry(tmp_path / "c_*")]))
        assert graph.as_graph_def() == before
        with tf.Session() as session:
            assert session.run(constant) == 7
    assert [split.tally.records for split in report.splits] == [300] * 4
    assert f"{size / 1000:.1f}k/{size / 1000:.1f}k" in capfd.readouterr().err


def test_samples_are_the_first_training_examples(tmp_path: Path) -> None:
    write_records(tmp_path / "a_0.tfrecords", numbered_chunks(10, 3))
    write_records(tmp_path / "b_0.tfrecords", numbered_chunks(50, 3))
    config = config_of([entry(tmp_path / "a_*"), entry(tmp_path / "b_*", weight=0.5)])
    output = tmp_path / "folder" / "examples.txt"
    write_samples(config, 5, str(output))
    (batch,) = batches(train_input_fn(config, SPECIAL), 1, batch_size=5)
    rule, blocks = "=" * 80, output.read_text().split("=" * 80 + "\nexample ")[1:]
    for number, (block, tokens, name) in enumerate(zip(blocks, batch["inputs"], "aabaa", strict=True), 1):
        title, text = block.split(f"\n{rule}\n")
        assert title == f'{number}: dataset "{tmp_path}/{name}_*", chunks, 4 tokens'
        assert text.strip() == " ".join(map(str, tokens))
