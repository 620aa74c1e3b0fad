"""What a process keeps for the next one, and between its steps. Each case is a process of its own."""

import os
import subprocess
import sys

import pytest

KEPT = """
import jax, jax.numpy as jnp
from irope_jax.core.programs import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).block_until_ready()
print(jax.config.jax_enable_compilation_cache)
"""

FREED = """
import resource
from irope_jax.core.allocator import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: (jnp.sin(x[:, None]) * jnp.cos(x[None])) @ x)
x = jnp.ones(4096)
for _ in range(30):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    f(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program, tmp_path, **environ):
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "JAX_COMPILATION", "XLA_"))}
    mine |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", **environ}
    done = subprocess.run([sys.executable, "-c", program], env=mine, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("devices", [1, 2])
def test_programs_are_kept_by_default_but_not_with_several_cpu_devices(tmp_path, devices):
    told = run(KEPT, tmp_path, XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    kept = [path for path in (tmp_path / "irope_jax").rglob("*-cache")] if (tmp_path / "irope_jax").exists() else []
    assert told == [str(devices == 1)] and bool(kept) == (devices == 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_unless_the_user_says_how(tmp_path):
    """A program with 64 MB of temporary memory: 16,384 pages a call if it were taken anew."""
    kept, faults = run(FREED, tmp_path)
    assert kept == "True" and int(faults) < 20 * 16384 / 2
    told, faults = run(FREED, tmp_path, MALLOC_ARENA_MAX="2")
    assert told == "False" and int(faults) > 20 * 16384 / 2
