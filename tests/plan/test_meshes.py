"""What `--mesh=auto` picks, against a long shortlist that was all compiled (`scripts/exhaustive_meshes.py`)."""

import json
from pathlib import Path

from irope_jax.plan.job import Figures, chip_of_target, roofline

STORED = json.loads((Path(__file__).parent / "meshes.json").read_text())
COMPILED_BY_DEFAULT = 3


def test_of_the_few_that_are_compiled_the_best_is_within_a_twentieth_of_the_best_of_all():
    chip = chip_of_target(STORED["target"])
    found = [Figures.of(one["compiled"]) for one in STORED["candidates"] if one["compiled"]]
    assert len(found) >= 10
    seconds = [roofline(one, chip).in_turn if one.total <= chip.memory else float("inf") for one in found]
    assert min(seconds[:COMPILED_BY_DEFAULT]) <= 1.05 * min(seconds)


def test_by_hand_each_is_within_a_twentieth_of_what_was_compiled():
    chip = chip_of_target(STORED["target"])
    for one in STORED["candidates"]:
        compiled = Figures.of(one["compiled"])
        assert abs(one["by_hand"]["total"] / compiled.total - 1) < 0.05, one["label"]
        assert abs(one["by_hand"]["seconds"] / roofline(compiled, chip).in_turn - 1) < 0.05, one["label"]
