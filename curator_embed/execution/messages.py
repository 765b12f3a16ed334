"""What a run says to its workers beside their tasks: to stop, to give shards back, to let go of their models."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distributed import Client

from curator_embed.execution.worker import ask_back, close_run, stop_run

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
"""How often it is looked whether there is something to say."""
TELL_WITHIN_S = 5.0
"""A worker that has not answered a message in this time does not hold back the next one to the others."""
CLOSE_WITHIN_S = 30.0
"""How long workers have to let go of a run's models before the driver goes on without their word."""


class Messages:
    """Says it in a thread of its own, because a worker that hangs does not answer.

    Args:
        run_id: the run.
        stopping: asked now and then; once it says yes, workers are told to begin no more shards.
    """

    def __init__(self, client: Client, run_id: str, stopping: Callable[[], bool]) -> None:
        self._client, self._run_id, self._stopping = client, run_id, stopping
        self._wanted: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()

    @contextmanager
    def open(self) -> Iterator[None]:
        """For the length of the block; at its end workers are told to let go of the run's models."""
        over = threading.Event()

        def talk() -> None:
            while not over.wait(LOOK_EVERY_S):
                if self._stopping():
                    self._tell(stop_run, self._run_id)  # again and again: workers may be new
                elif wanted := self.wanted_back():
                    self._tell(ask_back, wanted)
            self._tell(close_run, self._run_id, CLOSE_WITHIN_S)

        thread = threading.Thread(target=talk, name="talking-to-workers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(CLOSE_WITHIN_S)

    def ask_back(self, tasks: Sequence[str]) -> None:
        """Have these tasks asked for the shards they have not finished; does not wait for it."""
        self._wanted.put(tasks)

    def wanted_back(self) -> list[str]:
        """The tasks that ``ask_back`` was given since the last call."""
        wanted: dict[str, None] = {}
        while not self._wanted.empty():
            wanted.update(dict.fromkeys(self._wanted.get()))
        return list(wanted)

    def _tell(self, message: Callable[..., Any], content: str | list[str], within: float = TELL_WITHIN_S) -> None:
        """Call a function on every worker there is; what goes wrong is no reason to stop talking."""
        try:
            if self._client.status == "running":
                self._client.run(message, content, on_error="ignore", callback_timeout=within)
        except Exception as error:
            log.debug("not every worker heard %s (%s: %s)", message.__name__, type(error).__name__, error)
