"""A sweep as jobs of a cluster: a SLURM array or a Kubernetes JobSet, one task a cell.

Cells that start from others make a later array, which begins when the one before has ended well. Each task is
`irope sweep GRID --task=CELL`, so the files hold no command twice, a task that is started again goes on, and a grid
that changes meanwhile does not change which cell is whose.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from irope_jax.core.config import ConfigError
from irope_jax.study.grid import Cell

_SBATCH = """\
#!/bin/bash
# {name}: cells {first} to {last} of level {level}, one a task. Resources are for a small run; change them here.
#SBATCH --job-name={name}.{level}
#SBATCH --array=0-{top}
#SBATCH --nodes=1
#SBATCH --cpus-per-task=4
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}.{level}.%a.log

cells=(
{cells}
)
trap 'kill -TERM "$task"' TERM
{command} --task="${{cells[$SLURM_ARRAY_TASK_ID]}}" &
task=$!
wait "$task"
code=$?
while kill -0 "$task" 2>/dev/null; do # a signal ended the wait, not the task
    wait "$task"
    code=$?
done
# Stopped with everything saved: queue it again, it goes on.
if [ "$code" -ge 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 50 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def write_jobs(
    name: str, levels: Sequence[Sequence[Cell]], command: Sequence[str], slurm: str | None, jobset: str | None
) -> list[str]:
    """Write the files; what to do with them.

    Args:
      levels: cells by what they wait for.
      command: `irope sweep` with all that chooses these cells.
      slurm: a folder for one file a level.
      jobset: a JSON file, which kubectl reads like YAML.

    Raises:
      ConfigError: a file that cannot be written.
    """
    said = []
    try:
        if slurm:
            said += _slurm(name, levels, shlex.join(command), Path(slurm))
        if jobset:
            path = Path(jobset)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_jobset(name, levels, command), indent=2) + "\n")
            said.append(f"kubectl apply -f {path}   # after naming your image and volume in it")
    except OSError as error:
        raise ConfigError("--slurm" if slurm else "--jobset", slurm or jobset, f"cannot be written ({error})") from None
    return said


def _slurm(name: str, levels: Sequence[Sequence[Cell]], command: str, folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    said, job = [], name.replace("/", "_")
    for level, cells in enumerate(levels):
        path = folder / f"{job}.{level}.sbatch"
        listed = "\n".join(f"    {shlex.quote(cell.name)}" for cell in cells)
        text = _SBATCH.format(
            name=job, level=level, top=len(cells) - 1, command=command, cells=listed, first=cells[0].name,
            last=cells[-1].name,
        )  # fmt: skip
        path.write_text(text)
        after = f"--dependency=afterok:$job{level - 1} " if level else ""
        said.append(f"job{level}=$(sbatch --parsable {after}{path})")
    return said


def _jobset(name: str, levels: Sequence[Sequence[Cell]], command: Sequence[str]) -> dict:
    def job(level: int, cells: Sequence[Cell]) -> dict:
        names = shlex.join(cell.name for cell in cells)
        task = f'cells=({names}); exec {shlex.join(command)} --task="${{cells[$JOB_COMPLETION_INDEX]}}"'
        pod = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 300,
            "containers": [
                {
                    "name": "cell",
                    "image": "REGISTRY/irope:TAG",
                    "command": ["bash", "-c", task],
                    "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
                    "workingDir": "/shared",
                }
            ],
            "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}],
        }
        spec = {
            "completionMode": "Indexed", "completions": len(cells), "parallelism": len(cells),
            "backoffLimitPerIndex": 3, "template": {"spec": pod},
        }  # fmt: skip
        one = {"name": f"level-{level}", "replicas": 1, "template": {"spec": spec}}
        waits = {"dependsOn": [{"name": f"level-{level - 1}", "status": "Complete"}]} if level else {}
        return one | waits

    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name.replace("/", "-").replace("_", "-").lower()},
        "spec": {"replicatedJobs": [job(level, cells) for level, cells in enumerate(levels)]},
    }
