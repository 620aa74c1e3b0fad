"""What `--mesh=auto` picks, against a long shortlist that was all compiled (`scripts/exhaustive_meshes.py`)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from irope_jax.core.chips import CHIPS
from irope_jax.experiment import load_config, resolve
from irope_jax.plan.analytic import closed_form
from irope_jax.plan.job import Failure, Figures, chip_of_target, compiler_of_target, roofline
from irope_jax.plan.meshes import candidates, judged, ranked, ranked_lines, step_seconds
from irope_jax.plan_flags import CANDIDATES
from irope_jax.sharding.mesh import MeshConfig
from scripts.exhaustive_meshes import CONFIG, job_of

STORED = json.loads((Path(__file__).parent / "meshes.json").read_text())
CHIP = chip_of_target(STORED["target"])


@pytest.fixture(scope="module")
def found():
    """Candidates in the order by hand as it is now, each with what the compiler said."""
    experiment, compiled = resolve(load_config(str(CONFIG))), {}
    for row in STORED["candidates"]:
        model = replace(experiment.model, remat=row["remat"])
        model = replace(model, context=replace(model.context, layout=row["layout"]))
        job = job_of(replace(experiment, mesh=MeshConfig(**row["mesh"]), model=model))
        compiled[row["label"]] = job, Figures.of(row["compiled"]) if row["compiled"] else Failure(row["why"])
    results = []
    for label, (job, said) in compiled.items():
        one = judged(job, closed_form(job), CHIP)
        assert one.label == label
        results.append((one, said))
    assert len(results) >= 10
    return sorted(results, key=lambda result: result[0].seconds)


def test_of_the_few_that_are_compiled_the_best_is_within_a_twentieth_of_the_best_of_all(found):
    pick, best = ranked(found[:CANDIDATES], CHIP)[0], ranked(found, CHIP)[0]
    assert isinstance(pick[1], Figures) and pick[1].total <= CHIP.memory
    assert step_seconds(pick, CHIP) <= 1.05 * step_seconds(best, CHIP)


def test_by_hand_each_is_within_a_twentieth_of_what_was_compiled(found):
    for one, compiled in found:
        assert one.by_hand.total == pytest.approx(compiled.total, rel=0.05), one.label
        assert one.seconds == pytest.approx(step_seconds((one, compiled), CHIP), rel=0.05), one.label


def test_what_fits_comes_before_what_does_not(found):
    (first, said), (second, _), (third, other), *_ = found
    large = replace(said, total=2 * CHIP.memory)
    results = [(first, large), (second, Failure("no")), (third, other)]
    assert [one is third for one, _ in ranked(results, CHIP)] == [True, False, False]
    lines = ranked_lines(ranked(results, CHIP), CHIP)
    assert sum("does not fit" in line for line in lines) == 1 and sum("does not compile" in line for line in lines) == 1
    assert ranked([(replace(first, fits=False), None), (third, None)], CHIP)[0][0] is third


def test_a_contiguous_ring_waits_for_its_last_device(found):
    one, said = found[0]
    model = replace(one.job.model, context=replace(one.job.model.context, layout="contiguous"))
    other = replace(one, job=replace(one.job, model=model))
    more = step_seconds((other, said), CHIP) - step_seconds((one, said), CHIP)
    assert more == pytest.approx(0.5 * roofline(said, CHIP).compute)


def test_the_candidates_of_a_small_model_are_meshes_that_divide():
    experiment = resolve(load_config(str(CONFIG.parent / "debug.py")))
    tpu = CHIPS["TPU v5 lite"]
    build = lambda changed: job_of(changed, devices=4)
    options = candidates(experiment, build, closed_form, 4, tpu, "train")
    assert options and all(one.fits for one in options)
    assert [one.seconds for one in options] == sorted(one.seconds for one in options)


def test_whose_compiler_it_is_and_what_follows():
    names = {"cpu:8": "cpu", "h100:8": "gpu", "a100:8": "gpu", "v5p:4x4x4": "tpu", "tpu7x:2x2x1": "tpu"}
    assert {target: compiler_of_target(target) for target in names} == names


def test_time_to_the_host_is_for_what_goes_there_and_comes_back(found):
    job = found[0][0].job
    offloading = replace(job, model=replace(job.model, remat="offload"))
    by_hand = closed_form(offloading)
    assert by_hand.host > 0 and by_hand.host_traffic == 2 * by_hand.host
    assert roofline(by_hand, CHIP).host == 2 * by_hand.host / CHIP.host
    halves = closed_form(replace(offloading, train=replace(job.train, accumulate=2)))
    assert halves.host == by_hand.host / 2 and halves.host_traffic == by_hand.host_traffic
    assert closed_form(job, compiler="tpu").flops > closed_form(job, compiler="gpu").flops
