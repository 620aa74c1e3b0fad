"""Scripts that start `irope train` on clusters: they parse, and give it flags that it has."""

import re
import subprocess
from pathlib import Path

import pytest

from irope_jax import cli

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch"
SHELL = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?![\w-])")
OWN = {"--config", "--run-dir", "--coordinator", "--process-id", "--num-processes"}


def flags_of_train():
    return {flag for flag in cli._parser()[1]["train"]._option_string_actions if flag.startswith("--")}


def commands(text):
    """What follows `irope train` to the end of its line, and lines of flags put behind it; comments left out."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
    found = [line.partition("irope train")[2] for line in lines if "irope train" in line]
    return found, [line for line in lines if re.match(r"\s*place=", line)]


def test_there_is_one_for_each_kind_of_cluster():
    assert SHELL == ["mpirun.sh", "slurm.sbatch", "ssh.sh", "tpu_pod.sh"]


@pytest.mark.parametrize("name", SHELL)
def test_shell_scripts_parse_and_name_flags_that_exist(name):
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    text = (LAUNCH / name).read_text()
    trains, places = commands(text)
    assert len(trains) == 1 and '"$@"' in trains[0]
    flags = {flag for line in (*trains, *places) for flag in FLAG.findall(line)}
    assert {"--config", "--run-dir"} <= flags <= flags_of_train(), flags
    assert bool(places) == (name in ("ssh.sh", "mpirun.sh")) and (not places or flags == OWN)


@pytest.mark.parametrize("name", SHELL)
def test_without_arguments_they_say_what_to_give(name):
    said = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
    assert said.returncode != 0 and f"scripts/launch/{name} " in said.stderr and "CONFIG RUN_DIR" in said.stderr


def test_the_jobset_starts_train_and_does_not_repeat_a_wrong_command():
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))
    assert [it["kind"] for it in documents] == ["ServiceAccount", "Role", "RoleBinding", "JobSet"]
    job = documents[-1]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    program, verb, *flags = job["template"]["spec"]["containers"][0]["command"]
    assert (program, verb) == ("irope", "train")
    assert {flag.partition("=")[0] for flag in flags} <= flags_of_train()
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [2] and job["template"]["spec"]["restartPolicy"] == "Never"


PRETEND = """#!/bin/bash
echo "$0 $*" >> "$CALLS"
code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"
exit "${code:-0}"
"""


@pytest.mark.parametrize(
    ("name", "tool", "codes", "times", "end"),
    [
        ("mpirun.sh", "mpirun", "137 1 0", 3, 0),
        ("mpirun.sh", "mpirun", "1 1 1 1", 4, 1),
        ("mpirun.sh", "mpirun", "2 0", 1, 2),
        ("tpu_pod.sh", "gcloud", "2 0", 1, 2),
        ("slurm.sbatch", "srun", "138", 1, 138),
        ("slurm.sbatch", "srun", "2", 1, 2),
    ],
)
def test_what_is_started_again(tmp_path, name, tool, codes, times, end):
    """With a pretended tool that ends with one exit code after the other."""
    for program in (tool, "scontrol"):
        (tmp_path / program).write_text(PRETEND if program == tool else '#!/bin/bash\necho "$*" >> "$QUEUED"\n')
        (tmp_path / program).chmod(0o755)
    (tmp_path / "hosts").write_text("# all\nnode1 slots=4\nnode2\n")
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    before = {"mpirun.sh": [tmp_path / "hosts", "8"], "tpu_pod.sh": ["pod", "zone"], "slurm.sbatch": []}[name]
    environ = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7",
        "CALLS": str(tmp_path / "calls"), "CODES": str(tmp_path / "codes"), "QUEUED": str(tmp_path / "queued"),
    }  # fmt: skip
    run = ["bash", LAUNCH / name, *before, "a config.py", "/runs/a", "--config.x=1"]
    done = subprocess.run(run, env=environ, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert (done.returncode, len(calls)) == (end, times), done.stderr
    assert "--run-dir=/runs/a" in calls[0] and "--config.x=1" in calls[0]
    queued = (tmp_path / "queued").exists()
    assert queued == (name == "slurm.sbatch" and end >= 128)
