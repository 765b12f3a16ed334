"""What rows may open: names of every kind against a gate, and sources read through it from disk and real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from hypothesis import example, given, settings
from hypothesis import strategies as st
from yarl import URL

from curator_embed.cli import main
from curator_embed.cli.wording import in_options
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.errors import MissingExtra, Reason, SourceError, UsageError
from curator_embed.execution.run import RunStopped
from curator_embed.sources.folder import find_images
from curator_embed.sources.parquet import find_parquets
from curator_embed.sources.path_list import PathListShard, find_lines
from curator_embed.sources.shard import Sample, Shard
from curator_embed.sources.webdataset import find_shards
from curator_embed.storage.files import filesystem
from curator_embed.storage.gate import KEPT_FOLDERS, Gate, Place, Unread
from curator_embed.storage.location import Location
from curator_embed.storage.objects import ReadPolicy, read_many
from curator_embed.storage.s3 import S3Options
from tests.rows import tar_members
from tests.shards import crops
from tests.stub import ColourEmbedder
from tests.web import Web
from tests.written_tars import image_bytes, tar_bytes

ANY_LINKS = ReadPolicy(links="any")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        yield client


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """``images/`` with a picture, and beside it a secret that links, dots and whole paths lead to."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.jpg").write_bytes(b"one")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(b"x")
    (tmp_path / "images" / "out.jpg").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "images" / "outside").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "in.jpg").symlink_to(Path("a") / "1.jpg")
    (tmp_path / "images" / "inside").symlink_to("a")
    (tmp_path / "images" / "loop.jpg").symlink_to("loop.jpg")
    return tmp_path


def listed(home: Path, *lines: str, where: str = "list.txt", **options: Any) -> PathListShard:
    path = home / where
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape") + b"\n")
    (shard,) = find_lines(path, **options)
    return shard


def outcome(shard: Shard) -> list[bytes | str | None]:
    """Per row the bytes, else the reason."""
    return [s.image if s.error is None else str(s.error) for s in samples(shard)]


def samples(shard: Shard) -> list[Sample]:
    return list(shard.samples(id_col="path"))


def only_note(shard: Shard) -> str:
    (note,) = shard.notes()
    return note.message


