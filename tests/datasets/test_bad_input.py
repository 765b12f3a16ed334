"""Every kind of bad input has one clear outcome, and nothing else is lost."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.errors import UsageError
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RunStopped
from tests.rows import assert_embedded, assert_failed, colour_vector, table_rows, tar_images
from tests.shards import crops, write_dataset, write_tar
from tests.stub import ColourEmbedder


def save(source: Path | Sequence[str], output: Path | None = None, *, id_col: str = "key", **options: Any) -> RunReport:
    """Embed with the stub."""
    path = str(source) if isinstance(source, Path) else source
    dataset = ColourEmbedder()(ImageTextPairDataset.from_webdataset(path, id_col=id_col))
    return dataset.save_metadata(None if output is None else str(output), progress=False, **options)


def assert_accounted(report: RunReport, rows: int) -> None:
    assert report.read == rows == report.embedded + report.failed + report.no_image
    assert report.failed == sum(report.reasons.values())


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo(wheel_photos: list[Path]) -> Image.Image:
    with Image.open(next(p for p in wheel_photos if p.name == "chelsea.png")) as opened:
        return opened.convert("RGB")


# -- bad images ------------------------------------------------------------------------------


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def png_bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def random_bytes() -> bytes:
    return random.Random(3).randbytes(5000)


def bad_images(photo: Image.Image) -> dict[str, tuple[bytes, str]]:
    """What it is -> (bytes, reason)."""
    jpeg, png = encoded(photo, "JPEG", quality=90), encoded(photo)
    half = len(jpeg) // 2
    return {
        "empty": (b"", "empty"),
        "garbage": (random_bytes(), "not_an_image"),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"),
        "truncated head": (jpeg[1000:], "not_an_image"),
        "truncated tail": (jpeg[:half], "truncated"),
        "truncated png": (png[: len(png) // 2], "truncated"),
        "truncated to its header": (jpeg[:20], "truncated"),
        "truncated middle": (png[: len(png) // 2] + png[len(png) // 2 + 3000 :], "truncated"),
        "flipped byte": (flipped(png, len(png) // 2), "corrupt"),
        "decompression bomb": (png_bomb(65_000), "too_large"),
        "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
                "unsupported_format"),
    }  # fmt: skip


def odd_images(photo: Image.Image) -> dict[str, bytes]:
    """Unusual, and to be embedded."""
    second = Image.new("RGB", photo.size, "green")
    grey16 = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    palette = photo.quantize(64)
    found = {
        "1x1": encoded(Image.new("RGB", (1, 1), (200, 100, 50))),
        "3x8000": encoded(photo.resize((3, 8000))),
        "8000x3": encoded(photo.resize((8000, 3))),
        "1x30000": encoded(photo.resize((1, 30000))),
        "16-bit grey": encoded(Image.fromarray(grey16)),
        "palette with transparency": encoded(palette, transparency=5),
        "rgba": encoded(photo.convert("RGBA")),
        "cmyk": encoded(photo.convert("CMYK"), "JPEG"),
        "animated gif": encoded(photo.quantize(32), "GIF", save_all=True, append_images=[second.quantize(2)]),
        "animated webp": encoded(photo, "WEBP", save_all=True, append_images=[second]),
        "avif": encoded(photo, "AVIF"),
        "wrong extension": encoded(photo, "WEBP"),
        "bmp": encoded(photo, "BMP"),
        "tiff": encoded(photo, "TIFF"),
        "grey": encoded(photo.convert("L"), "JPEG"),
    }
    jpeg = encoded(photo, "JPEG", quality=90)
    # Damage that decoders cannot see, as a JPEG has no checksums: the row gets the vector of what Pillow decodes.
    found["flipped byte in a jpeg's scan"] = next(
        damaged for at in range(len(jpeg) // 2, len(jpeg)) if decodes(damaged := flipped(jpeg, at))
    )
    return found


def decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, photo: Image.Image, wheel_photos: list[Path]) -> dict[str, Any]:
    """One run over a shard a case: the case between two good photographs."""
    source, output = (tmp_path_factory.mktemp("zoo") / name for name in ("source", "output"))
    source.mkdir()
    first, last = crops(wheel_photos[0], 2)
    cases = {name: data for name, (data, _) in bad_images(photo).items()} | odd_images(photo)
    for number, (name, data) in enumerate(cases.items()):
        stem = source / f"{number:05d}"
        write_tar(stem.with_suffix(".tar"), [("a.jpg", first), ("b.jpg", data), ("c.jpg", last)])
        pq.write_table(pa.table({"key": ["c", "b", "a"], "case": [name] * 3}), stem.with_suffix(".parquet"))
    report = save(source, output)
    tables = [pq.read_table(path) for path in sorted(output.glob("*.parquet"))]
    return {
        "report": report,
        "cases": cases,
        "good": {"a": first, "c": last},
        "rows": {table["case"][0].as_py(): {row["key"]: row for row in table.to_pylist()} for table in tables},
    }


BAD = (
    "empty", "garbage", "html", "truncated head", "truncated tail", "truncated png", "truncated to its header",
    "truncated middle", "flipped byte", "decompression bomb", "svg",
)  # fmt: skip
ODD = (
    "1x1", "3x8000", "8000x3", "1x30000", "16-bit grey", "palette with transparency", "rgba", "cmyk", "animated gif",
    "animated webp", "avif", "wrong extension", "bmp", "tiff", "grey", "flipped byte in a jpeg's scan",
)  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_a_row_with_a_reason(case: str, zoo: dict[str, Any], photo: Image.Image) -> None:
    rows = zoo["rows"][case]
    assert list(rows) == ["c", "b", "a"]
    assert_failed(rows["b"], bad_images(photo)[case][1])
    for key, data in zoo["good"].items():
        assert_embedded(rows[key], data)


@pytest.mark.parametrize("case", ODD)
def test_an_odd_image_is_embedded(case: str, zoo: dict[str, Any]) -> None:
    rows, data = zoo["rows"][case], zoo["cases"][case]
    if case == "16-bit grey":  # Pillow's own conversion clips: 8 bits of 16 are the high byte
        with Image.open(io.BytesIO(data)) as image:
            data = encoded(Image.fromarray((np.asarray(image) // 256).astype(np.uint8)))
        assert np.std(rows["b"]["image_embedding"]) > 0.01
    assert_embedded(rows["b"], data)
    for key, good in zoo["good"].items():
        assert_embedded(rows[key], good)


def test_the_report_of_the_zoo_accounts_for_every_row(zoo: dict[str, Any], photo: Image.Image) -> None:
    assert set(BAD) | set(ODD) == set(zoo["cases"])
    assert_accounted(zoo["report"], 3 * len(zoo["cases"]))
    wanted = [reason for _, reason in bad_images(photo).values()]
    assert zoo["report"].reasons == {reason: wanted.count(reason) for reason in sorted(set(wanted))}
    assert not zoo["report"].faults


def test_a_real_models_crop_of_odd_images(tmp_path: Path, photo: Image.Image) -> None:
    """Extreme shapes cost what the crop needs, not what the resized image would have."""
    odd = odd_images(photo)
    names = ("1x1", "3x8000", "8000x3", "1x30000", "16-bit grey", "cmyk")
    write_tar(tmp_path / "0.tar", [(f"{number}.png", odd[name]) for number, name in enumerate(names)])
    embedder = TimmImageEmbedder("test_resnet.r160_in1k", compile=False)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    report = dataset.save_metadata(str(tmp_path / "out"), progress=False)
    rows = table_rows(tmp_path / "out")
    # 1x30000 resized to a short side of 256 would be 256 x 7,680,000; the crop is all that is computed.
    assert {row["image_error"] for row in rows.values()} == {None}, report.reasons
    assert all(abs(np.linalg.norm(row["image_embedding"]) - 1) < 1e-5 for row in rows.values())


def test_the_limit_of_pixels_can_be_chosen(tmp_path: Path, photo: Image.Image) -> None:
    small = encoded(photo.resize((50, 50)))
    write_tar(tmp_path / "0.tar", [("large.png", encoded(photo)), ("small.png", small)])
    embedder = TimmImageEmbedder("test_resnet.r160_in1k", compile=False, max_image_pixels=60_000)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(tmp_path)))
    dataset.save_metadata(str(tmp_path / "out"), progress=False)
    rows = table_rows(tmp_path / "out")
    assert_failed(rows["large"], "too_large")
    assert rows["small"]["image_error"] is None


def test_the_real_formats_folder(tmp_path: Path, format_files: list[Path]) -> None:
    """Files of every format that people collected to break readers, extensions that lie among them."""
    members = [(f"{number:04d}{path.suffix}", path.read_bytes()) for number, path in enumerate(format_files)]
    write_tar(tmp_path / "0.tar", members)
    report = save(tmp_path, tmp_path / "out")
    rows = table_rows(tmp_path / "out")
    assert_accounted(report, len(format_files))
    assert len(rows) == len(format_files)
    failed = {path.name: rows[f"{number:04d}"]["image_error"] for number, path in enumerate(format_files)}
    assert {name: reason for name, reason in failed.items() if reason is not None} == {
        "cat-3449999_640_grayscale_12bit.jpg": "unsupported_format",
        "ukbench09268_corrupt.jpg": "not_an_image",
    }
    assert all((row["image_embedding"] is None) == (row["image_error"] is not None) for row in rows.values())


# -- ids -------------------------------------------------------------------------------------


def one_shard(folder: Path, members: list[tuple[str, bytes]], table: pa.Table | None) -> Path:
    folder.mkdir(exist_ok=True)
    write_tar(folder / "00000.tar", members)
    if table is not None:
        pq.write_table(table, folder / "00000.parquet")
    return folder


def vectors_equal(row: dict[str, Any], data: bytes) -> bool:
    return row["image_embedding"] is not None and bool(
        np.array_equal(np.float32(row["image_embedding"]), colour_vector(data))
    )


def test_rows_out_of_order_meet_their_images(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=2)
    images = tar_images(folder)
    order = [list(pq.read_table(p)["key"].to_pylist()) for p in sorted(folder.glob("*.parquet"))]
    assert order[0] != sorted(order[0])
    report = save(folder)
    assert_accounted(report, 22)
    assert [list(pq.read_table(p)["key"].to_pylist()) for p in sorted(folder.glob("*.parquet"))] == order
    rows = table_rows(folder)
    for key, data in images.items():
        assert_embedded(rows[key], data)
    for key in rows.keys() - images.keys():
        assert_failed(rows[key], "no_image")


def test_ids_that_repeat_pair_in_order_and_unequal_counts_are_told(tmp_path: Path, wheel_photos: list[Path]) -> None:
    a1, a2, b, c1, c2 = crops(wheel_photos[0], 5)
    folder = one_shard(
        tmp_path / "in",
        [("x/a.jpg", a1), ("x/b.jpg", b), ("x/a.jpg", a2), ("x/c.jpg", c1), ("x/c.jpg", c2)],
        pa.table({"key": ["x/c", "x/a", "x/b", "x/a"], "line": [0, 1, 2, 3]}),
    )
    report = save(folder, tmp_path / "out")
    rows = {row["line"]: row for row in pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()}
    assert [rows[n]["key"] for n in range(4)] == ["x/c", "x/a", "x/b", "x/a"]
    assert_embedded(rows[1], a1)
    assert_embedded(rows[2], b)
    assert_embedded(rows[3], a2)
    assert_failed(rows[0], "ambiguous_id")
    assert report.reasons == {"ambiguous_id": 1}
    assert any("x/c" in note and "1 rows" in note and "2 images" in note for note in report.notes)


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.int32(), pa.uint64(), pa.float64(), pa.large_string(), pa.binary(), pa.string_view(),
     pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("in_json_as", [int, str])
def test_ids_of_another_type_than_the_jsons(
    tmp_path: Path, wheel_photos: list[Path], kind: pa.DataType, in_json_as: Callable[[int], Any]
) -> None:
    """The table has them as one type, the json members as another: 7 is 7 is "7"."""
    import json

    images = dict(zip((7, 42, 2_000_000_000), crops(wheel_photos[0], 3), strict=True))
    members = []
    for number, (uid, data) in enumerate(images.items()):
        members += [(f"{number}.jpg", data), (f"{number}.json", json.dumps({"uid": in_json_as(uid)}).encode())]
    ids = [2_000_000_000, 7, 42]
    as_text = pa.array([str(uid) for uid in ids])
    column = as_text.dictionary_encode() if pa.types.is_dictionary(kind) else as_text.cast(kind)
    folder = one_shard(tmp_path / "in", members, pa.table({"uid": column}))
    report = save(folder, tmp_path / "out", id_col="uid")
    assert_accounted(report, 3)
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert table.schema.field("uid").type == pq.read_table(folder / "00000.parquet").schema.field("uid").type
    for uid, row in zip(ids, table.to_pylist(), strict=True):
        assert_embedded(row, images[uid])


def test_a_table_of_integer_keys(tmp_path: Path, wheel_photos: list[Path]) -> None:
    """img2dataset's keys are zero-padded text; pandas reads them as integers."""
    images = dict(zip(("000000003", "000000012"), crops(wheel_photos[0], 2), strict=True))
    folder = one_shard(tmp_path / "in", [(f"{k}.jpg", d) for k, d in images.items()], pa.table({"key": [12, 3]}))
    assert save(folder).embedded == 2
    rows = table_rows(folder)
    assert_embedded(rows[3], images["000000003"])
    assert_embedded(rows[12], images["000000012"])


