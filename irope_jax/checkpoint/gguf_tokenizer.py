"""Tokenizers of GGUF files, in both directions: byte-level BPE, and how text is cut before pairs merge.

Files have the vocabulary and the merges, but of the cutting only a name (`tokenizer.ggml.pre`), for which llama.cpp has
regular expressions in its program (src/llama-vocab.cpp). What is known by no name cannot be said.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from irope_jax.checkpoint.gguf_models import Header
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.core.config import ConfigError
from irope_jax.data.tokenizer import TokenIds, TokenizerSpec
from irope_jax.data.tokenizer_json import byte_characters, tokenizer_files

log = logging.getLogger(__name__)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens (`gguf.TokenType`): of text, never of text, matched before all others, and holes."""

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
"""Tokens with a name here, and theirs."""

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _REST
_QWEN2 = _ENDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CUTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((_DIGIT, _GPT2), False),
    "llama-bpe": ((_LLAMA3,), True),
    "dbrx": ((_LLAMA3,), False),
    "qwen2": ((_QWEN2,), False),
    "llama4": ((_GPT4O,), False),
}
"""By `tokenizer.ggml.pre`: expressions that cut one after the other, and whether a piece that is a token stays whole
even if no merges lead to it. Files without a name, or with `default`, may be of any tokenizer: ids would be a guess."""

_ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "gpt-4o": "llama4", "smaug-bpe": "dbrx", "starcoder": "smollm"}
"""Other names of the same."""

_NO_MERGE = "<bos> <eos>"
"""llama.cpp loads no BPE without merges. This one stands for none: text never has two such symbols, only characters."""


def tokenizer_json(header: Header) -> str | None:
    """The tokenizer as a Hugging Face `tokenizer.json`; None, with a logged reason, if it is of no known kind.

    Raises:
      CheckpointError: of a known kind, but damaged.
    """
    cut = _cut_of(header)
    if cut is None:
        kind, pre = header.fields.get("tokenizer.ggml.model"), header.fields.get("tokenizer.ggml.pre")
        log.warning("%s: its tokenizer (%s, %s) is not read; give the model one of its own", header.where, kind, pre)
        return None
    try:
        return _byte_level_bpe(header, *cut)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{header.where}: its tokenizer cannot be built ({error})") from None


def _cut_of(header: Header) -> tuple[tuple[str, ...], bool] | None:
    pre = header.fields.get("tokenizer.ggml.pre")
    return _CUTS.get(_ALSO.get(pre, pre)) if header.fields.get("tokenizer.ggml.model") == "gpt2" else None


def _byte_level_bpe(header: Header, cuts: Sequence[str], ignore_merges: bool) -> str:
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

    lists = {name: header.fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")}
    if absent := [name for name, found in lists.items() if not isinstance(found, list)]:
        raise ValueError(f"no {absent[0]}")
    tokens, types, merges = lists.values()
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise ValueError("tokens are there twice, or not each has a type")
    merges = [] if merges == [_NO_MERGE] else [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED or token != f"[PAD{i}]"}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    split = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    built.decoder = decoders.ByteLevel()
    for special, kind in ((True, CONTROL), (False, USER_DEFINED)):
        of_kind = [AddedToken(t, special=special, normalized=False) for t, its in zip(tokens, types) if its == kind]
        (built.add_special_tokens if special else built.add_tokens)(of_kind)
    return built.to_str()


def special_tokens(header: Header) -> dict[str, str]:
    """Texts of `bos`, `eos` and `pad`, as far as the header names them."""
    tokens, found = header.fields.get("tokenizer.ggml.tokens", []), {}
    for ours, theirs in _SPECIAL.items():
        number = header.fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[ours] = tokens[number]
    return found


def companions(header: Header) -> dict[str, bytes]:
    """What the header tells of files that Hugging Face has beside the weights, by name; an export gives it back."""
    ids = {ours: header.fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in _SPECIAL.items()}
    config = {f"{name}_token_id": number for name, number in ids.items() if isinstance(number, int)}
    files = {"config.json": {"max_position_embeddings": header.whole("context_length")} | config}
    if (cut := _cut_of(header)) is not None:
        # where no key says it, llama.cpp puts bos before a prompt if it knows the tokenizer for one that wants it
        adds = header.fields.get("tokenizer.ggml.add_bos_token", cut == _CUTS["llama-bpe"])
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": text for name, text in special_tokens(header).items()},
            "add_bos_token": adds,
        }
        if (chat := header.fields.get("tokenizer.chat_template")) is not None:
            files["tokenizer_config.json"]["chat_template"] = chat
    return {name: json.dumps(values, indent=2).encode() for name, values in files.items()}


def without_tokenizer(tokenizer: TokenizerSpec) -> dict[str, Any]:
    """Keys of a file that has ids only: llama.cpp then makes as many nameless tokens as the model has."""
    return {"tokenizer.ggml.model": "no_vocab"} | _ids(tokenizer)


def tokenizer_fields(tokenizer: TokenizerSpec, vocab_size: int, kept: Mapping[str, bytes]) -> dict[str, Any]:
    """Keys by which llama.cpp gives the ids that ours gives.

    Args:
      tokenizer: ours; one of ids only is written as none, with a warning.
      vocab_size: of the model; ids that no token has become unused ones.
      kept: files of Hugging Face that the model was imported with, by name.

    Raises:
      ConfigError: there is no name for how it cuts text, or it is no byte-level BPE.
    """
    if isinstance(tokenizer, TokenIds):
        log.warning("there is no tokenizer: the file holds ids only, and no program can read text with it")
        return without_tokenizer(tokenizer)
    try:
        values = json.loads(tokenizer_files(tokenizer, 1)["tokenizer.json"])
        return _of_json(values, vocab_size) | _ids(tokenizer) | _of_companions(values, kept)
    except _Unsayable as error:
        fix = f"llama.cpp cannot say it: {error}; --no-tokenizer writes the model without one"
        raise ConfigError("data.tokenizer", tokenizer.kind, fix) from None


