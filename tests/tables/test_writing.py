"""Writing: whole or not at all, and nothing of somebody else's is lost."""

from __future__ import annotations

import ast
import dataclasses
import errno
import os
import struct
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import curator_embed
from curator_embed.errors import MissingExtra, SourceError
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import Footer
from curator_embed.tables.writing import (
    ROW_GROUP_ROWS,
    NewColumn,
    TablePlan,
    TargetChanged,
    clear_temporaries,
    collect_table,
    replacing,
    takes_no_nulls,
    vectors_to_list_array,
    write_table,
)

NOBODY = np.empty(0, dtype=np.int64)


def plan_for(source: Location, rows: np.ndarray, columns: dict[str, NewColumn]) -> TablePlan:
    return TablePlan(source, None, rows, None, NOBODY, columns, Footer())


def test_existing_columns_keep_values_types_order_and_metadata(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": pa.array(["a", "b", None]),
            "small": pa.array([1, None, 3], pa.int8()),
            "when": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
            "nested": pa.array([{"x": [1, 2]}, None, {"x": []}], pa.struct([("x", pa.list_(pa.int16()))])),
            "kind": pa.array(["u", "v", "u"]).dictionary_encode(),
        }
    ).replace_schema_metadata({b"mine": b"kept"})
    path = tmp_path / "0.parquet"
    pq.write_table(table, path, row_group_size=2)
    location = Location.of(str(path))
    numbers = pa.array([10, 11, 12])
    column = NewColumn(pa.int64(), lambda rows: numbers.take(pa.array(rows)))
    write_table(plan_for(location, np.arange(3), {"new": column}), location, location.token())
    written = pq.read_table(path)
    assert written.drop_columns(["new"]).cast(table.schema).equals(table)
    assert written.schema.names == [*table.schema.names, "new"]
    assert [written.schema.field(n).type for n in table.schema.names] == [f.type for f in table.schema]
    assert written.schema.metadata[b"mine"] == b"kept"
    assert written["new"].to_pylist() == [10, 11, 12]
    assert pq.ParquetFile(path).num_row_groups == 2, "row groups are followed, not rebuilt"


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"old")
    location = Location.of(str(path))
    with pytest.raises(RuntimeError), replacing(location, location.token()) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["0.parquet"]


def test_a_file_changed_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"old")
    location = Location.of(str(path))
    with pytest.raises(TargetChanged, match="changed by someone else"), replacing(location, location.token()) as file:
        file.write(b"new")
        path.write_bytes(b"somebody else's work")
    assert path.read_bytes() == b"somebody else's work"


def test_an_input_that_is_replaced_while_it_is_copied_gives_no_output(tmp_path: Path) -> None:
    path, target = tmp_path / "0.parquet", tmp_path / "1.parquet"
    table = pa.table({"key": ["a", "b"]})
    pq.write_table(table, path)
    source = Location.of(str(path))
    token = source.token()

    def values(rows: np.ndarray) -> pa.Array:
        pq.write_table(table.take([1, 0]), tmp_path / "new")
        os.replace(tmp_path / "new", path)
        return pa.array(rows)

    plan = plan_for(source, np.arange(2), {"n": NewColumn(pa.int64(), values)})
    with pytest.raises(TargetChanged, match=r"0\.parquet: "):
        write_table(plan, Location.of(str(target)), None, source_token=token)
    assert not target.exists()
    assert write_table(plan, Location.of(str(target)), None) == 2


def test_no_parquet_glob_matches_the_temporary_name(tmp_path: Path) -> None:
    location = Location.of(str(tmp_path / "0.parquet"))
    with replacing(location, None) as file:
        file.write(b"x")
        assert list(tmp_path.glob("*.parquet")) == []
        assert len(list(tmp_path.iterdir())) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["0.parquet"]


