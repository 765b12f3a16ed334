"""Hashes and properties in runs: one decode for all columns, and later only what is missing."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagehash
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curator_embed.columns import ImageHasher, ImageProperties
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import SourceError, UsageError
from curator_embed.execution.job import ShardJob
from curator_embed.execution.shard_run import ShardRun
from curator_embed.execution.worker import build_pipeline
from curator_embed.pipeline import engines
from curator_embed.sources.webdataset import find_shards
from curator_embed.steps import Step
from tests.rows import assert_embedded, table_rows, tar_images
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder, ColourModel

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Two shards of six photographs, one of them broken, and a failed download each; with a column ``width``."""
    return write_dataset(tmp_path / "source", wheel_photos, shards=2, samples=6, bad={(1, 2): b"<html></html>"})


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts decodes, batches and hashes, which all run as they are."""
    counted: Counter[str] = Counter()

    def counting(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            counted[label] += 1
            return inner(*arguments, **options)

        monkeypatch.setattr(owner, name, wrapper)

    counting(engines, "decode", "decodes")
    counting(ColourModel, "__call__", "batches")
    counting(ColourEmbedder, "load_model", "models")
    counting(ImageHasher, "measure", "hashes")
    yield counted


def save(source: Path, *steps: Step, output: Path | None = None, **options: Any) -> Any:
    dataset = ImageTextPairDataset.from_webdataset(str(source))
    for step in steps:
        dataset = step(dataset)
    return dataset.save_metadata(None if output is None else str(output), progress=False, **options)


def hashes_of(encoded: bytes) -> dict[str, str]:
    with Image.open(io.BytesIO(encoded)) as opened:
        image = opened.convert("RGB")
    return {"phash": str(imagehash.phash(image)), "dhash": str(imagehash.dhash(image))}


def test_embeddings_hashes_and_properties_share_one_decode(source: Path, work: Counter[str], tmp_path: Path) -> None:
    report = save(source, ImageProperties(), ColourEmbedder(), ImageHasher(), output=tmp_path / "out")
    assert (report.read, report.embedded, report.failed, report.no_image) == (14, 11, 1, 2)
    assert (work["decodes"], work["models"]) == (12, 1)
    rows, images = table_rows(tmp_path / "out"), tar_images(source)
    for key, row in rows.items():
        if row["image_error"] is not None:
            assert row["phash"] is row["dhash"] is row["image_blur"] is row["image_embedding"] is None
            continue
        assert_embedded(row, images[key])
        assert {"phash": row["phash"], "dhash": row["dhash"]} == hashes_of(images[key])
        assert (row["image_width"], row["image_height"], row["image_format"]) == (96, 96, "JPEG")
        assert row["image_file_size"] == len(images[key])
        assert row["width"] == 96, "img2dataset's own column is untouched"


def test_hashes_added_in_place_embed_nothing_again(source: Path, work: Counter[str]) -> None:
    save(source, ColourEmbedder())
    embedded = {key: row["image_embedding"] for key, row in table_rows(source).items()}
    work.clear()
    save(source, ColourEmbedder(), ImageHasher("phash"))
    assert work == {"decodes": 12, "hashes": 11}
    rows, images = table_rows(source), tar_images(source)
    for key, row in rows.items():
        assert row["image_embedding"] == embedded[key]
        if row["image_error"] is None:
            assert row["phash"] == hashes_of(images[key])["phash"]


def test_a_column_lost_while_its_model_is_not_loaded(source: Path, tmp_path: Path) -> None:
    (shard, *_) = find_shards(str(source))
    job = ShardJob((ColourEmbedder(),), "key", output=str(tmp_path / "out"), not_needed=frozenset({0}))
    pipeline = build_pipeline(job)
    try:
        with pytest.raises(SourceError, match="has lost image_embedding since the run began"):
            ShardRun(job, shard, pipeline).begin()
    finally:
        pipeline.close()


def test_only_the_missing_kind_is_computed(source: Path, work: Counter[str]) -> None:
    save(source, ImageHasher("phash"))
    before = pq.read_table(source / "00000.parquet").column("phash")
    work.clear()
    save(source, ImageHasher(("phash", "dhash")))
    assert work == {"decodes": 12, "hashes": 11}
    after = pq.read_table(source / "00000.parquet")
    assert after.column("phash") == before and after.column("dhash").null_count == before.null_count


def test_what_is_there_is_not_computed_again(source: Path, work: Counter[str]) -> None:
    save(source, ImageHasher(("phash", "sha256")), ImageProperties())
    files = {path.name: path.read_bytes() for path in source.glob("*.*")}
    work.clear()
    save(source, ImageHasher(("sha256", "phash")), ImageProperties(("blur", "width")))
    assert not work
    assert {path.name: path.read_bytes() for path in source.glob("*.*")} == files


def test_another_size_is_another_hash(source: Path) -> None:
    save(source, ImageHasher("phash"))
    with pytest.raises(Exception, match=r"'phash' was made another way \(hash_size: 8 there, 16 now\)"):
        save(source, ImageHasher("phash", 16))
    save(source, ImageHasher("phash", 16), overwrite=True)
    found = [row["phash"] for row in table_rows(source).values() if row["image_error"] is None]
    assert {len(value) for value in found} == {64}


def test_steps_of_one_run_agree_on_the_decode(source: Path) -> None:
    with pytest.raises(UsageError, match="share one decode"):
        save(source, ImageHasher(), ImageProperties(honour_exif=True))
    pending = ImageHasher()(ImageProperties(honour_exif=True)(ImageTextPairDataset.from_webdataset(str(source))))
    with pytest.raises(UsageError, match="share one decode"):
        pending.plan()  # before any worker is asked


def test_a_kind_twice_is_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="two steps would write the column 'phash'"):
        ImageHasher("phash")(ImageHasher()(ImageTextPairDataset.from_webdataset(str(source))))


def test_too_many_pixels_are_a_reason(tmp_path: Path, wheel_photos: list[Path]) -> None:
    small = crops(wheel_photos[0], 1, size=40)[0]
    source = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=6, bad={(0, 1): small, (1, 2): b"<html>"})
    report = save(source, ImageHasher(max_image_pixels=50 * 50), output=tmp_path / "out")
    assert report.embedded == 1 and report.reasons == {"not_an_image": 1, "too_large": 10}
