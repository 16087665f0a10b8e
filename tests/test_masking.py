"""Masked language modelling: what is hidden and what is scored, counted; always the same; trained through main.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from input_pipeline.masking import NOT_SCORED, masked
from input_pipeline.report import check_dataset
from input_pipeline.samples import write_samples
from inputs import count_eval_examples, eval_input_fn, train_input_fn
from tests.record_files import (
    PADDING,
    SPECIAL,
    batches,
    batches_from,
    config_of,
    entry,
    numbered_chunks,
    plain_session,
    write_records,
)
from tests.workspace import Workspace, save_tokenizer

MASK, CLS = 999, 998
MLM: dict[str, Any] = {"mlm_training": True, "mlm_mask_id": MASK}


@pytest.fixture
def chunks(tmp_path: Path) -> Path:
    """20 records of 9 tokens, which begin with 0, 10, 20, ...; their glob. n_ctx 8 fits them."""
    write_records(tmp_path / "c_0_20.tfrecords", numbered_chunks(0, 20, size=9))
    return tmp_path / "c_*.tfrecords"


def rows(found: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in found])


def mask_windows(windows: np.ndarray, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels) of windows int [number, n_ctx + 1]."""
    config = config_of([], no_dataset=True, n_ctx=windows.shape[1] - 1, **(MLM | changes))
    with tf.Graph().as_default(), plain_session() as session:
        samples = tf.data.Dataset.from_tensor_slices(windows.astype(np.int64))
        first = tf.zeros([], tf.int64)
        examples = masked(samples, config, SPECIAL, first, evaluate=False).batch(len(windows))
        return session.run(tf.data.make_one_shot_iterator(examples).get_next())


def test_a_million_tokens() -> None:
    """15% chosen; of these 80% become the mask, 10% any token, 10% stay; never what must not be chosen."""
    random = np.random.default_rng(0)
    windows = random.integers(3, 990, [100, 10_001])
    special = random.random(windows.shape) < 0.05
    windows[special] = random.choice([1, 2, MASK, PADDING], special.sum())
    inputs, labels = mask_windows(windows, mlm_mask_ignore_ids=[1, 2])
    tokens, special = windows[:, :-1], special[:, :-1]
    chosen = labels != NOT_SCORED

    assert not chosen[special].any()
    np.testing.assert_array_equal(inputs[~chosen], tokens[~chosen])
    np.testing.assert_array_equal(labels[chosen], tokens[chosen])
    assert chosen[~special].mean() == pytest.approx(0.15, abs=0.005)
    became_mask, stayed = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert became_mask.mean() == pytest.approx(0.8, abs=0.005)
    assert stayed.mean() == pytest.approx(0.1, abs=0.005)
    others = inputs[chosen][~became_mask & ~stayed]
    counts = np.bincount(others, minlength=1000)
    assert others.size / chosen.sum() == pytest.approx(0.1, abs=0.005)
    assert len(counts) == 1000 and counts[:MASK].min() > 0  # any token of the vocabulary, about 14 times each
    assert counts.max() < 5 * counts.mean()
    for both in (chosen[:, 1:] & chosen[:, :-1], chosen[1:] & chosen[:-1]):  # neighbours are chosen independently
        assert both.mean() == pytest.approx(chosen.mean() ** 2, abs=0.001)


@pytest.mark.parametrize(
    ("same", "random", "expected"), [(1.0, 0.0, [0, 1, 0]), (0.0, 1.0, [0, 0, 1]), (0.0, 0.0, [1, 0, 0])]
)
def test_probabilities_at_their_ends(same: float, random: float, expected: list[int]) -> None:
    settings = {"mlm_mask_prob": 1.0, "mlm_same_token_prob": same, "mlm_random_token_prob": random}
    windows = np.full([2, 501], 5)
    inputs, labels = mask_windows(windows, **settings)
    assert (labels == 5).all()
    shares = [(inputs == MASK).mean(), (inputs == 5).mean(), (~np.isin(inputs, [MASK, 5])).mean()]
    assert shares == pytest.approx(expected, abs=0.01)


def test_cls_stands_in_front_and_takes_a_place(chunks: Path) -> None:
    inputs, labels = mask_windows(np.tile(np.arange(10, 19), [50, 1]), mlm_cls_token_id=CLS, mlm_mask_prob=0.5)
    assert inputs.shape == labels.shape == (50, 8)
    assert (inputs[:, 0] == CLS).all() and (labels[:, 0] == NOT_SCORED).all()
    kept = np.where(labels == NOT_SCORED, inputs, labels)
    np.testing.assert_array_equal(kept[:, 1:], np.tile(np.arange(10, 17), [50, 1]))


