"""Skip, redo, or refuse: decided from footers, field by field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa
import pytest

from curator_embed.tables.conflicts import Conflict, ConflictKind
from curator_embed.tables.judge import (
    Asked,
    Facts,
    Stored,
    Wanted,
    judge_columns,
    judge_in_place,
    judge_output,
    made_from_images,
    outdated,
    same_mark,
    stale,
)
from curator_embed.tables.provenance import ASSIGNED, ERROR_COLUMN, Entry, Footer

RECIPE = {
    "step": "embed", "class": "TimmImageEmbedder", "model": "a", "weights": "sha", "preprocessing": {"size": [224]},
    "honour_exif": False, "max_image_pixels": 10, "batch_shape": [16, 3, 224, 224], "device": "cpu", "decoder": "cpu",
    "threads": 2, "compile": False, "precision": "float32", "normalize": True, "dtype": "float32",
}  # fmt: skip
SAMPLES = {"size": 10, "mtime_ns": 5}
PAIRING = {"id_col": "key", "key_split": "last"}
MADE = Entry(RECIPE, SAMPLES, PAIRING, "ids", 192)
WANTED = Wanted(("a",), RECIPE)
FACTS = Facts(SAMPLES, PAIRING)


def test_a_column_made_the_same_way_from_the_same_is_up_to_date() -> None:
    assert stale(MADE, WANTED, FACTS) is None
    assert stale(MADE, dataclasses.replace(WANTED, dimension=192), dataclasses.replace(FACTS, ids="ids")) is None


@pytest.mark.parametrize("name", sorted(RECIPE))
def test_every_field_of_a_recipe_counts(name: str) -> None:
    for made in ({**RECIPE, name: "other"}, {k: v for k, v in RECIPE.items() if k != name}):
        found = stale(dataclasses.replace(MADE, recipe=made), WANTED, FACTS)
        assert found is not None and found[0] is ConflictKind.OTHER_RECIPE and f"{name}: " in found[1]


def test_a_field_that_only_the_column_has_counts() -> None:
    found = stale(dataclasses.replace(MADE, recipe={**RECIPE, "cuda_graphs": True}), WANTED, FACTS)
    assert found is not None and "cuda_graphs: True there, None now" in found[1]


def test_a_missing_entry_is_not_taken_for_an_equal_one() -> None:
    assert stale(None, Wanted(("a",), {}), Facts({}, {})) == (
        ConflictKind.FOREIGN_COLUMN, "is already there and does not say what made it",
    )  # fmt: skip
    assert stale(Entry(), WANTED, FACTS) is not None


@pytest.mark.parametrize("name", ["software", "exceptions"])
def test_what_is_only_recorded_does_not_count(name: str) -> None:
    assert stale(dataclasses.replace(MADE, recipe={**RECIPE, name: ["x"]}), WANTED, FACTS) is None


def test_threads_do_not_count_for_parts_of_a_list() -> None:
    made = dataclasses.replace(MADE, recipe={**RECIPE, "threads": 64})
    assert stale(made, WANTED, FACTS) is not None
    assert stale(made, WANTED, dataclasses.replace(FACTS, uncounted=frozenset({"threads"}))) is None
    other = dataclasses.replace(MADE, recipe={**RECIPE, "compile": True})
    assert stale(other, WANTED, dataclasses.replace(FACTS, uncounted=frozenset({"threads"}))) is not None


@pytest.mark.parametrize(("changed", "kind"), [
    ({"samples": {"size": 11, "mtime_ns": 5}}, ConflictKind.OTHER_SAMPLES),
    ({"samples": {"size": 10, "mtime_ns": 6}}, ConflictKind.OTHER_SAMPLES),
    ({"samples": {"size": 10}}, ConflictKind.OTHER_SAMPLES),
    ({"pairing": {"id_col": "uid", "key_split": "last"}}, ConflictKind.OTHER_PAIRING),
    ({"pairing": {"id_col": "key"}}, ConflictKind.OTHER_PAIRING),
    ({"pairing": {"id_col": "key", "key_split": "last", "index": {"size": 3}}}, ConflictKind.OTHER_PAIRING),
    ({"pairing": {"id_col": "key", "key_split": "last", "image_col": "jpg"}}, ConflictKind.OTHER_PAIRING),
    ({"dimension": 193}, ConflictKind.OTHER_RECIPE),
])  # fmt: skip
def test_everything_that_a_column_was_made_from_counts(changed: dict[str, Any], kind: ConflictKind) -> None:
    found = stale(dataclasses.replace(MADE, **changed), dataclasses.replace(WANTED, dimension=192), FACTS)
    assert found is not None and found[0] is kind


def test_permuted_ids_are_found_where_ids_were_read() -> None:
    assert outdated(MADE, FACTS) is None
    found = outdated(MADE, dataclasses.replace(FACTS, ids="other"))
    assert found is not None and found[0] is ConflictKind.OTHER_IDS
    assert outdated(dataclasses.replace(MADE, ids=""), dataclasses.replace(FACTS, ids="other")) is None, "0.1.0"


def test_the_source_says_whether_samples_are_the_same() -> None:
    facts = dataclasses.replace(FACTS, samples={"files": "x"}, changed=lambda recorded: "3 of 5 images")
    found = outdated(MADE, facts)
    assert found is not None and "3 of 5 images" in found[1]
    assert outdated(MADE, dataclasses.replace(facts, changed=lambda recorded: "")) is None


def test_only_missing_columns_are_computed() -> None:
    two = (WANTED, Wanted(("b", "c"), {"step": "x"}))
    assert judge_columns(["key", "a"], {"a": MADE}, two, FACTS).todo == (1,)
    entries = {"a": MADE, "b": dataclasses.replace(MADE, recipe={"step": "x"})}
    assert judge_columns(["key", "a", "b"], entries, two, FACTS).todo == (1,), "half of a step is none"
    assert judge_columns(["key"], {}, two, FACTS).todo == (0, 1)


def test_a_column_made_another_way_is_refused_unless_overwritten() -> None:
    entries = {"a": dataclasses.replace(MADE, recipe={**RECIPE, "model": "b"})}
    found = judge_columns(["key", "a"], entries, [WANTED], FACTS)
    assert (found.todo, found.column, found.kind) == ((), "a", ConflictKind.OTHER_RECIPE)
    assert found.why == "column 'a' was made another way (model: 'b' there, 'a' now)"
    assert judge_columns(["key", "a"], entries, [WANTED], FACTS, overwrite=True).todo == (0,)


def test_overwriting_makes_anew_what_is_up_to_date() -> None:
    found = judge_columns(["key", "a"], {"a": MADE}, [WANTED], FACTS, overwrite=True)
    assert found.todo == (0,) and found.kind is None


def test_a_new_file_may_have_its_own_of_what_says_what_made_it() -> None:
    entries = {"a": dataclasses.replace(MADE, recipe={**RECIPE, "model": "b"})}
    found = judge_columns(["key", "a"], entries, [WANTED], FACTS, replace_ours=True)
    assert (found.todo, found.replaced, found.kind) == ((0,), ("a",), None)
    foreign = judge_columns(["key", "a"], {}, [WANTED], FACTS, replace_ours=True)
    assert foreign.kind is ConflictKind.FOREIGN_COLUMN and foreign.todo == ()


# -- whole shards --------------------------------------------------------------------------

ASKED = Asked((WANTED,), "key")
ERRORS = Entry({"step": "image_error"}, SAMPLES, PAIRING, "ids")
COUNTS = {"read": 5, "embedded": 5, "failed": 0, "no_image": 0, "reasons": {}}


def table(*names: str, rows: int = 5, **fields: Any) -> Stored:
    """A file of ours with these columns beside the ids."""
    columns = {"key": pa.string(), "a": pa.list_(pa.float32()), ERROR_COLUMN: pa.string()}
    schema = pa.schema([(name, columns.get(name, pa.string())) for name in names])
    made = {"a": MADE, ERROR_COLUMN: ERRORS}
    footer = Footer({name: made[name] for name in names if name in made}, COUNTS, rows=5)
    footer = dataclasses.replace(
        footer, **{k: v for k, v in fields.items() if k in ("output", "table", "columns", "rows")}
    )
    rest = {k: v for k, v in fields.items() if k in ("damaged", "mark")}
    return Stored("/d/0.parquet", schema, rows, footer, **rest)


DONE = ("key", "a", ERROR_COLUMN)


def test_in_place_done_and_not() -> None:
    assert judge_in_place(table(*DONE), ASKED, FACTS).done
    found = judge_in_place(table("key", "caption", columns={}), ASKED, FACTS)
    assert (found.done, found.todo, found.conflict) == (False, (0,), None)
    assert judge_in_place(Stored("/d/0.parquet"), ASKED, FACTS).todo == (0,)


def test_in_place_overwriting_is_never_done() -> None:
    found = judge_in_place(table(*DONE), dataclasses.replace(ASKED, overwrite=True), FACTS)
    assert not found.done and found.todo == (0,)


def test_in_place_rows_that_somebody_added_are_worked_on() -> None:
    assert judge_in_place(table(*DONE, rows=6), ASKED, FACTS).todo == (0,)
    foreign = judge_in_place(table("key", "a", rows=6, columns={}), ASKED, FACTS)
    assert foreign.conflict is not None and foreign.conflict.kind is ConflictKind.FOREIGN_COLUMN
    assert judge_in_place(table(*DONE, rows=4), ASKED, FACTS).todo == (0,)


@pytest.mark.parametrize(("there", "kind"), [
    (table("caption"), ConflictKind.NO_ID_COLUMN),
    (table("key", "key"), ConflictKind.NO_ID_COLUMN),
    (table("key", ERROR_COLUMN, columns={}), ConflictKind.FOREIGN_COLUMN),
    (table("key", "a", columns={}), ConflictKind.FOREIGN_COLUMN),
])  # fmt: skip
def test_in_place_refusals(there: Stored, kind: ConflictKind) -> None:
    found = judge_in_place(there, ASKED, FACTS)
    assert found.conflict is not None and found.conflict.kind is kind and not found.done


@pytest.mark.parametrize("there", [table("caption"), table("key", "key")])
def test_in_place_what_overwriting_cannot_mend_stays_refused(there: Stored) -> None:
    found = judge_in_place(there, dataclasses.replace(ASKED, overwrite=True), FACTS)
    assert found.conflict is not None and not found.conflict.overwritable


@pytest.mark.parametrize("overwrite", [False, True])
def test_columns_of_images_that_are_gone_are_not_emptied(overwrite: bool) -> None:
    gone = Facts({"size": None, "mtime_ns": None}, PAIRING, images=False)
    asked = dataclasses.replace(ASKED, overwrite=overwrite)
    more = Asked((Wanted(("b",), {"step": "x"}),), "key", overwrite=overwrite)
    for what in (asked, more):
        found = judge_in_place(table(*DONE), what, gone)
        assert found.conflict is not None and found.conflict.kind is ConflictKind.IMAGES_GONE
        assert not found.conflict.overwritable


def test_a_table_that_never_had_images_takes_a_second_column() -> None:
    never = {"size": None, "mtime_ns": None}
    entries = {"a": dataclasses.replace(MADE, samples=never), ERROR_COLUMN: dataclasses.replace(ERRORS, samples=never)}
    more = Asked((Wanted(("b",), {"step": "x"}),), "key")
    found = judge_in_place(table(*DONE, columns=entries), more, Facts(never, PAIRING, images=False))
    assert found.conflict is None and found.todo == (0,)


OUTPUT = {"on_error": "keep"}
TO = Asked((WANTED,), "key", OUTPUT, output="/out")
MARK = {"size": 7, "mtime_ns": 3}
FROM = {"rows": 5, "ids": "t", **MARK}


def out(*names: str, **fields: Any) -> Stored:
    """An output made from ``INPUT``."""
    return table(*(names or DONE), **({"output": OUTPUT, "table": FROM} | fields))


INPUT = table("key", "caption", columns={}, mark=MARK)
ABSENT = Stored("/out/0.parquet")


def test_an_output_done_and_not() -> None:
    assert judge_output(out(), INPUT, TO, FACTS).done
    found = judge_output(ABSENT, INPUT, TO, FACTS)
    assert (found.done, found.todo, found.rows) == (False, (0,), 5)
    assert not judge_output(out(), INPUT, dataclasses.replace(TO, overwrite=True), FACTS).done


def test_an_output_that_had_columns_added_is_done_all_the_same() -> None:
    assert judge_output(out("key", "a", ERROR_COLUMN, "phash"), INPUT, TO, FACTS).done


@pytest.mark.parametrize(("there", "kind"), [
    (out(output={}, table={}), ConflictKind.COLUMNS_ADDED),
    (out(output={}, columns={}, table={}), ConflictKind.STRANGER),
    (out(columns={}), ConflictKind.FOREIGN_COLUMN),
    (out(output={"on_error": "drop"}), ConflictKind.OTHER_OPTIONS),
    (out(output={"on_error": "keep", "columns": ["caption"]}), ConflictKind.OTHER_OPTIONS),
    (out(table=FROM | {"rows": 6}), ConflictKind.OTHER_ROWS),
    (out("key", ERROR_COLUMN), ConflictKind.LACKS_COLUMNS),
    (out(columns={"a": dataclasses.replace(MADE, recipe={**RECIPE, "weights": "x"}), ERROR_COLUMN: ERRORS}),
     ConflictKind.OTHER_RECIPE),
    (Stored("/out/0.parquet", damaged="no magic bytes"), ConflictKind.DAMAGED),
])  # fmt: skip
def test_an_outputs_refusals(there: Stored, kind: ConflictKind) -> None:
    found = judge_output(there, INPUT, TO, FACTS)
    assert found.conflict is not None and found.conflict.kind is kind and not found.done
    anew = judge_output(there, INPUT, dataclasses.replace(TO, overwrite=True), FACTS)
    assert anew.conflict is None and anew.todo == (0,), "overwriting makes it anew, always"


def test_a_trial_gives_way_to_the_whole() -> None:
    trial = out(output=OUTPUT | {"limit": 3})
    found = judge_output(trial, INPUT, TO, FACTS)
    assert (found.done, found.conflict, found.todo) == (False, None, (0,))
    assert judge_output(trial, INPUT, dataclasses.replace(TO, options=OUTPUT | {"limit": 3}), FACTS).done
    assert judge_output(out(), INPUT, dataclasses.replace(TO, options=OUTPUT | {"limit": 3}), FACTS).done, (
        "a whole shard"
    )


def test_the_datasets_own_table_is_no_output() -> None:
    for overwrite in (False, True):
        found = judge_output(out(), INPUT, dataclasses.replace(TO, overwrite=overwrite), FACTS, own=True)
        assert found.conflict is not None and found.conflict.kind is ConflictKind.OWN_TABLE
        assert "overwrite" not in found.conflict.advice


def test_a_table_that_changed_since_is_told_and_other_ids_are_refused() -> None:
    changed = dataclasses.replace(INPUT, mark={"size": 8, "mtime_ns": 4})
    found = judge_output(out(), changed, TO, FACTS, ids="t")
    assert found.done and "has changed since" in found.notes[0] and "overwrite=True" in found.notes[0]
    other = judge_output(out(), changed, TO, FACTS, ids="other")
    assert other.conflict is not None and other.conflict.kind is ConflictKind.OTHER_ROWS
    assert judge_output(out(), INPUT, TO, FACTS).notes == ()


def test_columns_of_the_input_that_are_up_to_date_are_copied() -> None:
    found = judge_output(ABSENT, table(*DONE, mark=MARK), TO, FACTS)
    assert (found.todo, found.conflict) == ((), None) and not found.done
    assert judge_output(ABSENT, table(*DONE), dataclasses.replace(TO, overwrite=True), FACTS).todo == (0,)


def test_a_second_model_into_a_new_folder_is_not_refused_for_the_first_ones_column() -> None:
    first = dataclasses.replace(MADE, recipe={**RECIPE, "model": "first"})
    found = judge_output(ABSENT, table(*DONE, columns={"a": first, ERROR_COLUMN: ERRORS}), TO, FACTS)
    assert (found.todo, found.conflict) == ((0,), None)
    assert "of another run" in found.notes[0]


@pytest.mark.parametrize(("there", "kind"), [
    (table("key", "a", columns={}), ConflictKind.FOREIGN_COLUMN),
    (table("key", ERROR_COLUMN, columns={}), ConflictKind.FOREIGN_COLUMN),
    (table("caption"), ConflictKind.NO_ID_COLUMN),
])  # fmt: skip
def test_columns_of_the_input_that_stand_in_the_way(there: Stored, kind: ConflictKind) -> None:
    found = judge_output(ABSENT, there, TO, FACTS)
    assert found.conflict is not None and found.conflict.kind is kind and found.todo == ()


def test_an_output_without_a_table_behind_it() -> None:
    assert judge_output(out(table={}), None, TO, FACTS).done
    assert judge_output(out(table={}), dataclasses.replace(INPUT, mark=None), TO, FACTS).done, "a table made since"
    found = judge_output(out(), None, TO, FACTS)
    assert found.conflict is not None and "a table of 5 rows, and there is no table now" in found.conflict.why


# -- what a small fault in the judge would change ------------------------------------------


def test_reasons_are_told_in_words() -> None:
    assert stale(dataclasses.replace(MADE, dimension=None), dataclasses.replace(WANTED, dimension=192), FACTS) is None
    assert stale(MADE, dataclasses.replace(WANTED, dimension=7), FACTS) == (
        ConflictKind.OTHER_RECIPE, "was made another way (dimension: 192 there, 7 now)",
    )  # fmt: skip
    assert outdated(MADE, dataclasses.replace(FACTS, pairing={"id_col": "uid", "key_split": "last"})) == (
        ConflictKind.OTHER_PAIRING,
        "was made with rows and images paired another way (id_col: 'key' there, 'uid' now)",
    )
    assert outdated(MADE, dataclasses.replace(FACTS, ids="other")) == (
        ConflictKind.OTHER_IDS, "was made for other ids, or for the same ids in another order",
    )  # fmt: skip


def test_the_first_three_differences_are_told_and_long_values_are_cut() -> None:
    recipe = {"e": 1, "d": "y" * 59, "c": "x" * 58, "b": 1, "a": 1}
    found = stale(dataclasses.replace(MADE, recipe=recipe), Wanted(("a",), {"b": 1, "e": 2, "a": 2}), FACTS)
    assert found is not None
    assert found[1] == (
        f"was made another way (a: 1 there, 2 now; c: '{'x' * 58}' there, None now; d: '{'y' * 56}... there, None now)"
    )


def test_images_that_never_were_are_not_gone() -> None:
    never = {"size": None, "mtime_ns": None}
    made = dataclasses.replace(MADE, samples=never)
    assert outdated(made, Facts(never, PAIRING, images=False)) is None
    assert made_from_images(MADE) and made_from_images(dataclasses.replace(MADE, samples={"files": "x"}))
    assert not made_from_images(made) and made_from_images(Entry(ASSIGNED)) is False


def test_nothing_in_the_way_has_no_words() -> None:
    found = judge_columns(["key", "a"], {"a": MADE}, [WANTED], FACTS)
    assert (found.todo, found.column, found.kind, found.why, found.replaced) == ((), "", None, "", ())
    assert Asked((), "key") == Asked((), "key", {}, None, False, "")


def test_a_step_of_several_columns_that_are_out_of_date_runs_once() -> None:
    old = dataclasses.replace(MADE, recipe={"step": "old"})
    step = Wanted(("b", "c"), {"step": "x"})
    found = judge_columns(["b", "c"], {"b": old, "c": old}, [step], FACTS, replace_ours=True)
    assert (found.todo, found.replaced) == ((0,), ("b", "c"))


def test_in_place_a_file_that_does_not_say_its_rows_has_those_it_has() -> None:
    assert judge_in_place(table(*DONE, rows=5), ASKED, FACTS).done
    there = table(*DONE)
    silent = dataclasses.replace(there, footer=dataclasses.replace(there.footer, rows=None))
    assert judge_in_place(silent, ASKED, FACTS).done


def test_columns_of_images_that_are_gone_beside_others() -> None:
    gone = Facts({"size": None, "mtime_ns": None}, PAIRING, images=False)
    there = table(*DONE, columns={"note": Entry(ASSIGNED), "a": MADE, ERROR_COLUMN: ERRORS})
    for asked in (ASKED, dataclasses.replace(ASKED, overwrite=True), Asked((Wanted(("b",), {"step": "x"}),), "key")):
        found = judge_in_place(there, asked, gone).conflict
        assert found is not None and found.kind is ConflictKind.IMAGES_GONE
        assert found.advice == "Restore the images, or leave this shard out"
    assert judge_in_place(there, Asked((), "key"), gone).done, "nothing is asked for"


def test_reasons_of_another_origin_stand_in_the_way_of_steps_alone() -> None:
    foreign = table("key", ERROR_COLUMN, columns={})
    nothing, anew = Asked((), "key"), dataclasses.replace(ASKED, overwrite=True)
    assert judge_in_place(foreign, nothing, FACTS).conflict is None
    assert judge_in_place(foreign, anew, FACTS).todo == (0,)
    assert judge_output(ABSENT, foreign, dataclasses.replace(nothing, options=OUTPUT), FACTS).conflict is None
    assert judge_output(ABSENT, foreign, dataclasses.replace(TO, overwrite=True), FACTS).todo == (0,)


def test_an_output_of_a_shard_without_a_table_or_with_one_not_looked_into() -> None:
    found = judge_output(ABSENT, None, TO, FACTS)
    assert (found.todo, found.rows, found.conflict) == ((0,), None, None)
    found = judge_output(ABSENT, Stored("/d/0.parquet", rows=7), TO, FACTS)
    assert (found.todo, found.rows, found.conflict) == ((0,), 7, None)


def test_a_limited_run_over_a_whole_output_without_the_columns() -> None:
    limited = dataclasses.replace(TO, options=OUTPUT | {"limit": 3})
    found = judge_output(out("key", ERROR_COLUMN), INPUT, limited, FACTS).conflict
    assert found is not None and found.kind is ConflictKind.LACKS_COLUMNS
    assert found.advice.endswith("metadata_path='/out'")


def test_what_is_known_of_an_outputs_table_decides_and_no_more() -> None:
    changed = dataclasses.replace(INPUT, mark={"size": 8, "mtime_ns": 3})
    found = judge_output(out(), changed, TO, FACTS)
    assert found.done and len(found.notes) == 1, "the ids were not read"
    found = judge_output(out(table={"rows": 5, **MARK}), changed, TO, FACTS, ids="t")
    assert found.done and len(found.notes) == 1, "or not written down"
    found = judge_output(out(), dataclasses.replace(INPUT, mark=None), TO, FACTS, ids="other")
    assert found.done and found.notes == (), "or the table's size and time are not known"
    assert judge_output(out(table={}), INPUT, TO, FACTS).notes == ()
    assert same_mark({"rows": 5, **MARK}, MARK) and not same_mark(MARK, {"size": 7, "mtime_ns": 4})


def test_what_is_wrong_with_the_ids_is_told() -> None:
    def why(*names: str) -> str:
        found = judge_in_place(table(*names), ASKED, FACTS).conflict
        assert found is not None and found.advice == "Choose the id column with id_col="
        return str(found)

    assert why("caption") == "/d/0.parquet: no column 'key' to pair rows and images by (it has: caption)"
    assert why("key", "key", "b").endswith("has 2 columns named 'key' to pair rows and images by (it has: key, key, b)")
    assert why(*"abcdefghijklmn").endswith("(it has: a, b, c, d, e, f, g, h, i, j, k, l)")


@pytest.mark.parametrize("kind", ConflictKind)
def test_what_overwriting_would_replace_and_what_is_advised(kind: ConflictKind) -> None:
    replaced = {
        ConflictKind.FOREIGN_COLUMN, ConflictKind.OTHER_RECIPE, ConflictKind.OTHER_SAMPLES, ConflictKind.OTHER_PAIRING,
        ConflictKind.OTHER_IDS, ConflictKind.DAMAGED, ConflictKind.STRANGER, ConflictKind.OTHER_OPTIONS,
        ConflictKind.OTHER_ROWS, ConflictKind.LACKS_COLUMNS, ConflictKind.COLUMNS_ADDED,
    }  # fmt: skip
    conflict = Conflict(kind, "/d/0.parquet", "is wrong")
    assert conflict.overwritable is (kind in replaced)
    assert conflict.advice.startswith("Pass overwrite=True to" if kind in replaced else "Choose another output path")
    assert str(conflict) == "/d/0.parquet: is wrong"
    assert Conflict(kind, "/d/0.parquet", "is wrong", "Do this").advice == "Do this"


def test_refusals_without_a_remedy_of_their_own_advise_what_their_kind_does() -> None:
    other = {"a": dataclasses.replace(MADE, recipe={"step": "x"}), ERROR_COLUMN: ERRORS}
    for found in (
        judge_in_place(table(*DONE, columns=other), ASKED, FACTS),
        judge_output(out(columns=other), INPUT, TO, FACTS),
    ):
        assert found.conflict is not None and found.conflict.advice.startswith("Pass overwrite=True to replace")
