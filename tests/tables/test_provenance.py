"""Skip, redo, or refuse: decided from a footer."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from curator_embed.steps import Step
from curator_embed.tables.provenance import FOOTER_KEY, Footer, recorded_settings, status

FINGERPRINT = {"size": 10, "mtime_ns": 5}


class Made(Step):
    """A step known by its recipe."""

    def __init__(self, column: str = "image_embedding", **recipe: Any) -> None:
        self.column, self._recipe = column, {"step": "embedder", "model": "a", "threads": 2, "compile": False} | recipe

    def columns(self) -> dict[str, pa.DataType]:
        return {self.column: pa.list_(pa.float32())}

    def recipe(self) -> dict[str, Any]:
        return self._recipe


def schema(*steps: Step, fingerprint: dict[str, Any] = FINGERPRINT) -> pa.Schema:
    columns = {n: {"recipe": s.recipe(), "samples": {**fingerprint, "ids": "x"}} for s in steps for n in s.columns()}
    fields = [pa.field("key", pa.string())] + [pa.field(n, k) for s in steps for n, k in s.columns().items()]
    return pa.schema(fields, metadata={FOOTER_KEY: Footer(columns).to_bytes()})


def test_the_same_recipe_on_the_same_samples_is_done() -> None:
    assert status(schema(Made()), [Made()], FINGERPRINT).todo == ()


def test_software_versions_and_halvings_are_recorded_but_do_not_count() -> None:
    made = Made(software={"torch": "1"}, exceptions=["batch halved to 8"])
    assert status(schema(made), [Made(software={"torch": "2"})], FINGERPRINT).todo == ()


def test_only_missing_columns_are_computed() -> None:
    assert status(schema(Made()), [Made(), Made("second")], FINGERPRINT).todo == (1,)
    assert status(None, [Made(), Made("second")], FINGERPRINT).todo == (0, 1)


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (schema(Made(model="b")), "model: 'b' there, 'a' now"),
        (schema(Made(), fingerprint={"size": 11, "mtime_ns": 5}), "images that have changed"),
        (pa.schema([("image_embedding", pa.list_(pa.float32()))]), "does not say what made it"),
        (schema(Made(batch_shape=[8, 3, 224, 224])), "batch_shape"),
    ],
)
def test_columns_made_otherwise_are_refused_unless_overwritten(there: pa.Schema, why: str) -> None:
    assert why in status(there, [Made()], FINGERPRINT).conflict
    assert status(there, [Made()], FINGERPRINT, overwrite=True).todo == (0,)


def test_a_resumed_run_finds_the_settings_of_the_first() -> None:
    finished = Footer.of(schema(Made(threads=7, compile=True)))
    assert recorded_settings([Footer(), finished], Made()) == {"threads": 7, "compile": True}
    assert recorded_settings([finished], Made(model="other")) is None


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"not json", b'{"format": 99, "columns": {}}'])
def test_a_footer_that_cannot_be_read_counts_as_none(raw: bytes) -> None:
    assert Footer.of(pa.schema([], metadata={FOOTER_KEY: raw})) == Footer()


def test_footers_do_not_depend_on_the_order_of_keys() -> None:
    assert Footer({"a": {"x": 1, "y": 2}}).to_bytes() == Footer({"a": {"y": 2, "x": 1}}).to_bytes()
