"""Reading shards: what comes out of a tar, in which order, and what bad input leads to."""

from __future__ import annotations

import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curator_embed.errors import Reason, SourceError
from curator_embed.sources.extras import MAX_COLUMNS, load_json
from curator_embed.sources.shard import Sample
from curator_embed.sources.webdataset import WebdatasetShard
from tests.written_tars import as_json, image_bytes, tar_bytes

MakeTar = Callable[..., str]
A, B, C = image_bytes(1), image_bytes(2, "PNG"), image_bytes(3)


def read(path: str, id_col: str = "key", *, extras: bool = False, **options: Any) -> tuple[list[Sample], list[str]]:
    shard = WebdatasetShard("00000", path, id_col=id_col, **options)
    samples = list(shard.samples(id_col=id_col, extras=extras))
    notes = [note.message for note in shard.notes()]
    assert shard.keys(id_col=id_col) == [sample.key for sample in samples]
    return samples, notes


def pairs(samples: list[Sample]) -> list[tuple[str, bytes | None]]:
    return [(sample.key, sample.image) for sample in samples]


# --- the image of a sample -----------------------------------------------------------------------


def test_image_is_what_its_bytes_are(make_tar: MakeTar) -> None:
    samples, notes = read(make_tar([("0.txt", b"BMW"), ("0.dat", A), ("1.jpg", B), ("2", C), ("3.PNG", A)]))
    assert pairs(samples) == [("0", A), ("1", B), ("2", C), ("3", A)]
    assert notes == []


def test_first_image_by_signature_beats_an_extension_that_lies(make_tar: MakeTar) -> None:
    samples, notes = read(make_tar([("0.jpg", b"<html>gone</html>"), ("0.bin", A), ("0.png", B), ("1.jpg", C)]))
    assert pairs(samples) == [("0", A), ("1", C)]
    assert len(notes) == 1
    assert notes[0].startswith("1 further image")


def test_bad_images_are_handed_on_for_the_decoder_to_judge(make_tar: MakeTar) -> None:
    members = [("0.jpg", b""), ("1.jpg", b"<html>"), ("1.png", b"x"), ("2.txt", b"no image"), ("3.jpeg", b"\0" * 5000)]
    samples, _ = read(make_tar(members))
    assert pairs(samples) == [("0", b""), ("1", b"<html>"), ("3", b"\0" * 5000), ("2", None)]
    assert all(sample.error is None for sample in samples)


def test_any_order_within_a_sample(make_tar: MakeTar) -> None:
    info = as_json(uid=7)
    for number, names in enumerate((("jpg", "txt", "json"), ("json", "txt", "jpg"), ("txt", "jpg", "json"))):
        data = {"jpg": A, "txt": b"caption", "json": info}
        samples, notes = read(make_tar([(f"0.{n}", data[n]) for n in names], f"{number}.tar"), "uid", extras=True)
        assert samples == [Sample("7", A, extras={"txt": "caption", "json": {"uid": 7}})]
        assert list(samples[0].extras) == [n for n in names if n != "jpg"]
        assert notes == []


@pytest.mark.parametrize("first", ["jpg", "txt"])
def test_members_that_do_not_stand_together(make_tar: MakeTar, first: str) -> None:
    order = ["jpg", "txt"] if first == "jpg" else ["txt", "jpg"]
    data = {"jpg": [A, B, C], "txt": [b"a", b"b", b"c"]}
    path = make_tar([(f"{i}.{kind}", data[kind][i]) for kind in order for i in range(3)])
    samples, notes = read(path, extras=True)
    assert pairs(samples) == [("0", A), ("1", B), ("2", C)]
    assert [sample.extras for sample in samples] == [{"txt": "a"}, {"txt": "b"}, {"txt": "c"}]
    assert notes == []
    stored = list(WebdatasetShard("0", path).stored_samples([0, 2]))
    assert [(s.ordinal, dict(s.members)) for s in stored] == [
        (0, {"jpg": A, "txt": b"a"}),
        (2, {"jpg": C, "txt": b"c"}),
    ]


def test_keys_of_every_kind(make_tar: MakeTar) -> None:
    keys = ["a/b/001", "with blank", "ünï/漢字", "x" * 180, "-dash", "100%"]
    samples, _ = read(make_tar([(f"./{key}.jpg", A) for key in keys]))
    assert [sample.key for sample in samples] == keys


