"""Flags and help of `irope generate`, apart from its work so that help does not wait for jax."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_generate(verb: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    write = verb(
        "generate",
        "text that a checkpoint writes on from prompts",
        """\
Read prompts with a trained or imported model and write on. A file is read first and once, however many prompts follow
it. One row is printed as it comes; several (prompts, samples) one after the other. Speed goes to standard error.

examples:
  irope generate --checkpoint=runs/quickstart/irope --prompt='It is a truth universally acknowledged'
  irope generate --checkpoint=RUN --prompt-file=book.txt --prompt='Who is the captain?' --prompt='Where does it end?'
  irope generate --checkpoint=RUN --prompt='Once' --temperature=0.8 --top-p=0.95 --samples=4 --tokens=100
  irope generate --checkpoint=RUN --prompt-file=book.txt --cache=int8 --guesses=8 --stop='\n\n'

The cache keeps every token in global layers, one chunk or window in the others (`irope show --decode=LENGTH`). All
devices share the text unless --config.mesh says otherwise; of several processes the first prints.
""",
        "Values of the run's config are changed as in `irope train`: --config.a.b=VALUE.",
    )
    write.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory")
    write.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    write.add_argument("--prompt", action="append", metavar="TEXT", help="text to go on from; may repeat")
    write.add_argument("--prompt-file", metavar="FILE", help="text before every prompt; - is standard input")
    write.add_argument("--no-bos", action="store_true", help="do not begin with the token that begins documents")
    write.add_argument("--tokens", type=int, default=128, metavar="N", help="most new tokens of a row (default: 128)")
    write.add_argument("--samples", type=int, default=1, metavar="N", help="rows for each prompt (default: 1)")
    write.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest (default)")
    write.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest")
    write.add_argument("--top-p", type=float, metavar="X", help="draw from the fewest with this probability together")
    write.add_argument("--min-p", type=float, metavar="X", help="draw from those this share as likely as the likeliest")
    write.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    write.add_argument("--stop", action="append", metavar="TEXT", help="text that ends a row; may repeat")
    write.add_argument("--ignore-eos", action="store_true", help="go on after the token that ends documents")
    write.add_argument(
        "--cache",
        choices=("float32", "bfloat16", "int8", "int4"),
        help="numbers of the cache (default: those the model computes in)",
    )
    write.add_argument(
        "--offload", action="store_true", help="keep what layers that see everything remember in the host's memory"
    )
    write.add_argument(
        "--guesses", type=int, default=0, metavar="N", help="tokens guessed from earlier text and checked at once"
    )
    write.add_argument(
        "--piece", type=int, default=2048, metavar="N", help="tokens of a prompt read at a time (default: 2048)"
    )
    write.add_argument(
        "--document-length",
        type=int,
        metavar="N",
        help="for scalings that follow the length: the length to turn for (default: prompt and new tokens)",
    )
    return write
