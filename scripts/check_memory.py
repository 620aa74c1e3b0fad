"""How much memory does a conversion take? A made-up Llama 4 of 3 GB and 16 experts, imported and exported again.

    python scripts/check_memory.py [--gigabytes=3] [--folder=DIR]

Each step is a process of its own; its peak of resident memory is compared with that of a process that only loads the
package. A layer's experts are one tensor of a sixth of the checkpoint each for gate and up together, so holding the
largest tensor as a whole would already show. What was exported must be the source, tensor by tensor. The last line is
JSON; the gate is 1 GB over the bare process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from irope_jax.checkpoint.hf_config import model_from_hf
from irope_jax.checkpoint.hf_families import FAMILIES
from irope_jax.checkpoint.hf_places import wanted_tensors
from irope_jax.checkpoint.hf_weights import SINGLE

GATE = 1e9
BARE = "import jax; from irope_jax import run; jax.devices()"
EXPERTS, WIDTH = 16, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint, bfloat16")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, run, back = (Path(folder) / name for name in ("source", "run", "back"))
        # in another process: what is forked later would count this one's memory as its own
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size, largest = pool.apply(make, (source, args.gigabytes))
        print(f"made {size / 1e9:.2f} GB, the largest tensor {largest / 1e9:.2f} GB", flush=True)
        bare = peak("the package alone", [sys.executable, "-c", BARE])
        irope = [sys.executable, "-m", "irope_jax.cli"]
        peaks = {
            "import": peak("import", [*irope, "import", str(source), str(run)]),
            "export": peak("export", [*irope, "export", str(run), str(back), "--verify"]),
        }
        with safe_open(source / SINGLE, "numpy") as one, safe_open(back / SINGLE, "numpy") as other:
            names = list(one.keys())
            same = set(names) == set(other.keys())
            same = same and all(np.array_equal(one.get_tensor(name), other.get_tensor(name)) for name in names)
    over = {name: found - bare for name, found in peaks.items()}
    for name, bytes_over in over.items():
        print(f"{name}: {bytes_over / 1e6:,.0f} MB over the package alone ({bare / 1e6:,.0f} MB)")
    good = same and max(over.values()) < GATE
    print(json.dumps({"pass": good, "gate": GATE, "bare": bare, **over, "same_tensors": same}))
    sys.exit(not good)


def make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write the checkpoint as an export would; bytes in all and of the largest tensor."""
    folder.mkdir()
    layers, vocabulary = 2, 32_000
    rest = 2 * vocabulary * WIDTH
    hidden = int((gigabytes * 1e9 / 2 - rest) / (layers * (EXPERTS + 1) * 3 * WIDTH)) // 64 * 64
    config = {
        "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "dtype": "bfloat16",
        "vocab_size": vocabulary, "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": hidden, "intermediate_size_mlp": 2 * hidden,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "moe_layers": [0, 1], "no_rope_layers": [1, 0],
        "attention_chunk_size": 8192, "max_position_embeddings": 262_144, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model = model_from_hf(config)
    rng = np.random.default_rng(0)
    noise = (0.02 * rng.standard_normal(2**24)).astype(ml_dtypes.bfloat16)
    tensors = {}
    wanted = wanted_tensors(FAMILIES["llama4_text"].tables[0], model)
    order = lambda item: (item[1][0].row.per_layer, item[1][0].layer)
    for name, places in sorted(wanted.items(), key=order):
        shape = places[0].row.source_shape(model, places[0].layer)
        tensors[name] = np.resize(np.roll(noise, len(tensors)), shape)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return sum(sizes), max(sizes)


def peak(what: str, command: list[str]) -> int:
    """Most resident memory of a process, in bytes."""
    print(f"{what} …", flush=True)
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{what}: exit code {os.waitstatus_to_exitcode(status)}")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