def test_null_ids_meet_nothing(tmp_path: Path, wheel_photos: list[Path]) -> None:
    (data,) = crops(wheel_photos[0], 1)
    folder = one_shard(tmp_path / "in", [("a.jpg", data)], pa.table({"key": [None, "a", None]}))
    report = save(folder)
    assert (report.embedded, report.no_image) == (1, 2)
    table = pq.read_table(folder / "00000.parquet")
    assert table["key"].to_pylist() == [None, "a", None]
    assert_embedded(table.to_pylist()[1], data)


def test_a_table_without_the_id_column(tmp_path: Path, source: Path) -> None:
    path = source / "00001.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["name", "caption", "status", "width", "url"]), path)
    before = {p.name: p.read_bytes() for p in source.glob("*.parquet")}
    with pytest.raises(UsageError, match=r"00001\.parquet.*no column 'key'.*name, caption") as caught:
        save(source, tmp_path / "out")
    assert "id" in str(caught.value)
    assert not list((tmp_path / "out").glob("*.parquet")), "refused before anything is computed"
    assert {p.name: p.read_bytes() for p in source.glob("*.parquet")} == before


def test_a_table_with_two_id_columns(tmp_path: Path, source: Path) -> None:
    keys = pq.read_table(source / "00000.parquet").column("key")
    pq.write_table(pa.table([keys, keys], names=["key", "key"]), source / "00000.parquet")
    with pytest.raises(UsageError, match=r"00000\.parquet: has 2 columns named 'key'.*Choose the id column"):
        save(source, tmp_path / "out")


