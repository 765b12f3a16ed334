"""Where a job runs, decided before anything is read or loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import UsageError
from curator_embed.execution import placing
from curator_embed.execution.placing import engine_for, place_on_workers
from curator_embed.steps import BatchModel
from tests.stub import ColourEmbedder


class Unloadable(ColourEmbedder):
    """Nobody may load its model or compare its preprocessing: placing comes first."""

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        raise AssertionError("the model was loaded")

    def certify(self, images: Any) -> None:
        raise AssertionError("the preprocessing was compared")


def seen(nobody: LocalCluster, monkeypatch: pytest.MonkeyPatch, *gpus: int) -> None:
    """Start as many workers, which see so many GPUs."""
    nobody.scale(len(gpus))
    Client.current().wait_for_workers(len(gpus))
    by_address = dict(zip(sorted(Client.current().nthreads()), gpus, strict=True))

    def asked(dask_worker: Any) -> int:
        return by_address[dask_worker.address]

    monkeypatch.setattr(placing, "_gpus", asked)


@pytest.mark.parametrize(
    ("device", "gpus", "why", "remedy"),
    [
        ("cuda", (0,), "device='cuda' was asked for, and no worker sees a GPU", "cpu"),
        ("cuda:1", (0, 0), "device='cuda:1' was asked for, and no worker sees a GPU", "cpu"),
        ("cuda:2", (2, 1), "no worker sees more than 2 (they are counted from 0)", "cuda"),
    ],
)
def test_a_device_that_no_worker_has_is_told_before_anything_is_done(
    device: str,
    gpus: tuple[int, ...],
    why: str,
    remedy: str,
    nobody: LocalCluster,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(nobody, monkeypatch, *gpus)
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    pending = Unloadable(device=device)(dataset)
    for ask in (
        lambda: pending.save_metadata(str(tmp_path / "out"), certify=True, progress=False),
        lambda: pending.plan(str(tmp_path / "out")),
        lambda: pending.metadata,
    ):
        with pytest.raises(UsageError) as told:
            ask()
        assert why in str(told.value) and f"Pass device='{remedy}'" in str(told.value)
    assert not list(tmp_path.rglob("*.parquet"))
    placed = place_on_workers(Client.current(), ColourEmbedder(device=remedy)(dataset).job(None))
    assert placed.device == remedy


@pytest.mark.parametrize(
    ("asked", "gpus", "device"),
    [
        (None, (1, 1), "cuda"),
        (None, (1, 0), "cpu"),
        (None, (0, 0), "cpu"),
        ("cpu", (1, 1), "cpu"),
        ("cuda", (0, 1), "cuda"),
        ("cuda:1", (2, 0), "cuda:1"),
    ],
)
def test_the_device_is_what_is_asked_for_or_what_all_workers_have(
    asked: str | None,
    gpus: tuple[int, ...],
    device: str,
    nobody: LocalCluster,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen(nobody, monkeypatch, *gpus)
    job = ColourEmbedder(device=asked)(ImageTextPairDataset.from_webdataset(str(source))).job(None)
    assert place_on_workers(Client.current(), job).device == device


def test_embedders_that_ask_for_different_devices_are_refused(nobody: LocalCluster, source: Path) -> None:
    nobody.scale(1)
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    both = ColourEmbedder("a", device="cpu")(ColourEmbedder("b", device="cuda")(dataset))
    with pytest.raises(UsageError, match=r"different devices: \['cpu', 'cuda'\]"):
        place_on_workers(Client.current(), both.job(None))


def test_a_step_that_asks_for_no_decoder_leaves_the_choice() -> None:
    assert engine_for("cpu", [ColourEmbedder()]) == "cpu"
    asking = ColourEmbedder()
    asking.decoder = "dali"
    assert engine_for("cpu", [ColourEmbedder(), asking]) == "dali"