def embedded_paths(folder: Path, name: str, paths: list[str | None]) -> Path:
    """A parquet file as Hugging Face writes it, whose images are named by path."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if path is None else {"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"key": [str(n) for n in range(len(rows))], "image": pa.array(rows, kind)}), folder / name)
    return folder / name


# --- path lists with a root ----------------------------------------------------------------------


def test_everything_lies_below_the_root(home: Path) -> None:
    images = home / "images"
    shard = listed(
        home,
        "a/1.jpg", f"{images}/a/1.jpg", f"file://{images}/a/1.jpg", "list//a/1.jpg", "a/../a/1.jpg", "in.jpg",
        "inside/1.jpg", "a/./1.jpg", "gone/../../images/a/1.jpg",
        "../secret.txt", "a/../../secret.txt", "/etc/passwd", f"{home}/secret.txt", f"file://{home}/secret.txt",
        "out.jpg", "outside/x.jpg", "a/../outside/x.jpg", "..", f"{images}/../secret.txt",
        "gone.jpg", "loop.jpg", "", "a", ".",
        root=images,
    )  # fmt: skip
    refused, not_found, unread = "refused", "not_found", "read_error"
    assert outcome(shard) == [*[b"one"] * 9, *[refused] * 10, not_found, unread, None, unread, unread]
    note = shard.notes()[0].message
    assert note.startswith("10 rows name what this dataset may not open, and carry 'refused'; the first is")
    assert f"'../secret.txt': lies outside {images}" in note
    assert {s.ordinal: s.members for s in shard.stored_samples({0, 9, 11, 14})} == {
        0: (("jpg", b"one"),), 9: (), 11: (), 14: (),
    }  # fmt: skip


def test_a_root_may_itself_be_a_link(home: Path) -> None:
    (home / "mounted").symlink_to(home / "images")
    shard = listed(home, "a/1.jpg", f"{home}/mounted/a/1.jpg", f"{home}/images/a/1.jpg", root=home / "mounted")
    assert outcome(shard) == [b"one"] * 3


def test_links_that_lead_out_are_followed_when_that_is_asked_for(home: Path) -> None:
    lines = ("out.jpg", "outside/x.jpg", "in.jpg", "../secret.txt", "outside/../../secret.txt", "/etc/passwd")
    shard = listed(home, *lines[:3], root=home / "images")
    assert outcome(shard) == ["refused", "refused", b"one"]
    assert "a link leads out" in only_note(shard) and "reading=ReadPolicy(links='any')" in only_note(shard)
    assert "pass --links any" in in_options(only_note(shard))
    followed = listed(home, *lines, root=home / "images", policy=ANY_LINKS)
    assert outcome(followed) == [b"secret", b"x", b"one", "refused", "refused", "refused"]


def test_the_remedies_for_lines_outside_work(home: Path) -> None:
    shard = listed(home, f"{home}/secret.txt", root=home / "images")
    assert outcome(shard) == ["refused"] and "pass root='/'" in only_note(shard)
    assert outcome(listed(home, f"{home}/secret.txt", root="/")) == [b"secret"]
    dots = listed(home, "../secret.txt", root=home / "images")
    assert outcome(dots) == ["refused"] and "as whole paths, and pass root='/'" in only_note(dots)
    alone = listed(home, f"{home}/secret.txt", where="images/list.txt")
    assert outcome(alone) == ["refused"] and "pass root='/'" in only_note(alone)


def test_names_no_system_can_have_are_failed_rows(home: Path) -> None:
    long, deep = "x" * 100_000, "a/" * 500_000
    lines = (f"{'y' * 300}.jpg", long, deep, "a/\0/1.jpg", "a\0b.jpg", "\udcff/\udcfe.jpg", "a/1.jpg")
    shard = listed(home, *lines, root=home / "images")
    assert outcome(shard) == [*["not_found"] * 6, b"one"]


# --- path lists without a root -------------------------------------------------------------------


def test_a_list_alone_opens_its_folder_and_the_web(home: Path) -> None:
    with Web({"/x.jpg": b"web"}) as web:
        shard = listed(
            home,
            "a/1.jpg", f"{home}/images/a/1.jpg", f"{web.url}/x.jpg", f"{web.url.upper()}/x.jpg", "list/a/1.jpg",
            "../secret.txt", f"{home}/secret.txt", "~/secret.txt", "~root/secret.txt",
            where="images/list.txt",
            policy=ReadPolicy(retries=0),
        )  # fmt: skip
        assert outcome(shard) == [b"one", b"one", b"web", b"web", b"one", "refused", "refused", "refused", "not_found"]


UNUSABLE = (
    "gs://bucket/a.jpg", "s3://bucket/a.jpg", "ftp://host/a.jpg", "foo://a/b.jpg", "hf://datasets/a/b/c.jpg",
    "reference://a::http://127.0.0.1:1/x", "simplecache::http://127.0.0.1:1/x", "zip://a.jpg::file:///b.zip",
    "http://[::1", "http://[zz]/x.jpg", "http://host:99999/x", "http://host:x/x", "http:///x.jpg", "http://",
    "http://a\\@b/x.jpg", "http://a b/x", "http://127.0.0.1:1\0/x", "https://h/" + "x" * 20_000,
    "data://x", "local://x.jpg", "File:///etc/passwd", "file://etc/passwd", "python://os", "://x", "x://",
)  # fmt: skip


@pytest.mark.parametrize("line", UNUSABLE)
def test_one_unusable_line_is_one_failed_row(home: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    shard = listed(home, "a/1.jpg", line, "a/1.jpg", where="images/list.txt", policy=ReadPolicy(retries=0))
    before, found, after = outcome(shard)
    assert before == after == b"one"
    assert found in ("refused", "not_found")
    if found == "refused":
        assert "1 rows name what this dataset may not open" in only_note(shard)


def test_a_line_of_a_store_names_the_root_that_opens_it(home: Path, memory: Any) -> None:
    memory.pipe_file("/bucket/a.jpg", b"stored")
    shard = listed(home, "memory://bucket/a.jpg", where="images/list.txt")
    assert outcome(shard) == ["refused"] and "pass root='memory://bucket'" in only_note(shard)
    assert outcome(listed(home, "memory://bucket/a.jpg", root="memory://bucket")) == [b"stored"]
    inside = listed(home, "memory://bucket/a.jpg", root=home / "images")
    assert outcome(inside) == ["refused"] and "pass root='memory://bucket'" in only_note(inside)


def test_a_root_that_cannot_be_opened_is_said_when_the_list_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"curator-embed\[gcs\]"):
        listed(home, "a.jpg", root="gs://bucket")
    with pytest.raises(UsageError, match="nosuch"):
        listed(home, "a.jpg", root="nosuch://bucket")


def test_lines_below_a_root_elsewhere(home: Path, memory: Any) -> None:
    for name in ("in/a.jpg", "in/b/c.jpg", "other.jpg", "inner/x.jpg"):
        memory.pipe_file(f"/bucket/{name}", name.encode())
    lines = ("a.jpg", "/a.jpg", "memory://bucket/in/a.jpg", "b/../a.jpg", "memory://bucket/in/b/c.jpg")
    wrong = (
        "../other.jpg", "memory://bucket/other.jpg", "memory://bucket/inner/x.jpg", "memory://bucket/in/../other.jpg",
        "memory://other/in/a.jpg", "file:///etc/passwd", "http://127.0.0.1:1/in/a.jpg", "x::memory://bucket/in/a.jpg",
        "reference://a::memory://bucket/in/a.jpg", "memory://bucket/in/a::b.jpg",
    )  # fmt: skip
    gate = Gate.of_root("memory://bucket/in")
    assert [gate.admit(line) for line in wrong if not isinstance(gate.admit(line), Unread)] == []
    answers = list(read_many(map(gate.admit, lines)))
    assert answers[:3] == [b"in/a.jpg"] * 3 and answers[4] == b"in/b/c.jpg"
    # A store has no '..': the name is looked for as it stands.
    assert isinstance(answers[3], Unread) and answers[3].reason is Reason.NOT_FOUND


def test_lines_below_a_root_on_the_web(home: Path) -> None:
    files = {"/in/a.jpg": b"a", "/in/b c.jpg": b"b", "/in/b%20c.jpg": b"b", "/other.jpg": b"o", "/in/x::y.jpg": b"::"}
    with Web(files) as web:
        root = f"{web.url}/in"
        assert outcome(
            listed(
                home,
                "a.jpg", f"{root}/a.jpg", f"{root}/b%20c.jpg", "b c.jpg", f"{root}/a.jpg?signed=1", "x::y.jpg",
                f"{root}/x::y.jpg", f"http://me:pw@127.0.0.1:{web.port}/in/a.jpg",
                f"{web.url}/other.jpg", f"{root}/../other.jpg", f"{root}/%2e%2e/other.jpg", "../other.jpg",
                f"{root}/..%2fother.jpg", f"{root}/..%5cother.jpg", f"{web.url}x/in/a.jpg", f"{web.url}/inner.jpg",
                f"https://127.0.0.1:{web.port}/in/a.jpg", "http://127.0.0.1/in/a.jpg",
                root=root,
                policy=ReadPolicy(retries=0),
            )
        ) == [b"a", b"a", b"b", b"b", b"a", b"::", b"::", b"a", *["refused"] * 10]  # fmt: skip
        assert all(path.startswith("/in/") for path, _ in web.asked)
        assert not any("Authorization" in headers for _, headers in web.asked)


def test_a_list_on_the_web_begins_at_its_folder_whatever_its_query(home: Path) -> None:
    with Web({"/lists/l.txt": b"a.jpg\n../b.jpg\n", "/lists/a.jpg": b"a", "/b.jpg": b"b"}) as web:
        (shard,) = find_lines(f"{web.url}/lists/l.txt?signed=a/b/c", dataset="l", policy=ReadPolicy(retries=0))
        assert outcome(shard) == [b"a", "refused"]


def test_a_list_in_a_bucket_opens_that_bucket(memory: Any) -> None:
    gate = Gate.of_list("s3://bucket/lists/l.txt")
    assert gate.admit("s3://bucket/images/a.jpg") == Place("s3://bucket/images/a.jpg", True, "s3://bucket")
    assert gate.admit("s3a://bucket/images/a.jpg") == Place("s3://bucket/images/a.jpg", True, "s3://bucket")
    assert gate.admit("b.jpg") == Place("s3://bucket/lists/b.jpg", True, "s3://bucket/lists")
    assert gate.admit("https://host/x.jpg") == Place("https://host/x.jpg", True)
    for line in ("s3://other/a.jpg", "/etc/passwd", "file:///etc/passwd", "s3://bucket/../other/a.jpg", "s3://bucket"):
        assert isinstance(gate.admit(line), Unread), line


# --- parquet -------------------------------------------------------------------------------------


def test_paths_in_a_parquet_lie_below_it(home: Path) -> None:
    with Web({"/x.jpg": b"web"}) as web:
        path = embedded_paths(
            home / "images",
            "x.parquet",
            ["a/1.jpg", f"{home}/images/a/1.jpg", "../secret.txt", f"{home}/secret.txt", "out.jpg", f"{web.url}/x.jpg",
             "s3://bucket/x", f"reference://a::{web.url}/x", f"simplecache::{web.url}/x", "gone.jpg", None, "foo://x"],
        )  # fmt: skip
        (shard,) = find_parquets(path)
        found = outcome(shard)
        assert found == [b"one", b"one", *["refused"] * 7, "not_found", None, "refused"]
        assert web.asked == []
        note = only_note(shard)
        assert "8 rows name what" in note and f"'../secret.txt': lies outside {home}/images" in note
        stored = {s.ordinal: s.members for s in shard.stored_samples(range(20))}
        assert stored[0] == (("jpg", b"one"),) and all(not stored[n] for n in range(2, 12))
        (followed,) = find_parquets(path, policy=ANY_LINKS)
        assert outcome(followed)[4] == b"secret" and outcome(followed).count("refused") == 7


def test_urls_in_a_parquet_are_opened_when_that_is_asked_for(home: Path) -> None:
    with Web({"/x.jpg": b"web"}) as web:
        path = embedded_paths(home, "x.parquet", [f"{web.url}/x.jpg"])
        (shard,) = find_parquets(path)
        assert outcome(shard) == ["refused"] and web.asked == []
        assert "pass reading=ReadPolicy(urls='public')" in only_note(shard)
        assert "pass --urls public" in in_options(only_note(shard))
        (public,) = find_parquets(path, policy=ReadPolicy(urls="public", retries=0))
        assert outcome(public) == ["refused"] and web.asked == []
        assert "its host's address is not public" in only_note(public)
        allowed = ReadPolicy(urls="public", allow=("127.0.0.0/8",))
        for policy in (allowed, ReadPolicy(urls="any")):
            assert outcome(find_parquets(path, policy=policy)[0]) == [b"web"]


def test_a_parquet_on_the_web_may_name_urls(home: Path) -> None:
    path = embedded_paths(home, "x.parquet", [])
    with Web({"/y.jpg": b"y"}) as other, Web() as web:
        embedded_paths(home, "x.parquet", [f"{other.url}/y.jpg", "z.jpg", f"{web.url}/d/z.jpg"])
        web.files |= {"/d/x.parquet": path.read_bytes(), "/d/z.jpg": b"z"}
        (shard,) = find_parquets(f"{web.url}/d/x.parquet", storage_options={"headers": {"X-Key": "hunter2"}})
        assert outcome(shard) == [b"y", b"z", b"z"]
        assert [headers["X-Key"] for _, headers in other.asked] == [None]
        assert {headers["X-Key"] for _, headers in web.asked} == {"hunter2"}


def test_the_remedies_for_a_parquets_paths_work(home: Path) -> None:
    (shard,) = find_parquets(embedded_paths(home / "images", "x.parquet", [f"{home}/secret.txt"]))
    assert outcome(shard) == ["refused"]
    assert "list their paths in a text file and open it with root='/'" in only_note(shard)
    assert outcome(listed(home, f"{home}/secret.txt", root="/")) == [b"secret"]


# --- folders -------------------------------------------------------------------------------------


def test_links_in_a_folder(home: Path) -> None:
    (home / "images" / "in.txt").symlink_to(home / "secret.txt")
    (shard,) = find_images(home / "images", dataset="d")
    found = {s.key: s for s in shard.samples(id_col="path", extras=True)}
    assert {key: s.image or s.error for key, s in found.items()} == {
        "a/1.jpg": b"one", "in.jpg": b"one", "out.jpg": Reason.REFUSED, "loop.jpg": Reason.READ_ERROR
    }  # fmt: skip
    assert "txt" not in found["in.jpg"].extras
    told = [note.message for note in shard.notes()]
    assert [m[:40] for m in told[:2]] == [
        "1 rows name what this dataset may not op",
        "1 captions or json files may not be open",
    ]
    assert all("reading=ReadPolicy(links='any')" in m for m in told[:2])
    stored = {s.ordinal: s.members for s in shard.stored_samples({0, 1, 3})}
    assert list(stored.values()) == [(("jpg", b"one"),), (("jpg", b"one"),), ()]
    (followed,) = find_images(home / "images", dataset="d", policy=ANY_LINKS)
    found = {s.key: s for s in followed.samples(id_col="path", extras=True)}
    assert found["out.jpg"].image == b"secret" and found["in.jpg"].extras == {"txt": "secret"}


def test_names_in_a_bucket_are_names_only(memory: Any) -> None:
    for name in ("http://127.0.0.1:1/a.jpg", "file:///etc/b.jpg", "/etc/c.jpg", "d.jpg", "x::y.jpg"):
        memory.store[f"/bucket/{name}"] = memory.open("/tmp.jpg", "wb").__class__(
            memory, f"/bucket/{name}", name.encode()
        )
    (shard,) = find_images("memory://bucket", dataset="d")
    found = {s.key: s.image if s.error is None else str(s.error) for s in samples(shard)}
    assert found.pop("x::y.jpg") == "refused"
    assert found["d.jpg"] == b"d.jpg" and set(found.values()) <= {name.encode() for name in found} | {"not_found"}


# --- chains: what ran a shell command with fsspec 2024.6 to 2026.2 -------------------------------


def test_no_chain_reaches_fsspec(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference file system's templates ran what they held: whoever asks for one has lost."""
    from fsspec.implementations import reference

    opened: list[object] = []
    made = reference.ReferenceFileSystem.__init__
    monkeypatch.setattr(
        reference.ReferenceFileSystem, "__init__", lambda self, *a, **k: (opened.append(a), made(self, *a, **k))[1]
    )
    ran = home / "ran"
    command = f"{{{{ cycler.__init__.__globals__.os.system('touch {ran}') }}}}"
    document = {"version": 1, "templates": {"u": command}, "refs": {"a": ["{{u}}", 0, 1]}}
    with Web({"/r.json": json.dumps(document).encode()}) as web:
        chains = [
            f"reference://a::{web.url}/r.json",
            f"reference://::{web.url}/r.json",
            f"dir::reference://a::{web.url}/r",
        ]
        policy = ReadPolicy(retries=0, urls="any", links="any")
        for root in (None, home / "images", "/", web.url):
            assert outcome(listed(home, *chains, root=root, policy=policy)) == ["refused"] * 3
        (shard,) = find_parquets(embedded_paths(home, "x.parquet", chains), policy=policy)  # type: ignore[arg-type]
        assert outcome(shard) == ["refused"] * 3
        assert [s.members for s in shard.stored_samples({0, 1, 2})] == [(), (), ()]
        assert web.asked == [] and opened == [] and not ran.exists()


