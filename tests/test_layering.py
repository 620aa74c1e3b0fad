"""The law of layers, read from the source: a module imports strictly lower rooms, or files of its own room without a
cycle. Every import counts, also those inside functions, under TYPE_CHECKING and by name through importlib."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "irope_jax"

LAYERS = {
    "core": 0,
    "position": 1,
    "sharding": 1,
    "losses": 1,
    "study": 1,
    "attention": 2,
    "data": 2,
    "context": 3,
    "model": 4,
    "checkpoint": 5,
    "decode": 5,
    "evals": 6,
    "train": 7,
    "plan": 8,
    "commands": 9,
}
COMMANDS = (
    "experiment", "stages", "transfer", "export", "verify", "launch", "prepare", "search", "show", "join", "generate",
    "harness", "generate_flags", "plan_flags", "planning", "reporting", "evaluated", "sweep", "sweep_cells",
    "sweep_cluster", "sweep_flags", "run", "transfer_flags", "search_flags",
    "cli", "__main__",
)  # fmt: skip
ONLY = {"study": ("core",)}
"""Rooms that may import less than their layer allows."""

JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex")
NAMELESS = ("utils", "util", "common", "helpers", "helper", "misc")


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name, relative to the package ("" is its `__init__`), to file."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return "commands" if first in COMMANDS else first


def imports_of(path: Path, module: str, modules: dict[str, Path]) -> list[tuple[int, str, bool]]:
    """(line, name, is it of this package) of everything a file imports; own names are relative to the package."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []

    def note(line: int, name: str) -> None:
        own = name == PACKAGE or name.startswith(PACKAGE + ".")
        found.append((line, name[len(PACKAGE) + 1 :] if own else name, own))

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                note(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [PACKAGE, *filter(None, package.split("."))]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                is_module = whole.removeprefix(PACKAGE + ".") in modules and whole.startswith(PACKAGE + ".")
                note(node.lineno, whole if is_module else base)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            if node.attr in {name.split(".")[0] for name in modules}:
                note(node.lineno, f"{PACKAGE}.{node.attr}")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                note(node.lineno, node.args[0].value)
    return found


def violations(root: Path) -> list[str]:
    """Every breach of the law in the package at `root`, one line each."""
    modules = modules_of(root)
    where = {module: str(path.relative_to(root)) for module, path in modules.items()}
    imports = {module: imports_of(path, module, modules) for module, path in modules.items()}
    found = []
    for module in modules:
        room, layer = room_of(module), LAYERS.get(room_of(module))
        found += [f"{where[module]}: call it by what it does, not {p!r}" for p in module.split(".") if p in NAMELESS]
        if layer is None and module:
            found.append(f"{where[module]}: {room!r} is in no layer; give it one in the law")
            continue
        for line, name, own in imports[module]:
            at, target = f"{where[module]}:{line}", room_of(name)
            if not own or not name or (target == room and module):
                continue  # others' packages; the package itself, which holds only its version; the own room
            if not module:
                found.append(f"{at}: the package itself imports {target}; it may import nothing of its own")
            elif target not in LAYERS:
                found.append(f"{at}: imports {name}, which is in no layer")
            elif LAYERS[target] >= layer:
                found.append(f"{at}: {room} (layer {layer}) imports {target} (layer {LAYERS[target]}), not a lower one")
            elif room in ONLY and target not in ONLY[room]:
                found.append(f"{at}: {room} imports {target}; it may import only {', '.join(ONLY[room])}")
    own = {module: {name for _, name, is_own in imports[module] if is_own and name in modules} for module in modules}
    found += cycles(own)
    for module, path in reachable(own, [module for module in modules if room_of(module) == "study"]).items():
        for line, name, is_own in imports[module]:
            if not is_own and name.split(".")[0] in JAX:
                way = " -> ".join(path)
                found.append(f"{where[module]}:{line}: study must run without jax, and reaches {name} by {way}")
    return found


def cycles(imports: dict[str, set[str]]) -> list[str]:
    """Import cycles between files, each once."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            cycle = path[path.index(module) :]
            found.append("cycle: " + " -> ".join([*cycle, module]))
            return
        if module in done:
            return
        for other in sorted(imports[module] - {""}):
            visit(other, [*path, module])
        done.add(module)

    for module in sorted(imports):
        visit(module, [])
    return found


def reachable(imports: dict[str, set[str]], start: list[str]) -> dict[str, list[str]]:
    """Everything imported from `start`, directly or not, with the way to it."""
    ways = {module: [module] for module in start}
    queue = list(start)
    while queue:
        module = queue.pop(0)
        for other in sorted(imports[module] - set(ways)):
            ways[other] = [*ways[module], other]
            queue.append(other)
    return ways


def test_the_package_keeps_the_law():
    broken = violations(REPOSITORY / PACKAGE)
    assert not broken, "\n" + "\n".join(broken)


def test_the_law_sees_the_package():
    """Guard against a law that holds because it looks at nothing."""
    modules = modules_of(REPOSITORY / PACKAGE)
    assert {"core.config", "core.records", "study.report", ""} <= set(modules)
    own = {name for _, name, own in imports_of(modules["study.report"], "study.report", modules) if own}
    assert {"core.records", "study.plots", "study.tables", "study.collect"} <= own


def test_configs_need_no_jax():
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        names = {name.split(".")[0] for _, name, own in imports_of(path, "configs", {}) if not own}
        assert not names & set(JAX), f"{path.name} imports {names & set(JAX)}; a config is plain values"


@pytest.fixture
def planted(tmp_path):
    """Violations of a synthetic package: a lawful one, changed by the given files."""

    def check(**files):
        lawful = {
            "__init__": "__version__ = '0'",
            "core/__init__": "",
            "core/config": "import json",
            "core/types": "import jax",
            "losses": "import jax\nfrom irope_jax.core import types",
            "attention/__init__": "",
            "attention/mask": "from irope_jax.core.config import x",
            "attention/api": "from . import mask\nfrom .mask import y\nfrom ..core import config",
            "model/__init__": "",
            "model/layers": "import irope_jax.attention.api as api\nfrom irope_jax import losses, __version__",
            "study/__init__": "",
            "study/report": "import irope_jax\nfrom irope_jax.core.config import x\nprint(irope_jax.__version__)",
            "run": "from irope_jax.model.layers import z",
            "cli": "def main():\n    from irope_jax import run",
        }
        for name, text in (lawful | {name.replace("__slash__", "/"): text for name, text in files.items()}).items():
            path = tmp_path / PACKAGE / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return violations(tmp_path / PACKAGE)

    return check


def test_a_lawful_package_has_no_violations(planted):
    assert planted() == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("core/config", "from irope_jax.model import layers", "core/config.py:1: core (layer 0) imports model"),
        ("core/config", "from irope_jax.model.layers import x", "core/config.py:1: core (layer 0) imports model"),
        ("core/config", "import irope_jax.model.layers", "core/config.py:1: core (layer 0) imports model"),
        ("core/config", "from ..model import layers", "core/config.py:1: core (layer 0) imports model"),
        ("core/config", "from .. import model", "core/config.py:1: core (layer 0) imports model"),
        ("core/__init__", "from ..model import layers", "core/__init__.py:1: core (layer 0) imports model"),
        ("core/config", "from irope_jax import losses", "core/config.py:1: core (layer 0) imports losses (layer 1)"),
        ("core/config", "def f():\n    import irope_jax.losses", "core/config.py:2: core (layer 0) imports losses"),
        ("core/config", "import importlib\nimportlib.import_module('irope_jax.run')", "core/config.py:2: core"),
        ("core/config", "import irope_jax\nirope_jax.model.layers.f()", "core/config.py:2: core (layer 0)"),
        (
            "attention/mask",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from irope_jax.run import z",
            "attention/mask.py:3: attention (layer 2) imports commands (layer 9), not a lower one",
        ),
        ("position/rope", "from irope_jax import losses", "position (layer 1) imports losses (layer 1)"),
        ("data/packing", "from irope_jax.attention import mask", "data (layer 2) imports attention (layer 2)"),
        ("attention/mask", "from irope_jax.attention import api", "cycle: attention.api -> attention.mask -> "),
        ("attention/mask", "def f():\n    from . import api", "cycle: attention.api -> attention.mask"),
        ("attention/__init__", "from irope_jax.attention.mask import y", None),
        ("run", "import irope_jax.cli", "cycle: cli -> run -> cli"),
        ("study/report", "from irope_jax import losses", "study (layer 1) imports losses"),
        ("study/report", "import jax.numpy", "study/report.py:1: study must run without jax, and reaches jax.numpy"),
        ("study/report", "def f():\n    import flax", "study/report.py:2: study must run without jax"),
        (
            "study/report",
            "from irope_jax.core import types",
            "core/types.py:1: study must run without jax, and reaches jax by study.report -> core.types",
        ),
        ("decode/generate", "import irope_jax.study.report", None),
        ("model/utils", "", "model/utils.py: call it by what it does, not 'utils'"),
        ("helpers/__init__", "", "helpers/__init__.py: call it by what it does, not 'helpers'"),
        ("kitchen/sink", "", "kitchen/sink.py: 'kitchen' is in no layer; give it one in the law"),
        ("model/layers", "from irope_jax.kitchen import x", "model/layers.py:1: imports kitchen, which is in no layer"),
        ("__init__", "from irope_jax.core import config", "__init__.py:1: the package itself imports core"),
    ],
)
def test_planted_violations_are_found(planted, file, text, expected):
    found = planted(**{file.replace("/", "__slash__"): text})
    if expected is None:
        assert found == []
    else:
        assert any(expected in line for line in found), found
