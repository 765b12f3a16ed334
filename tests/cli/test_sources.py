"""The command on path lists, folders and parquet files, and the options that belong to each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.cli.source_kind import SourceKind, detect
from curator_embed.cli.source_options import SourceOptions
from curator_embed.datasets.describing import describe_dataset
from curator_embed.errors import UsageError
from tests.shards import crops, write_dataset

Run = Callable[..., Any]


@pytest.fixture
def images(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """A folder of 10 images, a list of them, and the same in a parquet file."""
    folder = tmp_path / "images"
    folder.mkdir()
    encoded = crops(wheel_photos[0], 10, size=48)
    for number, image in enumerate(encoded):
        (folder / f"{number}.jpg").write_bytes(image)
    (tmp_path / "list.txt").write_text("".join(f"laion/{n}.jpg\n" for n in range(10)))
    (tmp_path / "parquets").mkdir()
    pq.write_table(pa.table({"key": list("abcdefghij"), "image": encoded}), tmp_path / "parquets" / "0.parquet")
    return tmp_path


def columns(folder: Path) -> dict[str, list[str]]:
    return {path.name: pq.read_schema(path).names for path in sorted(folder.glob("*.parquet"))}


def test_a_path_list_in_two_parts_with_logs(run: Run, images: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "out", tmp_path / "logs"
    for index, (start, end) in enumerate(((0, 4), (4, 10))):
        ran = run(
            "columns", images / "list.txt", "--hash", "sha256", "--output", out, "--target-dir", images / "images",
            "--dataset", "laion", "--start-line", start, "--end-line", end, "--images-per-file", 4,
            "--process-index", index, "--log-dir", logs, "--json",
        )  # fmt: skip
        assert ran.status == 0, ran.err
        assert json.loads(ran.out)["embedded"] == end - start
    assert list(columns(out)) == [f"laion_{a:09d}-{b:09d}.parquet" for a, b in ((0, 4), (4, 8), (8, 10))]
    assert set(map(tuple, columns(out).values())) == {("path", "image_sha256", "image_error")}
    assert sorted(path.name for path in logs.iterdir()) == ["laion_0.txt", "laion_1.txt"]
    log = (logs / "laion_1.txt").read_text()
    assert "begin laion, lines 4 to 10" in log and "read" in log and log.rstrip().endswith("end")


def test_rows_of_a_file_as_a_product(run: Run, images: Path, tmp_path: Path) -> None:
    ran = run(
        "embed", images / "list.txt", "--model", "test_vit", "--root", images / "images", "--dataset", "laion",
        "--output", tmp_path / "out", "--batch-size", 2, "--batch-per-inference", 1, "--inference-per-file", 3,
        "--num-workers", 1, "--num-threads", 2, "--quiet",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))] == [6, 4]
    assert next(iter(columns(tmp_path / "out").values())) == ["path", "image_embedding", "image_error"]


@pytest.mark.parametrize(("name", "column"), [("images", "path"), ("parquets", "key"), ("parquets/0.parquet", "key")])
def test_folders_and_parquet_are_recognised(run: Run, images: Path, tmp_path: Path, name: str, column: str) -> None:
    ran = run("columns", images / name, "--hash", "sha256", "--output", tmp_path / "out", "--quiet")
    assert ran.status == 0, ran.err
    assert list(columns(tmp_path / "out").values()) == [[column, "image_sha256", "image_error"]]


def test_a_log_that_cannot_be_written(run: Run, images: Path) -> None:
    ran = run("columns", images / "images", "--properties", "--log-dir", images / "list.txt")
    assert ran.status == 2 and "--log-dir" in ran.err and "cannot write there" in ran.err
    assert not (images / "images_metadata").exists()


def test_info_of_a_list_and_of_a_folder(run: Run, images: Path, tmp_path: Path) -> None:
    """What there is to do, and how much of it is done, wherever the output lies."""
    opened = (images / "list.txt", "--root", images / "images", "--dataset", "laion", "--images-per-file", 4)
    told = json.loads(run("info", *opened, "--json").out)
    assert (told["kind"], told["shards"], told["images"], told["tables"]) == ("path-list", 3, 10, 0)
    assert (told["images_below"], told["tables_in"]) == (str(images / "images"), f"{images / 'list.txt'}_metadata")
    assert "none yet in" in run("info", *opened).out

    out = tmp_path / "out"
    assert run("columns", *opened, "--end-line", 8, "--hash", "sha256", "--output", out, "--quiet").status == 0
    text = run("info", *opened, "--metadata", out).out
    assert "path-list, 3 shards, 10 lines, images below" in text
    assert f"tables: 2 parquet files for 3 shards, 8 rows, in {out}" in text and "8 read, 8 embedded" in text
    told = json.loads(run("info", out, "--json").out)
    assert (told["kind"], told["shards"], told["tars"], told["rows"]) == ("output", 2, 0, 8)

    assert run("columns", images / "images", "--properties", "--quiet").status == 0
    text = run("info", images / "images").out
    assert "folder, 1 shard, 10 images" in text and f"1 parquet file, 10 rows, in {images / 'images'}_metadata" in text
    assert "parquet, 1 shard\n" in run("info", images / "parquets").out
    refused = run("info", images / "images", "--root", "x")
    assert refused.status == 2 and "--root is for path-list" in refused.err


def test_what_a_source_is(images: Path, wheel_photos: list[Path]) -> None:
    write_dataset(images / "wds", wheel_photos, shards=1, samples=1)
    (images / "tables").mkdir()
    (images / "short").mkdir()
    (images / "short" / "0.pq").write_bytes((images / "parquets" / "0.parquet").read_bytes())
    (images / "wds" / "00000.parquet").rename(images / "tables" / "00000.parquet")
    for name, kind in (
        ("list.txt", SourceKind.path_list),
        ("images", SourceKind.folder),
        ("parquets", SourceKind.parquet),
        ("parquets/*.parquet", SourceKind.parquet),
        ("parquets/0.parquet", SourceKind.parquet),
        ("short", SourceKind.parquet),
        ("short/0.pq", SourceKind.parquet),
        ("tables", SourceKind.webdataset),
        ("tables/00000.parquet", SourceKind.webdataset),
        ("wds", SourceKind.webdataset),
        ("wds/{00000..00001}.tar", SourceKind.webdataset),
    ):
        assert detect(str(images / name), {}) is kind, name
    run_into = images / "images" / "out"
    run_into.mkdir()
    pq.write_table(pa.table({"path": ["0.jpg"]}), run_into / "0.parquet")
    assert detect(str(images / "images"), {}) is SourceKind.folder  # an output within is no input


def test_images_that_lie_beside_tars_are_not_passed_over_in_silence(
    images: Path, wheel_photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    write_dataset(images / "wds", wheel_photos, shards=1, samples=1)
    assert detect(str(images / "wds"), {}) is SourceKind.webdataset and not caplog.records
    (images / "wds" / "00000.tar").rename(images / "images" / "old.tar")
    assert detect(str(images / "images"), {}) is SourceKind.webdataset
    assert "not the image files beside them (10); --source folder" in caplog.text


def test_tables_without_any_image_are_told(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    (images / "two").mkdir()
    pq.write_table(pa.table({"key": ["a"], "front": [b"a"], "back": [b"b"]}), images / "two" / "0.parquet")
    assert len(SourceOptions().open(str(images / "two")).shards) == 1
    assert "every row counts as one without an image" in caplog.text
    with pytest.raises(UsageError, match="several columns can hold images"):
        SourceOptions(source=SourceKind.parquet).open(str(images / "two"))


def test_tars_in_capitals_keep_one_table(run: Run, tmp_path: Path, wheel_photos: list[Path]) -> None:
    """A second run finds the first one's table as that of the tar, and not as a shard of its own."""
    write_dataset(tmp_path / "wds", wheel_photos, shards=1, samples=3)
    (tmp_path / "wds" / "00000.parquet").unlink()
    (tmp_path / "wds" / "00000.tar").rename(tmp_path / "wds" / "00000.TAR")
    for kind in ("phash", "dhash"):
        told = json.loads(run("columns", tmp_path / "wds", "--hash", kind, "--json").out)
        assert (told["shards"]["done"], told["read"], told["no_image"]) == (1, 3, 0)
    assert [path.name for path in (tmp_path / "wds").glob("*.parquet")] == ["00000.parquet"]
    told = json.loads(run("info", tmp_path / "wds", "--json").out)
    assert (told["shards"], told["tars"], told["rows"]) == (1, 1, 3)


