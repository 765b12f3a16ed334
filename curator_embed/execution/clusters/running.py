"""A Dask cluster that somebody else has started."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import ClassVar

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.clusters.config import ClusterConfig

HALF_WRITTEN_S = 10.0
"""How long a scheduler file may be incomplete: its scheduler is just writing it."""


@dataclass(frozen=True, kw_only=True)
class RunningConfig(ClusterConfig):
    """A running scheduler, by one of two.

    Attributes:
        scheduler: its address ("tcp://10.0.0.1:8786").
        scheduler_file: the JSON file that ``dask scheduler --scheduler-file`` has written.
    """

    kind: ClassVar[str] = "scheduler"

    scheduler: str | None = None
    scheduler_file: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.scheduler is None) == (self.scheduler_file is None):
            raise UsageError(f"{self.path}: give 'scheduler' (an address) or 'scheduler_file', one of the two")
        plain = ClusterConfig()
        for key in ("nodes", "gpus_per_node", "workers_per_node", "threads_per_worker", "options"):
            if getattr(self, key) != getattr(plain, key):
                raise self.wrong(key, "starts a new cluster and cannot go with a running scheduler")

    def check(self) -> None:
        """See ``ClusterConfig.check``: whether the scheduler's file is there."""
        if self.scheduler_file is not None and not os.path.exists(self.scheduler_file):
            raise UsageError(
                f"scheduler_file={self.scheduler_file}: no such file; start a scheduler with "
                f"--scheduler-file {self.scheduler_file}"
            )

    def start(self) -> str:
        """The scheduler's address; see ``ClusterConfig.start``."""
        if self.scheduler is not None:
            return self.scheduler
        self.check()
        assert self.scheduler_file is not None
        until = time.monotonic() + HALF_WRITTEN_S
        while True:
            try:
                with open(self.scheduler_file, encoding="utf-8") as file:
                    return str(json.load(file)["address"])
            except OSError as error:
                raise UsageError(f"scheduler_file={self.scheduler_file}: cannot be read ({error.strerror})") from error
            except (ValueError, KeyError, TypeError):
                if time.monotonic() > until:
                    raise CuratorEmbedError(
                        f"scheduler_file={self.scheduler_file}: not a file of a Dask scheduler (JSON with an address)"
                    ) from None
                time.sleep(0.1)

    def where_to_look(self) -> str:
        """See ``ClusterConfig.where_to_look``."""
        command = f"dask worker {self.scheduler or f'--scheduler-file {self.scheduler_file}'}"
        return f"whether workers were started for it ({command}), and their logs"
