"""Tokenizers as files of Hugging Face: what reads them elsewhere gives the ids that ours give.

Markers and symbols, which no text produces, become special tokens with the names under which `decode` shows them.
"""

from __future__ import annotations

import json
from typing import Any

from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import MARKERS, ByteTokenizer, TokenIds, TokenizerFile, TokenizerSpec


def tokenizer_files(tokenizer: TokenizerSpec, max_length: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`, by name; nothing where there are ids only.

    Raises:
      ConfigError: the library `tokenizers` is missing, or the file of a tokenizer has no room for its extra tokens.
    """
    if isinstance(tokenizer, TokenIds):
        return {}
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(
            "data.tokenizer", tokenizer.kind, "writing it needs the library tokenizers: `pip install 'irope-jax[hf]'`"
        ) from None
    own = _names(tokenizer)
    if isinstance(tokenizer, TokenizerFile) and not own:
        content = tokenizer.content()
    else:
        if isinstance(tokenizer, ByteTokenizer):
            vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
            built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
            built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            built.decoder = tokenizers.decoders.ByteLevel()
        else:
            built = tokenizers.Tokenizer.from_str(tokenizer.content().decode("utf-8"))
        built.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in own])
        for name, number in own.items():
            if built.token_to_id(name) != number:
                fix = f"the file has {name} as {built.token_to_id(name)}; this run counts it as {number}"
                raise ConfigError("data.tokenizer", tokenizer.kind, fix)
        content = built.to_str().encode()
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "pad"):
        config[f"{name}_token"] = getattr(tokenizer, name, "") or f"<{name}>"
    return {"tokenizer.json": content, "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def byte_characters() -> list[str]:
    """How byte-level vocabularies write each byte: as itself where that can be seen, else by the next from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def _names(tokenizer: TokenizerSpec) -> dict[str, int]:
    """Tokens that are in no file, in the order of their ids."""
    of_file = isinstance(tokenizer, TokenizerFile)
    specials = [name for name in ("bos", "eos", "pad") if not of_file or not getattr(tokenizer, name)]
    names = {f"<{name}>": getattr(tokenizer, f"{name}_id") for name in specials}
    if tokenizer.has_markers:
        names |= {f"<{name}>": tokenizer.marker(name) for name in MARKERS}
        names |= {f"<k{i}>": int(n) for i, n in enumerate(tokenizer.symbols(0, tokenizer.num_symbols))}
    return names
