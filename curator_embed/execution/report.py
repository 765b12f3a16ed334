"""What a run did: every row accounted for, and where the time went."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from curator_embed.execution.certificate import certificate_lines
from curator_embed.execution.job import Fault, ShardReport
from curator_embed.pipeline.pipeline import StageClock

if TYPE_CHECKING:
    from curator_embed.datasets import ImageTextPairDataset

MAX_LISTED = 50
"""Notes and faults kept in a report; the rest is counted."""


def bottleneck(loads: Mapping[str, float]) -> str:
    """The stage whose threads have least time left: the others wait for it.

    Args:
        loads: per stage, the part of its threads' time in which they were busy, 0 to 1. "read" and "write" share
            their threads.
    """
    shared = max(("read", "write"), key=lambda stage: loads[stage])
    together = {"decode": loads["decode"], "model": loads["model"], shared: loads["read"] + loads["write"]}
    return max(together, key=lambda stage: together[stage])


@dataclass
class RunReport:
    """The account of one run over all shards, finished earlier or now.

    Attributes:
        read, embedded, failed, no_image: rows; ``read == embedded + failed + no_image``.
        reasons: failed rows by reason code.
        shards: ``{"done": by this run, "skipped": finished earlier, "failed": set aside, "left": not begun}``.
        images_without_row: images no table row knows (rows were added for them only with an output path).
        wall_seconds: this run, from the first shard to the last.
        decoders: images of this run by what decoded them ("pillow", "dali").
        time: busy seconds a stage, summed over all threads of all workers; ``idle`` is how long models waited.
        threads: of each stage, on one worker; "read" and "write" share theirs.
        queues: what waited between stages: ``encoded`` images for a decoder, ``ready`` batches for a model. ``waited``
            (integral over ``seconds``), ``filled`` (as part of the room) and ``most``, summed over workers.
        workers: Dask workers at a time, at most.
        workers_lost: Dask workers that left while the run went on.
        worker_seconds: time that workers were there, summed over them.
        output: the folder of the parquet files; of several, the first shard's.
        images_below: the root of a path list; empty for other sources.
        settings: what was settled for the run (device, threads, compile, batch shape), per column.
        faults: shard name -> why it was set aside.
        certificate: figures of the comparison with the models' own preprocessing, when asked for.
        stopped: the run was asked to stop before all shards had begun.
        ended: why the run could not go on; empty when it came to its end.
        dataset: the saved dataset, with nothing pending.
    """

    read: int = 0
    embedded: int = 0
    failed: int = 0
    no_image: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=lambda: {"done": 0, "skipped": 0, "failed": 0, "left": 0})
    images_without_row: int = 0
    images_this_run: int = 0
    decoders: dict[str, int] = field(default_factory=dict)
    wall_seconds: float = 0.0
    time: dict[str, float] = field(default_factory=lambda: dict.fromkeys(StageClock.STAGES, 0.0))
    threads: dict[str, int] = field(default_factory=lambda: {"read": 2, "decode": 1, "model": 1, "write": 2})
    queues: dict[str, dict[str, float]] = field(default_factory=dict)
    workers: int = 1
    workers_lost: int = 0
    worker_seconds: float = 0.0
    output: str = ""
    images_below: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    notes_left_out: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    certificate: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False
    ended: str = ""
    dataset: ImageTextPairDataset | None = None

    @property
    def images_per_second(self) -> float:
        """Images embedded or found bad by this run, a second of wall time."""
        return self.images_this_run / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def whole(self) -> bool:
        """Whether all was done that was to be done."""
        return not (self.faults or self.stopped or self.ended)

    def follow(self, after: RunReport) -> None:
        """Take over what became of work that was done to the same output afterwards; its rows are counted already."""
        self.faults |= after.faults
        self.stopped, self.ended = self.stopped or after.stopped, self.ended or after.ended
        self.wall_seconds += after.wall_seconds
        self.workers_lost += after.workers_lost
        shards = self.shards["done"] + self.shards["skipped"]
        self.shards |= {state: self.shards[state] + after.shards[state] for state in ("left", "failed")}
        finished = max(0, shards - after.shards["left"] - after.shards["failed"])
        self.shards["done"] = min(finished, max(self.shards["done"], after.shards["done"]))
        self.shards["skipped"] = finished - self.shards["done"]
        self._note_all(after.notes)

    def add(self, shard: ShardReport) -> None:
        """Count one shard's rows."""
        if shard.fault is not None:
            self.faults[shard.shard] = shard.fault
        if shard.fault is not None and not shard.skipped:
            self.shards["failed"] += 1
        else:
            self.shards["skipped" if shard.skipped else "done"] += 1
            self.read += shard.read
            self.embedded += shard.embedded
            self.failed += shard.failed
            self.no_image += shard.no_image
            self.reasons = dict(sorted((Counter(self.reasons) + Counter(shard.reasons)).items()))
            self.images_without_row += shard.images_without_row
            if not shard.skipped:
                self.images_this_run += shard.read - shard.no_image
                self.decoders = dict(sorted((Counter(self.decoders) + Counter(shard.decoders)).items()))
        self._note_all(f"{note.path}: {note.message}" for note in shard.notes)
        self._note_all(f"{shard.shard}: {text}" for text in shard.exceptions)
        for key, reason in shard.examples[: max(0, 10 - len(self.examples))]:
            self.examples.append((shard.shard, key, reason))
        self.add_load(shard)

    def add_load(self, shard: ShardReport) -> None:
        """Count where the time went that the work on a shard took, whatever became of it."""
        for stage, seconds in shard.seconds.items():
            self.time[stage] += seconds
        for queue, figures in shard.queues.items():
            so_far = self.queues.setdefault(queue, dict.fromkeys(figures, 0.0))
            for name, value in figures.items():
                so_far[name] = max(so_far[name], value) if name == "most" else so_far[name] + value

    def waiting(self, queue: str) -> dict[str, float]:
        """What waited in a queue of one worker: ``mean`` and ``most``, and ``fill``, the mean part of its room."""
        found = self.queues.get(queue, {})
        seconds = found.get("seconds", 0.0) or 1.0
        return {
            "mean": round(found.get("waited", 0.0) / seconds, 2),
            "most": round(found.get("most", 0.0), 2),
            "fill": round(found.get("filled", 0.0) / seconds, 3),
        }

    @property
    def bottleneck(self) -> str:
        """The stage that the others waited for; empty when nothing was done."""
        return bottleneck(self.loads()) if self.images_this_run else ""

    def loads(self) -> dict[str, float]:
        """Per stage, the part of its threads' time in which they were busy, 0 to 1."""
        total = self._all_seconds()
        return {stage: self.time[stage] / (total * count) if total else 0.0 for stage, count in self.threads.items()}

    @property
    def idle_share(self) -> float:
        """The part of the workers' time in which their models did not run, 0 to 1; images on their way or not."""
        return max(0.0, 1 - self.loads()["model"])

    def _all_seconds(self) -> float:
        return self.worker_seconds or self.wall_seconds * self.workers

    def stages(self) -> dict[str, dict[str, Any]]:
        """Per stage: its load, images per second of a thread's busy time, and what waited before it."""
        found: dict[str, dict[str, Any]] = {
            stage: {
                "load": round(load, 3),
                "images_per_second": round(self.images_this_run / self.time[stage], 2) if self.time[stage] else 0.0,
            }
            for stage, load in self.loads().items()
        }
        found["decode"]["waiting_images"] = self.waiting("encoded")
        found["model"]["waiting_batches"] = self.waiting("ready")
        found["model"]["idle_share"] = round(self.idle_share, 3)
        return found

    def note(self, message: str) -> None:
        """Keep something that a person should know."""
        self._note_all([message])

    def _note_all(self, messages: Iterable[str]) -> None:
        for message in messages:
            if message in self.notes:
                continue
            if len(self.notes) < MAX_LISTED:
                self.notes.append(message)
            else:
                self.notes_left_out += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; the same fields as the attributes, without the dataset."""
        return {
            "read": self.read,
            "embedded": self.embedded,
            "failed": self.failed,
            "no_image": self.no_image,
            "reasons": self.reasons,
            "images_per_second": round(self.images_per_second, 2),
            "wall_seconds": round(self.wall_seconds, 3),
            "time": {stage: round(seconds, 3) for stage, seconds in self.time.items()},
            "stages": self.stages(),
            "bottleneck": self.bottleneck,
            "workers": self.workers,
            "workers_lost": self.workers_lost,
            "shards": self.shards,
            "images_without_row": self.images_without_row,
            "decoders": self.decoders,
            "output": self.output,
            "images_below": self.images_below,
            "settings": self.settings,
            "notes": self.notes + ([f"... and {self.notes_left_out} more"] if self.notes_left_out else []),
            "faults": {shard: fault.message for shard, fault in self.faults.items()},
            "examples_of_failed_rows": [list(example) for example in self.examples],
            "certificate": self.certificate,
            "stopped": self.stopped,
            "ended": self.ended,
        }

    def to_json(self) -> str:
        """``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        """The closing table a person reads."""
        with_model = any(self.settings.values())
        lines = [
            f"rows read      {self.read:>12,}",
            f"  {'embedded' if with_model else 'measured'}     {self.embedded:>12,}",
            f"  failed       {self.failed:>12,}",
            *(f"    {reason:<18}{count:>7,}" for reason, count in self.reasons.items()),
            f"  no image     {self.no_image:>12,}",
        ]
        if self.images_without_row:
            lines.append(f"images with no row {self.images_without_row:>8,}")
        shards = ", ".join(f"{count:,} {state}" for state, count in self.shards.items() if count)
        lines.append(f"shards         {shards or 'none'}")
        if self.output and self.read:
            lines.append(f"output         {self.output}")
        if self.workers_lost:
            lines.append(f"workers        {self.workers:,} at a time, {self.workers_lost:,} lost on the way")
        if self.images_this_run:
            lines.append(f"speed          {self.images_per_second:>12,.1f} images/s over {self.wall_seconds:,.1f} s")
            total = self._all_seconds()
            stages = StageClock.STAGES if with_model else ("read", "decode", "write")
            parts = [f"{stage} {self.time[stage] / total:.0%}" for stage in stages if total > 0]
            lines.append(f"busy           {', '.join(parts)}  (of the wall time; threads add up)")
            encoded, ready = self.waiting("encoded")["mean"], self.waiting("ready")["mean"]
            waited = [f"{encoded:,.0f} images waited to be decoded"]
            if self.time["model"] > 0:
                share = f"the model waited {self.idle_share:.0%} of the time"
                waited = [share, *waited, f"{ready:,.1f} batches for the model"]
            lines.append(f"bottleneck     {self.bottleneck} ({', '.join(waited)})")
        if "dali" in self.decoders:
            shares = ", ".join(f"{count:,} {name}" for name, count in self.decoders.items())
            lines.append(f"decoded by     {shares}")
        lines += [f"certified      {line}" for line in certificate_lines(self.certificate)]
        lines += [f"note           {note}" for note in self.notes[:10]]
        hidden = len(self.notes[10:]) + self.notes_left_out
        if hidden:
            lines.append(f"note           ... and {hidden} more (the report as JSON has them)")
        lines += [f"set aside      {shard}: {fault}" for shard, fault in self.faults.items()]
        return "\n".join(lines)
