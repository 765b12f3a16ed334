"""What a footer says, in this version's form and in that of 0.1.0, and what is made of damaged ones."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa
import pytest

from curator_embed.steps import Step
from curator_embed.tables.provenance import (
    ASSIGNED,
    ERROR_COLUMN,
    ERROR_RECIPE,
    FOOTER_KEY,
    FORMAT,
    Entry,
    Footer,
    counted,
    recorded_settings,
)

ENTRY = Entry({"step": "embed", "model": "a"}, {"size": 10, "mtime_ns": 5}, {"id_col": "key"}, "abc", 192)


class Made(Step):
    """A step known by its recipe."""

    def __init__(self, column: str = "image_embedding", **recipe: Any) -> None:
        self.column, self._recipe = column, {"step": "embedder", "model": "a", "threads": 2, "compile": False} | recipe

    def columns(self) -> dict[str, pa.DataType]:
        return {self.column: pa.list_(pa.float32())}

    def recipe(self) -> dict[str, Any]:
        return self._recipe


def schema(value: Any) -> pa.Schema:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return pa.schema([pa.field("key", pa.string())], metadata={FOOTER_KEY: raw})


def test_every_field_comes_back() -> None:
    footer = Footer(
        {"image_embedding": ENTRY, "image_error": Entry()},
        {"read": 3, "embedded": 1, "failed": 1, "no_image": 1, "reasons": {"empty": 1}},
        {"on_error": "drop"},
        "uid",
        {"rows": 4, "size": 9, "ids": "x"},
        2,
        {"failed": 1, "no_image": 0, "reasons": {"truncated": 1}},
    )
    assert Footer.of(schema(footer.to_bytes())) == footer
    assert json.loads(footer.to_bytes())["format"] == FORMAT == 2


def test_marks_of_images_are_stored_once_for_all_columns() -> None:
    one, other = ({"files": digest, "marks": digest * 99} for digest in ("abc", "xyz"))
    samples = {"a": one, "b": other, "c": one, "d": {"size": 1}}
    footer = Footer({name: Entry({}, made, {"id_col": "path"}) for name, made in samples.items()})
    stored = footer.to_bytes()
    assert stored.count(b"abc" * 99) == stored.count(b"xyz" * 99) == 1
    assert Footer.of(schema(stored)) == footer


def test_footers_do_not_depend_on_the_order_of_keys() -> None:
    one, other = Entry({"x": 1, "y": 2}), Entry({"y": 2, "x": 1})
    assert Footer({"a": one}).to_bytes() == Footer({"a": other}).to_bytes()
    assert one.digest == other.digest


def test_text_that_no_utf8_can_hold_is_stored_escaped() -> None:
    footer = Footer({"a": Entry({"root": "caf\udce9"})})
    assert Footer.of(schema(footer.to_bytes())) == footer


@pytest.mark.parametrize("raw", [
    b"", b"[]", b"{}", b"not json", b'{"format": 99, "columns": {}}', b'{"format": 3, "columns": {}}', b"[" * 100_000,
    b'{"format": 2, "columns": ' + b"9" * 5000 + b"}", b"\xff\xfe",
])  # fmt: skip
def test_a_footer_that_cannot_be_read_counts_as_none(raw: bytes) -> None:
    assert Footer.of(schema(raw)) == Footer()


GOOD: dict[str, Any] = {"format": 2, "id_col": "key", "columns": {"a": {"recipe": {}, "samples": {}}}, "counts": {}}


@pytest.mark.parametrize("wrong", [
    {"columns": []}, {"columns": None}, {"columns": "a"}, {"columns": {"a": None}}, {"columns": {"a": []}},
    {"columns": {"a": {"recipe": []}}}, {"columns": {"a": {"samples": 1}}}, {"columns": {"a": {"samples": {"ids": 1}}}},
    {"columns": {"a": {"pairing": "key"}}}, {"columns": {"a": {"dimension": "3"}}},
    {"columns": {"a": {"dimension": True}}}, {"counts": []}, {"counts": {"read": "5"}}, {"counts": {"embedded": None}},
    {"counts": {"failed": 0.5}}, {"counts": {"reasons": []}}, {"counts": {"reasons": {"empty": "1"}}}, {"output": 1},
    {"table": []}, {"id_col": 1}, {"rows": "3"}, {"dropped": []}, {"dropped": {"failed": "x"}},
])  # fmt: skip
def test_one_of_wrong_types_counts_as_none(wrong: dict[str, Any]) -> None:
    assert Footer.of(schema(GOOD)).columns == {"a": Entry()}
    assert Footer.of(schema(GOOD | wrong)) == Footer()


OLD = {
    "format": 1,
    "id_col": "uid",
    "columns": {
        "a": {"recipe": {"step": "embed"}, "samples": {"size": 10, "mtime_ns": 5, "ids": "x", "key_split": "last"}},
        "b": {"recipe": {}, "samples": {"size": 10, "mtime_ns": 5, "ids": "x", "index": {"size": 3}}},
        "c": {"recipe": {}, "samples": {"images": {"column": "jpg", "size": 10}, "ids": "x"}},
        "d": {"recipe": {"step": "assigned"}, "samples": {}},
    },
    "counts": {"read": 5, "embedded": 4, "failed": 1, "no_image": 0, "reasons": {"empty": 1}},
}


def test_entries_of_0_1_0_say_how_rows_and_images_were_paired() -> None:
    footer = Footer.of(schema(OLD))
    assert {name: entry.pairing for name, entry in footer.columns.items()} == {
        "a": {"id_col": "uid", "key_split": "last"},
        "b": {"id_col": "uid", "index": {"size": 3}},
        "c": {"id_col": "uid", "image_col": "jpg"},
        "d": {},
    }
    assert [entry.samples for entry in footer.columns.values()] == [
        {"size": 10, "mtime_ns": 5}, {"size": 10, "mtime_ns": 5}, {"images": {"size": 10}}, {},
    ]  # fmt: skip
    assert footer.columns["a"].ids == "x" and footer.rows == 5


@pytest.mark.parametrize(("output", "rows", "ids"), [({"on_error": "drop"}, None, ""), ({"on_error": "keep"}, 5, "")])
def test_outputs_of_0_1_0_had_digests_of_their_inputs_ids(output: dict[str, Any], rows: int | None, ids: str) -> None:
    footer = Footer.of(schema(OLD | {"output": output}))
    assert footer.rows == rows and footer.columns["a"].ids == ids


def test_rows_that_were_dropped_are_accounted_for() -> None:
    counts = {"read": 3, "embedded": 3, "failed": 0, "no_image": 0, "reasons": {}}
    dropped = {"failed": 2, "no_image": 1, "reasons": {"empty": 2}}
    assert Footer(counts=counts).accounted() == counts
    assert Footer(counts=counts, dropped=dropped).accounted() == {
        "read": 6, "embedded": 3, "failed": 2, "no_image": 1, "reasons": {"empty": 2},
    }  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [
    ("recipe", {"step": "embed", "model": "b"}), ("samples", {"size": 11, "mtime_ns": 5}),
    ("pairing", {"id_col": "uid"}), ("ids", "abd"), ("dimension", 193),
])  # fmt: skip
def test_a_digest_stands_for_every_field_that_counts(field: str, value: Any) -> None:
    fields = {name: getattr(ENTRY, name) for name in ("recipe", "samples", "pairing", "ids", "dimension")}
    assert Entry(**fields).digest == ENTRY.digest
    assert Entry(**fields | {field: value}).digest != ENTRY.digest


def test_software_versions_and_halvings_are_recorded_but_do_not_count() -> None:
    recipe = {"model": "a", "software": {"torch": "1"}, "exceptions": ["batch halved to 8"]}
    assert counted(recipe) == {"model": "a"}
    assert Entry(recipe).digest == Entry({"model": "a"}).digest


def test_a_resumed_run_finds_the_settings_of_the_first() -> None:
    finished = Footer({"image_embedding": Entry(Made(threads=7, compile=True).recipe())})
    assert recorded_settings([Footer(), finished], Made()) == {"threads": 7, "compile": True}
    assert recorded_settings([finished], Made(model="other")) is None


# -- the form that lies in people's files --------------------------------------------------


def test_the_stored_form_byte_for_byte() -> None:
    """Files that were written with it are compared with it: a change here needs a new ``FORMAT``."""
    assert (FOOTER_KEY, ERROR_COLUMN) == (b"curator_embed", "image_error")
    assert (ERROR_RECIPE, ASSIGNED) == ({"step": "image_error"}, {"step": "assigned"})
    least = Footer({"a": Entry({"model": "ü"})})
    assert least.to_bytes().decode() == (
        '{"columns":{"a":{"recipe":{"model":"ü"},"samples":{}}},"counts":{},"format":2,"id_col":"key","output":{},'
        '"table":{}}'
    )
    full = Footer({"a": ENTRY}, {"read": 3}, {"limit": 3}, "uid", {"rows": 4}, 3, {"failed": 1})
    assert full.to_bytes().decode() == (
        '{"columns":{"a":{"dimension":192,"pairing":{"id_col":"key"},"recipe":{"model":"a","step":"embed"},"samples":'
        '{"ids":"abc","mtime_ns":5,"size":10}}},"counts":{"read":3},"dropped":{"failed":1},"format":2,"id_col":"uid",'
        '"output":{"limit":3},"rows":3,"table":{"rows":4}}'
    )


def test_marks_of_images_are_stored_once_where_columns_share_them() -> None:
    shared, alone = {"files": "d", "marks": "YWJj"}, {"files": "e", "marks": "ZGVm"}
    footer = Footer({"a": Entry({}, shared), "b": Entry({}, shared), "c": Entry({}, alone)})
    assert footer.to_bytes().count(b"YWJj") == 1
    assert Footer.of(schema(footer.to_bytes())).columns == {
        "a": Entry({}, shared, {"id_col": "key"}), "b": Entry({}, shared, {"id_col": "key"}),
        "c": Entry({}, alone, {"id_col": "key"}),
    }  # fmt: skip


@pytest.mark.parametrize("samples", [{"files": "d"}, {"marks": "YWJj"}, {"files": ["d"]}])
def test_samples_without_digest_or_marks_come_back(samples: dict[str, Any]) -> None:
    other = Entry({}, {"files": "e", "marks": "ZGVm"}, {"id_col": "uid"})
    footer = Footer({"a": Entry({}, samples, {"id_col": "key"}), "b": other})
    assert Footer.of(schema(footer.to_bytes())) == footer


def test_digests_are_those_that_were_written() -> None:
    stored = b'{"recipe":{"model":"\xc3\xbc"},"samples":{}}'
    assert Entry({"model": "ü", "software": {}}).digest == hashlib.sha256(stored).hexdigest()[:32]
    assert Entry({"root": "caf\udce9"}).digest != Entry({"root": "caf"}).digest


def test_what_is_absent_is_empty() -> None:
    assert Footer.of(pa.schema([("key", pa.string())])) == Footer()
    assert Footer.of(pa.schema([("key", pa.string())], metadata={b"pandas": b"{}"})) == Footer()
    assert Footer().id_col == Footer.of(schema({"format": 2, "columns": {}})).id_col == "key"
    later = {"format": 3, "columns": {"a": {"recipe": {}, "samples": {}}}, "id_col": "uid"}
    assert Footer.of(schema(later)) == Footer()
    images = {"format": 1, "columns": {"a": {"recipe": {}, "samples": {"images": {"size": 10}}}}}
    assert Footer.of(schema(images)).columns["a"] == Entry({}, {"images": {"size": 10}}, {"id_col": "key"})


@pytest.mark.parametrize("name", ["failed", "no_image"])
def test_counts_are_numbers(name: str) -> None:
    for place in ("counts", "dropped"):
        assert getattr(Footer.of(schema(GOOD | {place: {name: 1}})), place) == {name: 1}
        assert Footer.of(schema(GOOD | {place: {name: "1"}})) == Footer()


def test_rows_are_accounted_for_whatever_of_the_counts_is_there() -> None:
    assert Footer(counts={"read": 3}).accounted() == {"read": 3}
    nothing = {"read": 0, "embedded": 0, "failed": 0, "no_image": 0, "reasons": {"empty": 1}}
    assert Footer(dropped={"reasons": {"empty": 1}}).accounted() == nothing
    counts = {"read": 5, "embedded": 2, "failed": 2, "no_image": 1, "reasons": {"truncated": 2}}
    found = Footer(counts=counts, dropped={"failed": 1, "no_image": 2, "reasons": {"empty": 1}}).accounted()
    assert found == {"read": 8, "embedded": 2, "failed": 3, "no_image": 3, "reasons": {"empty": 1, "truncated": 2}}
    assert list(found["reasons"]) == ["empty", "truncated"], "in an order that does not depend on what was dropped"
