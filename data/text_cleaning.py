"""Mending text before it is tokenised: what ftfy repairs, and WikiText's tokenisation undone."""

import re

import ftfy

# Characters outside these are what ftfy looks at. Text of printable ASCII, tabs and newlines is never changed by it,
# save that "&" may begin an HTML entity; from the first "<" of a document on, ftfy takes entities for what they are.
_SUSPECT = re.compile(r"[^\t\n\x20-\x25\x27-\x7e]")
_SUSPECT_AFTER_TAG = re.compile(r"[^\t\n\x20-\x7e]")

_MENDING = ftfy.TextFixerConfig(explain=False, normalization="NFKC")
_MENDING_AFTER_TAG = _MENDING._replace(unescape_html=False)


def mend(text: str) -> str:
    """`ftfy.fix_text(text, normalization="NFKC")`, with only the lines that it could change going through it.

    ftfy mends each line by itself, and takes about a second for a megabyte of short lines; most lines are plain.
    """
    tag = text.find("<")
    parts = []
    done = 0  # always the start of a line
    while suspect := (_SUSPECT_AFTER_TAG if 0 <= tag < done else _SUSPECT).search(text, done):
        start = max(done, text.rfind("\n", done, suspect.start()) + 1)
        end = text.find("\n", suspect.start()) + 1 or len(text)
        parts += [
            text[done:start],
            ftfy.fix_text(text[start:end], _MENDING_AFTER_TAG if 0 <= tag < start else _MENDING),
        ]
        done = end
    parts.append(text[done:])
    return "".join(parts)


# WikiText sets spaces around every sign and writes the signs inside numbers and words as @-@, @,@ and @.@.
_WIKITEXT = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
        (r" ([:;.!?,])(?=\s|$)", r"\1"),
        (r"\( ([^()]*?) \)", r"(\1)"),
        (r"\[ ([^\[\]]*?) \]", r"[\1]"),
        (r"\{ ([^{}]*?) \}", r"{\1}"),
        (r'" ([^"\n]*?) "', r'"\1"'),
        (r" '(s|t|re|ve|m|ll|d)\b", r"'\1"),  # it 's -> it's
        (r"s ' ", "s' "),  # the players ' names -> the players' names
        (r"\b(do|does|did|is|are|was|were|has|have|had|wo|would|ca|could|should|must|need) n't\b", r"\1n't"),
        (r"= (?==)", "="),  # headings: = = Name = = -> == Name ==
        (r" ° ?", "°"),
        (r" ?\n ?", "\n"),
    )
)


def detokenize_wikitext(text: str) -> str:
    """WikiText's spaced-out signs closed up again: "1 @,@ 000 of Rome 's people" -> "1,000 of Rome's people"."""
    for pattern, replacement in _WIKITEXT:
        text = pattern.sub(replacement, text)
    return text