def test_no_password_of_a_url_is_told(images: Path) -> None:
    dataset = SourceOptions().open(str(images / "parquets"))
    assert describe_dataset(dataset, "https://me:secret@h/x.tar?sig=1", "webdataset").path == "https://h/x.tar"
    with SourceOptions(log_dir=str(images / "logs")).logging("https://h/list.txt?sig=a/secret.b"):
        pass
    assert [path.name for path in (images / "logs").iterdir()] == ["list_0.txt"]


def test_what_no_source_is(images: Path) -> None:
    texts = images / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt", "c.csv"):
        (texts / name).write_text("a")
    (images / "empty").mkdir()
    (images / "both").mkdir()
    (images / "both" / "0.jpg").write_bytes(b"x")
    (images / "both" / "0.parquet").write_bytes((images / "parquets" / "0.parquet").read_bytes())
    for name, words in (
        ("texts", r"no images there, but 2 \.txt, 1 \.csv\. A webdataset is a folder of"),
        ("empty", "the folder is empty"),
        ("both", "1 image files are there, and parquet files.*--source folder or --source parquet"),
        ("texts/c.csv", "say --source path-list"),
        ("images/0.jpg", "by their folder"),
        ("images/*.jpg", "by their folder"),
        ("nowhere", "no such file or folder"),
    ):
        with pytest.raises(UsageError, match=words):
            detect(str(images / name), {})


