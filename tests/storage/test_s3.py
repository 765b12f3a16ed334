"""S3 against a real server on loopback: right results, faults, and what cannot be reached."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import moto.server as moto_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from distributed import Client

from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.execution.report import RunReport
from curator_embed.execution.run import RunStopped
from curator_embed.sources.folder import find_images
from curator_embed.sources.path_list import find_lines
from curator_embed.storage.gate import Gate
from curator_embed.storage.objects import ReadPolicy, read_many
from curator_embed.storage.s3 import S3Options
from curator_embed.storage.s3_store import GIVE_UP_AFTER, fast_bucket
from tests.faulty_proxy import Fault, FaultyProxy
from tests.shards import crops, write_dataset
from tests.stub import ColourEmbedder

SECRET = "wJalrXUtnHUNTER2"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Credentials lie where AWS's tools look for them, and nowhere else."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUNTER2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def stored(server: str, tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Path:
    """A bucket with two tars, with their parquets, and 40 images; the same on disk, and a list of the images."""
    folder = tmp_path_factory.mktemp("stored")
    write_dataset(folder / "tars", wheel_photos, shards=2, samples=6)
    for number, image in enumerate(crops(wheel_photos[0], 40)):
        path = folder / "images" / f"{number % 4}" / f"{number} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    lines = [f"laion/{n % 4}/{n} ü.jpg" for n in range(40)]
    (folder / "list.txt").write_text("\n".join(lines))
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    fs.mkdir("photos")
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"photos/{path.relative_to(folder)}", path.read_bytes())
    return folder


def options(url: str, **more: object) -> S3Options:
    return S3Options(**{"region": "us-east-1", "endpoint": url, "timeout": 1.0, "retries": 4, **more})  # type: ignore[arg-type]


QUICK = ReadPolicy(timeout=2.0, retries=5, backoff=0.01)


def test_the_same_results_as_from_disk(client: Client, server: str, stored: Path, tmp_path: Path) -> None:
    s3 = options(server)
    for name, there, here in (
        (
            "tars",
            ImageTextPairDataset.from_webdataset("s3://photos/tars", storage_options=s3),
            ImageTextPairDataset.from_webdataset(str(stored / "tars")),
        ),
        (
            "list",
            ImageTextPairDataset.from_path_list(
                stored / "list.txt", "s3://photos/images", "laion", images_per_file=16, storage_options=s3
            ),
            ImageTextPairDataset.from_path_list(stored / "list.txt", stored / "images", "laion", images_per_file=16),
        ),
        (
            "folder",
            ImageTextPairDataset.from_folder("s3://photos/images", 16, storage_options=s3),
            ImageTextPairDataset.from_folder(stored / "images", 16),
        ),
    ):
        one = ColourEmbedder()(there).save_metadata(str(tmp_path / f"{name}-s3"), progress=False)
        two = ColourEmbedder()(here).save_metadata(str(tmp_path / f"{name}-disk"), progress=False)
        assert one.read == two.read and one.embedded == two.embedded > 10
        for path in (tmp_path / f"{name}-disk").glob("*.parquet"):
            assert pq.read_table(tmp_path / f"{name}-s3" / path.name).equals(pq.read_table(path))


def test_a_folder_in_the_bucket_grows(client: Client, server: str, stored: Path) -> None:
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    images = [path.read_bytes() for path in sorted((stored / "images" / "0").glob("*.jpg"))]

    def run(**more: object) -> RunReport:
        dataset = ImageTextPairDataset.from_folder("s3://photos/growing", 3, storage_options=options(server))
        return ColourEmbedder()(dataset).save_metadata("s3://photos/grown", progress=False, **more)

    for number, image in enumerate(images[:4]):
        fs.pipe_file(f"photos/growing/{number}.jpg", image)
    run()
    fs.pipe_file("photos/growing/!.jpg", images[5])
    fs.rm_file("photos/growing/1.jpg")
    report = run()
    assert (report.embedded, report.shards["skipped"], report.shards["done"]) == (5, 2, 1)
    assert "1 row is of an image that is gone ('1.jpg')" in report.notes[0]
    fs.invalidate_cache()
    files = sorted(path for path in fs.ls("photos/grown", detail=False) if path.endswith(".parquet"))
    paths = [pq.read_table(f"s3://{path}", filesystem=fs)["path"].to_pylist() for path in files]
    assert paths == [["0.jpg", "1.jpg", "2.jpg"], ["3.jpg"], ["!.jpg"]]
    fs.pipe_file("photos/growing/3.jpg", images[6])
    with pytest.raises(UsageError, match=r"changed since \(1 of 1, '3\.jpg' is the first\)"):
        run()
    run(overwrite=True)
    assert run().shards["done"] == 0


def test_list_and_output_in_the_bucket_and_a_resume(client: Client, server: str, stored: Path) -> None:
    def dataset() -> ImageTextPairDataset:
        return ImageTextPairDataset.from_path_list(
            "s3://photos/list.txt", "s3://photos/images", "laion", images_per_file=16, storage_options=options(server)
        )

    report = ColourEmbedder()(dataset()).save_metadata("s3://photos/out", progress=False)
    assert report.embedded == 40
    again = ColourEmbedder()(dataset()).save_metadata("s3://photos/out", progress=False)
    assert again.shards["skipped"] == 3 and again.embedded == 40


def test_parquet_with_images_gets_its_columns_in_the_bucket(client: Client, server: str, stored: Path) -> None:
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    images = [path.read_bytes() for path in sorted((stored / "images" / "0").iterdir())]
    with fs.open("photos/rows/0.parquet", "wb") as file:
        pq.write_table(pa.table({"key": [str(n) for n in range(len(images))], "jpg": images}), file)

    def dataset() -> ImageTextPairDataset:
        return ImageTextPairDataset.from_parquet("s3://photos/rows", storage_options=options(server))

    assert ColourEmbedder()(dataset()).save_metadata(progress=False).embedded == len(images)
    assert ColourEmbedder()(dataset()).save_metadata(progress=False).shards["skipped"] == 1
    with fs.open("photos/rows/0.parquet", "rb") as file:
        table = pq.read_table(file)
    assert table.column_names == ["key", "jpg", "image_embedding", "image_error"]
    assert table["jpg"].to_pylist() == images


def test_hundreds_are_in_flight_in_their_order(server: str, stored: Path) -> None:
    with FaultyProxy(server, lambda n, method, path: "slow", stall=0.5) as proxy:
        (shard,) = find_lines(
            stored / "list.txt",
            root="s3://photos/images",
            dataset="laion",
            storage_options=options(proxy.url, timeout=20.0),
        )
        found = list(shard.samples(id_col="path"))
        assert [s.image for s in found] == [(stored / "images" / s.key[6:]).read_bytes() for s in found]
        assert proxy.most > 10
        assert [method for method, _ in proxy.requests] == ["GET"] * 40  # one request an image


@pytest.mark.parametrize("fault", ["503", "stall", "cut"])
def test_a_tenth_of_the_requests_failing_costs_no_image(server: str, stored: Path, fault: str) -> None:
    with FaultyProxy(server, lambda n, method, path: fault if n % 10 == 3 else "", stall=1.5) as proxy:  # type: ignore[arg-type,return-value]
        (shard,) = find_lines(
            stored / "list.txt",
            root="s3://photos/images",
            dataset="laion",
            storage_options=options(proxy.url),
            policy=QUICK,
        )
        found = list(shard.samples(id_col="path"))
        assert proxy.faults >= 4
    assert [s.image for s in found] == [(stored / "images" / s.key[6:]).read_bytes() for s in found]


@pytest.mark.parametrize("fault", ["503", "stall", "cut"])
def test_tars_are_read_through_faults(server: str, stored: Path, fault: str) -> None:
    from curator_embed.sources.webdataset import find_shards

    def choose(n: int, method: str, path: str) -> str:
        return fault if n % 3 == 0 and method == "GET" else ""

    with FaultyProxy(server, choose, stall=1.5) as proxy:  # type: ignore[arg-type]
        shards = find_shards("s3://photos/tars", storage_options=options(proxy.url))
        found = [s for shard in shards for s in shard.samples(id_col="key")]
        assert proxy.faults > 0
    local = [s for shard in find_shards(str(stored / "tars")) for s in shard.samples(id_col="key")]
    assert [(s.key, s.image) for s in found] == [(s.key, s.image) for s in local]


def test_a_bucket_that_does_not_exist(client: Client, server: str, stored: Path, tmp_path: Path) -> None:
    dataset = ImageTextPairDataset.from_path_list(
        stored / "list.txt", "s3://nosuchbucket/images", "laion", storage_options=options(server)
    )
    with pytest.raises(RunStopped, match=r"s3://nosuchbucket/images: .*the bucket does not exist") as stopped:
        ColourEmbedder()(dataset).save_metadata(str(tmp_path / "out"), progress=False)
    assert not list((tmp_path / "out").glob("*.parquet"))
    assert SECRET not in str(stopped.value)
    with pytest.raises(UsageError, match="s3://nosuchbucket"):
        ImageTextPairDataset.from_webdataset("s3://nosuchbucket/tars", storage_options=options(server))
    with pytest.raises(UsageError, match="s3://nosuchbucket"):
        find_images("s3://nosuchbucket/images", storage_options=options(server))


def test_access_denied_is_no_row_and_is_not_tried_again(
    client: Client, server: str, stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyProxy(server, lambda n, method, path: "403") as proxy:
        dataset = ImageTextPairDataset.from_path_list(
            stored / "list.txt", "s3://photos/images", "laion", storage_options=options(proxy.url)
        )
        with pytest.raises(RunStopped, match=r"s3://photos/images: .*access denied") as stopped:
            ColourEmbedder()(dataset).save_metadata(str(tmp_path / "out"), progress=False)
        assert max(Counter(proxy.requests).values()) <= 2, "once through obstore, once through s3fs"
    assert SECRET not in str(stopped.value) + caplog.text
    with FaultyProxy(server, lambda n, method, path: "403" if "/images/1/5%20" in path else "") as proxy:
        (shard,) = find_lines(
            stored / "list.txt", root="s3://photos/images", dataset="laion", storage_options=options(proxy.url)
        )
        assert [s.error for s in shard.samples(id_col="path")].count(Reason.READ_ERROR) == 1
        assert "access denied" in shard.notes()[0].message


def test_a_server_that_is_away_is_said_soon(stored: Path) -> None:
    (shard,) = find_lines(
        stored / "list.txt",
        root="s3://photos/images",
        dataset="laion",
        storage_options=options("http://127.0.0.1:9", retries=0),
        policy=ReadPolicy(retries=0, timeout=5.0),
    )
    with pytest.raises(SourceError, match="not one of the first 32 images"):
        list(shard.samples(id_col="path"))


def test_an_object_deleted_between_listing_and_reading(
    client: Client, server: str, stored: Path, tmp_path: Path
) -> None:
    fs = s3fs.S3FileSystem(endpoint_url=server, skip_instance_cache=True)
    images = crops(stored / "images" / "0" / "0 ü.jpg", 3, size=32)
    for number, image in enumerate(images):
        fs.pipe_file(f"photos/gone/{number}.jpg", image)
    fs.pipe_file("photos/gone-tars/0.tar", (stored / "tars" / "00000.tar").read_bytes())
    fs.pipe_file("photos/gone-tars/1.tar", (stored / "tars" / "00001.tar").read_bytes())
    folder = ImageTextPairDataset.from_folder("s3://photos/gone", storage_options=options(server))
    tars = ImageTextPairDataset.from_webdataset("s3://photos/gone-tars", storage_options=options(server))
    fs.rm_file("photos/gone/1.jpg")
    report = ColourEmbedder()(folder).save_metadata(str(tmp_path / "folder"), progress=False)
    assert (report.read, report.embedded, report.reasons) == (3, 2, {"not_found": 1})
    shard = tars.shards[0]
    fs.rm_file("photos/gone-tars/0.tar")
    with pytest.raises(SourceError, match=r"gone-tars/0\.tar: does not exist"):
        list(shard.samples(id_col="key"))


def test_secrets_are_in_nothing_that_is_written(
    client: Client, server: str, stored: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "curator_embed")
    given = {
        "key": "AKIAHUNTER2",
        "secret": SECRET,
        "endpoint_url": server,
        "client_kwargs": {"region_name": "us-east-1"},
    }
    dataset = ImageTextPairDataset.from_path_list(
        stored / "list.txt", "s3://photos/images", "laion", storage_options=given
    )
    report = ColourEmbedder()(dataset).save_metadata(str(tmp_path / "out"), progress=False)
    told = json.dumps(report.to_dict()) + str(report) + repr(dataset) + repr(dataset.shards) + caplog.text
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for secret in (SECRET, "AKIAHUNTER2"):
        assert secret not in told and secret.encode() not in written


def test_proxies(server: str, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(s3: S3Options) -> bytes | None:
        (shard,) = find_lines(
            stored / "list.txt",
            root="s3://photos/images",
            dataset="laion",
            end_line=1,
            storage_options=s3,
            policy=ReadPolicy(retries=0, timeout=3.0),
        )
        return next(iter(shard.samples(id_col="path"))).image

    expected = (stored / "images" / "0" / "0 ü.jpg").read_bytes()
    with FaultyProxy(server) as proxy:
        assert read(options(server, http_proxy=proxy.url)) == expected
        assert len(proxy.requests) == 1
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        assert read(options(server, timeout=1.25)) == expected
        assert len(proxy.requests) == 2
        assert read(options(server, no_proxy=True)) == expected
        assert len(proxy.requests) == 2


def test_public_buckets_need_no_credentials(server: str, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    fs.call_s3("put_object_acl", Bucket="photos", Key="images/0/0 ü.jpg", ACL="public-read")
    (shard,) = find_lines(
        stored / "list.txt",
        root="s3://photos/images",
        dataset="laion",
        end_line=1,
        storage_options=options(server, anonymous=True),
    )
    assert next(iter(shard.samples(id_col="path"))).image is not None


def images(stored: Path, url: str, **more: object) -> list[bytes | None]:
    """Every image of the list, read from the bucket."""
    given = options(url, **more)
    (shard,) = find_lines(
        stored / "list.txt", root="s3://photos/images", dataset="laion", storage_options=given, policy=ReadPolicy()
    )
    return [sample.image for sample in shard.samples(id_col="path")]


def test_images_come_through_obstore_and_without_it_all_the_same(
    server: str, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_slowly: list[str] = []
    cat_file = s3fs.S3FileSystem._cat_file

    async def counted(self: object, path: str, **more: object) -> bytes:
        read_slowly.append(path)
        data: bytes = await cat_file(self, path, **more)
        return data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counted)
    right = [(stored / "images" / str(n % 4) / f"{n} ü.jpg").read_bytes() for n in range(40)]
    assert images(stored, server) == right
    assert not read_slowly
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    assert images(stored, server, timeout=7.0) == right  # other options: nothing of the first is kept
    assert len(read_slowly) == 40


def test_a_way_that_leads_nowhere_is_given_up(stored: Path, server: str) -> None:
    def refuse_obstore(number: int, headers: Message) -> Fault:
        return "503" if "object_store" in headers.get("User-Agent", "") else ""

    with FaultyProxy(server, by_headers=refuse_obstore) as proxy:
        found = images(stored, proxy.url)
    assert None not in found and len(found) == 40
    assert GIVE_UP_AFTER <= proxy.faults <= 40


@pytest.mark.parametrize(
    ("more", "there"),
    [
        ({}, True),
        ({"anon": True}, True),
        ({"key": "a", "secret": "b", "token": "c"}, True),
        ({"requester_pays": True}, False),
        ({"client_kwargs": {"verify": False}}, False),
        ({"config_kwargs": {"signature_version": "s3"}}, False),
        ({"session": object()}, False),
    ],
)
def test_only_what_obstore_understands_goes_its_way(more: dict[str, object], there: bool) -> None:
    assert (fast_bucket("photos", {"endpoint_url": "http://127.0.0.1:9", **more}) is not None) == there


@pytest.mark.parametrize("name", ["AWS_SKIP_SIGNATURE", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ALLOW_HTTP"])
def test_variables_that_obstore_reads_its_own_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fast_bucket("photos", {"endpoint_url": "http://127.0.0.1:9"}) is not None
    monkeypatch.setenv(name, "true")
    assert fast_bucket("photos", {"endpoint_url": "http://127.0.0.1:9"}) is None


def test_keys_that_obstore_would_change(server: str) -> None:
    fs = s3fs.S3FileSystem(endpoint_url=server, key="a", secret="b", skip_instance_cache=True)
    fs.mkdir("slashes")
    for key in ("a.png", "/a.png", "only.png", "b//c.png"):
        fs.call_s3("put_object", Bucket="slashes", Key=key, Body=key.encode())
    asked = ("a.png", "/a.png", "/only.png", "b//c.png")
    found = list(read_many(map(Gate.of_root("s3://slashes").below, asked), options(server)))
    assert [answer if isinstance(answer, bytes) else answer.reason for answer in found] == [
        b"a.png", b"/a.png", Reason.NOT_FOUND, b"b//c.png",
    ]  # fmt: skip


def test_keys_that_are_given_go_without_the_environments_token(
    server: str, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-role")
    tokens: list[str | None] = []

    def refuse_tokens(number: int, headers: Message) -> Fault:
        tokens.append(headers.get("x-amz-security-token"))
        return ""

    with FaultyProxy(server, by_headers=refuse_tokens) as proxy:
        given = {**options(proxy.url), "key": "mine", "secret": "too"}
        (found,) = read_many([Gate.of_root("s3://photos").below("images/0/0 ü.jpg")], given)
    assert isinstance(found, bytes) and tokens == [None]


def test_a_stalled_way_is_given_up(server: str, stored: Path) -> None:
    def stall_obstore(number: int, headers: Message) -> Fault:
        return "stall" if "object_store" in headers.get("User-Agent", "") else ""

    with FaultyProxy(server, by_headers=stall_obstore, stall=5.0) as proxy:
        gate = Gate.of_root("s3://photos/images")
        paths = [gate.below(f"{n % 4}/{n} ü.jpg") for n in range(30)]
        policy = ReadPolicy(in_flight=4, threads=1, timeout=1.0)
        found = list(read_many(paths, options(proxy.url, timeout=30.0), policy))
        assert all(isinstance(answer, bytes) for answer in found)
        assert GIVE_UP_AFTER <= proxy.faults < 30


def test_settings_of_the_profile_that_obstore_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    config.write_text("[default]\nendpoint_url = http://127.0.0.1:9\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert fast_bucket("of-a-profile", {}) is None


def test_options_that_contradict_each_other() -> None:
    for wrong, message in (
        ({"no_proxy": True, "http_proxy": "http://p"}, "contradict"),
        ({"timeout": 0.0}, "greater than 0"),
        ({"endpoint": "localhost:9000"}, "a URL"),
    ):
        with pytest.raises(UsageError, match=message):
            S3Options(**wrong)  # type: ignore[arg-type]
