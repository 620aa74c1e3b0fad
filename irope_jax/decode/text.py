"""From token ids as they come to text as it can be shown, and the strings at which it ends. No arrays of a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What a tokenizer makes of bytes that are not a whole character yet."""

LONGEST_CHARACTER = 8
"""Tokens after which a broken character is shown as it is: UTF-8 has at most 4 bytes, a token at least one."""


class TextStream:
    """Text of one row, given piece by piece.

    What is given out is final: bytes of half a character and the beginning of what may become a stop string are held
    back until it is known what they are.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if "" in stops:
            raise ConfigError("stop", "", "an empty text is everywhere; leave it out")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._shown, self._decoded = 0, 0  # ids whose text was taken; ids before them that their text may depend on
        self._held = ""
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        """Tokens taken, those of the stop string too."""
        return len(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """Text that these tokens make final. Tokens after a stop string are not taken."""
        new = []
        for token in ids:
            if self.stopped:
                break
            self._ids.append(int(token))
            new.append(self._take(final=False))
        return "".join(new)

    def finish(self) -> str:
        """The rest, once no token follows."""
        return "" if self.stopped else self._take(final=True)

    def _take(self, final: bool) -> str:
        # A tokenizer may treat the first token of a text in its own way: what is new is the difference.
        before = self._decode(self._decoded, self._shown)
        now = self._decode(self._decoded, len(self._ids))
        waiting = len(self._ids) - self._shown
        if final or not now.endswith(BROKEN) or waiting >= LONGEST_CHARACTER:
            self._held += now[len(before) :]
            self._decoded, self._shown = self._shown, len(self._ids)
        return self._release(final)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(np.asarray(self._ids[start:end], np.int32)) if end > start else ""

    def _release(self, final: bool) -> str:
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, out = True, self._held[: min(found)]
            self._held = ""
        else:
            keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
