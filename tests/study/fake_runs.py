"""Run directories as training and evaluation would leave them, from closed formulas: no model, no chance."""

import itertools
import math
import random
from pathlib import Path

from irope_jax.core.records import RunWriter

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def make_run(
    directory: Path,
    name: str,
    *,
    length: int = 128,
    steps: int = 400,
    done: int | None = None,
    decay: float = 0.0,
    lengths: tuple[int, ...] = (128, 512, 2048, 8192),
    evaluations: tuple[str, ...] = ("perplexity", "retrieval"),
    depths: tuple[float, ...] = DEPTHS,
    config: dict | None = None,
    chance: float | None = 1 / 26,
    seed: int = 0,
) -> Path:
    """One run. `decay` is how much accuracy and loss worsen with each factor 4 beyond the training length."""
    rng = random.Random(seed)
    done = steps if done is None else done
    resolved = {
        "name": name,
        "description": f"{name}, from scratch on novels and facts",
        "model": {"layers": [{"position": "rope"}, {"position": "nope"}], "width": 128},
        "data": {"seq_len": length},
        "train": {"steps": steps},
    } | (config or {})
    with RunWriter(directory / name, resolved, f"{seed:012x}", tensorboard=False) as w:
        w.start(0, parameters=1_234_567, devices=1)
        for step in range(5, done + 1, 5):
            loss = 1.4 + 2.6 * math.exp(-step / 60) - 0.4 * (step > 200) + 0.12 * rng.gauss(0, 1) + 0.1 * seed
            w.train(
                step,
                {
                    "loss": loss, "grad_norm": 1.0, "update_norm": 0.1, "learning_rate": 1e-3, "tokens": step * 4096,
                    "tokens_per_second": 21_000, "flops_per_second": 3.3e10, "memory_bytes": 812e6,
                    "step_seconds": 0.2, "skipped": 0,
                },
            )  # fmt: skip
        for context in lengths:
            beyond = max(0.0, math.log(context / length, 4))
            if "perplexity" in evaluations:
                total = 0.0
                edges = [0, *(2**i for i in range(int(math.log2(context)) + 1))]
                for low, high in itertools.pairwise(edges):
                    loss = 1.35 + 2.2 / (1 + high) ** 0.5
                    loss += 0.8 * decay * max(0.0, math.log(high / length, 4)) + 0.01 * rng.gauss(0, 1)
                    total += loss * (high - low)
                    where = {"length": context, "from": low, "to": high}
                    w.measure(done, "perplexity", "nll_by_position", loss, 64 * (high - low), where)
                w.measure(done, "perplexity", "nll_by_length", total / context, 64 * context, {"length": context})
            if "retrieval" in evaluations:
                for depth in depths:
                    for straddle in (False, True):
                        count = 16 if straddle else 64
                        right = max(0.03, 0.995 - decay * beyond * (1.3 - depth) - 0.5 * straddle)
                        hits = sum(rng.random() < right for _ in range(count))
                        where = {"length": context, "depth": depth, "straddle": straddle}
                        w.measure(done, "retrieval", "accuracy", hits / count, count, where)
                        w.measure(done, "retrieval", "answer_nll", 3 * (1 - right), count, where)
        if "retrieval" in evaluations and chance is not None:
            w.measure(done, "retrieval", "chance", chance, 1)
    return directory / name
