"""The processes of a run: how they find each other, what they tell each other, who logs.

One process is the usual case and pays for nothing here. With several, every process runs the same program over one
mesh; process 0 alone writes records and prints. What a process feeds to the mesh is said in `sharding.feed`.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from irope_jax.core.config import ConfigError
from irope_jax.core.pulse import Pulse

log = logging.getLogger(__name__)


# ---- finding each other ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hosts:
    """Where the processes of a run meet. Nothing given: as the cluster says, if there is one.

    Attributes:
      coordinator: HOST:PORT where process 0 listens and the others find it.
      process_id: which process this is, from 0.
      num_processes: how many there are; 1 says that this process works alone, whatever the cluster says.
      join_timeout: seconds to wait for the others.
    """

    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None
    join_timeout: int = 300

    def __post_init__(self):
        if self.join_timeout < 1:
            raise ConfigError("--join-timeout", self.join_timeout, "seconds to wait for the other processes, 1 or more")
        count, place = self.num_processes, self.process_id
        if count is not None and count < 1:
            raise ConfigError("--num-processes", count, "how many processes the run has, 1 or more")
        if count == 1 and not place:
            return
        given = {"--coordinator": self.coordinator, "--process-id": place, "--num-processes": count}
        missing = [flag for flag, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            there = " ".join(f"{flag}={value}" for flag, value in given.items() if value is not None)
            fix = f"{there} was given: give all three of {', '.join(given)}, or none of them on a cluster jax knows"
            raise ConfigError(missing[0], ConfigError.ABSENT, fix)
        if missing:
            return
        if not 0 <= place < count:
            raise ConfigError("--process-id", place, f"must be 0 to {count - 1}: there are --num-processes={count}")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError("--coordinator", self.coordinator, "give HOST:PORT, a free port on the host of process 0")


ENVIRONMENT = {
    "coordinator": "IROPE_COORDINATOR",
    "process_id": "IROPE_PROCESS_ID",
    "num_processes": "IROPE_NUM_PROCESSES",
}
"""Environment variables that stand for flags not given."""


def hosts_from(flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Hosts:
    """Flags (None where not given) and, for those not given, environment variables.

    Raises:
      ConfigError: half of what is needed, or out of range; names the flag.
    """
    values = {name: value for name, value in flags.items() if value is not None}
    for name, variable in ENVIRONMENT.items():
        text = environ.get(variable, "")
        if name in values or not text:
            continue
        if name != "coordinator" and not text.lstrip("-").isdigit():
            raise ConfigError(variable, text, "must be an integer")
        values[name] = text if name == "coordinator" else int(text)
    return Hosts(**values)


def find_cluster(environ: Mapping[str, str], *, tpu_chips: bool) -> str | None:
    """The cluster whose processes jax can bring together by itself; None where this process works alone.

    Open MPI and SLURM: more than one task was launched. Cloud TPU: there are chips, and on Kubernetes more than one
    worker. Kubernetes: a pod of an indexed Job or JobSet. The rest (addresses, numbers) `jax.distributed.initialize`
    finds out itself.

    Raises:
      ConfigError: there are several processes, but jax cannot bring them together without being told how.
    """
    by_hand = "give --coordinator=HOST:PORT --process-id=N --num-processes=M, or --num-processes=1 to work alone"
    tasks = environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if tasks != "1":
        if "OMPI_MCA_orte_hnp_uri" not in environ:  # Open MPI 5 no longer says where its launcher is
            fix = (
                f"this Open MPI does not say where process 0 is; {by_hand} "
                "(N is $OMPI_COMM_WORLD_RANK, M is $OMPI_COMM_WORLD_SIZE)"
            )
            raise ConfigError("--coordinator", ConfigError.ABSENT, fix)
        return "Open MPI"
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environ for name in slurm) and environ["SLURM_NTASKS"] != "1":
        return "SLURM"
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if tpu_chips and workers is not None:
        several = "," in workers or environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
        return "Cloud TPU on Kubernetes" if several else None
    if tpu_chips and "TPU_SKIP_MDS_QUERY" not in environ:
        return "Cloud TPU"  # one host or many: its metadata server tells, and jax asks it
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is None:
            fix = f"a pod of an indexed Job: `pip install kubernetes`, with which jax finds the others; or {by_hand}"
            raise ConfigError("--coordinator", ConfigError.ABSENT, fix)
        return "Kubernetes"
    return None


HEARTBEAT = 90
"""Seconds after which jax itself ends the others of a dead process, at the latest; half of it was seen (jax 0.10.2).
`pulse` has to be faster, as it names the host."""

_pulse: Pulse | None = None


def initialise(hosts: Hosts) -> None:
    """Join the other processes of the run, if there are any. Call it before anything asks jax for a device.

    Raises:
      ConfigError: they cannot be found, or do not come in time; names the flag and the fix.
    """
    avoid_absent_tpu()
    if hosts.num_processes == 1 or jax.distributed.is_initialized():
        return
    if hosts.num_processes is None:
        cluster, how = find_cluster(os.environ, tpu_chips=tpu_chips()), {}
        if cluster is None:
            return
    else:
        cluster = None
        how = {
            "coordinator_address": hosts.coordinator,
            "num_processes": hosts.num_processes,
            "process_id": hosts.process_id,
            "cluster_detection_method": "deactivate",
        }
    # jax would take SIGTERM for itself and tell only those who ask it; `core.stopping.StopRequest` does both.
    jax.config.update("jax_enable_preemption_service", False)
    until = time.monotonic() + hosts.join_timeout
    if cluster is None and hosts.process_id == 0:
        _check_port(hosts)
    elif cluster is None:
        _wait_for_coordinator(hosts, until)
    with _Deadline(until, _absent(hosts, cluster)):
        try:
            # its own deadline ends the process with a stack trace, so that ours has to come first
            jax.distributed.initialize(
                **how, initialization_timeout=hosts.join_timeout + 60, heartbeat_timeout_seconds=HEARTBEAT
            )
        except (RuntimeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if cluster is None:
                fix = f"process {hosts.process_id} cannot join the others there ({reason})"
            else:
                fix = f"jax cannot join the processes of this cluster ({reason}); say where they meet: --coordinator, "
                fix += "--process-id, --num-processes; or --num-processes=1 to work alone"
            raise ConfigError("--coordinator", hosts.coordinator or cluster, fix) from None
    _start_pulse()


def _start_pulse() -> None:
    global _pulse
    if jax.process_count() == 1:
        return
    try:
        from jax._src.distributed import global_state  # jax has no public door to its store

        store = global_state.client
        store.key_value_dir_get("irope/")
    except Exception as error:
        log.warning("this jax does not let processes watch each other (%s); its own messages will have to do", error)
        return
    _pulse = Pulse(store, jax.process_index())
    _pulse.turn()  # from now on its silence is heard
    _pulse.start()
    atexit.register(_pulse.leave)  # before jax's own leaving, which waits for all


LOST = ("gloo", "nccl", "connection", "socket", "peer", "coordination", "heartbeat", "barrier")


def end_if_another_is_gone(error: BaseException) -> None:
    """End this process with a line that names the one that is gone, if that is what the error is about."""
    if gone := lost_process(error):
        _pulse.end(gone)


def lost_process(error: BaseException) -> str | None:
    """Who is gone, if an error says that another process does not answer; waits until that is known, under a minute."""
    if _pulse is None or not any(word in str(error).lower() for word in LOST):
        return None
    return _pulse.who()


def _absent(hosts: Hosts, cluster: str | None) -> str:
    who = f"--coordinator={hosts.coordinator} --process-id={hosts.process_id} --num-processes={hosts.num_processes}"
    return (
        f"irope: error: --join-timeout={hosts.join_timeout}: not all processes came in that many seconds "
        f"({cluster or who}); start every process with the same --coordinator and --num-processes and a --process-id "
        "of its own, or wait longer"
    )


def _check_port(hosts: Hosts) -> None:
    """jax's own service dies unpleasantly on a port that is taken."""
    ipv6 = socket.has_dualstack_ipv6()
    port = int(hosts.coordinator.rpartition(":")[2])
    try:
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=ipv6).close()
    except OSError as error:
        fix = f"process 0 cannot listen on this port ({error.strerror}); choose a free one, the same for all processes"
        raise ConfigError("--coordinator", hosts.coordinator, fix) from None


