"""A run that loses a worker in its middle, compared with one that loses none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from curator_embed.datasets import ImageTextPairDataset
from tests.clusters.gate import GatedEmbedder, wait_until
from tests.rows import assert_embedded, assert_failed, table_rows, tar_images

SHARDS, SAMPLES = 12, 6
BAD = (3, 2)
"""Shard and sample of the image that is none."""


def embed_and_kill(source: Path, folder: Path, kill: Callable[[dict[int, str]], None], workers: int = 2) -> None:
    """Embed on the default client, undisturbed and while a worker dies; compare rows and bytes.

    Args:
        kill: ends one of the workers that hold shards, given their processes (number -> host), and returns when it has.
    """
    gates = [folder / "gate-calm", folder / "gate-killed"]
    outputs = [folder / "calm", folder / "killed"]
    for gate in gates:
        gate.mkdir()
    calm, killed = (GatedEmbedder(gate) for gate in gates)
    calm.open()
    calm(ImageTextPairDataset.from_webdataset(str(source))).save_metadata(str(outputs[0]), progress=False)
    with ThreadPoolExecutor(1) as pool:
        dataset = killed(ImageTextPairDataset.from_webdataset(str(source)))
        run = pool.submit(dataset.save_metadata, str(outputs[1]), progress=False)
        try:
            wait_until(lambda: run.done() or len(killed.began()) == workers, "all workers to be at the gate")
            assert not run.done(), run.result()
            kill(killed.began())
        finally:
            killed.open()
        report = run.result(120)
    assert (report.read, report.embedded, report.failed, report.no_image) == (84, 71, 1, 12)
    images = tar_images(source)
    for key, row in table_rows(outputs[1]).items():
        if key == f"{BAD[0]:05d}{BAD[1]:04d}":
            assert_failed(row, "not_an_image")
        elif key in images:
            assert_embedded(row, images[key])
        else:
            assert_failed(row, "no_image")
    names = [path.name for path in sorted(outputs[0].glob("*.parquet"))]
    assert len(names) == SHARDS and names == [path.name for path in sorted(outputs[1].glob("*.parquet"))]
    for name in names:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes(), name
