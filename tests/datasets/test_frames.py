"""Metadata as a data frame: what its columns are, and what becomes of columns that users assign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.datasets import ImageTextPairDataset, saving
from curator_embed.datasets.assigned import assigned_work
from curator_embed.datasets.frames import _for_cudf
from curator_embed.datasets.loading import load_embeddings
from curator_embed.errors import UsageError
from tests.shards import write_tar
from tests.stub import ColourEmbedder, ColourModel
from tests.tables.test_fidelity import elsewhere


def open_dataset(folder: Path, **options: Any) -> ImageTextPairDataset:
    return ImageTextPairDataset.from_webdataset(str(folder), **options)


class FailsOnce(ColourModel):
    """A model that is out of memory the first time."""

    failed = False

    def __call__(self, images: Any) -> Any:
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise RuntimeError("out of memory")
        return super().__call__(images)


class Transient(ColourEmbedder):
    """An embedder with such a model."""

    def load_model(self, device: str, threads: int | None = None) -> FailsOnce:
        return FailsOnce(self.batch_size)


def test_an_error_in_the_model_is_not_kept(source: Path) -> None:
    FailsOnce.failed = False
    frame = Transient()(open_dataset(source)).metadata
    with pytest.raises(RuntimeError, match="out of memory"):
        frame.compute()
    assert frame["image_embedding"].compute().notna().sum() == 28


def test_columns_are_those_of_all_shards(tmp_path: Path) -> None:
    for number, fields in enumerate(({"msg": None}, {"msg": "text", "more": 1})):
        members = [("a.jpg", b"x"), ("a.json", json.dumps(fields).encode())]
        write_tar(tmp_path / f"{number:05d}.tar", members)
    frame = open_dataset(tmp_path).metadata.compute()
    assert frame["msg"].fillna("none").tolist() == ["none", "text"]
    assert frame["more"].fillna(0).tolist() == [0, 1]


def test_columns_of_no_common_type_name_the_shards(source: Path) -> None:
    path = source / "00001.parquet"
    table = pq.read_table(path)
    number = table.column_names.index("width")
    pq.write_table(table.set_column(number, "width", table["width"].cast(pa.int64())), path)
    assert str(open_dataset(source).metadata.dtypes["width"]) == "int64[pyarrow]"
    pq.write_table(table.set_column(number, "width", table["width"].cast(pa.string())), path)
    with pytest.raises(UsageError, match="'width' is int32 in shard 00000 and string in shard 00001"):
        _ = open_dataset(source).metadata


def test_integer_ids_beside_a_null_lose_nothing(tmp_path: Path) -> None:
    table = pa.table({"key": [2**60 + 1, None], "image_embedding": [[1.0], [2.0]]})
    pq.write_table(table, tmp_path / "0.parquet")
    ids, _ = load_embeddings(str(tmp_path / "0.parquet"))
    assert ids.dtype == np.dtype(object)
    assert ids.tolist() == [2**60 + 1, None]


def test_assigned_values_of_rows_without_an_id(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x")])
    pq.write_table(pa.table({"key": ["a", None, "None", "a"], "n": [1, 2, 3, 4]}), tmp_path / "0.parquet")
    write_tar(tmp_path / "1.tar", [("b.jpg", b"x")])
    pq.write_table(pa.table({"key": ["b"], "n": pa.array([None], pa.int64())}), tmp_path / "1.parquet")
    dataset = open_dataset(tmp_path)
    dataset.metadata["twice"] = dataset.metadata["n"] * 2
    dataset.save_metadata(progress=False)
    assert pq.read_table(tmp_path / "0.parquet")["twice"].to_pylist() == [2, 4, 6, 8]
    assert pq.read_schema(tmp_path / "1.parquet").field("twice").type == pa.int64()


def test_what_a_save_would_leave_out_is_refused(source: Path) -> None:
    dataset = open_dataset(source)
    dataset.metadata["caption"] = dataset.metadata["caption"].str.upper()
    with pytest.raises(UsageError, match=r"'caption' was assigned anew; use a new name"):
        dataset.save_metadata(progress=False)
    dataset = open_dataset(source)
    dataset.metadata = dataset.metadata[dataset.metadata["caption"] != "photo 0"]
    with pytest.raises(UsageError, match=r"lost rows.*to_webdataset"):
        dataset.save_metadata(progress=False)


def test_frames_are_of_the_kind_that_the_asking_process_wants(source: Path) -> None:
    """Workers on other machines have settings of their own: one that says cuDF must not mix it in."""
    frame = open_dataset(source).metadata
    with dask.config.set({"dataframe.backend": "cudf"}):
        computed = frame.compute(scheduler="sync")
    assert type(computed).__module__.startswith("pandas") and len(computed) > 0


def test_cudf_is_given_types_that_it_has() -> None:
    """No half floats, and one dictionary: cuDF 26.10 puts the chunks' dictionaries together, but not their codes."""
    words = pa.chunked_array([pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", "c"]).dictionary_encode()])
    halves = pa.chunked_array([pa.array([[0.5, None], None, [], [2.0]], pa.list_(pa.float16()))])
    table = _for_cudf(pa.table({"word": words, "half": halves, "n": [1, 2, 3, None]}))
    assert [str(item.type) for item in table.schema][1:] == ["list<item: float>", "int64"]
    first, second = (chunk.dictionary.to_pylist() for chunk in table["word"].chunks)
    assert first == second == ["a", "b", "c"]
    assert table.to_pydict() == {
        "word": ["a", "b", "b", "c"], "half": [[0.5, None], None, [], [2.0]], "n": [1, 2, 3, None]
    }  # fmt: skip


def test_stored_values_of_another_recipe_are_not_shown_as_pending_ones(source: Path) -> None:
    ColourEmbedder("a", version=1)(open_dataset(source)).save_metadata(progress=False)
    with pytest.raises(UsageError) as told:
        _ = ColourEmbedder("a", version=2)(open_dataset(source)).metadata
    assert "00000.parquet: column 'a'" in str(told.value) and "(2 more files like it)" in str(told.value)
    assert "save_metadata(overwrite=True) first" in str(told.value)
    assert "b" in ColourEmbedder("b", version=2)(open_dataset(source)).metadata.columns
    dataset = ColourEmbedder("a", version=2)(open_dataset(source))
    dataset.save_metadata(overwrite=True, progress=False)
    assert dataset.metadata["a"].compute().notna().sum() == 28
    assert "a" in ColourEmbedder("a", version=2)(open_dataset(source)).metadata.columns


def test_tables_that_cannot_be_written_back_are_shown(source: Path) -> None:
    """Looking writes nothing."""
    elsewhere(source / "00001.parquet")  # a column whose bytes lie in another file
    pending = ColourEmbedder()(open_dataset(source))
    with pytest.raises(UsageError, match="column 'far' cannot be copied"):
        pending.save_metadata(progress=False)
    assert {"far", "image_embedding"} <= set(pending.metadata.columns)


def test_columns_are_a_list(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pass a list of column names: columns=\['caption'\]"):
        open_dataset(source).save_metadata(str(tmp_path / "out"), columns="caption", progress=False)
    assert not (tmp_path / "out").exists()
    ColourEmbedder()(open_dataset(source)).save_metadata(str(tmp_path / "out"), columns=["caption"], progress=False)
    assert "caption" in pq.read_schema(tmp_path / "out" / "00000.parquet").names


def test_workers_prove_their_disks_before_they_write_assigned_columns(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proofs are known once the run holds its lock."""
    made: list[Any] = []

    def watched(*given: Any) -> Any:
        made.append(assigned_work(*given))
        return made[-1]

    monkeypatch.setattr(saving, "assigned_work", watched)
    dataset = open_dataset(source)
    dataset.metadata["twice"] = dataset.metadata["width"] * 2
    dataset.save_metadata(progress=False)
    (work,) = made
    lock = source.parent / "source.curator_embed" / "lock.json"
    assert work.job.must_see == (str(source / "00000.tar"), str(lock))