def test_a_listing_is_no_list_of_chains(home: Path) -> None:
    """A page that a web server gives for a folder names what it likes."""
    with Web() as evil, Web() as web:
        link = f"reference://a::{evil.url}/r.json/x.tar"
        web.files["/d"] = web.files["/d/"] = f'<a href="{link}">x</a>'.encode()
        for find in (find_shards, find_parquets, find_images):
            with pytest.raises((SourceError, UsageError)) as refused:
                for shard in find(f"{web.url}/d/"):  # type: ignore[operator]
                    samples(shard)
            assert evil.asked == [], refused.value


def test_a_local_name_with_colons_is_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "http::x"
    folder.mkdir()
    (folder / "simplecache::y.jpg").write_bytes(b"y")
    assert outcome(listed(folder, "simplecache::y.jpg")) == [b"y"]
    pq.write_table(pa.table({"a": [1]}), folder / "memory::z.parquet")
    assert Location.of(f"{folder}/memory::z.parquet").schema() == pa.schema([("a", pa.int64())])
    assert filesystem(f"{folder}/memory::z.parquet")[1] == f"{folder}/memory::z.parquet"


# --- options and credentials ---------------------------------------------------------------------

SECRETS = {"client_kwargs": {"headers": {"Authorization": "Bearer hunter2", "X-Api-Key": "hunter2"}}}