def test_no_id_in_common_is_told(tmp_path: Path, wheel_photos: list[Path]) -> None:
    folder = one_shard(
        tmp_path / "in", [("0.jpg", crops(wheel_photos[0], 1)[0])], pa.table({"key": ["sha-1", "sha-2"]})
    )
    report = save(folder, tmp_path / "out")
    assert (report.read, report.no_image, report.images_without_row, report.embedded) == (3, 2, 1, 1)
    assert any("no image has an id" in note and "id_col" in note for note in report.notes)


# -- missing halves --------------------------------------------------------------------------


def test_a_tar_without_parquet_and_a_parquet_without_tar(tmp_path: Path, source: Path) -> None:
    (source / "00000.parquet").unlink()
    (source / "00001.tar").unlink()
    images = tar_images(source)
    report = save(source, tmp_path / "out")
    rows = table_rows(tmp_path / "out")
    assert_accounted(report, 10 + 11 + 11)
    for key in (k for k in images if k.startswith("00000")):
        assert_embedded(rows[key], images[key])
        assert rows[key]["caption"].startswith("photo "), "the table is made from json and txt"
    without = [row for key, row in rows.items() if key.startswith("00001")]
    assert len(without) == 11
    for row in without:
        assert_failed(row, "no_image")
    assert report.reasons == {"not_an_image": 1}


