"""What a controller must not forget when its process dies: which instances are held, and that the cluster stops.

A small file beside the logs, on the machine where every controller of a run lives; it needs nobody else to be there.
Notes of another run are none. How often an instance has died lately is not noted: after a controller's death the pauses
between its restarts begin anew.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

__all__ = ["ControllerNotes"]

logger = logging.getLogger(__name__)


class ControllerNotes:
    """Read once, at the beginning of a controller; written then, and before a request that changes them is answered.

    Attributes:
        generation: 1 for the first controller of a run, and higher for each later one.
        held: instance ids.
        stopping: the cluster was told to stop.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.generation = 1
        self.held: frozenset[str] = frozenset()
        self.stopping = False
        self._path = path
        self._run = run
        try:
            noted = json.loads(path.read_text())
            if noted["run"] == run:
                self.held, self.stopping = frozenset(map(str, noted["held"])), bool(noted["stopping"])
                self.generation = int(noted["generation"]) + 1
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): no instance is held", path, error)
        self.write(self.held, stopping=self.stopping)

    def write(self, held: Collection[str], *, stopping: bool) -> None:
        """Replace the notes in one step."""
        self.held, self.stopping = frozenset(held), stopping
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                notes = {"run": self._run, "generation": self.generation, "held": sorted(held), "stopping": stopping}
                json.dump(notes, file)
            temporary.replace(self._path)
        except OSError as error:
            # The controller goes on; only its successor would not know.
            logger.warning("%s cannot be written (%s)", self._path, error)
