"""The closed form against what compilers said (`scripts/refresh_plan_cells.py` asks them), and against itself."""

import json
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from irope_jax.attention.mask import Global, visible_pairs
from irope_jax.experiment import check_devices, load_config, resolve
from irope_jax.model.cost import abstract_params, train_flops_per_token
from irope_jax.plan.analytic import closed_form, weights
from irope_jax.plan.job import Figures, Job, compiler_of_target
from irope_jax.sharding.mesh import MeshConfig
from tests.plan.cells import CELLS, WHOLE, job_of

CONFIGS = Path(__file__).parents[2] / "configs"
STORED = json.loads((Path(__file__).parent / "cells.json").read_text())


def scout(devices=64, **changes):
    experiment = resolve(load_config(f"{CONFIGS / 'llama4_scout.py'}:1m"), list(changes.items()))
    mesh = check_devices(experiment, devices)
    return Job(model=experiment.model, data=experiment.data, train=experiment.train, mesh=mesh)


DISAGREE = {
    "cpu, fsdp x context": "by hand 17 % too little: XLA:CPU sums the gradient of the head once more",
}
"""Cells in which the closed form is not within the bounds, and why."""


def test_every_cell_was_compiled():
    """python scripts/refresh_plan_cells.py"""
    assert STORED.keys() == {*CELLS, *WHOLE}


def marked(name: str):
    return pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=DISAGREE[name])) if name in DISAGREE else name


@pytest.mark.parametrize("name", [marked(name) for name in STORED])
def test_it_agrees_with_the_compiler(name):
    target, job = job_of(name)
    compiled, by_hand = Figures.of(STORED[name]), closed_form(job, compiler=compiler_of_target(target))
    for field in ("parameters", "optimizer", "cache"):
        assert getattr(by_hand, field) == pytest.approx(getattr(compiled, field), rel=0.10), field
    assert by_hand.sent_bytes == pytest.approx(compiled.sent_bytes, rel=0.10)
    if job.mode == "train":
        assert by_hand.flops == pytest.approx(compiled.flops, rel=0.10)
    # Of two repeats, other arrays with a leading axis of 2 cannot be told from what is stacked.
    if compiled.kept is not None and job.model.num_layers > 2 * len(job.model.period):
        assert by_hand.kept == pytest.approx(compiled.kept, rel=0.20)


@pytest.mark.parametrize("name", [name for name in STORED if "train" in CELLS.get(name, "train") and "cpu" not in name])
def test_all_that_a_chip_holds_in_training_is_told_within_a_seventh(name):
    compiled, by_hand = Figures.of(STORED[name]), closed_form(job_of(name)[1])
    assert by_hand.total == pytest.approx(compiled.total, rel=0.15)


@pytest.mark.parametrize("file", ["debug.py", "llama4_scout.py", "llama4_maverick.py", "llama3_8b.py"])
def test_weights_are_those_that_the_model_makes(file):
    model = resolve(load_config(str(CONFIGS / file))).model
    made = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(nn.meta.unbox(abstract_params(model))))
    assert sum(w.size * w.repeats for w in weights(model, MeshConfig(data=1))) == made


def test_flops_of_a_step_that_computes_nothing_again_are_those_of_the_model():
    job = scout(1, **{"mesh.context": "1", "model.remat": "none"})
    job = job.at_length(16_384)
    of_the_model = 16_384 * train_flops_per_token(job.model.in_training(), 16_384)
    # A backward pass that keeps no scores computes them again: 2 N H a pair that the model does not count.
    pairs = sum(visible_pairs(layer.mask, 16_384) for layer in job.model.layers)
    again = 2 * job.model.num_heads * job.model.head_dim * pairs
    assert closed_form(job, compiler="gpu").flops == pytest.approx(of_the_model + again, rel=1e-3)


def test_what_is_held_does_not_depend_on_the_length_and_what_is_kept_grows_with_it():
    short, long = closed_form(scout()), closed_form(scout().at_length(2 * 1_048_576))
    assert (short.parameters, short.optimizer) == (long.parameters, long.optimizer)
    assert long.kept == 2 * short.kept


def test_chunks_send_nothing_for_attention_and_an_all_global_model_does():
    job = scout()
    everywhere = tuple(replace(layer, mask=Global()) for layer in job.model.pattern)
    rival = replace(job, model=replace(job.model, pattern=everywhere))
    sent = closed_form(job).sent["collective-permute"], closed_form(rival).sent["collective-permute"]
    assert sent[1] == 4 * sent[0] > 0


def test_a_cache_of_scout_is_a_quarter_of_an_all_global_one_and_less():
    job = replace(scout(), mode="decode", mesh=MeshConfig(data=1, context=64)).at_length(10_485_760)
    everywhere = tuple(replace(layer, mask=Global()) for layer in job.model.pattern)
    rival = replace(job, model=replace(job.model, pattern=everywhere))
    assert closed_form(job).cache * 3 < closed_form(rival).cache < closed_form(job).cache * 4