SOURCES: dict[str, list[tuple[str, int]]] = {
    "chunks": [("chunks", 1)],
    "documents": [("documents_random", 3)],
    "mixture": [("chunks", 1), ("documents_fixed", 2)],
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_resumed_run_sees_the_masks_of_an_uninterrupted_one(chunks: Path, tmp_path: Path, name: str) -> None:
    datasets = [entry(chunks, mode, stitch) for mode, stitch in SOURCES[name]]
    settings: dict[str, Any] = {"n_ctx": 8, "model_path": str(tmp_path / "model")}
    plain, config = (config_of(datasets, **settings, **changes) for changes in ({}, MLM))
    text = rows(batches(train_input_fn(plain, SPECIAL), 14), "inputs")
    straight, resumed = batches_from(train_input_fn(config, SPECIAL), [0, 9], 14)
    inputs, labels = rows(straight, "inputs"), rows(straight, "labels")
    assert inputs.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(np.where(labels == NOT_SCORED, inputs, labels), text)  # the tokens, not the next ones
    for field in ("inputs", "labels"):
        np.testing.assert_array_equal(rows(resumed, field)[:20], rows(straight, field)[36:])
    chosen = labels != NOT_SCORED
    assert len({row.tobytes() for row in chosen}) > 25  # each sample has masks of its own, later epochs others


def test_masks_follow_the_seed_and_not_the_batch_size(chunks: Path) -> None:
    config = config_of([entry(chunks)], n_ctx=8, **MLM)
    expected = rows(batches(train_input_fn(config, SPECIAL), 6), "labels")
    found = rows(batches(train_input_fn(config, SPECIAL), 12, batch_size=2), "labels")
    np.testing.assert_array_equal(found, expected)
    in_order = {"shuffle_input_filenames": False}
    one, other = (config_of([entry(chunks)], n_ctx=8, seed=seed, **MLM, **in_order) for seed in (1, 2))
    chosen = [rows(batches(train_input_fn(c, SPECIAL), 5), "labels") != NOT_SCORED for c in (one, other)]
    assert (chosen[0] != chosen[1]).any()


@pytest.mark.parametrize("mode", ["chunks", "documents_random"])
def test_evaluation_hides_the_same_tokens_every_time(chunks: Path, mode: str) -> None:
    datasets = [entry(chunks, mode)]
    config = config_of(datasets, n_ctx=8, mlm_mask_prob=0.4, **MLM)
    number = count_eval_examples(config, SPECIAL)
    steps = -(-number // 4) + 1
    plain = batches(eval_input_fn(config_of(datasets, n_ctx=8), SPECIAL, steps, None), 99)
    found = batches(eval_input_fn(config, SPECIAL, steps, None), 99)
    other_seed = config_of(datasets, n_ctx=8, seed=9, mlm_mask_prob=0.4, **MLM)
    again = batches(eval_input_fn(other_seed, SPECIAL, 2 * steps, None), 99, batch_size=2)
    inputs, labels, weights = (rows(found, name) for name in ("inputs", "labels", "weights"))
    np.testing.assert_array_equal(rows(again, "inputs"), inputs)
    np.testing.assert_array_equal(rows(again, "labels"), labels)

    text = np.where(labels == NOT_SCORED, inputs, labels)
    np.testing.assert_array_equal(text, rows(plain, "inputs"))
    np.testing.assert_array_equal(weights, (labels != NOT_SCORED) & (rows(plain, "weights") > 0))
    assert not weights[text == PADDING].any() and not weights[number:].any()
    assert weights[:number].mean() == pytest.approx(0.4, abs=0.1)
    assert not rows(found, "label_bytes").any()


def test_check_dataset_knows_what_a_mask_must_be(chunks: Path) -> None:
    fits = check_dataset(config_of([entry(chunks)], n_ctx=8, mlm_cls_token_id=CLS, **MLM))
    assert fits.ok
    assert "20 samples of 7 tokens; 40 tokens (22.2%) unread" in fits.text()
    in_text = check_dataset(config_of([entry(chunks)], n_ctx=8, mlm_training=True, mlm_mask_id=33))
    assert not in_text.ok
    assert "PROBLEM: mlm_mask_id 33 is a token of the text, 1 times; give the mask an id that no " in in_text.text()
    is_eos = check_dataset(config_of([entry(chunks)], n_ctx=8, mlm_training=True, mlm_mask_id=0))
    assert "PROBLEM: mlm_mask_id is 0, which is the eos_id as well; give the mask an id that no text" in is_eos.text()


def test_examples_written_as_text_show_the_masks(tmp_path: Path) -> None:
    write_records(tmp_path / "c_0.tfrecords", [[5] * 9])
    dataset = {"path": str(tmp_path / "c_*"), "tokenizer_path": save_tokenizer(tmp_path)}
    (tmp_path / "words.json").write_text(json.dumps(dataset))
    settings = MLM | {"mlm_mask_prob": 1.0, "mlm_same_token_prob": 0.0, "mlm_random_token_prob": 0.0}
    datasets = [[str(tmp_path / "words.json"), 1, "chunks", 1.0]]
    write_samples(config_of(datasets, n_ctx=8, **settings), 1, str(tmp_path / "out.txt"))
    assert (tmp_path / "out.txt").read_text().endswith("\n" + "[MASK]" * 8 + "\n")


def test_a_masked_model_learns_is_evaluated_and_continues_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"mlm_training": True, "mlm_mask_id": 31, "mlm_mask_prob": 0.3, "lr": 0.02}
    run = Workspace(tmp_path, train_steps=60, attention_types=[[["local", "linear"], 1]], **settings)
    for name, count in (("train", 64), ("eval", 10)):  # what is hidden can be told from what stands around it
        write_records(tmp_path / f"{name}_0_{count}.tfrecords", [[2 + row % 8] * 9 for row in range(count)])
    assert run.main() == 0
    losses = run.losses()
    assert np.isfinite(losses).all()
    assert np.mean(losses[:5]) > 2.5 and np.mean(losses[-10:]) < 0.8

    assert run.main("--eval") == run.main("--eval") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert {**first, "time": 0} == {**second, "time": 0}
    assert first["bits_per_byte"] is first["bytes"] is None
    assert first["cross_entropy"] < 0.8 and 10 < first["tokens"] < 40
    for flag in ("--predict", "--export"):
        assert run.main(flag) == 2
        assert f"a masked model fills gaps and continues no text; {flag} needs a model" in capsys.readouterr().err
    assert run.main("--eval", "--set", "mlm_mask_id=1") == 2
    assert "mlm_mask_id is 1, which is the padding_id as well" in capsys.readouterr().err
