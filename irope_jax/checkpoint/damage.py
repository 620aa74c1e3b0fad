"""Which checkpoints of a run are damaged, and where those go that stand in the way."""

from __future__ import annotations

import logging
from pathlib import Path

from irope_jax.checkpoint import checksums

log = logging.getLogger(__name__)

DAMAGED = "damaged_checkpoints"
"""Where in a run directory those go that a run that goes on found damaged."""


class Damage:
    """What is wrong with the checkpoints in a directory; each is compared with its checksums once."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._known: dict[int, str | None] = {}

    def of(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step; None if it is whole."""
        if step not in self._known:
            directory = self._directory / str(step)
            if checksums.has_list(directory):
                self._known[step] = checksums.fault(directory)
            else:
                log.info("%s: made before there were checksums; used as it is", directory)
                self._known[step] = None
        return self._known[step]

    def forget(self, step: int) -> None:
        """The checkpoint of this step is gone; another may be saved under its name."""
        self._known.pop(step, None)

    def move_away(self, step: int) -> None:
        """Put a checkpoint aside, so that its step can be saved again."""
        place = self._directory.parent / DAMAGED
        place.mkdir(exist_ok=True)
        target, number = place / str(step), 1
        while target.exists():
            target, number = place / f"{step}.{number}", number + 1
        (self._directory / str(step)).rename(target)
        self.forget(step)
        log.warning("%s: moved to %s", self._directory / str(step), target)