class _Unsayable(ValueError):
    """Something of a tokenizer for which there are no keys."""


def _ids(tokenizer: TokenizerSpec) -> dict[str, int]:
    ids = {theirs: getattr(tokenizer, f"{ours}_id") for ours, theirs in _SPECIAL.items()}
    return {f"tokenizer.ggml.{name}_token_id": int(number) for name, number in ids.items()}


def _of_json(values: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    model, added = values.get("model") or {}, values.get("added_tokens") or []
    vocabulary, pairs = _checked(model)
    normalizer = (values.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _Unsayable(f"it changes text first (normalizer {normalizer!r})")
    if normalizer:
        log.warning("the tokenizer composes characters first (NFC), which llama.cpp does not: ids differ for such text")
    tokens = {number: (text, NORMAL) for text, number in vocabulary.items()}
    for token in added:
        if not token["special"] and any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            raise _Unsayable(f"its token {token['content']!r} takes the space beside it, or only whole words")
        tokens[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if tokens and max(tokens) >= vocab_size:
        raise _Unsayable(f"it has the id {max(tokens)}, the model {vocab_size} tokens")
    tokens = [tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(vocab_size)]
    if len({text for text, _ in tokens}) < vocab_size:
        raise _Unsayable("two ids have the same text")
    own = {token["content"] for token in added}
    pre = _name_of_cut(_cuts(values.get("pre_tokenizer")), model, own) if pairs else "qwen2"  # bytes, however cut
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [text for text, _ in tokens],
        "tokenizer.ggml.token_type": [kind for _, kind in tokens],
        "tokenizer.ggml.merges": pairs or [_NO_MERGE],
    }


def _checked(model: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of a byte-level BPE."""
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _Unsayable(f"it is no byte-level BPE but {model.get('type')!r}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _Unsayable(f"its {key} is {model[key]!r}")
    if model.get("unk_token") and not model["vocab"].keys() >= set(byte_characters()):
        raise _Unsayable(f"bytes that it has no token for are {model['unk_token']!r}")
    pairs = _pairs(model)
    if odd := [pair for pair in pairs if len(pair) != 2 or any(not part or " " in part for part in pair)]:
        raise _Unsayable(f"it merges {odd[0]!r}")
    return model["vocab"], [" ".join(pair) for pair in pairs]


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Merges; newer files have lists of two, older ones a text."""
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _cuts(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Expressions that cut text one after the other."""
    steps, found = _steps(pre_tokenizer), []
    for i, step in enumerate(steps):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False} if i == len(steps) - 1:
                return (*found, _GPT2) if step.get("use_regex", True) else tuple(found)
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGIT)
            case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}:
                found.append(cut)
            case {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Removed", "invert": True} if cut != _DIGIT:
                found.append(cut)  # what is no piece is dropped: nothing, of the other expressions that have a name
            case _:
                raise _Unsayable(f"it cuts text by {json.dumps(step)}")
    raise _Unsayable("it does not end in bytes (ByteLevel)")


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer and pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer] if pre_tokenizer else []


def _name_of_cut(cuts: tuple[str, ...], model: Mapping[str, Any], added: set[str]) -> str:
    names = {ignore: name for name, (known, ignore) in _CUTS.items() if known == cuts}
    if not names:
        known = ", ".join(_CUTS)
        raise _Unsayable(f"of the ways to cut text that have a name ({known}) none is {' then '.join(cuts) or 'this'}")
    ignores = bool(model.get("ignore_merges"))
    if ignores not in names and (token := _unmerged(model, added)) is not None:
        raise _Unsayable(f"its ignore_merges is {ignores}, not so there, and no merges lead to the token {token!r}")
    return names.get(ignores, next(iter(names.values())))


def _unmerged(model: Mapping[str, Any], added: set[str]) -> str | None:
    """A token to which no merges lead; where there is none, `ignore_merges` changes nothing."""
    from tokenizers import models

    bpe = models.BPE(vocab=model["vocab"], merges=_pairs(model))
    return next((text for text in model["vocab"] if text not in added and len(bpe.tokenize(text)) != 1), None)


def _of_companions(values: Mapping[str, Any], kept: Mapping[str, bytes]) -> dict[str, Any]:
    """Whether prompts begin with bos, and the chat template.

    Documents begin with bos here, so a model that was trained here wants it. One that was imported is as its files say.
    """
    config = json.loads(kept.get("tokenizer_config.json", b"{}"))
    processor = values.get("post_processor") or {}
    processors = processor.get("processors", []) if processor.get("type") == "Sequence" else [processor]
    template = next((one.get("single", []) for one in processors if one.get("type") == "TemplateProcessing"), [])
    adds = config.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = "SpecialToken" in template[0] if template else not kept
    found: dict[str, Any] = {"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.add_eos_token": False}
    chat = kept["chat_template.jinja"].decode() if "chat_template.jinja" in kept else config.get("chat_template")
    if isinstance(chat, str):
        found["tokenizer.chat_template"] = chat
    elif chat:
        log.warning("of several chat templates none is written")
    return found