def _wait_for_coordinator(hosts: Hosts, until: float) -> None:
    host, _, port = hosts.coordinator.rpartition(":")
    error = None
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 10)).close()
            return
        except OSError as found:
            error = found
            time.sleep(0.2)
    fix = (
        f"process 0 did not answer there within --join-timeout={hosts.join_timeout} seconds ({error}); start it with "
        "--process-id=0 on that host, open the port between the hosts, or wait longer"
    )
    raise ConfigError("--coordinator", hosts.coordinator, fix)


class _Deadline:
    """Ends the process with one line if the `with` block, which cannot be interrupted, takes too long."""

    def __init__(self, until: float, message: str):
        self._message = message
        self._timer = threading.Timer(max(0.1, until - time.monotonic()), self._end)
        self._timer.daemon = True

    def _end(self) -> None:
        print(self._message, file=sys.stderr, flush=True)
        os._exit(2)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def tpu_chips() -> bool:
    """Whether this machine has a TPU: libtpu is installed and a chip's device file is there."""
    there = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ
    return there and (any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev").glob("vfio/[0-9]*")))


def avoid_absent_tpu() -> None:
    """With libtpu installed but no accelerator here, compute on the CPU without trying a TPU first.

    libtpu is a compiler too, and installed for that where there is no TPU; being tried as a device it prints errors.
    This is what JAX_PLATFORMS=cpu does; whoever sets JAX_PLATFORMS is obeyed. Must precede the first use of a device.
    """
    if jax.config.jax_platforms or importlib.util.find_spec("libtpu") is None:
        return
    gpus = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    # jax sets the variable at import where it finds no chip on the PCI bus
    if os.environ.get("TPU_SKIP_MDS_QUERY") and not tpu_chips() and not any(map(os.path.exists, gpus)):
        jax.config.update("jax_platforms", "cpu")


def others_wait() -> bool:
    """Whether this process was joined to others, which notice if it goes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


# ---- who speaks -----------------------------------------------------------------------------------------------------


def is_main_process() -> bool:
    """True in the one process that writes records and prints."""
    return jax.process_index() == 0


def configure_logging(level: int = logging.INFO) -> None:
    """Log lines of this package to standard error, warnings of others; only errors outside process 0."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname).1s %(name)s: %(message)s"))
    package = logging.getLogger("irope_jax")
    package.handlers[:] = [handler]
    package.propagate = False
    package.setLevel(level if is_main_process() else logging.ERROR)
    if jax.process_count() > 1:
        log.info(
            "%d processes, %d devices, %d of them in this one",
            jax.process_count(), jax.device_count(), jax.local_device_count(),
        )  # fmt: skip


# ---- what they tell each other --------------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """The value of every process, in their order, on every process; plain JSON values. All must call it together."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(rows[i, : sizes[i]].tobytes()) for i in range(len(sizes))]


def agree(what: str, value: Any, fix: str) -> Any:
    """`value`, if every process has the same.

    Raises:
      DisagreementError: naming `what`, the values and the fix.
    """
    values = gather(value)
    odd = next((i for i, other in enumerate(values) if other != values[0]), None)
    if odd is not None:
        raise DisagreementError(f"{what}: process 0 has {values[0]!r}, process {odd} has {values[odd]!r}; {fix}")
    return value


class DisagreementError(RuntimeError):
    """Processes of one run that were given different things; says which."""


def to_host(array: jax.Array) -> np.ndarray:
    """A global array as numpy, on every process. All must call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
