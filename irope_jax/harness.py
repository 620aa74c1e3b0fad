"""`python -m irope_jax.harness`: tasks of lm-evaluation-harness on a run directory. Wiring only."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from irope_jax.core.allocator import keep_freed_memory
from irope_jax.core.config import ConfigError, to_dict
from irope_jax.core.hosts import avoid_absent_tpu, configure_logging
from irope_jax.core.programs import keep_programs
from irope_jax.evals.harness import HarnessModel
from irope_jax.experiment import resolve, run_config
from irope_jax.sharding.mesh import MeshConfig, make_mesh
from irope_jax.stages import experiment_at
from irope_jax.train.state import params_for


@contextlib.contextmanager
def harness_model(run: str | Path, *, step: int | None = None, **options) -> Iterator[HarnessModel]:
    """The model of a run directory for `lm_eval.simple_evaluate(model=…)`, while the context lasts.

    Args:
      run: run directory, trained or imported.
      step: checkpoint; the newest by default.
      options: of `HarnessModel`; `max_length` is by default the row length the run was trained at.
    """
    directory = Path(run)
    trained = experiment_at(directory, resolve(run_config(directory)), step)
    experiment = resolve(to_dict(trained), [(f"mesh.{a}", str(n)) for a, n in MeshConfig(data=-1).sizes.items()])
    options.setdefault("max_length", experiment.data.seq_len)
    mesh = make_mesh(experiment.mesh.fill(jax.device_count()))
    with jax.set_mesh(mesh):
        params, _ = params_for(directory, trained.model, experiment.model, mesh, step)
        yield HarnessModel(experiment.model, params, experiment.data.tokenizer, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints that library's table, and writes its results beside the run. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m irope_jax.harness",
        description="Tasks of lm-evaluation-harness on a run directory; results go to RUN/evaluations/harness.json.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include-path", metavar="DIR", help="folder with tasks of your own (YAML)")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many questions of each task")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to read (default: the newest)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens it reads at most (default: as trained)")
    parser.add_argument("--add-bos", action="store_true", help="put bos before every text")
    parser.add_argument("--cache", default="bfloat16", help="numbers of the KV cache (default: bfloat16)")
    args = parser.parse_args(arguments)
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    avoid_absent_tpu()
    keep_freed_memory()
    configure_logging()
    keep_programs()
    options = {"add_bos": args.add_bos, "cache": args.cache}
    if args.max_length is not None:
        options["max_length"] = args.max_length
    try:
        with harness_model(args.run, step=args.step, **options) as model:
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=args.tasks.split(","),
                num_fewshot=args.num_fewshot,
                limit=args.limit,
                task_manager=TaskManager(include_path=args.include_path),
                log_samples=False,
            )
    except ConfigError as error:
        print(f"irope: error: {error}", file=sys.stderr)
        return 2
    print(make_table(found))
    out = Path(args.run) / "evaluations" / "harness.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(found["results"], indent=2, default=str) + "\n", encoding="utf-8")
    print(f"results: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
