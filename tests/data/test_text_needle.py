"""A fact in words: at the start, asked at the end, only its answer counts."""

import re

import numpy as np
import pytest

from irope_jax.core.config import ConfigError
from irope_jax.data.text_needle import text_needle
from irope_jax.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
HAY = np.frombuffer(b"hay " * 300, np.uint8)


def test_the_answer_is_what_was_told_and_alone_has_weight():
    found = [text_needle(np.random.default_rng(seed), HAY, 600, TOKENIZER) for seed in range(5)]
    for document in found:
        text = TOKENIZER.decode(document.tokens)
        told = r"<bos>The secret number of the (.+?) is (\d{7})\. Remember it: (\d{7})\."
        key, value, again = re.match(told, text).groups()
        assert value == again and len(document.tokens) == 600
        assert text.endswith(f"What is the secret number of the {key}? The secret number of the {key} is {value}")
        assert TOKENIZER.decode(document.tokens[document.weights > 0]) == f" {value}"
    assert len({TOKENIZER.decode(d.tokens[-7:]) for d in found}) == 5


def test_too_little_room_is_said():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"length=100: .*longer"):
        text_needle(rng, HAY, 100, TOKENIZER)
    with pytest.raises(ConfigError, match=r"haystack=10"):
        text_needle(rng, HAY[:10], 600, TOKENIZER)
