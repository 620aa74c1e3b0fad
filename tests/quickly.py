"""What keeps the tests short: how they are compiled, and which of them are left out unless asked for."""

import os
from importlib.metadata import version

import pytest

# Programs of tests run once, on tiny arrays: it is compiling that takes time.

FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # The older emitters of XLA:CPU compile in two thirds of the time. JAX 0.11 does not know them and refuses the flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"

EVERYTHING = bool(os.environ.get("IROPE_EVERY_TEST"))
"""Run all that is left out otherwise."""

thorough = pytest.mark.thorough
"""One more case of what others show: run with IROPE_EVERY_TEST=1, or when named on the command line."""


def keep(*values, of):
    """Parameters `of` a test, all but `values` thorough."""
    assert all(value in of for value in values), (values, of)
    return [
        one if one in values else pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=thorough)
        for one in of
    ]
