"""Time divided among what a run does, and the share of a chip's peak."""

import pytest

from irope_jax.core.chips import CHIPS, chip_of
from irope_jax.train.meter import Stopwatch


def test_whatever_is_not_something_else_is_steps():
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    now[0] = 2.0
    with watch.during("data"):
        now[0] = 3.0
    with pytest.raises(KeyError), watch.during("checkpoint"):
        now[0] = 3.5
        raise KeyError
    with watch.during("data"):
        now[0] = 4.0
    assert watch.lap() == {"steps": 2.0, "data": 1.5, "checkpoint": 0.5}
    now[0] = 5.0
    assert watch.lap() == {"steps": 1.0}


def test_chips_are_known_by_the_names_jax_gives_them():
    assert chip_of("TPU v5").bf16_flops == 459e12 and chip_of("TPU v5 lite").bf16_flops == 197e12
    assert chip_of("NVIDIA A100-SXM4-80GB") is CHIPS["NVIDIA A100"]
    assert chip_of("NVIDIA H100 80GB HBM3").bf16_flops == 989.4e12
    assert chip_of("cpu") is None and chip_of("TPU v5x") is None and chip_of("NVIDIA H100 PCIe") is None
