"""A fact told in words in a long text, at its start by default (LongRoPE2), and asked for at its end; any tokenizer.

Facts of single opaque tokens, for models trained on them, are in `synthetic`.
"""

from __future__ import annotations

import numpy as np

from irope_jax.core.config import ConfigError
from irope_jax.data.documents import Document
from irope_jax.data.tokenizer import Tokenizer

THINGS = (
    "anchor", "basket", "candle", "desert", "engine", "feather", "garden", "harbour", "island", "jacket", "kettle",
    "ladder", "mirror", "needle", "orchard", "pepper", "quarry", "ribbon", "saddle", "temple", "umbrella", "village",
    "window", "yellow kite",
)  # fmt: skip


def text_needle(
    rng: np.random.Generator, haystack: np.ndarray, length: int, tokenizer: Tokenizer, depth: float = 0.0
) -> Document:
    """A document of `length` tokens whose only weighted tokens are the answer.

    `<bos> The secret number of the KEY is VALUE. … haystack … The secret number of the KEY is VALUE`, with a value of
    seven digits; at another depth some of the haystack comes before.

    Args:
      rng: chooses key and value.
      haystack: int ids of text, at least `length` of them.
      length: tokens of the document.
      tokenizer: of the words.
      depth: where the fact stands in the haystack, 0 to 1.

    Raises:
      ConfigError: too short for the words alone, or too little haystack.
    """
    key, value = THINGS[rng.integers(len(THINGS))], int(rng.integers(10**6, 10**7))
    told = tokenizer.encode(f"The secret number of the {key} is {value}. Remember it: {value}.\n")
    asked = tokenizer.encode(f"\nWhat is the secret number of the {key}? The secret number of the {key} is")
    answer = tokenizer.encode(f" {value}")
    room = length - 1 - len(told) - len(asked) - len(answer)
    if room < 1:
        raise ConfigError("length", length, f"fact and question alone take {length - room} tokens; use a longer text")
    if len(haystack) < room:
        raise ConfigError("haystack", len(haystack), f"needs {room} tokens of text; take a longer source")
    before = int(depth * room)
    parts = ([tokenizer.bos_id], haystack[:before], told, haystack[before:room], asked, answer)
    tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
    return Document(tokens, (np.arange(length) >= length - len(answer)).astype(np.float32))
