"""Guesses for speculative decoding out of the text itself: what followed the last words when they stood there before.

No second model (prompt lookup decoding, Saxena 2023; a kind of Leviathan et al. 2023, arXiv 2211.17192): guesses cost a
search on the host, and what the model would not have said itself is taken back. Long prompts that are quoted or
summarised are where it pays.
"""

from __future__ import annotations

import numpy as np

LONGEST, SHORTEST = 4, 2
"""Tokens that must have stood there before."""


class Lookup:
    """The text of one row, indexed by its n-grams."""

    def __init__(self, tokens: np.ndarray):
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens) -> None:
        for token in np.asarray(tokens).tolist():
            # An n-gram is indexed when its next token is known, so that the end of the text never finds itself.
            at = len(self.tokens)
            for n in range(SHORTEST, LONGEST + 1):
                if at >= n:
                    self._ends[tuple(self.tokens[at - n : at])] = at
            self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """At most `count` tokens that followed the last time the longest possible end of the text occurred."""
        for n in range(LONGEST, SHORTEST - 1, -1):
            at = self._ends.get(tuple(self.tokens[-n:])) if len(self.tokens) >= n else None
            if at is not None:
                return self.tokens[at : at + count]
        return []
