"""Starting, watching and starting again: with small programs in place of training."""

import ast
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from irope_jax import cli, launch
from irope_jax.launch import Launch, environment

ROOT = Path(__file__).parents[1]
HEAD = "import os, signal, sys, time; from pathlib import Path; me = int(os.environ['IROPE_PROCESS_ID']); "


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """`(exit code, standard error)` of a launch whose processes run `source` instead of irope."""

    def start(source, *flags):
        (tmp_path / "program.py").write_text(HEAD + f"here = Path({str(tmp_path)!r})\n" + source)
        monkeypatch.setattr(launch, "PROGRAM", (sys.executable, str(tmp_path / "program.py")))
        code = cli.main(["launch", *flags, "--", "train", "--config=x.py", "--config.a.b=1"])
        return code, capfd.readouterr()

    return start


def test_every_process_gets_the_command_and_its_place(run):
    code, said = run(
        "print(sys.argv[1:], me, os.environ['IROPE_NUM_PROCESSES'], os.environ['XLA_FLAGS'][-1:])\n"
        "print(os.environ['IROPE_COORDINATOR'], file=sys.stderr)",
        "--processes=3", "--devices-per-process=5",
    )  # fmt: skip
    command = ["train", "--config=x.py", "--config.a.b=1"]
    assert code == 0
    assert sorted(said.out.splitlines()) == [f"[{k}] {command} {k} 3 5" for k in range(3)]
    assert len(set(re.findall(r"\] (127\.0\.0\.1:\d+)$", said.err, re.MULTILINE))) == 1


def test_a_death_is_named_the_others_end_and_all_start_again(run, tmp_path):
    """The first time, process 2 is killed while the others wait for ever; some of them do not care for SIGTERM."""
    code, said = run(
        "first = not (here / f'{me}').exists(); (here / f'{me}').touch()\n"
        "if me == 1: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while first and me == 2 and not ((here / '0').exists() and (here / '1').exists()): time.sleep(0.01)\n"
        "if first and me == 2: time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)\n"
        "while first: time.sleep(0.1)",
        "--processes=3",
    )
    assert code == 0
    lines = [line for line in said.err.splitlines() if line.startswith("irope launch: ")]
    assert [line.split()[2] for line in lines] == ["started", "process", "starting", "started"]
    assert re.search(r"process 2 \(pid \d+\) was killed by SIGKILL after \d+ s; ending the others", lines[1])
    assert "(1 of 3)" in lines[2]
    ports = re.findall(r"coordinator 127.0.0.1:(\d+)", said.err)
    assert len(ports) == 2


def test_it_gives_up_in_the_end(run):
    code, said = run("sys.exit(7 if me == 1 else 0)", "--processes=2", "--restarts=2")
    assert code == 7
    assert said.err.count("process 1 ") == 3 and "exit code 7" in said.err and "given up after 2 restarts" in said.err


def test_who_was_killed_is_named_before_who_complained(run):
    code, said = run(
        "(here / f'{me}').touch()\n"
        "while len(list(here.iterdir())) < 3: time.sleep(0.01)\n"
        "sys.exit(1) if me == 0 else os.kill(os.getpid(), signal.SIGKILL)",
        "--processes=2", "--restarts=0",
    )  # fmt: skip
    assert code in (1, 128 + 9) and len(re.findall("process . ", said.err)) == 1


@pytest.mark.parametrize("code", [2, 128 + signal.SIGTERM, 128 + signal.SIGUSR1])
def test_wrong_commands_and_stopped_runs_are_not_started_again(run, code):
    found, said = run(f"sys.exit({code})", "--processes=2")
    assert found == code and "starting all again" not in said.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_process_and_they_may_take_their_time(run, tmp_path, number):
    def send():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    code, said = run(
        "def stop(number, _): time.sleep(0.2 * me); print('saved', flush=True); os._exit(128 + number)\n"
        f"signal.signal({int(number)}, stop); (here / f'ready{{me}}').touch()\n"
        "while True: time.sleep(0.05)",
        "--processes=2",
    )
    assert code == 128 + number
    assert sorted(said.out.splitlines()) == ["[0] saved", "[1] saved"]
    assert "starting all again" not in said.err


def test_the_processes_of_a_launcher_that_was_killed_end(tmp_path):
    source = (
        "import sys; from irope_jax import launch; "
        "launch.PROGRAM = (sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(1e6)'); "
        "launch.Launcher(launch.Launch(('train',), 2)).run()"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    launcher = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    while any(alive(pid) for pid in pids):
        time.sleep(0.02)


def alive(pid):
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes=0", "--", "train"], "--processes=0"),
        (["--processes=2", "--restarts=-1", "--", "train"], "--restarts=-1"),
        (["--processes=2", "--devices-per-process=0", "--", "train"], "--devices-per-process=0"),
        (["--processes=2", "--", "trian"], "did you mean 'train'?"),
        (["--processes=2"], "after --"),
        (["--procesess=2", "--", "train"], "--processes"),
        (["--processes=2", "--", "train", "--process-id=1"], "--process-id: irope launch sets it"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, said):
    assert cli.main(["launch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("irope: error: ") and said in line


def test_flags_of_xla_are_kept():
    own = environment(Launch(("train",), 2, 4), 1, 5, {"XLA_FLAGS": "--a=1", "HOME": "/h"})
    assert own["XLA_FLAGS"].split() == ["--a=1", "--xla_force_host_platform_device_count=4"] and own["HOME"] == "/h"
    assert "XLA_FLAGS" not in environment(Launch(("train",), 2), 1, 5, {})


def test_the_launcher_needs_no_jax():
    tree = ast.parse(Path(launch.__file__).read_text())
    names = {getattr(node, "module", "") or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.startswith("irope_jax")} == {"irope_jax.core.config"}