def test_in_place_without_parquet_makes_one(source: Path) -> None:
    for path in source.glob("*.parquet"):
        path.unlink()
    report = save(source)
    assert_accounted(report, 30)
    assert sorted(p.name for p in source.glob("*.parquet")) == ["00000.parquet", "00001.parquet", "00002.parquet"]
    assert save(source).shards["skipped"] == 3


def test_a_sample_without_an_image(tmp_path: Path, wheel_photos: list[Path]) -> None:
    (data,) = crops(wheel_photos[0], 1)
    folder = one_shard(tmp_path / "in", [("a.txt", b"only words"), ("b.jpg", data), ("b.txt", b"both")], None)
    report = save(folder)
    rows = table_rows(folder)
    assert (report.embedded, report.no_image) == (1, 1)
    assert_failed(rows["a"], "no_image")
    assert rows["a"]["caption"] == "only words"
    assert_embedded(rows["b"], data)


# -- bad tars --------------------------------------------------------------------------------


def test_an_empty_tar(tmp_path: Path, source: Path) -> None:
    (source / "00000.parquet").unlink()
    write_tar(source / "00000.tar", [])
    report = save(source, tmp_path / "out")
    assert_accounted(report, 22)
    assert pq.read_table(tmp_path / "out" / "00000.parquet").num_rows == 0
    assert len(table_rows(tmp_path / "out")) == 22