def test_keys_with_dots_are_split_where_the_ids_say(make_tar: MakeTar, tmp_path: Path) -> None:
    path = make_tar([("img.1.jpg", A), ("img.1.txt", b"x"), ("img.2.jpg", B)])
    assert pairs(read(path)[0]) == [("img", A)]
    assert "key_split='last'" in read(path)[1][0]
    assert pairs(read(path, key_split="last")[0]) == [("img.1", A), ("img.2", B)]
    table = str(tmp_path / "00000.parquet")
    for ids, expected in ((["img.1", "img.2"], ["img.1", "img.2"]), (["img", "a.b/c"], ["img"]), ([1, 2], ["img"])):
        for column in (pa.array(ids), pa.array(ids).dictionary_encode()):
            pq.write_table(pa.table({"key": column}), table)
            assert [s.key for s in read(path, table=table)[0]] == expected
    assert [s.key for s in read(path, table=table, key_split="last")[0]] == ["img.1", "img.2"]
    Path(table).write_bytes(b"no parquet")
    assert [s.key for s in read(path, table=table)[0]] == ["img"]


def test_repeated_keys_come_in_order(make_tar: MakeTar) -> None:
    assert pairs(read(make_tar([("0.jpg", A), ("1.jpg", C), ("0.jpg", B)]))[0]) == [("0", A), ("1", C), ("0", B)]
    # One without an image must not be overtaken by its namesake: the k-th row is the k-th sample's.
    assert pairs(read(make_tar([("0.txt", b""), ("1.jpg", C), ("0.txt", b""), ("0.jpg", B)]))[0]) == [
        ("1", C),
        ("0", None),
        ("0", B),
    ]
    members = [("0.json", as_json(uid="u")), ("1.json", as_json(uid="u")), ("1.jpg", B)]
    assert pairs(read(make_tar(members), "uid")[0]) == [("u", None), ("u", B)]


# --- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "key"),
    [("text", "text"), (2**63 + 1, str(2**63 + 1)), (7, "7"), (3.0, "3"), (0.5, "0.5"), (None, "0"), (True, "True"),
     ([1, "a"], '[1, "a"]'), ("\ud800x", "?x")],
)  # fmt: skip
def test_id_from_json(make_tar: MakeTar, value: Any, key: str) -> None:
    path = make_tar([("0.jpg", A), ("0.json", as_json(uid=value))])
    assert pairs(read(path, "uid")[0]) == [(key, A)]
    assert pairs(read(path)[0]) == [("0", A)]


def test_id_falls_back_to_the_key(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A), ("1.jpg", A), ("1.json", b"{broken"), ("2.jpg", A), ("2.json", b"[1]")])
    samples, notes = read(path, "uid")
    assert [sample.key for sample in samples] == ["0", "1", "2"]
    assert notes == ["1 json members cannot be read and count as null"]


