"""Which record or window and which dataset comes when: pure functions of a position in the training stream.

Nothing here keeps state, so a run resumed at step s reads what an uninterrupted run would have read from step s on.
"""

import hashlib
import heapq
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import tensorflow.compat.v1 as tf

from input_pipeline.errors import require

# Elements are shuffled within consecutive blocks of this many: a bounded memory, and a position can be sought.
BLOCK_ELEMENTS = 4096
# Shares that need a longer cycle than this are rounded to a part in it.
_LONGEST_CYCLE = 100_000
_FOREVER = tf.int64.max

# (path [], byte ranges int64 [parts, 2]) -> the file's elements, range by range those that begin in it: tensors of one
# dtype and static shape.
Reader = Callable[[tf.Tensor, tf.Tensor], tf.data.Dataset]


def interleave_schedule(weights: Sequence[float]) -> np.ndarray:
    """The cycle in which datasets take turns: int32 [cycle], the index of the dataset that each sample comes from.

    At every point of the endlessly repeated cycle a dataset has given its share of the samples, to within one sample.
    Its m-th sample belongs in the slots floor(m / share) ... ceil((m + 1) / share) - 1, and serving the earliest
    deadline first meets all of these (Baruah et al. 1996, "Proportionate progress", on one processor).
    """
    parts = _whole_parts(weights)
    cycle = sum(parts)
    waiting = [(0, index) for index in range(len(parts))]  # (first slot of the dataset's next sample, dataset)
    ready: list[tuple[int, int]] = []  # (slot before which it must be served, dataset)
    given = [0] * len(parts)
    turns = np.empty(cycle, np.int32)
    for slot in range(cycle):
        while waiting and waiting[0][0] <= slot:
            index = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(given[index] + 1) * cycle // parts[index]), index))
        index = heapq.heappop(ready)[1]
        turns[slot] = index
        given[index] += 1
        heapq.heappush(waiting, (given[index] * cycle // parts[index], index))
    return turns


def samples_before(schedule: np.ndarray, index: int, first: tf.Tensor) -> tf.Tensor:
    """How many of the samples 0 ... first - 1 (int64 []) come from dataset `index`."""
    cycle = len(schedule)
    before = np.concatenate([[0], np.cumsum(schedule == index)]).astype(np.int64)
    return first // cycle * before[-1] + tf.gather(before, first % cycle)


def turns(schedule: np.ndarray, first: tf.Tensor) -> tf.data.Dataset:
    """Infinite dataset of int64 []: the index of the dataset that sample `first`, first + 1, ... comes from."""
    table = schedule.astype(np.int64)
    return tf.data.Dataset.range(first, _FOREVER).map(lambda sample: tf.gather(table, sample % len(table)))


def stream_key(seed: int, *names: object) -> int:
    """A 64-bit key for one use of randomness, to be paired with an index: the key pairs of two uses never meet."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def draws_below(bounds: tf.Tensor, key: int, index: tf.Tensor) -> tf.Tensor:
    """int64 [n]: uniform draws from 0 ... bounds - 1, the index-th n of them, from no state but (key, index)."""
    uniform = tf.random.stateless_uniform(tf.shape(bounds), [key, index], dtype=tf.float64, alg="philox")
    return tf.cast(uniform * tf.cast(bounds, tf.float64), tf.int64)


def ordered_elements(
    files: Sequence[str],
    counts: Sequence[int],
    starts: Sequence[Sequence[int]],
    read: Reader,
    seed: int,
    shuffle: bool,
    first: tf.Tensor,
) -> tf.data.Dataset:
    """Infinite dataset of the files' elements: those of the training order from position `first` (int64 []) on.

    Every epoch gives each element once. With `shuffle` it permutes the files anew, the parts of each file, and then the
    elements within blocks of BLOCK_ELEMENTS; without, it keeps the files' order. Reaching a position opens one file,
    passes over the elements before it and reads at most one block too many.

    Args:
        files: paths.
        counts: how many elements each file holds; a file that holds more or fewer is refused while it is read.
        starts: the bytes at which the parts of each file begin, the first of them 0.
        read: see Reader.
        seed, shuffle, first: as above.
    """
    total = sum(counts)
    names, sizes = np.array(files), np.array(counts, np.int64)
    file_key, part_key, element_key = (stream_key(seed, name) for name in ("files", "parts", "records"))
    parts, parts_of_file = _byte_ranges(starts)
    blocks_per_epoch = math.ceil(total / BLOCK_ELEMENTS)
    first_epoch, first_block = first // total, first % total // BLOCK_ELEMENTS

    def epoch_blocks(epoch: tf.Tensor) -> tf.data.Dataset:
        """(number of the block since the beginning of training, [elements, ...]), ..."""
        block = tf.where(tf.equal(epoch, first_epoch), first_block, tf.zeros_like(first_block))
        order = _permutation(len(files), file_key, epoch) if shuffle else tf.range(len(files))
        size = tf.gather(sizes, order)
        passed = tf.clip_by_value(block * BLOCK_ELEMENTS - tf.cumsum(size, exclusive=True), 0, size)
        unread = tf.data.Dataset.from_tensor_slices((order, passed, size)).filter(lambda _, passed, size: passed < size)

        def file_elements(file: tf.Tensor, passed: tf.Tensor, size: tf.Tensor) -> tf.data.Dataset:
            of_file = tf.gather(parts_of_file, file)
            ranges = tf.gather(parts, tf.range(of_file[0], of_file[1]))
            if shuffle:
                shuffled = _permutation(tf.shape(ranges)[0], part_key, epoch * len(files) + tf.cast(file, tf.int64))
                ranges = tf.gather(ranges, shuffled)
            return _read_exactly(read, tf.gather(names, file), ranges, passed, size)

        elements = unread.flat_map(file_elements)
        return elements.batch(BLOCK_ELEMENTS).enumerate(epoch * blocks_per_epoch + block)

    def permuted(block: tf.Tensor, elements: tf.Tensor) -> tf.Tensor:
        if not shuffle:
            return elements
        return tf.gather(elements, _permutation(tf.shape(elements)[0], element_key, block))

    blocks = tf.data.Dataset.range(first_epoch, _FOREVER).flat_map(epoch_blocks).prefetch(1)
    return blocks.map(permuted).unbatch().skip(first % total % BLOCK_ELEMENTS)


def _byte_ranges(starts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [parts, 2], the first byte of each part of all files and the one after its last; int32 [files, 2], which of
    them are each file's. The last one has no end."""
    ranges = [pair for file in starts for pair in zip(file, [*file[1:], _FOREVER], strict=True)]
    ends = np.cumsum([len(file) for file in starts])
    return np.array(ranges, np.int64), np.stack([np.append(0, ends[:-1]), ends], axis=1).astype(np.int32)


def _read_exactly(
    read: Reader, path: tf.Tensor, ranges: tf.Tensor, passed: tf.Tensor, size: tf.Tensor
) -> tf.data.Dataset:
    """The elements of a file of `size` from number `passed` on; an assertion fails where it holds more or fewer."""
    elements = read(path, ranges).skip(passed)
    nothing = tf.zeros(elements.element_spec.shape, elements.element_spec.dtype)
    after_end = tf.data.Dataset.from_tensors((nothing, False)).repeat()
    # One is asked for past the last, so that a file that holds more is found out.
    asked = elements.map(lambda element: (element, True)).concatenate(after_end).take(size - passed + 1)

    def check(number: tf.Tensor, asked: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        element, is_there = asked
        expected = number < size
        as_counted = require(
            tf.equal(is_there, expected),
            path, " holds ", tf.where(is_there, "more", "fewer"), " than the ", size,
            " that its name or an earlier count says; give it its true count, which --check_dataset tells, as the "
            "last number of its name",
        )  # fmt: skip
        with tf.control_dependencies([as_counted]):
            return tf.identity(element), expected

    checked = asked.enumerate(passed).map(check)
    return checked.filter(lambda element, expected: expected).map(lambda element, expected: element)


def _permutation(size: int | tf.Tensor, key: int, index: tf.Tensor) -> tf.Tensor:
    """int32 [size]: the index-th permutation of 0 ... size - 1."""
    return tf.argsort(tf.random.stateless_uniform([size], [key, index], None, None, tf.int64, alg="philox"))


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, as small as can be: [0.5, 0.25] -> [2, 1]."""
    exact = [Fraction(repr(float(weight))) for weight in weights]  # the decimal as written, not its binary neighbour
    scale = math.lcm(*(weight.denominator for weight in exact))
    parts = [int(weight * scale) for weight in exact]
    parts = [part // math.gcd(*parts) for part in parts]
    if sum(parts) > _LONGEST_CYCLE:
        parts = [max(1, round(Fraction(part, sum(parts)) * _LONGEST_CYCLE)) for part in parts]
    return parts
