"""What a run does to every shard, and what became of one: what driver, workers and shard runs tell each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal

from curator_embed.errors import CuratorEmbedError, SourceError, UsageError, redact
from curator_embed.sources.shard import Note, Shard
from curator_embed.steps import BatchStep, Step
from curator_embed.tables.provenance import Footer, counted

log = logging.getLogger(__name__)

OnError = Literal["keep", "drop", "raise"]


@dataclass(frozen=True)
class ShardJob:
    """What a run does to every shard. Picklable, small, the same for all workers.

    Attributes:
        steps: settled steps, in the order their columns are written.
        id_col: the dataset's id column.
        output: folder of a new dataset, or None to add columns in place.
        select: the input's columns a new dataset gets (None: all).
        on_error: what happens to rows without an embedding.
        overwrite: make everything anew, whatever is there.
        engine: which decode engine ("cpu": Pillow; "dali": DALI, on ``device``).
        device: where the models run, as torch names it.
        decode_threads: decode threads a worker.
        model_threads: the forward pass's own threads on a CPU.
        storage_options: for fsspec.
        must_see: files on local disks that a worker must find at these paths, or it is on another disk.
        not_needed: positions of steps whose columns every shard has already; their models are not loaded.
        state: where bookkeeping lies, as the user chose; None for the usual place.
        dimensions: lengths of the vectors of finished shards, by column.
        write_unreadable: write shards of which not one row was embedded, too: something else of the dataset was.
    """

    steps: tuple[Step, ...]
    id_col: str
    output: str | None
    select: tuple[str, ...] | None = None
    on_error: OnError = "keep"
    overwrite: bool = False
    engine: str = "cpu"
    device: str = "cpu"
    decode_threads: int = 4
    model_threads: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    must_see: tuple[str, ...] = ()
    not_needed: frozenset[int] = frozenset()
    state: str | None = None
    dimensions: Mapping[str, int] = field(default_factory=dict)
    write_unreadable: bool = False

    @cached_property
    def recipes(self) -> tuple[dict[str, Any], ...]:
        """What counts of the steps' recipes; asking a step costs more than reading a footer."""
        return tuple(counted(step.recipe()) for step in self.steps)

    @cached_property
    def dimensions_wanted(self) -> tuple[int | None, ...]:
        """Per step, the length of its vectors where that is known; some models are run once to find out."""
        return tuple(step.embedding_dim if isinstance(step, BatchStep) else None for step in self.steps)

    def target(self, shard: Shard) -> str:
        """Where the shard's parquet goes."""
        if self.output is not None:
            return f"{self.output.rstrip('/')}/{shard.name}.parquet"
        table = shard.table_path()
        if table is not None:
            return table
        own = shard.own_table()
        if own is None:
            raise UsageError(f"shard {shard.name} has no table to add columns to; give an output path")
        return own

    def output_options(self, limit: int | None = None) -> dict[str, Any]:
        """How rows and columns were chosen, for the footer: it tells apart outputs of different runs."""
        if self.output is None:
            return {}
        options: dict[str, Any] = {"on_error": "drop" if self.on_error == "drop" else "keep"}
        if self.select is not None:
            options["columns"] = list(self.select)
        if limit is not None:
            options["limit"] = limit
        return options


class FaultKind(StrEnum):
    """Why a shard was set aside."""

    UNUSABLE = "unusable"  # its files cannot be used, or an error met it that nobody expected
    NOTHING_READABLE = "nothing_readable"  # not one row was embedded: nothing is written until it is known why
    FAILED_ROWS = "failed_rows"  # none of the shard's: ``on_error="raise"`` met rows that failed
    KILLS_WORKERS = "kills_workers"  # workers that had nothing else to work on died
    BREAKS_MODEL = "breaks_model"  # the model breaks down over it, also with nothing beside it


@dataclass(frozen=True)
class Fault:
    """Why a shard was set aside: ``kind`` for programs, ``message`` for people, whole and without credentials."""

    kind: FaultKind
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", redact(self.message))

    def __str__(self) -> str:
        return self.message


def fault_of(error: Exception, path: str) -> Fault:
    """What an exception says of the shard that it met; one that nobody expected is logged, and told with where it was.

    Args:
        path: of the shard.
    """
    if isinstance(error, NothingReadable):
        return Fault(FaultKind.NOTHING_READABLE, str(error))
    if isinstance(error, FailedRows):
        return Fault(FaultKind.FAILED_ROWS, str(error))
    if isinstance(error, SourceError | UsageError):
        return Fault(FaultKind.UNUSABLE, str(error))
    if isinstance(error, CuratorEmbedError):
        return Fault(FaultKind.UNUSABLE, f"{path}: {error}")
    if isinstance(error, OSError):
        known = SourceError(path, f"cannot be read ({error})", "Check that it exists and may be read")
        return Fault(FaultKind.UNUSABLE, str(known))
    log.warning("%s: unexpected error", redact(path), exc_info=error)
    return Fault(
        FaultKind.UNUSABLE,
        f"{path}: could not be worked on ({type(error).__name__}: {error}). The log has the details; the other shards "
        "are not affected",
    )


@dataclass
class ShardReport:
    """What became of one shard's rows; sums up to the run's report.

    Attributes:
        found: what the job found out about its unit, for the work that it belongs to (``Work.settle``).
    """

    shard: str
    read: int = 0
    embedded: int = 0
    failed: int = 0
    no_image: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    skipped: bool = False
    images_without_row: int = 0
    notes: list[Note] = field(default_factory=list)
    examples: list[tuple[str, str]] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)
    decoders: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    queues: dict[str, dict[str, float]] = field(default_factory=dict)
    fault: Fault | None = None
    found: Any = None

    @classmethod
    def of_finished(cls, shard: str, footer: Footer, *, with_dropped: bool = False) -> ShardReport:
        """The report of a shard that an earlier run finished, from its footer.

        Args:
            with_dropped: count the rows that its output was made without as well.
        """
        report = cls(shard, skipped=True)
        report.take(footer.accounted() if with_dropped else footer.counts)
        return report

    def take(self, counts: Mapping[str, Any]) -> None:
        """Take over counts as ``counts`` gives them."""
        self.read, self.embedded = counts.get("read", 0), counts.get("embedded", 0)
        self.failed, self.no_image = counts.get("failed", 0), counts.get("no_image", 0)
        self.reasons = dict(counts.get("reasons", {}))

    @property
    def held(self) -> bool:
        """Rows failed and none was embedded (``NothingReadable``): nothing was written, and what becomes of the shard
        is decided when the others are through.
        """
        return self.fault is not None and self.fault.kind is FaultKind.NOTHING_READABLE

    def counts(self) -> dict[str, Any]:
        """The part that is stored in the footer, so that a resumed run can account for this shard."""
        return {
            "read": self.read,
            "embedded": self.embedded,
            "failed": self.failed,
            "no_image": self.no_image,
            "reasons": dict(sorted(self.reasons.items())),
        }


class FailedRows(UsageError):
    """``on_error="raise"`` met rows that failed; the shard was not written."""


class NothingReadable(CuratorEmbedError):
    """Rows of a shard failed and none was embedded, so the shard was not written: as long as nothing else of the
    dataset was embedded, it may be the source that is wrong (a forgotten ``root=``) and not the images.
    """
