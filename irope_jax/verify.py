"""Is an export the model it was made from? Read back number by number, and asked of transformers where it is there."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from irope_jax.checkpoint.gguf_export import GgufWriting
from irope_jax.checkpoint.hf_export import Writing
from irope_jax.checkpoint.native import CheckpointError
from irope_jax.checkpoint.streams import Keys
from irope_jax.core.types import Precision, TokenInfo
from irope_jax.data.tokenizer import TokenizerSpec
from irope_jax.model.config import ModelConfig
from irope_jax.model.decoder import logits
from irope_jax.transfer import Imported

TOLERANCE = 1e-3
"""Of logits, relative to the largest where that is above 1; both compute in float32."""

LONGEST = 512

TEXT = 'It\'s 3,141 words of "naïve" text;\n\n\tsee §2.7 (ÜBER)  and   x_y = 的 \U0001f600!\r\n'
"""Something of everything that tokenizers cut differently."""


def compare(folder: Path, read: Imported, writing: Writing) -> list[str]:
    """What was found, a line each.

    Args:
      folder: the export.
      read: what our importer says of it.
      writing: what it was written from.

    Raises:
      CheckpointError: it is not the same.
    """
    count = _read_back(folder, read, writing, lambda _: writing.numbers)
    lines = [f"verified: {count:,} numbers read back are those of the run"]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return [*lines, _ask_transformers(folder, read)]
    return [*lines, "not asked: transformers and torch are not installed, so their logits were not compared"]


def compare_gguf(path: Path, read: Imported, what: GgufWriting, tokenizer: TokenizerSpec) -> list[str]:
    """The same of a GGUF file, and whether its tokenizer gives the ids of the run's; llama.cpp itself is not asked.

    Raises:
      CheckpointError: the header, a number or an id is not the same.
    """
    if read.weights.there != what.writing.there:
        raise CheckpointError(f"{path}: the header read back does not say the model that was written")
    if read.tokenizer is not None:
        import tokenizers

        built = tokenizers.Tokenizer.from_str(read.tokenizer)
        built.encode_special_tokens = True  # text that spells a special token stays text
        if built.encode(TEXT, add_special_tokens=False).ids != tokenizer.encode(TEXT).tolist():
            raise CheckpointError(f"{path}: the tokenizer read back does not give the ids of the run's")
    count = _read_back(path, read, what.writing, what.dtypes().__getitem__)
    return [f"verified: {count:,} numbers read back are those of the run; llama.cpp was not asked"]


def _read_back(where: Path, read: Imported, writing: Writing, dtype: Callable[[Keys], np.dtype]) -> int:
    """`dtype` is that of a parameter in the file."""
    count = 0
    for keys, index, values in read.weights.pieces(writing.ours):
        ours = writing.arrays[keys][index].read().result().astype(dtype(keys))
        if not np.array_equal(values.astype(dtype(keys)), ours):
            raise CheckpointError(f"{where}: {'/'.join(keys)} read back is not what the run has")
        count += values.size
    return count


def _ask_transformers(folder: Path, read: Imported) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = probe(read.model, read.context)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, trust_remote_code=False
    )
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    ours = plain_logits(read.model, read.params, tokens)
    worst, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    said = f"logits of {tokens.shape[1]} tokens differ by at most {worst:.1e}, the largest is {largest:.3g}"
    if worst > TOLERANCE * max(1.0, largest):
        raise CheckpointError(f"{folder}: transformers computes something else: {said}")
    return f"verified with transformers: {said}"


def probe(model: ModelConfig, context: int) -> np.ndarray:
    """Random tokens `[1, T]` over more than two chunks or windows of the model where `LONGEST` allows."""
    reach = max((layer.mask.reach or 0 for layer in model.layers), default=0)
    length = min(context, LONGEST, max(64, 3 * reach + 1))
    return np.random.default_rng(0).integers(0, model.vocab_size, (1, length), np.int32)


def plain_logits(model: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits computed in float32 by the plain definition of attention."""
    model = dataclasses.replace(model, precision=Precision(), attention="reference", remat="none")
    params = jax.tree.map(lambda w: np.asarray(w, np.float32), params)
    return np.asarray(jax.jit(lambda p, t: logits(model, p, t, TokenInfo.single(*t.shape)))(params, tokens))
