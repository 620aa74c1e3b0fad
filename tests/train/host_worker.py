"""A process of `test_two_processes.py`; not a test. Runs the verbs one after the other in one process.

host_worker.py PLACE                    alone: every PLACE/NAME.json, to the end
host_worker.py PLACE PROCESS PORT       as one of two processes; exit codes go to PLACE/codes.PROCESS.json
"""

import json
import os
import signal
import sys
import unittest.mock
from pathlib import Path

from irope_jax import cli
from irope_jax.core.records import NullWriter


def train(place, name):
    return "train", f"--config={place / name}.json", f"--run-dir={place / name}"


def alone(place: Path) -> None:
    for config in sorted(place.glob("*.json")):
        assert cli.main([*train(place, config.stem), "--config.train.log_every=1"]) == 0


def together(place: Path, process: int, port: int) -> None:
    flags = [f"--coordinator=127.0.0.1:{port}", f"--process-id={process}", "--num-processes=2", "--join-timeout=120"]
    codes = {}

    def irope(step, *arguments):
        codes[step] = cli.main([*arguments, *flags])
        (place / f"codes.{process}").write_text(json.dumps(codes))  # read if a later step hangs

    irope("data", *train(place, "data"))
    irope("data again", *train(place, "data"))
    irope("data evaluated", "eval", str(place / "data"), "--step=4")
    if (place / "both.json").is_file():
        irope("both", *train(place, "both"))

    # process 1, and it alone, gets SIGTERM when it is told of step 1, then when it is told a measurement of step 5
    with patched("train", terminate_at(1)):
        irope("context stopped", *train(place, "context"))
    with patched("measure", terminate_at(5)):
        irope("context cut", *train(place, "context"))
    irope("context", *train(place, "context"))

    irope("refused", *train(place, "context"), "--config.train.z_loss=1e-4")  # ends the process


def patched(method, function):
    return unittest.mock.patch.object(NullWriter, method, function)


def terminate_at(at):
    def terminate(self, step, *_):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    return terminate


if __name__ == "__main__":
    if len(sys.argv) == 2:
        alone(Path(sys.argv[1]))
    else:
        together(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