def test_a_file_of_zero_bytes_instead_of_a_tar(tmp_path: Path, source: Path) -> None:
    (source / "00001.tar").write_bytes(b"")
    expect_one_shard_set_aside(source, tmp_path / "out", "00001.tar")


def expect_one_shard_set_aside(source: Path, output: Path, name: str) -> None:
    """The others are finished, the message names the file, and a second run needs only the one."""
    with pytest.raises(RunStopped, match=name) as caught:
        save(source, output)
    report = caught.value.report
    assert report.shards == {"done": 2, "skipped": 0, "failed": 1, "left": 0}
    assert list(report.faults) == [name.partition(".")[0]]
    assert len(table_rows(output)) == 22
    with pytest.raises(RunStopped) as again:
        save(source, output)
    assert again.value.report.shards == {"done": 0, "skipped": 2, "failed": 1, "left": 0}


@pytest.mark.parametrize("content", [b"no tar at all, just text " * 100, b"PK\x03\x04" + b"zip" * 500])
def test_a_file_that_is_no_tar(tmp_path: Path, source: Path, content: bytes) -> None:
    (source / "00001.tar").write_bytes(content)
    expect_one_shard_set_aside(source, tmp_path / "out", "00001.tar")


def test_a_compressed_tar_says_what_to_do(tmp_path: Path, source: Path) -> None:
    import gzip

    path = source / "00001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(RunStopped, match=r"00001\.tar.*(?i:gzip|compress)"):
        save(source, tmp_path / "out")