def test_what_killed_runs_leave_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / "0.parquet.tmp-999999-abcd").write_bytes(b"half")
    (tmp_path / "0.parquet").write_bytes(b"whole")
    (tmp_path / "notes.tmp-1").write_bytes(b"not ours")
    assert clear_temporaries(Location.of(str(tmp_path))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.parquet", "notes.tmp-1"]


def test_a_temporary_that_its_writer_takes_away_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.parquet.tmp-999999-abcd").write_bytes(b"half")
    remove = os.unlink

    def too_late(path: str) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(os, "unlink", too_late)
    assert clear_temporaries(Location.of(str(tmp_path))) == 0


def test_temporaries_of_a_former_run_with_this_process_number_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"0.parquet.tmp-{os.getpid()}-abcd").write_bytes(b"half")
    assert clear_temporaries(Location.of(str(tmp_path))) == 1


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"old")
    path.chmod(0o664)
    before = os.umask(0o077)
    try:
        with replacing(Location.of(str(path)), Location.of(str(path)).token()) as file:
            file.write(b"new")
        with replacing(Location.of(str(tmp_path / "1.parquet")), None) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o664
    assert (tmp_path / "1.parquet").stat().st_mode & 0o777 == 0o600


def test_a_replaced_file_keeps_its_owner_its_group_and_its_attributes(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"old")
    with suppress(PermissionError):  # only root gives files away
        os.chown(path, 1234, -1)
    os.chown(path, -1, 1234 if os.getuid() == 0 else os.getgroups()[-1])
    path.chmod(0o2640)
    # Read, write and execute for: the owner, user 4321, the group, at most, others.
    entries = ((0x01, 6, -1), (0x02, 4, 4321), (0x04, 4, -1), (0x10, 4, -1), (0x20, 0, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    for name, value in (("user.origin", b"a crawl"), ("system.posix_acl_access", acl)):
        with suppress(OSError):  # not every disk has them
            os.setxattr(path, name, value)

    def state() -> tuple[object, ...]:
        found = path.stat()
        attributes = {name: os.getxattr(path, name) for name in os.listxattr(path)}
        return found.st_uid, found.st_gid, oct(found.st_mode), attributes

    before = state()
    with replacing(Location.of(str(path)), Location.of(str(path)).token()) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and state() == before


def test_who_may_not_give_files_away_still_replaces_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_allowed(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    path = tmp_path / "0.parquet"
    path.write_bytes(b"old")
    path.chmod(0o664)
    monkeypatch.setattr("curator_embed.tables.writing.os.fchown", not_allowed)
    with replacing(Location.of(str(path)), Location.of(str(path)).token()) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o664


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.parquet").write_bytes(b"old")
    link = tmp_path / "0.parquet"
    link.symlink_to("real/a.parquet")
    location = Location.of(str(link))
    with replacing(location, location.token()) as file:
        file.write(b"new")
    assert link.is_symlink() and (tmp_path / "real" / "a.parquet").read_bytes() == b"new"
    assert [p.name for p in (tmp_path / "real").iterdir()] == ["a.parquet"]


@pytest.mark.parametrize("selected", [None, ["key", "twice"]])
def test_columns_of_one_name_are_both_kept(tmp_path: Path, selected: list[str] | None) -> None:
    arrays = [pa.array(["a", "b", "c"]), pa.array([1, 2, 3]), pa.array([7, 8, 9]), pa.array(["x", "y", "z"])]
    path, target = Location.of(str(tmp_path / "0.parquet")), Location.of(str(tmp_path / "1.parquet"))
    pq.write_table(pa.Table.from_arrays(arrays, ["key", "twice", "other", "twice"]), path.path)
    new = NewColumn(pa.int64(), lambda rows: pa.array(rows))
    plan = TablePlan(path, None, np.array([0, 2]), None, NOBODY, {"new": new}, Footer(), selected)
    write_table(plan, target, None)
    written = pq.ParquetFile(target.path).read()
    names = ["key", "twice", "other", "twice", "new"] if selected is None else ["key", "twice", "twice", "new"]
    assert written.column_names == names
    first, second = (written.column(n).to_pylist() for n in written.schema.get_all_field_indices("twice"))
    assert (first, second) == ([1, 3], ["x", "z"])


def test_a_large_row_group_asks_for_its_new_values_piece_by_piece(tmp_path: Path) -> None:
    count = 2 * ROW_GROUP_ROWS + 5
    location = Location.of(str(tmp_path / "0.parquet"))
    pq.write_table(pa.table({"n": np.arange(count)}), location.path)
    asked = []

    def values(rows: np.ndarray) -> pa.Array:
        asked.append(len(rows))
        return vectors_to_list_array(rows[:, None].astype(np.float32), rows >= 0, pa.float32())

    column = NewColumn(pa.list_(pa.float32()), values)
    write_table(plan_for(location, np.arange(count), {"v": column}), location, location.token())
    assert asked == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 5]
    written = pq.ParquetFile(location.path)
    assert written.num_row_groups == 1
    assert written.read()["v"].combine_chunks().flatten().to_pylist() == list(range(count))


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("curator_embed.tables.writing.os.fsync", full)
    location = Location.of(str(tmp_path / "0.parquet"))
    said = pytest.raises(SourceError, match=r"0\.parquet: the disk is full.*run the same command again")
    with said, replacing(location, None) as file:
        file.write(b"x")
    assert list(tmp_path.iterdir()) == []


def test_where_files_are_collected_for_an_object_store_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    location = Location.of("memory://bucket/0.parquet")
    said = pytest.raises(SourceError, match=rf"0\.parquet: the disk of {tempfile.gettempdir()}.*TMPDIR")
    with said, replacing(location, None):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert location.token() is None


def test_nobody_else_writes_parquet() -> None:
    """``write_table`` is the one writer; the demo makes its own input."""
    package = Path(curator_embed.__file__).parent
    ours = {"tables/writing.py", "tables/splicing.py", "cli/demo_data.py"}

    def writes(path: Path) -> bool:
        return any(
            (isinstance(node, ast.Attribute) and node.attr in ("ParquetWriter", "to_parquet", "write_to_dataset"))
            or (isinstance(node, ast.Name) and node.id == "ParquetWriter")
            or (isinstance(node, ast.Attribute) and node.attr == "write_table" and ast.unparse(node.value) == "pq")
            for node in ast.walk(ast.parse(path.read_text()))
        )

    found = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if writes(path)}
    assert found == ours


MEMORY = """
import sys
import numpy as np, pyarrow as pa
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import Footer
from curator_embed.tables.writing import NewColumn, TablePlan, write_table

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

def add(path, count):
    column = NewColumn(pa.int64(), lambda rows: pa.array(rows))
    location = Location.of(path)
    plan = TablePlan(location, None, np.arange(count), None, np.empty(0, np.int64), {"n": column}, Footer())
    write_table(plan, location, location.token())

add(sys.argv[1], 1)
before = peak()
add(sys.argv[2], int(sys.argv[3]))
print(peak() - before)
"""


def test_images_in_a_large_row_group_pass_through_little_memory(tmp_path: Path) -> None:
    one, many = tmp_path / "0.parquet", tmp_path / "1.parquet"
    images = np.random.default_rng(0)
    pq.write_table(pa.table({"key": ["a"], "image": [b"x"]}), one)
    keys = [str(n) for n in range(1000)]
    pq.write_table(pa.table({"key": keys, "image": [images.bytes(100_000) for _ in keys]}), many)
    assert pq.read_metadata(many).num_row_groups == 1
    command = [sys.executable, "-c", MEMORY, str(one), str(many), "1000"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 30, "MB more for 100 MB of images"


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(SourceError, match=r"0\.parquet: not a readable parquet file"):
        Location.of(str(path)).schema()


def test_a_damaged_footer_or_page_names_the_file_and_other_errors_do_not(tmp_path: Path) -> None:
    path, damaged = tmp_path / "0.parquet", tmp_path / "1.parquet"
    pq.write_table(pa.table({"key": ["a" * 99] * 99, "n": range(99)}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    damaged.write_bytes(whole[: -8 - length] + b"\xff" * length + whole[-8:])
    with pytest.raises(SourceError, match=r"1\.parquet: not a readable parquet file"):
        Location.of(str(damaged)).schema()
    damaged.write_bytes(whole[:4] + b"\xff" * 60 + whole[64:])
    said = pytest.raises(SourceError, match=r"1\.parquet: not a readable parquet file")
    with Location.of(str(damaged)).open_parquet() as parquet, said:
        parquet.read()
    with Location.of(str(damaged)).open_parquet() as parquet, said:
        parquet.read_row_group(0)
    with pytest.raises(pa.ArrowInvalid), Location.of(str(path)).open_parquet():
        pa.array([2**40], pa.int64()).cast(pa.int8())
    with pytest.raises(FileNotFoundError), Location.of(str(tmp_path / "2.parquet")).open_parquet():
        pass


def test_object_stores_get_one_put(tmp_path: Path) -> None:
    import fsspec

    memory: Any = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/0.parquet", b"old")
    location = Location.of("memory://bucket/0.parquet")
    with pytest.raises(RuntimeError), replacing(location, location.token()) as file:
        file.write(b"half")
        raise RuntimeError
    assert memory.cat_file("/bucket/0.parquet") == b"old"
    with replacing(location, location.token()) as file:
        file.write(b"new")
    assert memory.cat_file("/bucket/0.parquet") == b"new"
    memory.rm("/bucket", recursive=True)


def test_vectors_become_plain_lists_with_nulls() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    column = vectors_to_list_array(vectors, np.array([True, False, True]), pa.float32())
    assert column.type == pa.list_(pa.float32())
    assert column.to_pylist() == [[0.0, 1.0], None, [4.0, 5.0]]
    none = vectors_to_list_array(np.zeros((2, 0), np.float32), np.array([False, False]), pa.float32())
    assert none.to_pylist() == [None, None]


def test_an_output_that_needs_an_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(MissingExtra, match=r"curator-embed\[gcs\]"):
        Location.of("gs://bucket/out")


# -- what a small fault would change --------------------------------------------------------


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_points_at_which_runs_are_killed_in_tests(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    monkeypatch.setattr("curator_embed.tables.writing.failpoint", passed.append)
    location = Location.of(str(tmp_path / "0.parquet") if where == "local" else "memory://points/0.parquet")
    with replacing(location, None) as file:
        assert passed == ["output.temporary_opened"]
        file.write(b"new")
    assert passed == ["output.temporary_opened", "output.temporary_written", "output.replaced"]


def test_all_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with replacing(Location.of(str(tmp_path / "0.parquet")), None) as file:
        file.write(b"new")
    assert synced == [3]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_version_that_nobody_read_is_replaced_where_that_is_asked_for(
    where: str, check: bool, tmp_path: Path
) -> None:
    location = Location.of(str(tmp_path / "0.parquet") if where == "local" else f"memory://unread-{check}/0.parquet")
    location.fs.pipe_file(location.path, b"somebody else's work")
    if check:
        with pytest.raises(TargetChanged), replacing(location, None) as file:
            file.write(b"new")
    else:
        with replacing(location, None, check=False) as file:
            file.write(b"new")
    assert location.fs.cat_file(location.path) == (b"somebody else's work" if check else b"new")


def test_what_is_collected_for_an_object_store_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with replacing(Location.of("memory://named/0.parquet"), None):
        assert [path.name.startswith("curator-embed-") for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize(("number", "says"), [
    (errno.ENOSPC, "the disk is full; nothing of this file was left behind"), (errno.EDQUOT, "the disk is full"),
    (errno.EACCES, "its folder cannot be written to"), (errno.EPERM, "its folder cannot be written to"),
    (errno.EROFS, "its folder cannot be written to"), (errno.EIO, None),
])  # fmt: skip
@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_the_system_says_is_told_with_a_remedy(where: str, number: int, says: str | None, tmp_path: Path) -> None:
    location = Location.of(str(tmp_path / "0.parquet") if where == "local" else "memory://said/0.parquet")
    if where == "memory":  # where it is collected may be full; what the store says is the store's
        folder = f"the disk of {tempfile.gettempdir()}, where it is collected, is full"
        says = folder if says and says.startswith("the disk") else None
    with pytest.raises(SourceError if says else OSError) as caught, replacing(location, None):
        raise OSError(number, "words")
    assert caught.value.args[0] == number if says is None else says in str(caught.value)
    if says and "disk" in says:
        assert str(caught.value).endswith("(TMPDIR names another folder)") is (where == "memory")
        assert "run the same command again: finished shards are kept" in str(caught.value)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(Location.of(str(tmp_path / "0.parquet")), None):
        raise ZeroDivisionError


def test_only_what_is_ours_is_cleared(tmp_path: Path) -> None:
    ours = ["a.parquet.tmp-12-ab", "b.tar.tmp-3-cd", "c.parquet.tmp-4"]
    others = ["a.parquet", "a.parquet.tmp-x1-ab", "a.txt.tmp-12-ab", "a.parquet.tmp-", "tmp-12-ab", "a.parquet.12-ab"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.parquet.tmp-5-ef").mkdir()
    (tmp_path / "e.parquet.tmp-6-gh").symlink_to("a.parquet")
    kept = [*others, "d.parquet.tmp-5-ef", "e.parquet.tmp-6-gh"]
    folder = Location.of(str(tmp_path))
    assert clear_temporaries(folder, {"b", "z"}) == 1
    assert not (tmp_path / "b.tar.tmp-3-cd").exists() and (tmp_path / "a.parquet.tmp-12-ab").exists()
    assert clear_temporaries(folder) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert clear_temporaries(Location.of(str(tmp_path / "nowhere"))) == 0
    assert clear_temporaries(Location.of("memory://temporaries")) == 0


def test_which_column_must_have_a_value() -> None:
    fields = [pa.field("key", pa.string(), nullable=False), pa.field("a", pa.int8()), pa.field("b", pa.int8(), False)]
    assert takes_no_nulls(pa.schema(fields), "key") == "b"
    assert takes_no_nulls(pa.schema(fields), "key", ["key", "a"]) == ""
    assert takes_no_nulls(pa.schema(fields), "b") == "key"
    fixed = pa.list_(pa.float32(), 2)
    for kind, refused in (
        (fixed, False), (pa.struct([("x", pa.int8())]), False), (pa.struct([("x", fixed)]), True),
        (pa.struct([("y", pa.int8()), ("x", pa.struct([("z", fixed)]))]), True),
    ):  # fmt: skip
        assert takes_no_nulls(pa.schema([("key", pa.string()), ("s", kind)]), "key") == ("s" if refused else "")


@pytest.mark.parametrize("source", ["file", "memory"])
@pytest.mark.parametrize("selected", [None, ["key", "b"]])
def test_a_table_in_memory_is_what_would_be_written(source: str, selected: list[str] | None, tmp_path: Path) -> None:
    """Row groups of which nothing is kept, some, and all; rows behind; a column anew and a new one."""
    table = pa.table({"key": list("abcdef"), "a": range(6), "b": [1.5] * 6}).replace_schema_metadata({"mine": "kept"})
    path, target = Location.of(str(tmp_path / "in.parquet")), Location.of(str(tmp_path / "new" / "out.parquet"))
    pq.write_table(table, path.path, row_group_size=2)
    behind = pa.table({"key": ["z"], "a": pa.nulls(1, pa.int64()), "b": pa.nulls(1, pa.float64())})
    values = pa.array([10, 11, 12, 13, 14, 15, 99])
    anew = NewColumn(pa.int64(), lambda rows: values.take(pa.array(rows)))
    plan = TablePlan(
        path if source == "file" else None, None if source == "file" else table, np.array([2, 3, 5]), behind,
        np.array([6]), {"b": anew, "c": anew}, Footer(id_col="key"), selected,
    )  # fmt: skip
    if source == "file" and selected is not None:
        plan = dataclasses.replace(plan, appended=behind.select(selected))
    assert write_table(plan, target, None) == 4
    written, collected = pq.ParquetFile(target.path).read(), collect_table(plan)
    assert collected.schema.equals(written.schema, check_metadata=True) and collected.equals(written)
    assert collected.schema.metadata[b"mine"] == b"kept" and Footer.of(collected.schema) == Footer(id_col="key")
    wanted = {"key": list("cdfz"), "a": [2, 3, 5, None], "b": [12, 13, 15, 99], "c": [12, 13, 15, 99]}
    names = ["key", "b", "c"] if selected else ["key", "a", "b", "c"]
    assert collected.to_pydict() == {name: wanted[name] for name in names}


def test_a_shard_without_a_table_of_its_own_is_written_in_row_groups(tmp_path: Path) -> None:
    count = ROW_GROUP_ROWS + 3
    target = Location.of(str(tmp_path / "0.parquet"))
    plan = TablePlan(None, pa.table({"n": range(count)}), np.arange(count), None, NOBODY, {}, Footer())
    assert write_table(plan, target, None) == count
    assert [pq.ParquetFile(target.path).metadata.row_group(n).num_rows for n in range(2)] == [ROW_GROUP_ROWS, 3]
    empty = TablePlan(None, None, NOBODY, None, NOBODY, {}, Footer())
    assert collect_table(empty).num_rows == 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    plan = TablePlan(None, pa.table({"n": [1]}), np.arange(1), None, NOBODY, {}, Footer())
    with pytest.raises(OSError, match="file"):
        write_table(plan, Location.of(str(tmp_path / "file" / "0.parquet")), None)