def told(web: Web) -> set[str | None]:
    return {headers[name] for _, headers in web.asked for name in ("Authorization", "X-Api-Key", "Cookie", "X-Mine")}


def test_options_go_to_the_lists_own_host_only(home: Path) -> None:
    with Web({"/x.jpg": b"other"}) as other, Web() as web:
        web.files |= {"/l.txt": f"a.jpg\n{web.url}/a.jpg\n{other.url}/x.jpg\n".encode(), "/a.jpg": b"own"}
        (shard,) = find_lines(f"{web.url}/l.txt", storage_options=SECRETS)
        assert outcome(shard) == [b"own", b"own", b"other"]
        assert told(web) == {"Bearer hunter2", "hunter2", None} and told(other) == {None}
        assert sum(headers["X-Api-Key"] == "hunter2" for path, headers in web.asked if path == "/a.jpg") == 2


def test_options_of_a_list_on_disk_go_to_no_host_that_a_line_names(home: Path) -> None:
    with Web({"/x.jpg": b"x"}) as web:
        shard = listed(home, f"{web.url}/x.jpg", storage_options=SECRETS)
        assert outcome(shard) == [b"x"] and told(web) == {None}
        assert f"pass root='{web.url}'" in only_note(shard)
        assert outcome(listed(home, f"{web.url}/x.jpg", root=web.url, storage_options=SECRETS)) == [b"x"]
        assert told(web) == {"Bearer hunter2", "hunter2", None}


