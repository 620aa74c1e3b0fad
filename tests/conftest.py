"""Eight simulated devices, a compile cache shared by test processes, and the repository root on the path."""

import gc
import logging
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import quickly  # noqa: E402

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices on a few busy cores may keep one another waiting for longer than XLA's 40 s, and it aborts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    f" --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600 {quickly.FLAGS}"
)

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# Traced programs are millions of objects that live on; looking through them for garbage again and again takes long.
gc.set_threshold(50_000, 50, 1000)


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: one more case of what other tests show; run with IROPE_EVERY_TEST=1")


def pytest_collection_modifyitems(config, items):
    if quickly.EVERYTHING or any("::" in argument for argument in config.args):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(autouse=True)
def package_log_as_it_was():
    """A command line that a test runs puts its own handler on the package's logger and keeps lines from the root."""
    package = logging.getLogger("irope_jax")
    level, propagate = package.level, package.propagate
    yield
    package.handlers.clear()
    package.propagate = propagate
    package.setLevel(level)
