"""Two real processes with four devices each against one with eight: the same numbers, one stop for both."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irope_jax.checkpoint.native import Checkpoints
from irope_jax.core.records import load_run
from tests import quickly, tiny

ROOT = Path(__file__).parents[2]
SECONDS = 900
"""A hang fails after this."""

FOLDS = ("model.attention", "blockwise")
"""The reference does not work on pieces of a sequence."""

RUNS = {
    # name: mesh, evaluations of `tiny`, overrides
    "data": (dict(data=8), slice(1, 2), ()),
    "both": (dict(data=2, context=4), slice(0), (FOLDS,)),
    "context": (dict(data=1, context=8), slice(1), (FOLDS, ("train.log_every", "4"), ("train.eval_every", "5"))),
}
"""The batch cut across processes; then, with the sequence cut inside each; then the sequence cut across processes. The
second is a mixture of the others, so one of those that run with IROPE_EVERY_TEST=1."""
if not quickly.EVERYTHING:
    del RUNS["both"]


def write_configs(place):
    for name, (mesh, evaluations, overrides) in RUNS.items():
        values = tiny.values(*((f"mesh.{axis}", str(size)) for axis, size in mesh.items()), *overrides)
        values["evals"] = values["evals"][evaluations]
        (place / f"{name}.json").write_text(json.dumps(values))


def start(place, devices, *arguments):
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quickly.FLAGS}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    with open(place / f"log.{arguments[0] if arguments else 0}", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "host_worker.py"), str(place), *arguments],
            stdout=log, stderr=log, env=environ,
        )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where one process wrote, and where two did."""
    places = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for place in places:
        write_configs(place)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [start(places[0], 8), *(start(places[1], 4, process, port) for process in ("0", "1"))]
    until = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(max(1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # what they did until then is judged
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 0, (places[0] / "log.0").read_text()[-3000:]
    return places


@pytest.fixture
def one(places):
    return places[0]


@pytest.fixture
def two(places):
    """Where the two processes wrote, and what both said."""
    return places[1], [(places[1] / f"log.{process}").read_text() for process in (0, 1)]


def codes(two):
    place, logs = two
    found = [json.loads((place / f"codes.{process}").read_text()) for process in (0, 1)]
    return found, "\n".join(log[-3000:] for log in logs)


def test_both_end_every_run_alike(two):
    (first, second), logs = codes(two)
    stopped = 128 + signal.SIGTERM
    wanted = {
        "data": 0, "data again": 0, "data evaluated": 0, **({"both": 0} if "both" in RUNS else {}),
        "context stopped": stopped, "context cut": stopped, "context": 0,
    }  # fmt: skip
    assert first == second == wanted, logs


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_one_process(one, two, name):
    losses = [{r.step: r.scalars["loss"] for r in load_run(place / name).train} for place in (one, two[0])]
    assert set(losses[0]) == set(range(1, tiny.STEPS + 1))
    assert set(losses[1]) == ({1, 4, 6} if name == "context" else set(losses[0]))
    for step, loss in losses[1].items():
        assert loss == pytest.approx(losses[0][step], abs=1e-6), (step, losses)


@pytest.mark.parametrize("name", ["data", "context"])
def test_measurements_are_those_of_one_process(one, two, name):
    key = lambda r: (r.step, r.evaluation, r.name, *r.where.items())
    alone, together = ({key(r): (r.value, r.count) for r in load_run(place / name).evals} for place in (one, two[0]))
    extra = {k for k in together if k[0] == 4}  # `irope eval --step=4`
    assert set(together) - extra == set(alone) and bool(extra) == (name == "data")
    for k, (value, count) in alone.items():
        assert together[k][0] == pytest.approx(value, abs=2e-6) and together[k][1] == count, k


def test_a_signal_to_one_process_stops_both_at_one_step_and_they_go_on_from_there(two):
    """Told of step 1, process 1 votes in step 2, whose result all read in step 3; later, an evaluation is cut short."""
    run = load_run(two[0] / "context")
    told = [(e.name, e.step) for e in run.events if e.name != "spent"]
    assert told == [("start", 0), ("stopped", 3), ("start", 3), ("stopped", 5), ("start", 5), ("finished", 6)]
    assert next(e for e in run.events if e.name == "stopped").details == {"signal": "SIGTERM"}
    with Checkpoints(two[0] / "context") as checkpoints:
        assert checkpoints.latest == 6


def test_one_process_speaks(two):
    first, second = two[1]
    assert "2 processes, 8 devices, 4 of them in this one" in first and "finished" in first
    assert "load all" not in first
    own = re.findall(r"^I irope_jax.*|^\w+ \d+/\d+.*|^retrieval .*", second, re.MULTILINE)
    assert own == []
    assert re.search(r"^retrieval  accuracy ", first, re.MULTILINE)


def test_what_process_0_refuses_no_process_does(two):
    for log in two[1]:
        last = [line for line in log.splitlines() if line.startswith("irope: error")][-1]
        assert "train.z_loss: 0.0 -> 0.0001" in last and "--on-config-change=accept" in last