@pytest.mark.parametrize(
    "given",
    [
        SECRETS,
        {"headers": {"Authorization": "Bearer hunter2", "X-Mine": "hunter2"}},
        {"client_kwargs": {"cookies": {"session": "hunter2"}}},
        {"cookies": {"session": "hunter2"}},
    ],
    ids=["session", "request", "session-cookies", "request-cookies"],
)
def test_redirects_take_no_credentials_elsewhere(home: Path, given: dict[str, Any]) -> None:
    tar = tar_bytes([("0.jpg", image_bytes(0)), ("1.jpg", image_bytes(1))])
    with Web({"/x": b"x", "/x.tar": tar}) as other, Web() as web:
        web.moved |= {"/a.jpg": f"{other.url}/x", "/0.tar": f"{other.url}/x.tar"}
        assert outcome(listed(home, "a.jpg", root=web.url, storage_options=given)) == [b"x"]
        assert told(web) - {None}
        (shard,) = find_shards(f"{web.url}/0.tar", storage_options=given)
        assert outcome(shard) == [image_bytes(0), image_bytes(1)]
        assert len(other.asked) > 2 and told(other) == {None}


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # aiohttp's word for this way to say it
def test_a_password_given_for_one_host_stays_there(home: Path) -> None:
    import aiohttp

    given = {"client_kwargs": {"auth": aiohttp.BasicAuth("me", "hunter2")}}
    with Web({"/x.jpg": b"x"}) as other, Web({}, {"/a.jpg": f"{other.url}/x.jpg", "/b.jpg": "/a.jpg"}) as web:
        assert outcome(listed(home, "a.jpg", "b.jpg", root=web.url, storage_options=given)) == [b"x", b"x"]
        assert [h["Authorization"] is not None for _, h in web.asked] == [True] * 3 and told(other) == {None}
        root = web.url.replace("://", "://me:hunter2@")
        assert outcome(listed(home, "a.jpg", f"{other.url}/x.jpg", root=root)) == [b"x", "refused"]
        assert told(other) == {None}


