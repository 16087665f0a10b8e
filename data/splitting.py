"""Documents for training, validation and test, told apart by a hash of what they say."""

import re
from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from errors import UserError

PARTS = ("train", "validation", "test")
DEFAULT_SEED = 1234  # Megatron-LM's


@dataclass(frozen=True)
class Split:
    """Which part of a set a document belongs to.

    The same text always belongs to the same part, wherever in the input it stands and however often.

    Attributes:
        weights: two or three whole numbers; a part gets about its weight of the documents.
        seed: another one gives other parts of the same sizes.
    """

    weights: tuple[int, ...]
    seed: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts' names."""
        return PARTS[: len(self.weights)]

    def part_of(self, text: str) -> int:
        """The index of the part that a document belongs to."""
        key = self.seed.to_bytes(8, "little", signed=True)
        place = int.from_bytes(blake2b(text.encode(), digest_size=8, key=key).digest(), "big")
        bounds = list(accumulate(self.weights))
        return bisect_right(bounds, place * bounds[-1] >> 64)


def parse_split(text: str, seed: int | None) -> Split:
    """ "949:50:1" (or with commas) and a seed -> Split; UserError if it is none."""
    if not re.fullmatch(r"\d+([:,]\d+){1,2}", text) or not int(re.split("[:,]", text)[0]):
        raise UserError(
            f"--split {text} must be two or three whole numbers, the weights of {', '.join(PARTS)}, "
            'the first above 0, such as "949:50:1"'
        )
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed {seed} must fit into 64 bits")
    return Split(tuple(map(int, re.split("[:,]", text))), DEFAULT_SEED if seed is None else seed)