def test_a_truncated_tar_keeps_what_is_whole(tmp_path: Path, source: Path) -> None:
    path = source / "00000.tar"
    images = tar_images(source)
    data = path.read_bytes()
    # In the middle of the seventh image.
    at = data.index(images["000000006"]) + len(images["000000006"]) // 2
    path.write_bytes(data[:at])
    report = save(source, tmp_path / "out")
    rows = table_rows(tmp_path / "out")
    assert len(rows) == 33
    for number in range(6):
        key = f"00000{number:04d}"
        assert_embedded(rows[key], images[key])
    assert_failed(rows["000000006"], "truncated")
    for number in range(7, 11):
        assert_failed(rows[f"00000{number:04d}"], "no_image")
    assert any("00000.tar" in note for note in report.notes)


def test_a_stale_index_is_passed_over(tmp_path: Path, source: Path, wheel_photos: list[Path]) -> None:
    from curator_embed.sources.webdataset import index_tars

    index_tars(str(source))
    # One image is replaced by a longer one: all that comes behind lies elsewhere now.
    path = source / "00000.tar"
    stale = path.with_suffix(".idx").stat()
    images = crops(wheel_photos[1], 10, size=160)
    write_tar(path, [(f"00000{number:04d}.jpg", image) for number, image in enumerate(images)])
    os.utime(path, ns=(stale.st_mtime_ns + 10**9, stale.st_mtime_ns + 10**9))
    report = save(source, tmp_path / "out")
    rows = table_rows(tmp_path / "out")
    for number, image in enumerate(images):
        assert_embedded(rows[f"00000{number:04d}"], image)
    assert_accounted(report, 33)


@pytest.mark.parametrize(
    "index",
    [b"", b"garbage\n\x00\xff", b"v1.2 3\njpg 512 10 a.jpg\n", b"v1.2 1\njpg 99999999999 5 000000000.jpg\n",
     b"v9.9 1\njpg 512 10 a.jpg\n", b"v1.2 1\njpg -5 xx a.jpg\n"],
)  # fmt: skip
def test_a_broken_index_is_passed_over(tmp_path: Path, source: Path, index: bytes) -> None:
    images = tar_images(source)
    (source / "00000.idx").write_bytes(index)
    later = (source / "00000.tar").stat().st_mtime_ns + 10**9
    os.utime(source / "00000.idx", ns=(later, later))
    report = save(source, tmp_path / "out")
    assert_accounted(report, 33)
    rows = table_rows(tmp_path / "out")
    for key in (key for key in images if key.startswith("00000")):
        assert_embedded(rows[key], images[key])