def test_what_is_not_there_is_bad_usage(run: Run, images: Path, source: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    for arguments in (
        (tmp_path / "nowhere.txt",),
        (tmp_path / "nowhere.parquet",),
        (images / "list.txt", "--root", nowhere),
        (images / "images", "--metadata", nowhere),
        (source, "--metadata", nowhere),
    ):
        ran = run("columns", *arguments, "--properties", "--output", tmp_path / "out")
        assert (ran.status, ran.out) == (2, ""), arguments
        assert str(nowhere) in ran.err, arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"root": "x", "source": SourceKind.webdataset}, "--root is for path-list"),
        ({"image_col": "jpg"}, "--image-col is for parquet"),
        ({"use_index_files": True}, "--use-index-files is for webdataset"),
        ({"region": "eu-central-1"}, "--region is for buckets"),
        ({"images_per_file": 5, "inference_per_file": 5}, "give one"),
        ({"root": "s3://b", "no_proxy": True, "http_proxy": "http://p"}, "contradict"),
        ({"storage_options": "[1]"}, "must be a JSON object"),
    ],
)
def test_options_that_do_not_belong_together(images: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SourceOptions(**options).open(str(images / "list.txt"))


def test_options_of_buckets_reach_the_file_system(images: Path) -> None:
    options = SourceOptions(
        root="s3://bucket/x", region="eu-central-1", endpoint="http://localhost:1", anonymous=True, timeout=7.0,
        retries=2, http_proxy="http://proxy:3128", in_flight=99, storage_options='{"requester_pays": true}',
    )  # fmt: skip
    dataset = options.open(str(images / "list.txt"))
    assert dataset.storage_options == {
        "anon": True,
        "endpoint_url": "http://localhost:1",
        "client_kwargs": {"region_name": "eu-central-1"},
        "requester_pays": True,
        "config_kwargs": {
            "connect_timeout": 7.0,
            "read_timeout": 7.0,
            "retries": {"max_attempts": 3, "mode": "standard"},
            "max_pool_connections": 99,
            "proxies": {"http": "http://proxy:3128"},
        },
    }
    policy = dataset.shards[0].listed.policy  # type: ignore[attr-defined]
    assert (policy.in_flight, policy.timeout, policy.retries) == (99, 7.0, 2)
