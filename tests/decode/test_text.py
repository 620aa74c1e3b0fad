"""Text as it comes: whole characters, nothing of a stop string, and pieces that add up to the whole."""

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import ByteTokenizer
from irope_jax.decode.lookup import Lookup
from irope_jax.decode.text import TextStream

BYTES = ByteTokenizer()


def stream(text: str | bytes, *stops, size=1):
    raw = text.encode() if isinstance(text, str) else text
    watch = TextStream(BYTES, stops)
    parts = [watch.push(raw[i : i + size]) for i in range(0, len(raw), size)] + [watch.finish()]
    assert "".join(parts) == watch.text
    return watch, parts


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_pieces_are_the_text_and_stop_strings_end_it(size):
    assert stream("Grüße, 東京 🙂!", size=size)[0].text == "Grüße, 東京 🙂!"
    watch, _ = stream("one\n\nQ: two", "\n\nQ:", "\nA:", size=size)
    assert watch.text == "one" and watch.stopped and watch.tokens == len("one\n\nQ:")
    assert stream("ababac", "abac", size=size)[0].text == "ab"
    assert stream("the end is near", "the end.", size=size)[0].text == "the end is near"


def test_what_is_shown_is_final():
    assert stream("é!")[1] == ["", "é", "!", ""]
    assert stream("a\n\nb", "\n\nQ")[1] == ["a", "", "", "\n\nb", ""]
    assert stream(b"a\xff" + b"b" * 3)[0].text == "a\ufffdbbb"
    with pytest.raises(ConfigError, match="empty"):
        TextStream(BYTES, [""])


def test_lookup_finds_what_followed_the_longest_end():
    text = Lookup(np.array([1, 2, 3, 4, 9, 2, 3, 5, 6, 1, 2, 3]))
    assert text.guess(3) == [4, 9, 2]  # 1 2 3 came once, before 4
    assert Lookup(np.array([2, 3, 4, 2, 3, 5, 2, 3])).guess(2) == [5, 2]  # the last time
    assert Lookup(np.array([1, 2, 3])).guess(4) == [] and Lookup(np.array([7])).guess(4) == []
    text.extend([4, 9])
    assert text.guess(2) == [2, 3]