def test_id_in_a_json_far_from_its_image_is_told(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A), ("1.jpg", B), ("0.json", as_json(uid=7)), ("1.json", as_json(uid=8))])
    samples, notes = read(path, "uid")
    assert [sample.key for sample in samples] == ["0", "1"]
    assert notes[0].startswith("2 samples have their 'uid' in a json")
    path = make_tar([("0.json", as_json(uid=7)), ("1.json", as_json(uid=8)), ("0.jpg", A), ("1.jpg", B)])
    assert pairs(read(path, "uid")[0]) == [("7", A), ("8", B)]


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("id_col", ["key", "uid"])
def test_truncation_costs_the_cut_sample_alone(tmp_path: Path, fmt: int, id_col: str) -> None:
    members: list[tuple[str, bytes]] = []
    for i in range(3):
        members += [(f"{i}.json", as_json(uid=f"u{i}")), (f"{i}.jpg", image_bytes(i) + b"\0" * 300), (f"{i}.txt", b"c")]
    whole = tar_bytes(members, fmt)
    with tarfile.open(fileobj=__import__("io").BytesIO(whole)) as archive:
        images = {m.name[0]: (m.offset, m.offset_data, m.offset_data + m.size) for m in archive if m.name[2:] == "jpg"}
    path = tmp_path / "cut.tar"
    for cut in range(512, len(whole), 97):
        path.write_bytes(whole[:cut])
        samples, notes = read(str(path), id_col, extras=True)
        for i, (header_at, data_at, end) in images.items():
            key = i if id_col == "key" else f"u{i}"
            found = [sample for sample in samples if sample.key == key]
            if cut >= end:
                assert [(s.image, s.error) for s in found] == [(image_bytes(int(i)) + b"\0" * 300, None)]
            elif cut > data_at or header_at < cut < data_at:
                assert [(s.image, s.error) for s in found] == [(None, Reason.TRUNCATED)], cut
                assert found[0].detail
                assert any(f"byte {cut}" in note or f"of {cut}" in note for note in notes)
            else:
                assert all(s.image is None for s in found)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_anywhere_has_a_documented_outcome(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(
        tar_bytes([(f"{i}.{e}", A if e == "jpg" else b'{"uid": 1}') for i in range(3) for e in ("jpg", "json")])
    )
    for _ in range(data.draw(st.integers(0, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.tar"
    path.write_bytes(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    try:
        samples, _ = read(str(path), data.draw(st.sampled_from(["key", "uid"])), extras=True)
    except SourceError as exc:
        assert "not a tar" in str(exc) or "compressed" in str(exc)
    else:
        assert len(samples) <= 6
        assert all(s.error in (None, Reason.TRUNCATED) for s in samples)


def test_what_is_no_tar_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    for content in (b"", b"<html>not found</html>" * 50, b"\x1f\x8b" + b"x" * 600):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"00000\.tar: "):
            read(str(path))
    path.unlink()
    with pytest.raises(SourceError, match="does not exist"):
        read(str(path))
    path.mkdir()
    with pytest.raises(SourceError, match="IsADirectory"):
        read(str(path))


def test_an_empty_tar_has_no_samples(make_tar: MakeTar) -> None:
    assert read(make_tar([])) == ([], [])


def test_a_tar_that_shrinks_while_it_is_read(make_tar: MakeTar) -> None:
    path = make_tar([(f"{i}.jpg", A) for i in range(10)])
    samples = WebdatasetShard("0", path).samples(id_col="key")
    next(samples)
    with open(path, "r+b") as file:
        file.truncate(3000)
    with pytest.raises(SourceError, match="ends at byte 3000, earlier than when it was opened"):
        list(samples)


def test_links_are_told(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A)])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    samples, notes = read(path)
    assert [sample.key for sample in samples] == ["0"]
    assert notes == ["1 x symbolic link: not a regular file, ignored"]


def test_memory_is_that_of_one_sample(tmp_path: Path) -> None:
    big = A + bytes(2 << 20)
    path = tmp_path / "big.tar"
    path.write_bytes(
        tar_bytes([(f"{i}.{e}", big if e == "jpg" else b"{}") for i in range(24) for e in ("jpg", "json")])
    )
    shard = WebdatasetShard("0", str(path))
    tracemalloc.start()
    try:
        assert sum(1 for _ in shard.samples(id_col="uid", extras=True)) == 24
        assert tracemalloc.get_traced_memory()[1] < 4 * len(big)
    finally:
        tracemalloc.stop()


# --- the rest of the contract --------------------------------------------------------------------


def test_without_a_tar(tmp_path: Path) -> None:
    table = str(tmp_path / "0.parquet")
    pq.write_table(pa.table({"key": ["a", "b"]}), table)
    shard = WebdatasetShard("0", None, table)
    assert list(shard.samples(id_col="key")) == []
    assert list(shard.stored_samples([0])) == []
    assert shard.keys(id_col="key") == []
    assert shard.fingerprint() == {"size": None, "mtime_ns": None}
    assert (shard.image_source(), shard.table_path(), shard.row_estimate()) == (None, table, 2)


def test_shards_are_small_picklable_and_keep_secrets(make_tar: MakeTar) -> None:
    shard = WebdatasetShard("0", make_tar([("0.jpg", A)]), storage_options={"secret": "hush"})
    again = pickle.loads(pickle.dumps(shard))
    assert list(again.samples(id_col="key")) == list(shard.samples(id_col="key"))
    assert len(pickle.dumps(shard)) < 1000
    assert "hush" not in repr(shard)
    other = shard.with_table("x.parquet")
    assert (other.table_path(), shard.table_path(), other.image_source()) == ("x.parquet", None, shard.image_source())


def test_fingerprint_follows_the_tar(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A)])
    shard = WebdatasetShard("0", path)
    before = shard.fingerprint()
    assert before == shard.with_table("x").fingerprint()
    assert set(before) == {"size", "mtime_ns"}
    make_tar([("0.jpg", A), ("1.jpg", A)] * 20)
    assert shard.fingerprint() != before
    assert WebdatasetShard("0", path, key_split="last").fingerprint() == shard.fingerprint(), "the tar is the same"


def test_pairing_says_whatever_changes_which_row_gets_which_image(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A)])
    assert WebdatasetShard("0", path).pairing("key") == {"id_col": "key"}
    assert WebdatasetShard("0", path).pairing("uid") == {"id_col": "uid"}
    assert WebdatasetShard("0", path, key_split="last").pairing("key") == {"id_col": "key", "key_split": "last"}
    assert WebdatasetShard("0", None, "0.parquet", use_index=True).pairing("key") == {"id_col": "key"}


def test_stored_samples_are_byte_for_byte(make_tar: MakeTar) -> None:
    members = [("0.JPG", A), ("0.txt", b"\xff\x00"), ("1.cls", b"3"), ("2.seg.png", B), ("2.jpg", C)]
    shard = WebdatasetShard("0", make_tar(members))
    order = [sample.key for sample in shard.samples(id_col="key")]
    assert order == ["0", "2", "1"]
    stored = {order[s.ordinal]: s.members for s in shard.stored_samples({0, 1, 2})}
    assert stored == {"0": (("JPG", A), ("txt", b"\xff\x00")), "2": (("seg.png", B), ("jpg", C)), "1": (("cls", b"3"),)}


