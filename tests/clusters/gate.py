"""An embedder that stops in the middle until it is let go on: tests kill workers while it waits."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.stub import ColourEmbedder, ColourModel

DEADLINE_S = 120.0


class GatedModel(ColourModel):
    """Says where it runs, and works once the gate is open."""

    def __init__(self, batch_size: int, folder: Path) -> None:
        super().__init__(batch_size)
        self.folder = folder

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        (self.folder / f"began-{socket.gethostname()}-{os.getpid()}").touch()
        wait_until((self.folder / "open").exists, "the gate to open")
        return super().__call__(images)


class GatedEmbedder(ColourEmbedder):
    """``ColourEmbedder`` behind a gate: a folder in which a file named "open" lets it work."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def load_model(self, device: str, threads: int | None = None) -> GatedModel:
        return GatedModel(self.batch_size, self.folder)

    def began(self) -> dict[int, str]:
        """Process number -> host of the workers that have come to the gate."""
        found = [path.name.split("-", 1)[1].rpartition("-") for path in self.folder.glob("began-*")]
        return {int(number): host for host, _, number in found}

    def open(self) -> None:
        """Let all go on."""
        (self.folder / "open").touch()


def wait_until(there: Callable[[], object], what: str, seconds: float = DEADLINE_S) -> None:
    """Return once it is so."""
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
