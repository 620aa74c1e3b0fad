"""What each kind of layer does and sends when the sequence spans devices, against an all-gather in every layer.

    python scripts/context_table.py                       Llama 4 Scout at 8k, 131k, 1M and 10M tokens; a second
    python scripts/context_table.py --local sliding --size 4096 --lengths 32768,262144 --devices 8,16
    python scripts/context_table.py --query-heads 32 --key-heads 4 --width 64 --far ring --gradients keys

Bytes are those that one device sends for one row, layer by layer, forward and backward, computed by
`irope_jax.context.strategy`, the function that decides in training; nothing is compiled and no device is touched.
Gradients of keys travel around a ring in float32, elsewhere in the format of the keys (`--gradients keys`: everywhere).
Documents fill their rows; `--packed` lets them start anywhere.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from irope_jax.attention.mask import Chunked, Global, Sliding
from irope_jax.context.layout import ContextLayout
from irope_jax.context.strategy import CallShape, ContextConfig, Decision, Promises, decide, megabytes
from irope_jax.core.config import ConfigError


def integers(text: str) -> list[int]:
    return [int(x.replace("_", "")) for x in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=integers, default=[8192, 131_072, 1_048_576, 10_485_760])
    parser.add_argument("--devices", type=integers, default=[8, 64, 512])
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=["contiguous", "zigzag"])
    parser.add_argument("--local", choices=("chunked", "sliding"), default="chunked", help="mask of the local layers")
    parser.add_argument("--size", type=int, default=8192, help="tokens per chunk or window")
    parser.add_argument("--query-heads", type=int, default=40)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--itemsize", type=int, default=2, help="bytes per number")
    parser.add_argument("--layers", type=integers, default=[36, 12], help="how many are local, how many global")
    parser.add_argument("--packed", action="store_true", help="documents may start at any row")
    for field in ("far", "near", "gradients"):
        parser.add_argument(f"--{field}", default=getattr(ContextConfig(), field))
    return parser.parse_args()


def way(decision: Decision) -> str:
    """Few words: `halo 6144`, `exchange 8 x ring 8`."""
    ring = f"ring {decision.hops + 1}"
    return {
        "local": "local",
        "halo": f"halo {decision.halo}",
        "ring": ring,
        "all_to_all": f"exchange {decision.group}" + f" x {ring}" * (decision.hops > 0),
        "gather": "gather",
    }[decision.kind]


def sent(decision: Decision) -> str:
    if not decision.total_bytes:
        return "0"
    return f"{megabytes(decision.forward_bytes)} + {megabytes(decision.backward_bytes)}"


def line(args, length: int, parts: int, kind: str) -> list[str]:
    """The cells of one row."""
    shape = CallShape(parts, length, length, args.query_heads, args.key_heads, args.width, args.itemsize)
    config = ContextConfig(far=args.far, near=args.near, gradients=args.gradients)
    local = Chunked(args.size) if args.local == "chunked" else Sliding(args.size)
    promises = Promises() if args.packed else Promises(document_multiple=0, unbroken=True)
    cells = [f"{length:,}", str(parts), kind]
    try:
        layout = ContextLayout(kind, parts)
        near, far = (decide(mask, shape, layout, promises, config) for mask in (local, Global()))
    except ConfigError as error:
        return [*cells, f"impossible: {error}"]
    total = args.layers[0] * near.total_bytes + args.layers[1] * far.total_bytes
    gathered = sum(args.layers) * (near.gather_forward_bytes + near.gather_backward_bytes)
    ratio = f"{gathered / total:.1f}x" if total else "-"
    return [*cells, way(near), sent(near), way(far), sent(far), megabytes(total), megabytes(gathered), ratio]


def aligned(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; a row that is impossible ends in a sentence of any width."""
    widths = [max(len(row[i]) for row in rows if len(row) == len(rows[0])) for i in range(len(rows[0]))]
    words = (2, 3, 5)
    pad = lambda i, cell: cell.ljust(widths[i]) if i in words else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def main() -> None:
    args = arguments()
    counts = f"{args.layers[0]} {args.local} {args.size} and {args.layers[1]} global layers"
    heads = f"{args.query_heads} query and {args.key_heads} key heads of {args.width}, {args.itemsize} bytes a number"
    print(f"{counts}; {heads}")
    print("bytes a device sends per layer: forward + backward; whole model: all layers, both ways\n")
    title = ["tokens", "devices", "layout", "local layer", "sends", "global layer", "sends"]
    rows = [[*title, "whole model", "all-gather everywhere", "saved"]]
    for length in args.lengths:
        for parts in args.devices:
            rows += [line(args, length, parts, kind) for kind in args.layouts]
    print(aligned(rows))


if __name__ == "__main__":
    main()
