"""Records: every token is accounted for, and the bytes are TensorFlow's."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from data import parallel_tokenizer
from data.encoders import Encoder
from data.fast_bpe import make_fast_encoder
from data.parallel_tokenizer import TextOptions, TextTokenizer, TokenBatch, TokenizerPool, batches_of
from data.record_bytes import frame_records
from data.records import Account, RecordCutter, RecordOptions
from data.tfrecord_writer import RecordSetWriter
from data.train_tokenizer import train_tokenizer
from errors import UserError
from tests.tfrecords_run import TEXT, read_records


def tokens(documents: list[list[int]]) -> TokenBatch:
    lengths = np.array(list(map(len, documents)), np.int64)
    return TokenBatch(np.array(sum(documents, []), np.int32), lengths, int(lengths.sum()))


# Documents of 0 to 5,000 tokens, most of them short; batches of at least one.
DOCUMENT = st.one_of(st.integers(0, 5), st.integers(0, 60), st.integers(0, 5000)).map(
    lambda length: [(7 * length + place) % 1000 for place in range(length)]
)
BATCHES = st.lists(st.lists(DOCUMENT, min_size=1, max_size=6), max_size=6)
OPTIONS = st.builds(
    RecordOptions,
    chunk_size=st.one_of(st.none(), st.integers(1, 40), st.integers(1, 3000)),
    separator=st.lists(st.integers(0, 999), max_size=3).map(tuple),
    append_eod=st.booleans(),
    minimum_size=st.one_of(st.just(0), st.integers(0, 30), st.integers(0, 5000)),
)


def expected_records(documents: list[list[int]], options: RecordOptions) -> tuple[list[list[int]], list[int]]:
    """(records, tail), a token at a time."""
    kept = [document for document in documents if document and len(document) >= options.minimum_size]
    ended = [document + list(options.separator) * options.append_eod for document in kept]
    if options.chunk_size is None:
        return ended, []
    stream: list[int] = []
    for number, document in enumerate(ended):
        stream += (list(options.separator) if number and not options.append_eod else []) + document
    size = options.chunk_size + 1
    chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
    tail = chunks.pop() if chunks and len(chunks[-1]) < size else []
    return chunks, tail


@settings(max_examples=150, deadline=None)
@given(BATCHES, OPTIONS)
def test_every_token_and_document_is_accounted_for(batches: list[list[list[int]]], options: RecordOptions):
    cutter = RecordCutter(options)
    made: list[list[int]] = []
    for batch in batches:
        cutter = RecordCutter(options, cutter.state())  # as a run does that goes on after an interruption
        records = cutter.cut(tokens(batch))
        assert records.ids.dtype == np.int32
        made += [ids.tolist() for ids in np.split(records.ids, np.cumsum(records.lengths))[:-1]]
    documents = sum(batches, [])
    expected, tail = expected_records(documents, options)
    assert made == expected
    kept = [document for document in documents if document and len(document) >= options.minimum_size]
    account = cutter.account
    assert account.balances()
    assert (account.documents, account.tokens) == (len(documents), sum(map(len, documents)))
    assert account.discarded_documents == len(documents) - len(kept)
    assert account.discarded_tokens == account.tokens - sum(map(len, kept))
    assert account.empty_documents == documents.count([])
    assert (account.written, account.tail) == (sum(map(len, expected)), len(tail))
    if options.chunk_size is None:
        assert account.written_documents == len(kept)


def test_documents_of_which_nothing_is_written_are_in_the_tail():
    options = RecordOptions(chunk_size=3, separator=(9, 9), append_eod=False, minimum_size=0)
    cutter = RecordCutter(options)
    assert cutter.cut(tokens([[1], [2]])).ids.tolist() == [1, 9, 9, 2]
    assert cutter.cut(tokens([[3], [4, 4]])).ids.tolist() == [9, 9, 3, 9]  # 9 4 4 is left
    assert cutter.account == Account(
        documents=4, written_documents=3, tail_documents=1, text_bytes=5, tokens=5, separators=6, written=8, tail=3
    )


def test_parts_add_up():
    one, two = Account(documents=1, tokens=5, written=3, tail=2), Account(documents=2, tokens=7, written=7)
    assert one + two == Account(documents=3, tokens=12, written=10, tail=2)


def reference_bytes(path: Path, records: list[list[int]]) -> bytes:
    with tf.io.TFRecordWriter(str(path)) as writer:
        for ids in records:
            feature = tf.train.Feature(int64_list=tf.train.Int64List(value=ids))
            example = tf.train.Example(features=tf.train.Features(feature={"text": feature}))
            writer.write(example.SerializeToString())
    return path.read_bytes()


@pytest.mark.parametrize("largest", [127, 128, 50256, 1 << 18, (1 << 28) - 1])
def test_the_bytes_are_those_of_tensorflow(tmp_path: Path, largest: int):
    draw = np.random.default_rng(largest)
    # Lengths at which the fields' own lengths take another byte, and many others.
    lengths = np.array([1, 2, 63, 64, 110, 126, 127, 128, 129, 5000, 8191, 16383, *draw.integers(1, 300, 50)])
    ids = draw.integers(0, largest + 1, lengths.sum()).astype(np.int32)
    ids[::5] %= 128
    ids[0], ids[-1] = 0, largest
    records = [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]
    assert frame_records(ids, lengths) == reference_bytes(tmp_path / "reference", records)


def test_files_hold_so_many_records_each_and_are_described(tmp_path: Path):
    draw = np.random.default_rng(0)
    cutter = RecordCutter(RecordOptions(chunk_size=None, separator=(), append_eod=False, minimum_size=0))
    documents = [draw.integers(0, 60000, length).tolist() for length in draw.integers(1, 40, 25)]
    with RecordSetWriter(str(tmp_path), "x", 4) as writer:
        finished = [writer.write(cutter.cut(tokens(documents[start : start + 3]))) for start in range(0, 25, 3)]
        assert writer.records == 25
    assert finished == [False, True, True, True, False, True, True, True, False]
    assert [file.file for file in writer.files] == [f"x_{i}_{4 if i < 6 else 1}.tfrecords" for i in range(7)]
    again = [ids for file in writer.files for ids in read_records(tmp_path / file.file)]
    assert again == documents
    for number, file in enumerate(writer.files):
        held = documents[4 * number : 4 * number + 4]
        assert (file.records, file.tokens) == (len(held), sum(map(len, held)))
        assert (file.min_tokens, file.max_tokens) == (min(map(len, held)), max(map(len, held)))
        assert (file.min_id, file.max_id) == (min(map(min, held)), max(map(max, held)))
        assert file.bytes == (tmp_path / file.file).stat().st_size


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer([TEXT] * 3, vocab_size=290).to_str())


def test_a_worker_that_dies_as_it_starts_is_an_error_and_no_wait(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    large = Encoder(encoder.tokenizer_json + " " * 1_000_000)  # more than a pipe holds
    with TokenizerPool(TextTokenizer(large, TextOptions()), 2) as pool:
        monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/bin/false")
        with pytest.raises(UserError, match="one of the 2 tokenising processes was killed"):
            list(pool.run(batches_of([(0, 0, "text")])))


def test_decoded_tokens_are_the_texts_whatever_the_processes(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel_tokenizer, "_BATCH_CHARACTERS", 300)
    tokenizer = TextTokenizer(encoder, TextOptions(ftfy=False), make_fast_encoder(encoder, False))
    assert tokenizer.fast is not None
    with TokenizerPool(tokenizer, 1) as alone, TokenizerPool(tokenizer, 2) as two:

        @settings(max_examples=60, deadline=None)
        @given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=200) | st.text("ab \n", max_size=5000))))
        def check(documents: list[tuple[int, str]]) -> None:
            numbered = [(part, number, text) for number, (part, text) in enumerate(documents)]
            results = [list(pool.run(batches_of(numbered))) for pool in (alone, two)]
            found: dict[int, list[str]] = {0: [], 1: [], 2: []}
            size = 0
            for (batch, made), (batch_of_two, made_by_two) in zip(*results, strict=True):
                assert batch == batch_of_two
                assert made.ids.tolist() == made_by_two.ids.tolist()
                assert made.lengths.tolist() == made_by_two.lengths.tolist()
                found[batch.part] += [encoder.decode(ids) for ids in np.split(made.ids, np.cumsum(made.lengths))[:-1]]
                size += made.text_bytes
            assert found == {part: [text for which, text in documents if which == part] for part in (0, 1, 2)}
            assert size == sum(len(text.encode()) for _, text in documents)

        check()
