"""Does transformers compute what we compute, of models trained here and exported?

    python scripts/parity_hf.py --reference-python=OTHER/bin/python
    python scripts/parity_hf.py --reference-python=OTHER/bin/python --only=irope --only=cohere2 --steps=100

Each case is `configs/debug.py` with other layers, trained for a few steps, exported with `irope export` and loaded by
an interpreter with torch and transformers, which this project does not depend on (default: this one). Compared are
float32 logits over 200 random tokens, which is several chunks or windows of every case, and the ids of a text. The last
line is JSON; the gate is a largest difference of 1e-4.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from irope_jax import cli
from irope_jax.experiment import resolve, run_config
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.train.state import load_params
from irope_jax.verify import plain_logits

ROOT = Path(__file__).resolve().parent.parent
GATE = 1e-4
LENGTH = 200
TEXT = "Call me Ishmael. Some years ago — never mind how long — 1851 ümlaut, 你好, \t tabs\n\nand lines."

REFERENCE = """
import json, sys, numpy as np, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
work = Path(sys.argv[1])
for name in sys.argv[2:]:
    folder = work / name / "exported"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.from_numpy(np.load(work / "tokens.npy").astype(np.int64))
    with torch.no_grad():
        np.save(work / name / "logits.npy", model(tokens).logits.numpy())
    ids = AutoTokenizer.from_pretrained(folder)((work / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    np.save(work / name / "ids.npy", np.array(ids))
    print(name, type(model).__name__, flush=True)
"""

DENSE = dict(kind="swiglu", hidden_dim=64)
GLOBAL = dict(kind="global")
CHUNKS = dict(kind="chunked", size=16)
WINDOW = dict(kind="sliding", size=24)
RISES = dict(kind="log_floor", floor_scale=16, attn_scale=0.3)


def rope(scaling: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return dict(kind="rope", **options) | ({"scaling": scaling} if scaling else {})


def layer(position: dict[str, Any], mask: dict[str, Any], ffn: dict[str, Any] = DENSE, **options: Any) -> dict:
    return dict(position=position, mask=mask, ffn=ffn, **options)


def irope(ffn: dict[str, Any] = DENSE, far: dict[str, Any] = DENSE, scaling: dict | None = None) -> list[dict]:
    local = [layer(rope(scaling), CHUNKS, kind, qk_norm="rms") for kind in (DENSE, ffn, DENSE)]
    return [*local, layer(dict(kind="nope"), GLOBAL, far, temperature=RISES)]


SIGMOID = dict(kind="moe", num_experts=4, hidden_dim=32, top_k=1, shared=DENSE | {"hidden_dim": 32})
SOFTMAX = dict(kind="moe", num_experts=4, hidden_dim=32, top_k=2, router=dict(kind="softmax"))
YARN = dict(kind="yarn", factor=4.0, original_length=32)
LLAMA3 = dict(kind="llama3", factor=8.0, original_length=32, low_freq_factor=1.0, high_freq_factor=4.0)
LONG = dict(kind="longrope", original_length=32, factor=4.0, long_factor=[1.0, 1.1, 1.3, 1.8, 2.2, 3.0, 3.5, 4.0])
DYNAMIC = dict(kind="dynamic_ntk", factor=4.0, original_length=32, step=1)
PLAIN = layer(rope(), GLOBAL)

CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "irope": ("llama4_text", irope(), {}),
    "irope-interleaved": ("llama4_text", [one | {"position": one["position"] | {"pairing": "interleaved"}}
                                          if one["position"]["kind"] == "rope" else one for one in irope()], {}),
    "irope-moe": ("llama4_text", irope(SIGMOID, SIGMOID, LLAMA3), {"output_head": "untied"}),
    "llama": ("llama", [PLAIN], {}),
    "llama-pi": ("llama", [layer(rope(dict(kind="linear", factor=4.0)), GLOBAL)], {}),
    "llama-dynamic": ("llama", [layer(rope(DYNAMIC), GLOBAL)], {}),
    "llama-yarn": ("llama", [layer(rope(YARN), GLOBAL)], {}),
    "llama-llama3": ("llama", [layer(rope(LLAMA3), GLOBAL)], {}),
    "llama-longrope": ("llama", [layer(rope(LONG), GLOBAL)], {}),
    "mistral": ("mistral", [layer(rope(), WINDOW)], {}),
    "qwen2": ("qwen2", [PLAIN, PLAIN, layer(rope(), WINDOW), layer(rope(), WINDOW)], {"attention_bias": "qkv"}),
    "qwen3": ("qwen3", [PLAIN | {"qk_norm": "learned"}], {}),
    "qwen3-moe": ("qwen3_moe", [layer(rope(), GLOBAL, SOFTMAX, qk_norm="learned"), PLAIN | {"qk_norm": "learned"}], {}),
    "mixtral": ("mixtral", [layer(rope(), GLOBAL, SOFTMAX)], {}),
    "smollm3": ("smollm3", [PLAIN, PLAIN, PLAIN, layer(dict(kind="nope"), GLOBAL)], {}),
    "cohere2": (
        "cohere2",
        [*[layer(rope(), WINDOW)] * 3, layer(dict(kind="nope"), GLOBAL)],
        {"block": "parallel", "norm": "layer", "logit_scale": 0.5},
    ),
    "olmo2": ("olmo2", [PLAIN | {"qk_norm": "learned_all_heads"}], {"block": "post_norm"}),
    "olmo3": (
        "olmo3",
        [layer(*of, qk_norm="learned_all_heads") for of in [(rope(), WINDOW)] * 3 + [(rope(YARN), GLOBAL)]],
        {"block": "post_norm"},
    ),
}  # fmt: skip
"""The family expected, the layers that repeat, and other fields of the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", default=sys.executable, metavar="PATH", help="with torch, transformers")
    parser.add_argument("--only", action="append", choices=CASES, metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.only or CASES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokens = np.random.default_rng(0).integers(0, 304, (2, LENGTH), np.int32)
        np.save(work / "tokens.npy", tokens)
        (work / "text.txt").write_text(TEXT, encoding="utf-8")
        for name, (family, layers, options) in cases.items():
            make(work / name, family, layers, options, args.steps)
            print(f"trained and exported {name}", flush=True)
        subprocess.run([args.reference_python, "-c", REFERENCE, str(work), *cases], check=True)
        print(f"\n{'case':<20} {'family':<12} {'largest difference':>18} {'largest logit':>14}  ids")
        worst, good = 0.0, True
        for name, (family, _, _) in cases.items():
            ours, tokenizer = our_logits(work / name / "run", tokens)
            theirs = np.load(work / name / "logits.npy")
            same_ids = np.array_equal(np.load(work / name / "ids.npy"), tokenizer.encode(TEXT))
            found = float(np.abs(ours - theirs).max())
            worst, good = max(worst, found), good and same_ids and found < GATE
            largest = np.abs(theirs).max()
            print(f"{name:<20} {family:<12} {found:>18.1e} {largest:>14.2f}  {'same' if same_ids else 'DIFFERENT'}")
    print(json.dumps({"pass": good, "largest": worst, "gate": GATE, "cases": len(cases)}))
    sys.exit(not good)


def make(folder: Path, family: str, layers: list[dict], options: dict[str, Any], steps: int) -> None:
    """Train a run in `folder/run` and export it to `folder/exported`."""
    change = {"model.pattern": layers, "train.steps": steps, "evals": [], "model.vocab_size": 304}
    change |= {f"model.{key}": value for key, value in options.items()}
    given = [f"--config.{key}={value}" for key, value in change.items()]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        code = cli.main(["train", f"--config={ROOT / 'configs' / 'debug.py'}", f"--run-dir={folder / 'run'}", *given])
        asked = [] if family.startswith("llama") else [f"--family={family}"]  # those are found without
        code = code or cli.main(["export", str(folder / "run"), str(folder / "exported"), *asked])
    if code:
        sys.exit(f"{folder.name}: {told.getvalue()}")
    written = json.loads((folder / "exported" / "config.json").read_text())["model_type"]
    if written != family:
        sys.exit(f"{folder.name}: exported as {written}, not {family}")


def our_logits(run: Path, tokens: np.ndarray) -> tuple[np.ndarray, Any]:
    """Logits of a run's newest parameters, and its tokenizer."""
    experiment = resolve(run_config(run))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        params, _ = load_params(run, experiment.model, jax.sharding.get_mesh())
    return plain_logits(experiment.model, jax.device_get(params), tokens), experiment.data.tokenizer


if __name__ == "__main__":
    main()