def test_real_tars(clip_tars: list[Path], clip_images: dict[str, bytes]) -> None:
    for path in clip_tars:
        samples, notes = read(str(path))
        assert samples
        assert notes == []
        assert all(clip_images[sample.key] == sample.image for sample in samples)


# --- tables from extras --------------------------------------------------------------------------


def table(path: str, id_col: str = "key") -> pa.Table:
    shard = WebdatasetShard("0", path, id_col=id_col)
    return shard.table_from_extras(list(shard.samples(id_col=id_col, extras=True)))


def test_table_from_extras(make_tar: MakeTar) -> None:
    path = make_tar(
        [
            ("0.jpg", A),
            ("0.txt", b"from txt"),
            ("0.json", as_json(key="0", uid=5, width=8, nested={"a": [1]}, mixed=1, caption="from json")),
            ("1.jpg", A),
            ("1.txt", "\ufeffcaf\u00e9 ".encode() + b"\xff"),
            ("1.json", as_json(uid=6, mixed="x", empty={}, big=2**70, half="\ud800")),
            ("2.jpg", A),
            ("2.json", b"{'not': json}"),
        ]
    )
    found = table(path)
    assert found.column_names == ["key", "caption", "uid", "width", "nested", "mixed", "empty", "big", "half"]
    assert found.column("key").to_pylist() == ["0", "1", "2"]
    assert found.column("caption").to_pylist() == ["from json", "café \ufffd", None]
    assert found.column("width").to_pylist() == [8, None, None]
    assert found.column("nested").to_pylist() == [{"a": [1]}, None, None]
    assert found.column("mixed").to_pylist() == ["1", "x", None]
    assert found.column("empty").to_pylist() == [None, "{}", None]
    assert found.column("big").to_pylist() == [None, str(2**70), None]
    assert found.column("half").to_pylist() == [None, "?", None]
    pq.write_table(found, path + ".parquet")
    assert pq.read_table(path + ".parquet").equals(found)


def test_table_by_another_id(make_tar: MakeTar) -> None:
    path = make_tar([("0.jpg", A), ("0.json", as_json(uid=2**60 + 1)), ("1.jpg", B), ("1.json", as_json(uid=3))])
    found = table(path, "uid")
    assert found.column_names == ["uid", "caption"]
    assert found.column("uid").to_pylist() == [2**60 + 1, 3]
    path = make_tar([("0.jpg", A), ("0.json", as_json(uid=1)), ("1.jpg", B)])
    assert table(path, "uid").column("uid").to_pylist() == ["1", "1"]


def test_table_of_images_alone(make_tar: MakeTar) -> None:
    found = table(make_tar([("0.jpg", A), ("1.jpg", B)]))
    assert found.to_pydict() == {"key": ["0", "1"], "caption": [None, None]}
    assert found.schema.field("caption").type == pa.string()
    assert table(make_tar([])).num_rows == 0


def test_hostile_json_crashes_nothing(make_tar: MakeTar, tmp_path: Path) -> None:
    deep = b"[" * 5000 + b"]" * 5000
    nested = b'{"a":' * 40 + b"1" + b"}" * 40
    digits = b'{"n": ' + b"9" * 5000 + b"}"
    wide = [(f"{i}.json", as_json(**{f"f{i}-{j}": j for j in range(60)})) for i in range(40, 60)]
    bad = [("0.json", deep), ("1.json", nested), ("2.json", digits), ("3.json", b"\xff\xfe"), ("4.json", b"null"),
           ("5.json", b'{"a": NaN, "a": [1, "x", {}], "": 1}')]  # fmt: skip
    shard = WebdatasetShard("0", make_tar([*bad, *wide]))
    samples = list(shard.samples(id_col="key", extras=True))
    found = shard.table_from_extras(samples)
    assert len(samples) == found.num_rows == 26
    assert found.num_columns == MAX_COLUMNS + 2
    assert any("json fields are left out" in note.message for note in shard.notes())
    assert any(note.message.startswith("4 json members cannot be read") for note in shard.notes())
    pq.write_table(found, tmp_path / "out.parquet")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "uid", "caption"]), json_values), max_size=5))
def test_any_json_makes_a_table_parquet_can_hold(objects: list[dict[str, Any]]) -> None:
    samples = []
    for i, fields in enumerate(objects):
        value = load_json(as_json(**fields))
        samples.append(Sample(str(i), None, extras={"json": value}))
    found = WebdatasetShard("0", "0.tar", id_col="uid").table_from_extras(samples)
    assert found.num_rows == len(objects)
    sink = pa.BufferOutputStream()
    pq.write_table(found, sink)
    assert pq.read_table(pa.BufferReader(sink.getvalue())).num_rows == len(objects)
