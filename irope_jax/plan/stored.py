"""Results of compilers, kept on disk: a step that took minutes to compile is not compiled twice.

An entry is found by all that it depends on: the job, the target, the versions of the compilers and the source of this
package. It is a JSON file in `~/.cache/irope_jax/plan` (`XDG_CACHE_HOME`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from irope_jax.core.config import to_dict
from irope_jax.plan.job import Failure, Figures, Job
from irope_jax.plan.measured import measure

PACKAGE = Path(__file__).resolve().parent.parent


def recall(job: Job, target: str) -> Figures | Failure | None:
    """What a compiler said of this job before; None if nobody asked, or the file cannot be read."""
    try:
        values = json.loads(_path(job, target).read_text(encoding="utf-8"))
        return Failure(**values["failure"]) if "failure" in values else Figures.of(values["figures"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(job: Job, target: str, result: Figures | Failure) -> None:
    """Keeps a result; a directory that cannot be written to keeps nothing."""
    path = _path(job, target)
    name = "failure" if isinstance(result, Failure) else "figures"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"target": target, name: asdict(result)}, indent=1), encoding="utf-8")
        part.replace(path)


def ask(job: Job, target: str) -> Figures | Failure:
    """What a compiler says of a job now, kept.

    Raises:
      TargetError, ConfigError: as `measure`.
    """
    result = measure(job, target)
    remember(job, target, result)
    return result


def _path(job: Job, target: str) -> Path:
    text = json.dumps([to_dict(job), target, _versions(), _source()], sort_keys=True)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "irope_jax" / "plan" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@lru_cache(maxsize=1)
def _source() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return digest.hexdigest()
