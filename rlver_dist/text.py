"""Words of a text and n-grams of tokens.

`words` is the tokenizer of English rules. Two others stand where they are used, since results depend on them:
`experience/guards.py` counts words in any script and takes a Chinese character for a word, and
`tracking/dialogue_metrics.py` splits at white space, as the published distinct-n does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


class _Plain(dict[int, str]):
    """A `str.translate` table, filled as characters are met: code point -> what words are compared by."""

    def __missing__(self, code: int) -> str:
        decomposed = unicodedata.normalize("NFKD", chr(code))
        bare = "".join(one for one in decomposed if not unicodedata.category(one).startswith("M"))
        self[code] = plain = unicodedata.normalize("NFC", bare)
        return plain


_PLAIN = _Plain({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})


def plain(text: str) -> str:
    """`text` with compatibility forms and curly quotes made plain, and without accents and other marks on
    letters."""
    # Character by character: normalising a whole text with many marks in a row takes time in their square.
    return unicodedata.normalize("NFC", text.translate(_PLAIN))


def words(text: str) -> list[str]:
    """Lower-case words of `text`, in order, spelt as `plain` spells them."""
    return _WORD.findall(plain(text).lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` tokens (1 or more), in order; fewer than `n` tokens have none."""
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def overlap(tokens: Sequence[str], others: Sequence[Sequence[str]], n: int) -> float:
    """Share (0 to 1) of the n-grams of `tokens`, repeated ones included, that also occur in one of
    `others`."""
    own = ngrams(tokens, n)
    if not own:
        return 0.0
    known = {gram for other in others for gram in ngrams(other, n)}
    return sum(gram in known for gram in own) / len(own)


def distinct_overlap(tokens: Sequence[str], other: Sequence[str], n: int) -> float:
    """Share (0 to 1) of the distinct n-grams of `tokens` that `other` holds too."""
    own = set(ngrams(tokens, n))
    return len(own & set(ngrams(other, n))) / len(own) if own else 0.0
