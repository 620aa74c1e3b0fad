from pathlib import Path

from setuptools import find_packages, setup

# The version is read, not imported: the build environment has no jax.
version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("irope_jax").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

extras = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "text": ["tokenizers>=0.20", "pyarrow>=15", "zstandard>=0.22"],
    "plots": ["matplotlib>=3.8"],
    "wandb": ["wandb>=0.17"],
    "harness": ["lm_eval>=0.4.9"],
    "hf": ["safetensors>=0.4", "gguf>=0.17", "tokenizers>=0.20"],
}
# libtpu compiles for TPUs that are only described, so that tests can look at the programs; it exists for this platform.
libtpu = "libtpu>=0.0.42; sys_platform == 'linux' and platform_machine == 'x86_64'"
tools = ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6"]
extras["dev"] = sorted({*extras["text"], *extras["plots"], *extras["hf"], libtpu, *tools})

setup(
    name="irope-jax",
    version=version,
    description="Long-context language models in JAX: iRoPE and its rivals, trained, extended, measured and exported",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["irope_jax", "irope_jax.*"]),
    package_data={"irope_jax.data": ["corpus/*"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "tensorstore>=0.1.70",
        "ml-collections>=1.0",
        "grain>=0.2.12",
        "numpy>=2.0",
        "rich>=13",
        "markdown-it-py>=2.2",
        "filelock>=3.12",
        "tensorboardX>=2.6.2",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["irope = irope_jax.cli:main"]},
)