def test_fsspecs_own_configuration_is_not_for_hosts_that_rows_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "http", {**SECRETS, "headers": {"X-Mine": "hunter2"}})
    with Web({"/x.jpg": b"x"}) as web:
        assert outcome(listed(home, f"{web.url}/x.jpg")) == [b"x"] and told(web) == {None}


@pytest.mark.parametrize(
    ("root", "given", "message"),
    [
        ("http://127.0.0.1:1", {"heders": {}}, "storage_options has 'heders', .*did you mean 'headers'"),
        ("http://127.0.0.1:1", {"client_kwargs": {"heders": {}}}, "client_kwargs in storage_options has 'heders'"),
        ("s3://bucket", {"endpoint": "x"}, "storage_options has 'endpoint', .*did you mean 'endpoint_url'"),
        ("s3://bucket", {"client_kwargs": {"region": "x"}}, "has 'region', .*did you mean 'region_name'"),
        ("s3://bucket", {"nonsense": 1}, "storage_options has 'nonsense'.* They take: anon, "),
        ("s3://bucket", {"key": "x", "username": "y"}, "either key or username"),
    ],
)
def test_options_that_nobody_takes_are_said(home: Path, root: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        listed(home, "a.jpg", root=root, storage_options=given)


def test_options_of_s3_are_not_for_the_web(home: Path) -> None:
    """The images in a bucket, their list on a web server."""
    given = {**S3Options(region="eu-central-1", endpoint="http://127.0.0.1:1"), "key": "hunter2", "secret": "hunter2"}
    with Web({"/l.txt": b"a.jpg\n"}) as web:
        (shard,) = find_lines(
            f"{web.url}/l.txt", root="s3://bucket", storage_options={**given, "headers": {"X-Mine": "me"}}
        )
        assert shard.keys(id_col="path") == ["a.jpg"]
        assert told(web) == {None, "me"} and "hunter2" not in str([str(headers) for _, headers in web.asked])


# --- from end to end -----------------------------------------------------------------------------


def test_what_is_refused_is_a_row_with_a_reason_and_no_member_of_an_export(
    client: Client, home: Path, wheel_photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    for number, image in enumerate(crops(wheel_photos[0], 3)):
        (home / "images" / f"{number}.jpg").write_bytes(image)
    (home / "secret.jpg").write_bytes(crops(wheel_photos[1], 1)[0])
    lines = ["0.jpg", "../secret.jpg", "1.jpg", "/etc/passwd", "2.jpg", "foo://x"]
    (home / "list.txt").write_text("\n".join(lines))
    dataset = ImageTextPairDataset.from_path_list(home / "list.txt", root=home / "images")
    report = ColourEmbedder()(dataset).save_metadata(progress=False)
    assert (report.embedded, report.failed, report.reasons) == (3, 3, {"refused": 3})
    assert sum("may not open" in note for note in report.notes) == 1
    again = ImageTextPairDataset.from_path_list(home / "list.txt", root=home / "images")
    again.metadata["keep"] = True
    again.to_webdataset(str(home / "export"), "keep", progress=False)
    written = b"".join(path.read_bytes() for path in (home / "export").glob("*.tar"))
    assert (home / "secret.jpg").read_bytes() not in written and b"root:" not in written


def test_keys_that_are_urls_show_no_credentials(
    client: Client, home: Path, wheel_photos: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = crops(wheel_photos[0], 1)
    with Web({"/x.jpg": image, "/bad.jpg": b"<html>"}) as web:
        signed = f"{web.url.replace('://', '://me:hunter2@')}/{{}}?X-Amz-Signature=hunter3"
        lines = [signed.format(name) for name in ("x.jpg", "bad.jpg", "gone.jpg")]
        (home / "list.txt").write_text("\n".join([*lines, "s3://KEY:hunter2/hunter3@bucket/a.jpg"]))
        dataset = ImageTextPairDataset.from_path_list(home / "list.txt", reading=ReadPolicy(retries=0))
        report = ColourEmbedder()(dataset).save_metadata(progress=False)
        assert report.reasons == {"not_an_image": 1, "not_found": 1, "refused": 1}
        with pytest.raises(RunStopped) as stopped:
            ColourEmbedder()(dataset).save_metadata(str(home / "out"), on_error="raise", progress=False)
        shown = [json.dumps(report.to_dict()), str(report), repr(report), str(stopped.value), caplog.text]
        shown += [str(stopped.value.report), json.dumps(stopped.value.report.to_dict())]
        for text in shown:
            assert "hunter2" not in text and "hunter3" not in text
        assert f"{web.url}/bad.jpg" in shown[0] and f"{web.url}/bad.jpg" in shown[3]
        again = ImageTextPairDataset.from_path_list(home / "list.txt")
        assert again.metadata["path"].compute().to_list()[:3] == lines  # what came in stays what it is
        again.metadata["keep"] = again.metadata["image_error"].isnull()
        again.to_webdataset(str(home / "export"), "keep", progress=False)
        assert list(tar_members(home / "export" / "00000.tar")) == ["000000000.jpg"]


def test_the_command_says_how_links_are_followed(
    home: Path, wheel_photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "elsewhere" / "0.jpg").write_bytes(crops(wheel_photos[0], 1)[0])
    (home / "elsewhere" / "1.jpg").write_bytes(crops(wheel_photos[0], 2)[1])
    (home / "photos").mkdir()
    (home / "photos" / "0.jpg").symlink_to(home / "elsewhere" / "0.jpg")
    (home / "photos" / "1.jpg").write_bytes((home / "elsewhere" / "1.jpg").read_bytes())
    command = ["columns", str(home / "photos"), "--properties", "--quiet", "--output"]
    for more, codes in (((), ["refused", None]), (("--links", "any"), [None, None])):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(home / f"out{len(more)}"), *more])
        assert not ended.value.code
        (table,) = (home / f"out{len(more)}").glob("*.parquet")
        assert pq.read_table(table)["image_error"].to_pylist() == codes
        assert ("pass --links any" in capsys.readouterr().out) == (not more)


# --- properties ----------------------------------------------------------------------------------

_PIECES = st.sampled_from(
    ["..", ".", "", "a", "in", "out", "x.jpg", "link", "~", "::", "file://", "http://h", "\0", " "]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(_PIECES, max_size=7), st.booleans(), st.sampled_from(["root", "list", "parquet", "folder"]))
def test_no_name_gets_out_of_a_folder(tmp_path_factory: Any, parts: list[str], absolute: bool, kind: str) -> None:
    base = Path(tmp_path_factory.getbasetemp()) / "gate"
    if not base.exists():
        (base / "in" / "a").mkdir(parents=True)
        (base / "out").mkdir()
        for folder in ("in", "in/a", "out"):
            (base / folder / "x.jpg").write_bytes(folder.encode())
        (base / "in" / "link").symlink_to(base / "out")
        (base / "in" / "a" / "link").symlink_to("..")
    name = ("/" if absolute else "") + "/".join(parts)
    gate = {
        "root": Gate.of_root(f"{base}/in"),
        "list": Gate.of_list(f"{base}/in/list.txt"),
        "parquet": Gate.of_parquet(f"{base}/in/x.parquet"),
        "folder": Gate.of_folder(f"{base}/in"),
    }[kind]
    place = gate.below(name) if kind == "folder" else gate.admit(name)
    if isinstance(place, Place) and place.remote:
        assert kind == "list" and name.startswith("http://h") and place.base is None and "::" not in place.path
        return
    (answer,) = read_many([place])
    assert isinstance(answer, Unread) or answer in (b"in", b"in/a")


_URL_PIECES = st.sampled_from(
    [
        *(
            "http://",
            "https://",
            "HTTP://",
            "s3://",
            "own",
            "own:80",
            "other",
            "me:pw@",
            "@",
            "\\",
            "#",
            "?",
            "/",
            "in",
        ),
        *(
            "/in/",
            "..",
            "/../",
            "%2e%2e",
            "%2f",
            "%5c",
            "::",
            ":",
            "[::1]",
            "[",
            "]",
            "a.jpg",
            "\t",
            " ",
            "\0",
            "//",
            ".",
        ),
        *("%00", "ß", "\u3002"),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(_URL_PIECES, max_size=8).map("".join), st.sampled_from(["root", "list"]))
@example("http://::me:pw@http://", "list")
def test_credentials_go_to_the_users_own_place_as_aiohttp_reads_urls(name: str, kind: str) -> None:
    """Two readers of URLs may see two hosts in one text: what counts is who is connected to."""
    gate = Gate.of_root("http://own/in") if kind == "root" else Gate.of_list("http://own/in/list.txt")
    place = gate.admit(name)
    if isinstance(place, Unread):
        return
    assert place.remote
    try:
        url = URL(place.path)
    except ValueError:  # nothing is sent then
        return
    if place.base is not None:
        assert place.path.startswith(f"{place.base}/") and "::" not in place.path
        assert (url.scheme, url.host, url.port) == ("http", "own", 80)
        above = "/in/" if place.base == "http://own/in" else "/"
        assert url.path.startswith(above) and url.path_safe.startswith(above)
    else:
        assert kind == "list" and url.scheme in ("http", "https") and "::" not in place.path.replace("[::1]", "")


def test_a_gate_forgets_folders(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"x")
    gate = Gate.of_root(str(tmp_path))
    for number in range(KEPT_FOLDERS + 10):
        gate.admit(f"{number}/x.jpg")
    assert list(read_many([gate.admit("x.jpg")])) == [b"x"]
