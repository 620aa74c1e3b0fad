"""Text and values of plans."""

from irope_jax.core.chips import CHIPS
from irope_jax.plan.job import Figures, roofline, target_size
from irope_jax.plan.longest import longest
from irope_jax.plan.measured import failure
from irope_jax.plan.meshes import meshes
from irope_jax.plan.table import fits, flag

V5P = CHIPS["TPU v5"]


def test_fits_or_how_much_is_short():
    assert fits(50e9, V5P) == "fits 95 GB (53%)"
    assert fits(100e9, V5P) == "short by 5.0 GB of 95"


def test_a_difference_over_a_tenth_is_marked():
    assert flag(100, 109) == "" and flag(100, 112) == "DIFFER: by hand +12%" and flag(None, 3) == ""


def test_what_bounds_a_step():
    found = roofline(Figures(parameters=0, flops=459e12, traffic=2765e9 * 2, sent={"all-gather": 200e9 * 3}), V5P)
    assert (found.compute, found.memory, found.network) == (1.0, 2.0, 3.0) and found.bound == "network"
    one_link = roofline(Figures(parameters=0, sent={"collective-permute": 100e9}), V5P)
    assert one_link.network == 1.0


def test_lack_of_memory_is_a_line_with_both_numbers():
    said = failure("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
                   "Used 120.00G of 95.74G hbm. Exceeded hbm capacity by 24.26G.\n\nTotal hbm usage ...")  # fmt: skip
    assert said.why == "needs 128.85 GB of the 102.80 GB that the compiler has on a chip"
    assert round(said.short / 2**30, 2) == 24.26
    assert failure("INTERNAL: something\nmore").why == "the compiler says: INTERNAL: something"


def test_sizes_of_targets_by_their_names():
    assert (target_size("v5p:4x4x4"), target_size("h100:8"), target_size("v5p"), target_size("v5p:axb")) == (
        64, 8, None, None,
    )  # fmt: skip


def test_meshes_are_every_product_once():
    found = [tuple(mesh.sizes.values()) for mesh in meshes(8)]
    assert len(found) == len(set(found)) == 35 and all(sizes.count(1) >= 2 for sizes in found)


def test_the_longest_context_is_the_greatest_that_compiles_and_fits():
    from tests.plan.test_analytic import scout

    asked = []

    def compile_job(job):
        asked.append(job.length)
        return Figures(parameters=0, total=90e9 if job.length <= 1_048_576 else 100e9)

    length, tried = longest(lambda n: scout().at_length(n), V5P, compile_job)
    assert length == 1_048_576 and asked == sorted(asked, reverse=True) and len(tried) == len(asked)
    by_hand, _ = longest(lambda n: scout().at_length(n), V5P, lambda job: None)
    assert by_hand == asked[0]
