"""One of several processes of `test_two_processes.py`; not a test. Runs the verbs one after the other in one process.

host_worker.py PLACE PROCESS PORT     PLACE holds NAME.json configs; exit codes go to PLACE/codes.PROCESS.json
"""

import json
import os
import signal
import sys
from pathlib import Path

from irope_jax import cli
from irope_jax.core.records import NullWriter

STOP_AT = 1
"""Process 1, and it alone, gets SIGTERM while it should record this step."""


def main(place: Path, process: int, port: int) -> None:
    flags = [
        f"--coordinator=127.0.0.1:{port}", f"--process-id={process}", "--num-processes=2", "--join-timeout=120",
    ]  # fmt: skip
    codes = {}

    def irope(step, *arguments):
        codes[step] = cli.main([*arguments, *flags])
        (place / f"codes.{process}.json").write_text(json.dumps(codes))  # read if a later step hangs

    def train(name):
        return "train", f"--config={place / name}.json", f"--run-dir={place / name}"

    irope("data", *train("data"))
    irope("data again", *train("data"))
    irope("data evaluated", "eval", str(place / "data"), "--only=perplexity", "--step=4")
    irope("both", *train("both"))

    quiet, NullWriter.train = NullWriter.train, terminate
    irope("context stopped", *train("context"))
    NullWriter.train = quiet
    irope("context", *train("context"))

    # a directory that only one process can write to as asked, and a config that only one of them has
    irope("refused", *train("context"), "--config.train.z_loss=1e-4")


def terminate(self, step, scalars):
    if step == STOP_AT:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