def test_no_such_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*no such"):
        save(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty.*no \*\.tar"):
        save(tmp_path / "empty")


def test_a_parquet_that_is_none(tmp_path: Path, source: Path) -> None:
    (source / "00001.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    with pytest.raises(Exception, match=r"00001\.parquet.*not a readable parquet") as caught:
        save(source, tmp_path / "out")
    assert "Restore it or remove it" in str(caught.value)


# -- outputs that cannot be written ----------------------------------------------------------


def test_an_output_below_a_file(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"file/out.*cannot write there") as caught:
        save(source, tmp_path / "file" / "out")
    assert "nothing was computed" in str(caught.value)


def test_a_read_only_output_folder(tmp_path: Path, source: Path) -> None:
    """Real: a folder that even root cannot write into, as a read-only mount or a foreign share is."""
    output = tmp_path / "out"
    output.mkdir()
    with unwritable(output), pytest.raises(UsageError, match=r"out.*cannot write there.*another output path"):
        save(source, output)
    assert list(output.iterdir()) == []
    assert_accounted(save(source, output), 33)


def test_a_read_only_dataset_in_place(source: Path) -> None:
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with unwritable(source), pytest.raises(UsageError, match=r"source.*cannot write there"):
        save(source)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


class unwritable:
    """Nobody can write to the folder during the block: by permission bits, for root by a read-only mount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mounted = False

    def __enter__(self) -> None:
        if os.getuid() != 0:
            self.folder.chmod(0o555)
            return
        mount(["--bind", str(self.folder), str(self.folder)])
        self.mounted = True
        try:
            mount(["-o", "remount,bind,ro", str(self.folder)])
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)
        else:
            self.folder.chmod(0o755)


def mount(arguments: list[str]) -> None:
    """``mount``, or a skip that says why there is none."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("needs Linux's mount")
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 200 kB."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a disk of a chosen size")
    folder = tmp_path / "small"
    folder.mkdir()
    mount(["-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)])
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_disk_is_said_before(small_disk: Path, tmp_path: Path, wheel_photos: list[Path]) -> None:
    source = write_dataset(tmp_path / "many", wheel_photos, shards=1, samples=400)
    with pytest.raises(UsageError, match=r"needs about .* and its disk has .* free") as caught:
        save(source, small_disk / "out")
    assert "Free some space" in str(caught.value)
    assert not list((small_disk / "out").glob("*.parquet"))


def test_a_disk_that_fills_up_meanwhile(
    small_disk: Path, tmp_path: Path, wheel_photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards stay whole, half-written ones vanish, and the same command goes on once there is room."""
    from curator_embed.execution import run_plan

    source = write_dataset(tmp_path / "some", wheel_photos, shards=12, samples=40)
    monkeypatch.setattr(run_plan, "_bytes_free", lambda job, shards: None)  # others fill the disk after the look at it
    with pytest.raises(Exception, match=r"\.parquet.*disk is full.*Free some space") as caught:
        save(source, small_disk / "out")
    assert isinstance(caught.value, RunStopped)
    written = sorted((small_disk / "out").glob("*.parquet"))
    assert 0 < len(written) < 12
    assert all(pq.read_table(path).num_rows == 41 for path in written)
    assert not [p.name for p in (small_disk / "out").iterdir() if ".tmp" in p.name]
    stamps = {p.name: p.stat().st_mtime_ns for p in written}
    mount(["-o", "remount,size=20m", str(small_disk)])
    report = save(source, small_disk / "out")
    assert report.shards["skipped"] == len(written)
    assert len(table_rows(small_disk / "out")) == 12 * 41
    assert {name: (small_disk / "out" / name).stat().st_mtime_ns for name in stamps} == stamps


# -- models ----------------------------------------------------------------------------------


def test_a_model_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="resnet50"):
        TimmImageEmbedder("resnet5O")
    with pytest.raises(UsageError, match="ViT-B/32"):
        TimmImageEmbedder("ViT-B/23")


def test_weights_that_do_not_fit(tmp_path: Path, source: Path) -> None:
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), path)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    embedder = TimmImageEmbedder("test_resnet.r160_in1k", weights=path)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(source)))
    with pytest.raises(UsageError, match=r"other\.safetensors.*not .*missing.*unexpected") as caught:
        dataset.save_metadata(progress=False)
    assert "model name" in str(caught.value)
    assert {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()} == before


def test_weights_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"<html>rate limited</html>")
    embedder = TimmImageEmbedder("test_resnet.r160_in1k", weights=path)
    with pytest.raises(UsageError, match=r"weights\.pth.*cannot be read as weights"):
        embedder.embed([b""])
    with pytest.raises(UsageError, match=r"nowhere\.safetensors.*no such file"):
        TimmImageEmbedder("test_resnet.r160_in1k", weights=tmp_path / "nowhere.safetensors")


def test_an_image_size_that_does_not_fit() -> None:
    with pytest.raises(UsageError, match=r"160|16") as caught:
        TimmImageEmbedder("test_vit.r160_in1k", image_size=161)
    assert "161" in str(caught.value)
