"""What a run would do: counted from footers, timed on a few of the dataset's own images."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curator_embed.datasets.saving import plan as planned
from curator_embed.execution.job import ShardJob
from curator_embed.execution.placing import Workforce
from curator_embed.execution.worker import build_pipeline
from curator_embed.steps import BatchStep, Step

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset

TIMED_IMAGES = 64


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` prints.

    Attributes:
        shards: in the dataset; ``done`` of them are finished and will be skipped.
        rows: rows left to work on; None when the tables and indexes do not say.
        bytes_to_write, bytes_free: None where not known.
        seconds: expected for the rows that are left, measured on a few images; None when rows are not known.
        conflicts: files that stand in the way, with why.
        planned_for: the workers that are assumed, in words.
    """

    shards: int
    done: int
    rows: int | None
    bytes_to_write: int | None
    bytes_free: int | None
    images_per_second: float | None
    seconds: float | None
    conflicts: list[str]
    settings: dict[str, Any]
    planned_for: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = "unknown (no parquet and no index; run index-tars to count)" if self.rows is None else f"{self.rows:,}"
        lines = [f"shards         {self.shards:,}, of which {self.done:,} are done", f"rows left      {rows}"]
        if self.bytes_to_write is not None:
            free = "" if self.bytes_free is None else f", {self.bytes_free / 1e9:,.2f} GB free"
            lines.append(f"to write       {self.bytes_to_write / 1e9:,.3f} GB{free}")
        lines.append(f"planned for    {self.planned_for}")
        if self.images_per_second is not None:
            lines.append(
                f"speed          about {self.images_per_second:,.1f} images/s per worker, measured on a few images here"
            )
        if self.seconds is not None:
            lines.append(f"time           about {_duration(self.seconds)}")
        for name, settings in self.settings.items():
            lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        lines += [f"in the way     {conflict}" for conflict in self.conflicts[:10]]
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 172800 else f"{seconds / 86400:,.1f} days"


def describe(
    dataset: ImageTextPairDataset,
    output: str | None,
    *,
    limit: int | None,
    overwrite: bool,
    workforce: Workforce,
    planned_for: str,
) -> DryRun:
    """Plan the run and time a few images in this process; starts no cluster and writes nothing.

    Args:
        workforce: the workers that are assumed; ``planned_for`` says in words which.
    """
    plan = planned(dataset, output, limit=limit, overwrite=overwrite, workforce=workforce)
    todo = plan.todo
    speed = None
    if todo and len(plan.job.not_needed) < len(plan.job.steps) and _is_here(plan.job.device):  # else columns are copied
        images = dataset.like([plan.shards[todo[0]]], ()).first_images(TIMED_IMAGES)
        # An eager model is a safe lower bound: compiling takes longer than this measurement.
        job = dataclasses.replace(plan.job, steps=tuple(map(_eager, plan.job.steps)))
        speed = _images_per_second(job, images) if images else None
    rows = plan.rows if plan.rows_known else None
    return DryRun(
        shards=len(plan.shards),
        done=len(plan.shards) - len(todo),
        rows=rows,
        bytes_to_write=plan.bytes_to_write,
        bytes_free=plan.bytes_free,
        images_per_second=speed,
        seconds=rows / (speed * workforce.workers) if rows is not None and speed else None,
        conflicts=[str(conflict) for conflict in plan.conflicts()],
        settings=plan.settings,
        planned_for=planned_for,
    )


def _is_here(device: str) -> bool:
    """Whether this process can time a model on it: a cluster may have GPUs that this machine lacks."""
    return device.partition(":")[0] != "cuda" or bool(Workforce.here().gpus()["this machine"])


def _eager(step: Step) -> Step:
    return step.eager() if isinstance(step, BatchStep) else step


def _images_per_second(job: ShardJob, images: list[bytes]) -> float:
    """Run images through a pipeline of their own, twice: the first time warms up."""
    pipeline = build_pipeline(job)
    wanted = [position for position in range(len(job.steps)) if position not in job.not_needed]
    try:
        rates = []
        for part in (images[:16], images):
            start = time.perf_counter()
            with pipeline.shard(wanted) as opened:
                with pipeline.feeding():
                    for number, image in enumerate(part):
                        opened.submit(number, image)
                opened.wait()
            rates.append(len(part) / (time.perf_counter() - start))
        return rates[-1]
    finally:
        pipeline.close()
