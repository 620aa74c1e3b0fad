"""What does iRoPE buy? Trained at 128 tokens, judged far beyond: each part of it taken away, and its rivals beside it.

    irope sweep experiments/what_irope_buys --only=headline --jobs=2
    irope report experiments/what_irope_buys --only=headline

Every seed has one trained start: iRoPE, 500 steps on pairs at 32 tokens, then 1,200 on novels and facts at 128. An arm
goes on from it with its own layers and the same 300 steps at 128 tokens, where it must be right before it is judged
beyond. An arm is one line of ARMS.
"""

import math
import sys
from pathlib import Path

from irope_jax.study.grid import Cell, Study, product, seeds

CONFIGS = Path(__file__).parents[2] / "configs"
sys.path.insert(0, str(CONFIGS))
from quickstart import FACTS, HELD_OUT, LENGTH  # noqa: E402

QUICKSTART = "../../configs/quickstart.py"
FFN = dict(kind="swiglu", hidden_dim=128)
ROPE = dict(kind="rope", theta=10_000.0)
NOPE, GLOBAL = dict(kind="nope"), dict(kind="global")
LOG_N = dict(kind="log_floor", floor_scale=LENGTH, attn_scale=1 / math.log(LENGTH))
CHUNK = LENGTH // 4


def layer(position=ROPE, mask=GLOBAL, temperature=None) -> dict:
    return dict(position=position, mask=mask, ffn=FFN) | ({"temperature": temperature} if temperature else {})


def local(size: int = CHUNK, shift: int = 0) -> dict:
    return layer(mask=dict(kind="chunked", size=size, shift=shift))


def irope(interval: int = 4, size: int = CHUNK, temperature=LOG_N) -> tuple:
    """`interval - 1` chunk-local RoPE layers, then one that sees everything without positions."""
    return (*[local(size)] * (interval - 1), layer(NOPE, temperature=temperature))


WINDOW = layer(mask=dict(kind="sliding", size=CHUNK))
P_ROPE = dict(ROPE, fraction=0.5)


def retrieval(name: str, facts: int, queries: int, times: tuple[int, ...]) -> dict:
    task = FACTS | dict(haystack=HELD_OUT)
    lengths = tuple(LENGTH * n for n in times)
    return dict(kind="retrieval", name=name, task=task, lengths=lengths, facts=facts, queries=queries)


NEAR = (
    retrieval("retrieval", 8, 512, (1, 4, 16, 64)),
    dict(kind="perplexity", lengths=tuple(LENGTH * n for n in (1, 4, 16, 64)), tokens=131_072),
)
FAR = (
    retrieval("1 fact", 1, 4, (64, 1024, 8192)),
    retrieval("8 facts", 8, 16, (64, 1024, 8192)),
    retrieval("64 facts", 64, 64, (64, 1024, 8192)),
)
"""A million tokens take half a minute where all but the last layer are local, and hours where they are not."""

TRAINED_ON = (
    dict(source=FACTS | dict(num_facts=(1, 16), num_queries=(3, 16), answer_weight=2.5), weight=0.8),
    dict(source=dict(kind="corpus", split="train"), weight=0.2),
)
"""Twice the facts of the quickstart: a model that never tells 16 keys apart loses a twentieth of 64."""


def arm(*pattern: dict, headline: bool = False, far: bool = False, **overrides) -> dict:
    """What makes an arm: its layers, and whatever else of the config it changes (dots written as two underscores)."""
    values = {"model.pattern": pattern, "data.mixture": TRAINED_ON, "evals": NEAR + FAR if far else NEAR}
    values |= {path.replace("__", "."): value for path, value in overrides.items()}
    return dict(overrides=values, tags=("headline",) if headline else ())


LAST = layer(NOPE, temperature=LOG_N)
SHIFTED = local(shift=CHUNK // 2)
RANDOMISED = dict(kind="randomised", limit=64 * LENGTH)
ARMS = {
    "iRoPE": arm(*irope(), headline=True, far=True),
    "iRoPE, no temperature": arm(*irope(temperature=None), headline=True),
    "iRoPE, borders shifted": arm(local(), SHIFTED, local(), LAST, headline=True, far=True),
    "RoPE-NoPE, sliding window": arm(WINDOW, WINDOW, WINDOW, LAST, headline=True, far=True),
    "RoPE-NoPE, no local masks": arm(layer(), layer(), layer(), layer(NOPE), headline=True),
    "all RoPE": arm(layer(), headline=True),
    "all NoPE": arm(layer(NOPE), headline=True),
    "all NoPE, log-n": arm(LAST),
    "p-RoPE": arm(layer(P_ROPE)),
    "p-RoPE, log-n": arm(layer(P_ROPE, temperature=LOG_N)),
    "ALiBi": arm(layer(dict(kind="alibi"))),
    "randomised positions": arm(layer(), data__positions=RANDOMISED),
    "interval 2": arm(*irope(2)),
    "global first": arm(LAST, *[local()] * 3),
    "chunks of 16": arm(*irope(size=16)),
    "chunks of 64": arm(*irope(size=64)),
}


def get_study() -> Study:
    lesson = Cell(name="lesson", config=f"{QUICKSTART}:recall", overrides={"evals": ()})
    longer = {"evals": (), "data.mixture": TRAINED_ON, "train.steps": 1200}
    start = Cell(name="start", config=f"{QUICKSTART}:irope", overrides=longer, starts_from="lesson")
    arms = [
        Cell(
            name=name.replace(", ", "-").replace(" ", "_"),
            config=f"{QUICKSTART}:rope",
            overrides={**made["overrides"], "description": name},
            starts_from="start",
            tags=made["tags"],
        )
        for name, made in ARMS.items()
    ]
    return Study(
        name="what_irope_buys",
        question="What does iRoPE buy beyond the length it was trained at?",
        prediction="Local masks carry most of it: with chunks or windows retrieval stays above 0.97 at 64 times the "
        "training length, whatever the temperature; the temperature matters beyond that. Without local masks RoPE "
        "layers meet distances they never saw: interleaved falls below 0.8 at 64 times, all RoPE below 0.4. Facts "
        "across a chunk border are the hole of chunks; shifted borders close it and windows do not have it.",
        verdict="Half right, and the wrong half matters. Local masks are needed: without them 0.08 "
        "(interleaved) and 0.01 "
        "(all RoPE) at 64 times, with windows 0.999. But they are not enough: without the temperature chunks fall to "
        "0.83, from 0.61 to 0.95 by seed. At a million tokens iRoPE finds 0.946 of 64 facts inside a chunk, "
        "short of the "
        "0.95 that was hoped for. Shifted borders help facts on a border (0.73 to 0.94 at the training "
        "length) and lose "
        "some of the others far out (0.905). All NoPE is below 0.97 at its own length: not a fair arm yet. A longer "
        "trained start that lifts the far end would change our mind about the temperature's limit.",
        cells=product([lesson, start, *arms], seeds(3)),
    )
