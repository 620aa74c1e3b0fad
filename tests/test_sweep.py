"""Sweeps: with a small program in place of training, and once with training."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from irope_jax import cli, sweep, sweep_cells
from irope_jax.core.records import load_run
from tests import tiny

ROOT = Path(__file__).parents[1]

GRID = """
from irope_jax.study.grid import Cell, Study, product, seeds

def get_study(scale="small"):
    cells = [
        Cell(name="start", config="tiny.json"),
        Cell(name="arm", config="tiny.json", starts_from="start", overrides={"train.steps": 4}, tags=("headline",)),
        Cell(name="other", config="tiny.json", starts_from="start"),
    ]
    seeded = product(cells, seeds(2 if scale == "small" else 3))
    return Study(name="s", question="q", prediction="p", cells=seeded)
"""

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from irope_jax.core.records import RunWriter

arguments = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[2:])
directory, begin = Path(arguments["run-dir"]), arguments.get("config.train.init_from")
with open("order.txt", "a") as order:
    order.write(directory.name + " of " + directory.parent.name + "\\n")
if begin and not (Path(begin) / "records.jsonl").is_file():
    sys.exit("irope: error: nothing to start from")
if Path("break").is_file() and Path("break").read_text() in str(directory):
    print("irope: error: broken as asked", file=sys.stderr)
    sys.exit(1)
with RunWriter(directory, dict(arguments), "mark") as writer:
    writer.start(0)
    writer.train(1, {"loss": 2.0})
    if Path("stop").is_file():
        sys.exit(128 + signal.SIGTERM)
    if Path("hang").is_file():
        signal.signal(signal.SIGTERM, lambda *_: (writer.close(), os._exit(128 + signal.SIGTERM)))
        time.sleep(60)
    writer.train(6, {"loss": 1.0})
    writer.event(6, "finished", planned=6)
"""
"""In place of training; without jax, so with one fingerprint for all."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a grid, whose cells run the small program."""
    tiny.config_file(tmp_path)
    (tmp_path / "grid.py").write_text(GRID)
    (tmp_path / "program.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
    monkeypatch.setattr(sweep_cells, "fingerprint", lambda _: "mark")
    return tmp_path


def test_one_sweep_at_a_time(place, capsys):
    with sweep.alone(place / "runs" / "s"):
        assert cli.main(["sweep", "grid.py"]) == 2
    assert "another sweep is at work there" in capsys.readouterr().err and not (place / "order.txt").exists()
    assert cli.main(["sweep", "grid.py"]) == 0


def order(place) -> list[str]:
    return (place / "order.txt").read_text().splitlines()


def test_cells_run_after_what_they_start_from_and_never_twice(place, capfd):
    assert cli.main(["sweep", "grid.py"]) == 0
    wanted = [f"seed={seed} of {name}" for name in ("start", "arm", "other") for seed in (0, 1)]
    assert order(place) == wanted
    given = load_run(place / "runs/s/arm/seed=1").config
    assert given == {
        "config": "tiny.json", "run-dir": "runs/s/arm/seed=1", "config.name": "s/arm/seed=1", "config.train.steps": "4",
        "config.seed": "1", "config.data.seed": "1", "config.train.init_from": "runs/s/start/seed=1",
    }  # fmt: skip
    assert "6 of 6 cells done" in capfd.readouterr().err
    assert cli.main(["sweep", "."]) == 0
    assert order(place) == wanted


def test_the_others_go_on_past_a_failure_and_it_is_listed(place, capfd):
    (place / "break").write_text("start/seed=0")
    assert cli.main(["sweep", "grid.py", "--jobs=2"]) == 1
    said = capfd.readouterr().err
    assert "start/seed=0 failed: exit code 1: broken as asked; see runs/s/logs/start.seed=0.log" in said
    assert "arm/seed=0 blocked: it starts from start/seed=0, which failed" in said
    assert {"seed=1 of arm", "seed=1 of other"} < set(order(place)) and "seed=0 of arm" not in order(place)
    (place / "break").unlink()
    assert cli.main(["sweep", "grid.py"]) == 0
    assert len(order(place)) == 4 + 3


def test_a_signal_lets_what_runs_save_and_the_same_command_goes_on(place):
    (place / "hang").touch()
    code = f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from irope_jax import cli, sweep, sweep_cells
        sweep.PROGRAM, sweep_cells.fingerprint = (sys.executable, "program.py"), lambda _: "mark"
        sys.exit(cli.main(["sweep", "grid.py", "--jobs=2"]))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(list((place / "runs").rglob("records.jsonl"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert re.search(r"start/seed=0\s.*stopped", said) and "the same command goes on" in said
    (place / "hang").unlink()
    assert cli.main(["sweep", "grid.py"]) == 0
    assert all(sweep_cells.standing_of(work).state == "done" for work in works())


def works():
    study = sweep_cells.load_study("grid.py")
    return [sweep_cells.work_of(cell, Path(), Path("runs/s"), study) for cell in study.cells]


def test_a_list_says_what_is_left_and_how_to_run_it(place, capfd):
    assert cli.main(["sweep", "grid.py", "--only=start/seed=1"]) == 0
    capfd.readouterr()
    assert cli.main(["sweep", "grid.py", "--only=arm", "--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["new", "start/seed=0"], ["done", "start/seed=1"], ["new", "arm/seed=0"], ["new", "arm/seed=1"],
    ]  # fmt: skip
    assert lines[3].endswith("train tiny.json, from start/seed=1")
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1", "--list=commands"]) == 0
    *_, command = capfd.readouterr().out.splitlines()
    assert command.startswith("irope train --config=tiny.json --run-dir=runs/s/arm/seed=1")
    assert "--config.train.init_from=runs/s/start/seed=1" in command


def test_tasks_of_a_cluster(place, capfd):
    assert cli.main(["sweep", "grid.py", "--scale=large", "--only=arm", "--slurm=jobs", "--jobset=jobs/set.json"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[:2] == [
        "job0=$(sbatch --parsable jobs/s.0.sbatch)",
        "job1=$(sbatch --parsable --dependency=afterok:$job0 jobs/s.1.sbatch)",
    ]
    text = (place / "jobs/s.1.sbatch").read_text()
    assert "--array=0-2" in text
    told = text[text.index("cells=(") :].replace("\nirope ", "\necho ").replace("scontrol", "echo")
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": "2"}
    said = subprocess.run(["bash", "-c", told], env=environ, capture_output=True, text=True, check=True).stdout
    command, _, cell = said.strip().rpartition(" --task=")
    assert cell == "arm/seed=2"
    jobs = json.loads((place / "jobs/set.json").read_text())["spec"]["replicatedJobs"]
    assert [job["template"]["spec"]["completions"] for job in jobs] == [3, 3]
    assert jobs[1]["dependsOn"] == [{"name": "level-0", "status": "Complete"}]
    pods = jobs[1]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    told = [*pods[:-1], pods[-1].replace("exec irope ", "exec echo ")]
    environ = os.environ | {"JOB_COMPLETION_INDEX": "1"}
    assert subprocess.run(told, env=environ, capture_output=True, text=True).stdout.endswith(" --task=arm/seed=1\n")
    assert cli.main([*command.split(), "--task=arm/seed=2"]) == 2
    assert "starts from runs/s/start/seed=2, which is not finished" in capfd.readouterr().err
    for task in ("start/seed=2", "arm/seed=2"):
        assert cli.main([*command.split(), f"--task={task}"]) == 0
    assert order(place) == ["seed=2 of start", "seed=2 of arm"]
    assert cli.main([*command.split(), "--task=arm/seed=3"]) == 2
    assert "did you mean 'arm/seed=2'" in capfd.readouterr().err


def test_a_cell_that_stops_by_itself_ends_the_sweep_with_its_code(place, capfd):
    """As on a notice that its host goes away: what starts from it must not begin, and a cluster queues it again."""
    (place / "stop").touch()
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=0"]) == 128 + signal.SIGTERM
    assert order(place) == ["seed=0 of start"] and "the same command goes on" in capfd.readouterr().err
    (place / "stop").unlink()
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=0"]) == 0


def test_nobody_else_works_on_a_cell(place, capfd):
    logs = place / "runs/s/logs"
    logs.mkdir(parents=True)
    with open(logs / "start.seed=0.lock", "w") as file:
        assert sweep._locked(file)
        assert cli.main(["sweep", "grid.py", "--only=start/seed=0"]) == 1
        assert "another sweep or task is at work on it" in capfd.readouterr().err and not (place / "order.txt").exists()
    assert cli.main(["sweep", "grid.py", "--only=start/seed=0"]) == 0


def test_what_an_earlier_attempt_said_is_not_why_this_one_failed(place, capfd):
    (place / "break").write_text("start/seed=0")
    assert cli.main(["sweep", "grid.py", "--only=start/seed=0"]) == 1
    (place / "program.py").write_text("import sys; sys.exit(3)")
    capfd.readouterr()
    assert cli.main(["sweep", "grid.py", "--only=start/seed=0"]) == 1
    assert "exit code 3: ;" in capfd.readouterr().err


def test_a_start_that_was_trained_again_leaves_its_arms_behind(place, capfd):
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=0"]) == 0
    assert states("arm") == ["done", "new"]
    records = place / "runs/s/start/seed=0/records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    records.write_text("".join(json.dumps(line | {"time": line["time"] + 1000}) + "\n" for line in lines))
    assert states("arm") == ["other", "new"]
    arm = place / "runs/s/arm/seed=0/records.jsonl"
    arm.write_text("".join(line for line in arm.read_text().splitlines(True) if '"finished"' not in line))
    assert states("arm") == ["other", "new"]  # cut: it would go on from weights of the earlier start
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=0"]) == 1
    assert "arm/seed=0: begun before runs/s/start/seed=0 was trained" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("grid", "error"),
    [
        ("x = 1", "no get_study"),
        ("def get_study(): return 3", "returned a int"),
        ("def get_study(): return 1 / 0", "ZeroDivisionError"),
        (GRID.replace('"train.steps": 4', '"train.stepz": 4'), r"cell arm/seed=0.*did you mean 'steps'"),
        (GRID.replace('"train.steps": 4', '"train.eval_during": ("x",)'), r"cell arm/seed=0.*no such evaluation"),
        (
            GRID.replace('"train.steps": 4', '"stages": ({"name": "a", "steps": 1, "change": {"model.x": 1}},)'),
            "stages.0",
        ),
    ],
)
def test_a_mistake_in_a_grid_is_one_line_before_anything_runs(place, capfd, grid, error):
    (place / "grid.py").write_text(grid)
    assert cli.main(["sweep", "grid.py"]) == 2
    assert re.search(error, capfd.readouterr().err)
    assert not (place / "runs").exists()


def test_a_sweep_that_trains_and_its_report(tmp_path, monkeypatch, capfd):
    """Two real runs, the second from the weights of the first; with other values they are not taken for the same."""
    tiny.config_file(tmp_path)
    (tmp_path / "grid.py").write_text(GRID)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1"]) == 0
    start, arm = (load_run(f"runs/s/{name}/seed=1") for name in ("start", "arm"))
    assert (start.last_step, arm.last_step) == (tiny.STEPS, 4)
    assert arm.train[0].scalars["loss"] < start.train[0].scalars["loss"]
    assert cli.main(["report", "grid.py"]) == 0
    page = Path("report.md").read_text()
    assert page.startswith("# q\n\n**Predicted.** p\n\n**Verdict.** Not given yet.")
    assert "4 cells are not finished and left out: start/seed=0, arm/seed=0" in page and "irope sweep grid.py" in page
    assert Path("report.html").is_file()
    assert cli.main(["report", "grid.py", "--scale=large"]) == 0  # is no answer of the folder's
    assert Path("runs/s/report/report.md").read_text().startswith("# q (scale: large)")
    _comparisons()
    _evaluations_of_later(capfd)
    (tmp_path / "grid.py").write_text(GRID.replace('"train.steps": 4', '"train.steps": 5'))
    assert states("arm") == ["other", "other"]
    assert cli.main(["report", "."]) == 1
    assert "arm/seed=0: made with other values than the grid has now" in capfd.readouterr().err
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1", "--list"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == ["done", "other"]
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1"]) == 1
    assert "arm/seed=1: made with other values than the grid has now (train.steps: 4 -> 5)" in capfd.readouterr().err
    _of_an_earlier_version()


def _evaluations_of_later(capfd):
    """A grid with another evaluation: what is trained is measured, not trained again; and not under a name taken."""
    evals = [dict(kind="retrieval", name="again", task=tiny.FACTS, lengths=[32], queries=4, facts=1, batch_tokens=256)]
    more = GRID.replace('{"train.steps": 4}', f'{{"train.steps": 4, "evals": {evals}}}')
    Path("grid.py").write_text(more)
    assert states("arm") == ["new", "lacks"]
    records = Path("runs/s/arm/seed=1/records.jsonl")
    trained = records.read_text()
    capfd.readouterr()
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1", "--list"]) == 0
    assert re.search(r"lacks arm/seed=1 +evaluations to add: again", capfd.readouterr().out)
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1", "--list=commands"]) == 0
    assert capfd.readouterr().out.splitlines()[1].startswith("irope eval runs/s/arm/seed=1 --step=4 ")
    assert cli.main(["report", "grid.py"]) == 0
    assert "not measured yet and left out: arm/seed=1 again" in Path("report.md").read_text()
    assert (
        cli.main(["eval", "runs/s/arm/seed=1", "--step=2", f"--config.evals={tuple(evals)}"]) == 0
    )  # of other weights
    assert states("arm") == ["new", "lacks"]
    trained = records.read_text()
    assert cli.main(["sweep", "grid.py", "--only=arm"]) == 0  # one measures it now, one at its end
    assert states("arm") == ["done", "done"]
    assert cli.main(["report", "grid.py"]) == 0
    page = Path("report.md").read_text()
    assert "not measured yet" not in page and "(of the first of 2 seeds" in page
    lines = records.read_text().removeprefix(trained).splitlines()
    told = [json.loads(line) for line in lines]
    assert [line.get("name") for line in told if line["kind"] == "event"] == ["evaluation", "evaluation_ended"]
    assert {line["evaluation"] for line in told if line["kind"] == "eval"} == {"again"}
    cut = lines.index(next(line for line in lines if '"eval"' in line)) + 1
    records.write_text(trained + "\n".join(lines[:cut]) + "\n")  # killed while it measured
    assert states("arm") == ["done", "lacks"]
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1"]) == 0
    assert states("arm") == ["done", "done"]
    Path("grid.py").write_text(more.replace("'queries': 4", "'queries': 8"))
    assert states("arm") == ["other", "other"]
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=1"]) == 1
    said = capfd.readouterr().err
    assert "another evaluation 'again' than the grid; give the new one a name of its own" in said
    _other_evaluations_before_the_end()


def _other_evaluations_before_the_end():
    """Training that was cut goes on when its cell's evaluations alone were changed."""
    Path("grid.py").write_text(GRID)
    records = Path("runs/s/arm/seed=0/records.jsonl")
    records.write_text("".join(line for line in records.read_text().splitlines(True) if '"finished"' not in line))
    assert states("arm")[0] == "cut"
    assert cli.main(["sweep", "grid.py", "--only=arm/seed=0"]) == 0
    assert states("arm")[0] == "done"
    events = [event.name for event in load_run("runs/s/arm/seed=0").events]
    assert events.count("start") == 2 and "config_changed" in events


def states(arm: str) -> list[str]:
    return [sweep_cells.standing_of(work).state for work in works() if work.cell.arm == arm]


def _of_an_earlier_version():
    """A run from before a field was there is one with its default."""
    (work,) = (work for work in works() if work.cell.name == "start/seed=1")
    path = work.directory / "config.json"
    whole = json.loads(path.read_text())
    del whole["config"]["train"]["eval_during"]
    path.write_text(json.dumps({**whole, "fingerprint": "of other values"}))
    assert sweep_cells.standing_of(work).state == "done"


def _comparisons():
    """The same study of another commit, and another study, on one page."""
    shutil.copytree("runs/s", "before/s")
    assert cli.main(["report", "grid.py", "--beside=before/s", "--out=two"]) == 0
    page = Path("two/report.md").read_text()
    assert "| start (runs/s) |" in page and "| start (before/s) |" in page and "--beside=before/s --out=two" in page
    Path("other").mkdir()
    Path("other/grid.py").write_text(GRID.replace('name="s", question="q"', 'name="t", question="why"'))
    shutil.copy("tiny.json", "other")
    assert cli.main(["report", "grid.py", "other", "--out=both"]) == 1  # t was not run
    assert cli.main(["sweep", "other", "--only=start/seed=1"]) == 0
    assert cli.main(["report", "grid.py", "other", "--out=both"]) == 0
    page = Path("both/report.md").read_text()
    assert page.startswith("# q / why") and "| s/start |" in page and "| t/start |" in page


@pytest.mark.parametrize(
    "words, said",
    [
        (["grid.py", "--beside=x"], "--out.*no study's own page"),
        (["grid.py", "grid.py"], "--out.*several studies"),
        (["grid.py", "grid.py", "--out=o", "--beside=x"], "--beside.*one study"),
        (["grid.py", "runs/s"], "RUN.*not reported with run directories"),
        (["runs/s", "--beside=x"], "--beside.*belongs to a study"),
    ],
)
def test_what_cannot_be_compared_is_said(place, capsys, words, said):
    assert cli.main(["report", *words]) == 2
    assert re.search(said, capsys.readouterr().err)
