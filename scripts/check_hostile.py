"""Import damaged and hostile checkpoints: each ends with exit code 2 and one line, or is imported whole.

    python scripts/check_hostile.py --count=2000

Mutates a small Llama 4 with experts (tests/golden/families/llama4_moe_interleave2): flipped bits and cuts of the
weights, its header rewritten (shapes, types, offsets), values of config.json replaced. Prints how many went which way.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from irope_jax import cli  # noqa: E402

SOURCE = ROOT / "tests" / "golden" / "families" / "llama4_moe_interleave2"
ODD = [None, True, False, 0, -1, 1, 3, 2**31, 2**80, 1e308, float("nan"), float("inf"), 0.5, "", "x", "../..", [], [1],
       {}, {"a": 1}, [[[]]]]  # fmt: skip


def whole(folder: Path) -> None:
    """The checkpoint that is damaged: the golden one with room for bytes, so that undamaged it is imported."""
    folder.mkdir()
    tensors = load_file(SOURCE / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (288, tensors[name].shape[1]))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((SOURCE / "config.json").read_text()) | {"vocab_size": 288}
    (folder / "config.json").write_text(json.dumps(config))


def mutate(rng: random.Random, folder: Path) -> str:
    """Change one thing of a whole checkpoint; says what."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    data = bytearray(weights.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    how = rng.choice(["flip header", "flip anywhere", "cut", "header", "config", "config", "config text", "index"])
    if how == "flip header":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    elif how == "flip anywhere":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.choice([rng.randrange(16), rng.randrange(len(data))]) :]
    elif how == "header":
        header = json.loads(data[8 : 8 + size])
        name = rng.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        match rng.randrange(5):
            case 0:
                entry["shape"] = entry["shape"][::-1] if len(entry["shape"]) > 1 else [1, *entry["shape"]]
            case 1:
                entry["dtype"] = rng.choice(["F16", "BF16", "I32", "U8", "F8_E4M3", "Q9"])
            case 2:
                entry["data_offsets"] = [rng.randrange(-9, len(data)), rng.randrange(len(data) * 2)]
            case 3:
                header[rng.choice(["../../x", name + ".bias", ""])] = header.pop(name)
            case 4:
                entry["shape"] = [rng.choice([0, -1, 2**62, 3]) for _ in entry["shape"]]
        text = json.dumps(header).encode()
        data = bytearray(struct.pack("<Q", len(text)) + text + data[8 + size :])
    elif how == "config":
        values = json.loads(config.read_text())
        values[rng.choice([*values, "quantization_config", "auto_map", "rope_scaling"])] = rng.choice(ODD)
        config.write_text(json.dumps(values))
    elif how == "config text":
        text = bytearray(config.read_bytes())
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        config.write_bytes(text)
    else:
        file = rng.choice(["../model.safetensors", "/etc/passwd", "model.safetensors", "", 5, "nothing.safetensors"])
        index = {"weight_map": {"model.norm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.write_bytes(data)
    return how


def attempt(source: Path, target: Path) -> tuple[int, str]:
    """Exit code and what was said on stderr, but for warnings."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = cli.main(["import", str(source), str(target), "--config.evals=()"])
    return code, "\n".join(line for line in said.getvalue().splitlines() if line.startswith("irope: error"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="that an import may take")
    args = parser.parse_args()
    ways: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        undamaged = Path(scratch) / "undamaged"
        whole(undamaged)
        if attempt(undamaged, Path(scratch) / "model")[0] != 0:
            raise SystemExit("the undamaged checkpoint is not imported: nothing would be learned")
        for i in range(args.count):
            rng = random.Random(f"{args.seed} {i}")
            source, out = Path(scratch) / "source", Path(scratch) / "out"
            shutil.copytree(undamaged, source)
            how = mutate(rng, source)
            signal.alarm(args.seconds)
            try:
                code, said = attempt(source, out / "model")
            except BaseException as error:
                code, said = -1, f"{type(error).__name__}: {error}"
            signal.alarm(0)
            left = [path.name for path in out.iterdir()] if out.exists() else []
            fine = (code == 0 and left == ["model"]) or (code == 2 and not left and said.count("\n") == 0 and said)
            ways[how, "imported" if code == 0 else "refused" if fine else "WRONG"] += 1
            if not fine:
                wrong.append((i, how, code, said[:300], left))
                print(*wrong[-1], flush=True)
            shutil.rmtree(source)
            shutil.rmtree(out, ignore_errors=True)
            if (i + 1) % 100 == 0:
                print(f"{i + 1} of {args.count}, {len(wrong)} wrong", flush=True)
    for (how, end), count in sorted(ways.items()):
        print(f"{how:<14} {end:<10} {count:>6}")
    print(json.dumps({"count": args.count, "wrong": len(wrong), "pass": not wrong}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
