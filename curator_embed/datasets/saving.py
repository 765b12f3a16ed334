"""From a dataset to a run and back: what ``save_metadata`` and ``plan`` do."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from distributed import Client

from curator_embed.datasets.frames import assigned_columns, write_assigned
from curator_embed.errors import UsageError
from curator_embed.execution.clients import some_client
from curator_embed.execution.job import ShardJob
from curator_embed.execution.run import RunPlan, execute, make_plan
from curator_embed.execution.workers import ask_workers, cores_per_worker, wait_for_worker
from curator_embed.pipeline.engines import decode_options
from curator_embed.steps import BatchStep, Step
from curator_embed.storage.location import Location

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset
    from curator_embed.execution.report import RunReport

log = logging.getLogger(__name__)

CERTIFIED_IMAGES = 256
"""Images compared with the model's own preprocessing when a run is to be certified."""


def save(
    dataset: ImageTextPairDataset,
    path: str | None,
    columns: Sequence[str] | None,
    *,
    on_error: Literal["keep", "drop", "raise"],
    overwrite: bool,
    certify: bool,
    limit: int | None,
    progress: bool,
) -> RunReport:
    """See ``ImageTextPairDataset.save_metadata``."""
    _check_arguments(dataset, path, columns, on_error, limit)
    job = dataset.job(path, columns, on_error, overwrite)
    assigned = assigned_columns(dataset)
    if assigned is not None and limit is not None:
        raise UsageError("limit= cannot go with columns assigned to the metadata; save without one of them")
    certificate = _certificates(dataset, job) if certify else {}

    def write_added(job: ShardJob) -> None:
        if assigned is not None:
            write_assigned(assigned, dataset, job)

    report, _ = execute(
        dataset.shards,
        job,
        limit=limit,
        progress=progress,
        place=place_on_workers,
        certificate=certificate,
        afterwards=write_added,
    )
    saved = dataset.like([shard.with_table(job.target(shard)) for shard in dataset.shards], ())
    if limit is None:
        dataset.read_from(saved)
    else:  # a trial: the object stays what it was
        written = [s for s in saved.shards if Location.of(job.target(s), job.storage_options).token() is not None]
        saved = dataset.like(written, ())
    report.dataset = saved
    return report


def plan(dataset: ImageTextPairDataset, path: str | None, *, limit: int | None, overwrite: bool) -> RunPlan:
    """See ``ImageTextPairDataset.plan``."""
    _check_arguments(dataset, path, None, "keep", limit)
    with some_client() as client:
        job = place_on_workers(client, dataset.job(path, None, "keep", overwrite))
        tasks = sum(client.nthreads().values())
        return make_plan(dataset.shards, job, cores=cores_per_worker(client), limit=limit, tasks=tasks)


def _check_arguments(
    dataset: ImageTextPairDataset,
    path: str | None,
    columns: Sequence[str] | None,
    on_error: str,
    limit: int | None,
) -> None:
    if on_error not in ("keep", "drop", "raise"):
        raise UsageError(f"on_error={on_error!r}: choose 'keep', 'drop' or 'raise'")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: at least 1")
    if path is None:
        for given, why in (
            (on_error == "drop", "on_error='drop' removes rows"),
            (columns is not None, "columns= leaves columns out"),
            (limit is not None, "limit= leaves rows out"),
        ):
            if given:
                raise UsageError(f"{why}, and a dataset's own files never lose anything; give an output path as well")
    if not dataset.shards:
        raise UsageError("the dataset has no shards")
    decode_options(dataset.steps)  # steps that contradict each other are told here, not by a worker


def place_on_workers(client: Client, job: ShardJob) -> ShardJob:
    """Choose device and decode engine from what the workers have, unless the embedders say otherwise."""
    wait_for_worker(client)
    devices = {getattr(step, "device", None) for step in job.steps if isinstance(step, BatchStep)}
    asked = {device for device in devices if device is not None}
    if len(asked) > 1:
        raise UsageError(f"the embedders of one run ask for different devices: {sorted(asked)}")
    if asked:
        device = asked.pop()
    elif any(isinstance(step, BatchStep) for step in job.steps):
        seen = ask_workers(client, _sees_gpu)
        device = "cuda" if all(seen.values()) else "cpu"
        if device == "cpu" and any(seen.values()):
            without = [address for address, sees in seen.items() if not sees]
            log.warning(
                "%d of %d workers see no GPU (%s, ...): the run is on the CPU. With device='cuda' those that see one "
                "do the work alone",
                len(without),
                len(seen),
                without[0],
            )
    else:
        device = "cpu"  # nothing here has a model: torch need not even be imported
    steps: tuple[Step, ...] = tuple(
        step.on_device(device) if isinstance(step, BatchStep) else step for step in job.steps
    )
    engine = engine_for(device, job.steps)
    return dataclasses.replace(
        job, steps=tuple(_decoded_by(step, engine) for step in steps), device=device, engine=engine
    )


def _decoded_by(step: Step, engine: Literal["cpu", "dali"]) -> Step:
    """The step with its choice of decoder settled: DALI's pixels differ a little, so the recipe names it."""
    if getattr(step, "decoder", None) != "auto":
        return step
    settled: Any = copy.copy(step)
    settled.decoder = engine
    decoded: Step = settled
    return decoded


def engine_for(device: str, steps: Sequence[Step]) -> Literal["cpu", "dali"]:
    """The decoder the embedders ask for; DALI by default where the models have a GPU and DALI is installed.

    Raises:
        UsageError: they ask for different ones.
    """
    asked = {getattr(step, "decoder", "auto") for step in steps} - {"auto"}
    if len(asked) > 1:
        raise UsageError("the embedders of one run share one decode, but ask for decoder='cpu' and decoder='dali'")
    if asked:
        return "dali" if asked.pop() == "dali" else "cpu"
    if device.startswith("cuda"):
        from importlib.util import find_spec

        if find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None:
            return "dali"
    return "cpu"


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _certificates(dataset: ImageTextPairDataset, job: ShardJob) -> dict[str, Any]:
    """Compare the preprocessing of each embedder with its model's own on the dataset's first images."""
    found: dict[str, Any] = {}
    for step in job.steps:
        certify = getattr(step, "certify", None)
        if certify is not None:
            found[next(iter(step.columns()))] = certify(dataset.first_images(CERTIFIED_IMAGES)).to_dict()
    return found
