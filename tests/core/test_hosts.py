"""How processes find each other: flags, clusters by their environment, and what is said when it does not work."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from irope_jax.core import hosts
from irope_jax.core.config import ConfigError
from irope_jax.core.hosts import Hosts, agree, find_cluster, gather, hosts_from, initialise

ROOT = Path(__file__).parents[2]
GIVEN = dict(coordinator="10.0.0.1:1234", process_id=1, num_processes=4, join_timeout=None)


def test_flags_then_environment_variables():
    assert hosts_from(GIVEN, {}) == Hosts("10.0.0.1:1234", 1, 4)
    assert hosts_from(dict.fromkeys(GIVEN), {}) == Hosts()
    environ = {"IROPE_COORDINATOR": "a:1", "IROPE_PROCESS_ID": "0", "IROPE_NUM_PROCESSES": "2"}
    assert hosts_from(dict.fromkeys(GIVEN), environ) == Hosts("a:1", 0, 2)
    assert hosts_from(GIVEN | dict(process_id=3), environ) == Hosts("10.0.0.1:1234", 3, 4)
    assert hosts_from(dict(num_processes=1), {}) == Hosts(num_processes=1)


@pytest.mark.parametrize(
    "flags, environ, parts",
    [
        (dict(coordinator="a:1"), {}, ("--process-id:", "--coordinator=a:1 was given", "all three")),
        (dict(coordinator="a:1", num_processes=2), {}, ("--process-id:", "--num-processes=2 was given")),
        (dict(num_processes=2), {"IROPE_PROCESS_ID": "1"}, ("--coordinator:", "--process-id=1")),
        (dict(process_id=0), {}, ("--coordinator:",)),
        (GIVEN | dict(process_id=4), {}, ("--process-id=4", "0 to 3", "--num-processes=4")),
        (GIVEN | dict(process_id=-1), {}, ("--process-id=-1", "0 to 3")),
        (GIVEN | dict(num_processes=0), {}, ("--num-processes=0",)),
        (GIVEN | dict(num_processes=1), {}, ("--process-id=1", "0 to 0")),
        (GIVEN | dict(coordinator="10.0.0.1"), {}, ("--coordinator='10.0.0.1'", "HOST:PORT")),
        (GIVEN | dict(coordinator="host:99999"), {}, ("--coordinator=", "HOST:PORT")),
        (GIVEN | dict(join_timeout=0), {}, ("--join-timeout=0",)),
        ({}, {"IROPE_PROCESS_ID": "one"}, ("IROPE_PROCESS_ID='one'", "integer")),
    ],
)
def test_mistakes_name_the_flag_and_the_fix(flags, environ, parts):
    with pytest.raises(ConfigError) as raised:
        hosts_from(flags, environ)
    assert str(raised.value).startswith(parts[0])
    assert all(part in str(raised.value) for part in parts), str(raised.value)


SLURM = {f"SLURM_{name}": "0" for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID")} | {"SLURM_NTASKS": "2"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
MPI_4 = MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    "environ, tpu_chips, cluster",
    [
        ({}, False, None),
        (SLURM, False, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),  # one task, or a shell in an allocation
        ({k: v for k, v in SLURM.items() if "STEP" not in k}, False, None),  # in the batch script, not under srun
        (MPI_4, False, "Open MPI"),
        (MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        (MPI_4 | SLURM | {"SLURM_NTASKS": "1"}, False, "Open MPI"),  # mpirun inside a SLURM job
        ({}, True, "Cloud TPU"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "Cloud TPU on Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"} | POD | {"JOB_COMPLETION_INDEX": "0"}, True, "Cloud TPU on Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "Cloud TPU on Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
        (POD, False, None),  # a notebook, a pod of its own
        (POD | {"JOB_COMPLETION_INDEX": "1"}, False, "Kubernetes"),
    ],
)
def test_clusters_by_their_environment(monkeypatch, environ, tpu_chips, cluster):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name)
    assert find_cluster(environ, tpu_chips=tpu_chips) == cluster


@pytest.mark.parametrize("environ, part", [(MPI, "OMPI_COMM_WORLD_RANK"), (POD | {"JOB_COMPLETION_INDEX": "0"}, "pip")])
def test_processes_that_jax_cannot_bring_together_do_not_run_side_by_side(monkeypatch, environ, part):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--coordinator: .*--num-processes=1") as raised:
        find_cluster(environ, tpu_chips=False)
    assert part in str(raised.value)


def test_alone_there_is_nothing_to_tell():
    assert gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert agree("what", 3, "fix") == 3


def test_a_coordinator_that_does_not_answer_is_an_error_in_time():
    with socket.socket() as taken:  # bound, but not listening: nobody answers and nobody else can have it
        taken.bind(("127.0.0.1", 0))
        where, began = f"127.0.0.1:{taken.getsockname()[1]}", time.monotonic()
        with pytest.raises(ConfigError, match=rf"--coordinator='{where}': .*--join-timeout=1 .*--process-id=0"):
            initialise(Hosts(where, 1, 2, join_timeout=1))
    assert time.monotonic() - began < 10


def run(source, *arguments):
    return subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip


def test_processes_that_do_not_come_and_a_port_that_is_taken():
    source = """
import socket, sys
from irope_jax import cli
with socket.socket() as taken:
    taken.bind(("0.0.0.0", 0))
    taken.listen()
    where = f"127.0.0.1:{taken.getsockname()[1]}"
    train = ["train", "--config=none.json", "--process-id=0", "--num-processes=2", "--join-timeout=1"]
    assert cli.main([*train, f"--coordinator={where}"]) == 2
cli.main([*train, f"--coordinator={where}"])
"""
    done = run(source)
    lines = [line for line in done.stderr.splitlines() if line.startswith("irope: error: ")]
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert lines[0].startswith("irope: error: --coordinator='127.0.0.1:") and "cannot listen on this port" in lines[0]
    assert lines[1].startswith("irope: error: --join-timeout=1: not all processes came")
    assert "stack trace" not in done.stderr
