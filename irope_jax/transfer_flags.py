"""Flags and help of `irope import` and `irope export`, apart from their work so that help does not wait for jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_import(verb: Callable[..., argparse.ArgumentParser]) -> None:
    bring = verb(
        "import",
        "a Hugging Face or GGUF model as a run directory",
        """\
Read a Llama 2 to 4, Mistral, Mixtral, Qwen 2 or 3, SmolLM 3, Cohere 2 or OLMo 2 or 3 and make it a run directory, which
`irope eval`, `irope search-rope` and `train.init_from` take like one that was trained here. SRC is a folder with
config.json and safetensors, or a .gguf file of Llama or Llama 4, whose weights are dequantised. Only safetensors, JSON
and GGUF are read; nothing in them is executed. What this package cannot compute exactly is an error that names it; DST
appears only when it is whole.

examples:
  irope import ~/models/SmolLM2-135M runs/smollm2
  irope import model.Q8_0.gguf runs/model
  irope import model.gguf runs/model-16k --config.model.pattern.0.position.scaling.kind=ntk \\
      --config.model.pattern.0.position.scaling.factor=2
""",
        "Values of the run's config are changed as in `irope train`: --config.a.b=VALUE.",
    )
    bring.add_argument("source", metavar="SRC", help="folder or .gguf file")
    bring.add_argument("target", metavar="DST", help="run directory to make; must not be there")


def add_export(verb: Callable[..., argparse.ArgumentParser]) -> None:
    give = verb(
        "export",
        "a run as a Hugging Face folder or GGUF file",
        """\
Write a checkpoint as a folder that transformers, and what else reads its files, loads: safetensors, config.json,
generation_config.json and the tokenizer. The family is the first whose config can say the model: one that was imported
goes back as what it was, iRoPE becomes llama4_text. What the family cannot say is an error that names it. Weights pass
block by block; DST appears only when it is whole.

A DST that ends in .gguf becomes one file for llama.cpp, of architecture llama, or llama4 for iRoPE. What Llama 4 has is
fixed there: chunks of 8192, every fourth layer without RoPE and with its temperature; mixtures norm q and k unless they
have 128 experts. The number format is by default that of llama.cpp's converter: bfloat16, or float16 where the weights
are; vectors and routers stay float32. A tokenizer.json must be byte-level BPE that cuts text as GPT-2, SmolLM, Llama 3
or 4 or Qwen 2 does.

examples:
  irope export runs/quickstart/irope exported/irope
  irope export runs/model exported/model --dtype=bfloat16 --shard-size=2 --verify
  irope export runs/model exported/model --family=smollm3
  irope export runs/model exported/model.gguf --dtype=float16 --verify
""",
        "Values of the run's config are changed as in `irope train`, to say what the family can: --config.a.b=VALUE.",
    )
    give.add_argument("run", metavar="RUN", help="run directory")
    give.add_argument("target", metavar="DST", help="folder, or .gguf file, to make; must not be there")
    give.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    give.add_argument("--family", metavar="NAME", help="model_type to write (default: the first that can say it)")
    give.add_argument(
        "--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as the run; GGUF: see above)"
    )
    give.add_argument("--context", type=int, metavar="N", help="tokens the config says it reads (default: as trained)")
    give.add_argument(
        "--shard-size", type=float, default=5, metavar="GB", help="folder: at most so much a file (default: 5)"
    )
    give.add_argument("--no-tokenizer", action="store_true", help="GGUF: ids only, no tokenizer")
    give.add_argument(
        "--verify",
        action="store_true",
        help="read the result back, and compare logits with transformers if it is installed",
    )
