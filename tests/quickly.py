"""How programs of tests are compiled: they run once on tiny arrays, so it is compiling that takes time."""

from importlib.metadata import version

FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # The older emitters of XLA:CPU compile in two thirds of the time. JAX 0.11 does not know them and refuses the flag.
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
