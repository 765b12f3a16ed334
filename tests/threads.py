"""Runs on workers that are threads of this process, while something happens beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from distributed import get_worker

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.execution.report import RunReport
from curator_embed.steps import BatchModel
from tests.stub import ColourEmbedder


class Pausing(ColourEmbedder):
    """Takes its time, so that workers can come and go; notes which workers it ran on."""

    ran_on: ClassVar[set[str]] = set()

    def prepare(self, image: Any) -> Any:
        time.sleep(0.1)
        return super().prepare(image)

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        Pausing.ran_on.add(get_worker().address)
        return super().load_model(device, threads)


@contextmanager
def meanwhile(*steps: tuple[Callable[[], bool], Callable[[], Any]]) -> Iterator[None]:
    """Beside the block, one after another: wait until something holds, then do something."""

    def go() -> None:
        for holds, do in steps:
            wait_until(holds)
            do()

    thread = threading.Thread(target=go)
    thread.start()
    yield
    thread.join(30)


def wait_until(holds: Callable[[], bool], within: float = 30.0) -> None:
    until = time.monotonic() + within
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def has_begun(output: Path) -> Callable[[], bool]:
    return lambda: any(output.glob("*.parquet"))


def save(step: ColourEmbedder, source: Path, output: Path) -> RunReport:
    return step(ImageTextPairDataset.from_webdataset(str(source))).save_metadata(str(output), progress=False)
