"""One shard's rows through everything that can happen to its files between two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.errors import UsageError
from curator_embed.execution.run import RowsFailed, RunStopped
from curator_embed.steps import ImageStep
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder


def opened(folder: Path) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder))


def embedded(folder: Path, column: str = "image_embedding", version: int = 1) -> ImageTextPairDataset:
    return ColourEmbedder(column, version=version)(opened(folder))


def save(dataset: ImageTextPairDataset, path: Path | None = None, **options: Any) -> Any:
    return dataset.save_metadata(None if path is None else str(path), progress=False, **options)


@pytest.fixture
def source(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    return write_dataset(tmp_path / "in", wheel_photos, shards=1, samples=5, missing=0, bad={(0, 1): b"<html>"})


@pytest.fixture
def tars(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    return write_dataset(tmp_path / "tars", wheel_photos, shards=1, samples=4, missing=0, table=False)


def table(folder: Path, name: str = "00000") -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet")


def test_two_datasets_opened_from_tars_alone_add_to_one_table(tars: Path) -> None:
    first, second = embedded(tars, "a"), embedded(tars, "b")
    save(first)
    save(second)
    assert {"a", "b"} <= set(table(tars).column_names)


def test_a_table_that_came_to_lie_beside_the_tar_keeps_its_rows_and_columns(tars: Path) -> None:
    dataset = embedded(tars)
    keys = [*(f"00000{n:04d}" for n in range(4)), "somewhere else"]
    pq.write_table(pa.table({"key": keys, "label": list("abcde")}), tars / "00000.parquet")
    report = save(dataset)
    assert table(tars)["label"].to_pylist() == list("abcde")
    assert (report.read, report.embedded, report.no_image) == (5, 4, 1)


@pytest.mark.parametrize("options", [{"limit": 2}, {"on_error": "drop", "columns": []}, {}])
def test_the_datasets_own_folder_is_no_output_path(source: Path, options: dict[str, Any]) -> None:
    before = (source / "00000.parquet").read_bytes()
    with pytest.raises(UsageError, match="the dataset's own folder"):
        save(embedded(source), source, overwrite=True, **options)
    assert (source / "00000.parquet").read_bytes() == before


def test_a_limited_trial_then_the_whole(source: Path, tmp_path: Path) -> None:
    dataset, output = embedded(source), tmp_path / "out"
    trial = save(dataset, output, limit=3)
    assert trial.read == 3 and len(trial.dataset.metadata.compute()) == 3
    assert save(dataset, output, limit=3).read == 3, "the same trial again"
    report = save(dataset, output)
    assert (report.read, report.embedded, report.failed) == (5, 4, 1)
    assert table(output)["caption"].null_count == 0


def test_a_limited_run_over_several_shards_goes_on(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=3, samples=5, missing=0)
    assert save(embedded(folder), tmp_path / "out", limit=7).read == 7
    again = save(embedded(folder), tmp_path / "out", limit=7)
    assert again.read == 7 and again.shards["skipped"] >= 1
    assert save(embedded(folder), tmp_path / "out").read == 15


def test_a_limit_embeds_only_its_rows_and_pairs_repeated_ids(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    images = crops(wheel_photos[0], 3)
    write_tar(folder / "0.tar", [("a.jpg", images[0]), ("b.jpg", images[1]), ("a.jpg", images[2])])
    pq.write_table(pa.table({"key": ["a", "a", "b"]}), folder / "0.parquet")
    report = save(embedded(folder), tmp_path / "out", limit=1)
    assert (report.read, report.embedded) == (1, 1)
    assert report.decoders == {"pillow": 2}, "both images of the wanted id, not the third"


def test_codes_of_images_that_were_replaced_go(source: Path, wheel_photos: list[Path]) -> None:
    save(embedded(source))
    assert table(source)["image_error"].null_count == 4
    members = [(f"00000{n:04d}.jpg", image) for n, image in enumerate(crops(wheel_photos[1], 5))]
    write_tar(source / "00000.tar", members)
    report = save(embedded(source), overwrite=True)
    assert report.failed == 0
    assert table(source)["image_error"].null_count == 5


@pytest.mark.parametrize("on_error", ["keep", "drop", "raise"])
def test_failures_of_columns_that_are_copied_count(source: Path, tmp_path: Path, on_error: str) -> None:
    save(embedded(source))
    if on_error == "raise":
        with pytest.raises(RowsFailed, match="not_an_image"):
            save(embedded(source), tmp_path / "out", on_error=on_error)
        return
    report = save(embedded(source), tmp_path / "out", on_error=on_error)
    assert (report.read, report.embedded, report.failed) == (5, 4, 1)
    assert len(table(tmp_path / "out")) == (5 if on_error == "keep" else 4)


def test_columns_names_what_is_kept_of_the_input_beside_what_is_made(source: Path, tmp_path: Path) -> None:
    save(embedded(source))
    for _ in range(2):
        save(embedded(source), tmp_path / "out", columns=["caption"])
    assert table(tmp_path / "out").column_names == ["key", "caption", "image_embedding", "image_error"]


def test_rows_added_to_a_finished_table_are_worked_on(source: Path) -> None:
    save(embedded(source))
    old = table(source)
    pq.write_table(pa.concat_tables([old, old.slice(0, 1).set_column(0, "key", pa.array(["new"]))]),
                   source / "00000.parquet")  # fmt: skip
    report = save(embedded(source))
    assert (report.read, report.no_image, report.shards["skipped"]) == (6, 1, 0)


def test_an_output_of_fewer_rows_than_the_input_has_now_is_not_done(source: Path, tmp_path: Path) -> None:
    save(embedded(source), tmp_path / "out")
    old = table(source)
    pq.write_table(pa.concat_tables([old, old.slice(0, 1)]), source / "00000.parquet")
    with pytest.raises(UsageError, match="from a table of 5 rows, and there is a table of 6 rows now"):
        save(embedded(source), tmp_path / "out")
    assert save(embedded(source), tmp_path / "out", overwrite=True).read == 6


def test_something_unreadable_in_the_way_is_not_replaced_unasked(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.parquet").write_text("my notes")
    with pytest.raises(UsageError, match="cannot be read and would be replaced"):
        save(embedded(source), tmp_path / "out")
    assert save(embedded(source), tmp_path / "out", overwrite=True).read == 5


class Moody(ImageStep):
    """Fails on dark images."""

    def columns(self) -> dict[str, pa.DataType]:
        return {"mood": pa.int8()}

    def recipe(self) -> dict[str, Any]:
        return {"step": "moody"}

    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        if np.asarray(image.rgb)[0, 0, 0] % 2:
            raise ValueError("odd")
        return {"mood": 1}


class NoReader(ColourEmbedder):
    """Reads shards itself, and cannot."""

    reads_own_shards = True

    def embed_shard(self, source: str, device: str, id_col: str) -> Iterator[tuple[list[str], np.ndarray]]:
        raise KeyError("where is it")


def test_a_bug_in_a_step_costs_its_rows(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=8, missing=0)
    report = save(Moody()(opened(folder)))
    assert report.read == 16 and 0 < report.failed < 16
    assert report.reasons == {"embed_error": report.failed}


def test_an_error_of_one_shard_names_its_file(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=3, missing=0)
    with pytest.raises(RunStopped, match=r"00000\.(tar|parquet)"):
        save(NoReader()(opened(folder)))
