"""Metadata as a Dask DataFrame, and columns that users assign to it.

Shards are read with pyarrow and handed on as pandas with Arrow dtypes, or as cuDF where Dask's
data frame backend is "cudf": nulls, integers and lists stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

from curator_embed.datasets.pending import taken_columns
from curator_embed.errors import UsageError
from curator_embed.execution.clients import some_client
from curator_embed.execution.job import ShardJob
from curator_embed.execution.placing import place_on_workers
from curator_embed.execution.run_plan import check_shown, make_plan
from curator_embed.execution.worker import read_partition
from curator_embed.execution.workers import cores_per_worker
from curator_embed.sources.shard import Shard
from curator_embed.storage.location import Location
from curator_embed.tables.provenance import ASSIGNED, ERROR_COLUMN, Footer

if TYPE_CHECKING:
    from curator_embed.datasets.image_text_pair import ImageTextPairDataset

SCHEMA_SAMPLES = 64
"""Samples of a shard that are read to learn the columns of shards that have no parquet."""
SCHEMA_SHARDS = 8
"""Shards without a parquet that are read for it, at most."""
FOOTER_THREADS = 16


class PartitionReader:
    """Reads one shard as a data frame; computes pending columns only when they are asked for."""

    def __init__(self, job: ShardJob, schema: pa.Schema) -> None:
        self.job, self.schema = job, schema
        self.backend = dask.config.get("dataframe.backend", "pandas")  # of who asks; a worker's own may be another

    def __call__(self, shard: Shard, columns: Sequence[str] | None = None) -> Any:
        """The shard's rows, all columns or those named."""
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        pending = {name for step in self.job.steps for name in step.columns()} | {ERROR_COLUMN}
        table_path = shard.table_path()
        location = None if table_path is None else Location.of(table_path, self.job.storage_options)
        stored = None if location is None else location.schema()
        if location is None or stored is None or (self.job.steps and pending & set(schema.names) - set(stored.names)):
            table = read_partition(shard, self.job)
        else:
            with location.open_parquet() as parquet:
                table = parquet.read(columns=[name for name in schema.names if name in stored.names])
        return _to_frame(aligned(table, schema, shard.name), self.backend)

    def meta(self) -> Any:
        """An empty frame with the right columns and types."""
        return _to_frame(self.schema.empty_table(), self.backend)


def metadata_frame(dataset: ImageTextPairDataset) -> tuple[dd.DataFrame, frozenset[str]]:
    """See ``ImageTextPairDataset.metadata``.

    Returns:
        The frame, and those of its columns that earlier saves wrote for their users: a save that was killed has
        written them to some files, and the same assignment goes on from there.

    Raises:
        UsageError: a stored column would be shown as a pending one, see ``check_shown``.
    """
    job = dataset.job(None)
    if job.steps:
        with some_client() as client:
            job = place_on_workers(client, job)
            plan = make_plan(dataset.shards, job, cores=cores_per_worker(client))
            check_shown(plan)
            job = plan.job
    if not dataset.shards:
        raise UsageError("the dataset has no shards")
    schema, before = _schema(dataset, job)
    reader = PartitionReader(job, schema)
    frame: dd.DataFrame = dd.from_map(
        reader, list(dataset.shards), meta=reader.meta(), enforce_metadata=False, label="metadata"
    )
    return frame, before


def _schema(dataset: ImageTextPairDataset, job: ShardJob) -> tuple[pa.Schema, frozenset[str]]:
    """The columns of all shards, by their footers, and those that are pending; and which of them users assigned."""

    def stored(shard: Shard) -> pa.Schema | None:
        path = shard.table_path()
        return None if path is None else Location.of(path, dataset.storage_options).schema()

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        found = list(pool.map(stored, dataset.shards))
    schemas = [(shard.name, schema) for shard, schema in zip(dataset.shards, found, strict=True) if schema is not None]
    untabled = [shard for shard, schema in zip(dataset.shards, found, strict=True) if schema is None]
    for shard in untabled[:SCHEMA_SHARDS]:
        samples = list(islice(shard.samples(id_col=dataset.id_col, extras=True), SCHEMA_SAMPLES))
        table = shard.table_from_extras(samples)
        schema = table.schema if table is not None else pa.schema([pa.field(dataset.id_col, pa.string())])
        schemas.append((shard.name, schema))
    new = {name: kind for step in job.steps for name, kind in step.columns().items()}
    if new:
        new[ERROR_COLUMN] = pa.string()
    images = {name for shard in dataset.shards for name in shard.image_columns}
    base = _unified(schemas, text=bool(untabled))
    kept = [item for item in base if item.name not in new and item.name not in images]
    return pa.schema([*kept, *(pa.field(name, kind) for name, kind in new.items())]), _assigned_before(schemas)


def _assigned_before(schemas: Sequence[tuple[str, pa.Schema]]) -> frozenset[str]:
    """Columns that were assigned wherever they are."""
    assigned: set[str] = set()
    others: set[str] = set()
    for _, schema in schemas:
        made = Footer.of(schema).columns
        ours = {name for name, entry in made.items() if entry.recipe.get("step") == ASSIGNED["step"]}
        assigned |= ours
        others |= set(schema.names) - ours
    return frozenset(assigned - others)


def assigned_in(frame: dd.DataFrame) -> set[str]:
    """Columns that were assigned to a frame since it was read, as far as its last operations tell."""
    found: set[str] = set()
    made: Any = frame.expr
    while type(made).__name__ in ("Assign", "Projection"):
        if type(made).__name__ == "Assign":
            found |= set(made.keys)
        made = made.frame
    return found


def _unified(schemas: Sequence[tuple[str, pa.Schema]], *, text: bool) -> list[pa.Field]:
    """All columns in the types that hold what every shard has.

    Args:
        text: some tables are made from json: what has no type yet, or no common one, becomes text.
    """
    common: dict[str, tuple[str, pa.DataType]] = {}
    for shard, schema in schemas:
        for item in schema:
            first, kind = common.setdefault(item.name, (shard, item.type))
            if kind == item.type:
                continue
            pair_of = [pa.schema([pa.field("", _plain(one))]) for one in (kind, item.type)]
            try:
                kind = pa.unify_schemas(pair_of, promote_options="permissive").field(0).type
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                if not text:
                    raise UsageError(
                        f"column '{item.name}' is {kind} in shard {first} and {item.type} in shard {shard}; "
                        "write it in one type"
                    ) from None
                kind = pa.string()
            common[item.name] = (first, kind)
    return [pa.field(name, without_null(kind) if text else kind) for name, (_, kind) in common.items()]


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def without_null(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(without_null(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(item.name, without_null(item.type)) for item in kind])
    return kind


def aligned(table: pa.Table, schema: pa.Schema, shard: str) -> pa.Table:
    """Bring a shard's table to the frame's columns and types: absent ones are null."""
    columns = []
    for item in schema:
        if item.name not in table.column_names:
            columns.append(pa.nulls(len(table), item.type))
            continue
        column = table.column(item.name)
        try:
            if pa.types.is_nested(column.type) and pa.types.is_string(item.type):
                columns.append(pa.array([v if v is None else json.dumps(v) for v in column.to_pylist()], item.type))
            else:
                columns.append(column.cast(item.type))
        except (pa.ArrowException, TypeError) as error:
            raise UsageError(
                f"shard {shard}: column '{item.name}' holds {column.type}, elsewhere {item.type} ({error}); "
                "write it in one type"
            ) from None
    return pa.Table.from_arrays(columns, schema=schema)


def _to_frame(table: pa.Table, backend: str) -> Any:
    table = table.replace_schema_metadata(None)
    if backend == "cudf":
        import cudf

        return cudf.DataFrame.from_arrow(_for_cudf(table))
    return table.to_pandas(types_mapper=pd.ArrowDtype)


def _for_cudf(table: pa.Table) -> pa.Table:
    """What cuDF (26.10) takes as it is meant: no half floats, and dictionaries that are the same in all chunks."""
    fields = [pa.field(item.name, _without_half(item.type)) for item in table.schema]
    return table.unify_dictionaries().cast(pa.schema(fields))


def _without_half(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.list_(_without_half(kind.value_type)) if pa.types.is_list(kind) else kind


# -- columns that users assign -------------------------------------------------------------


def assigned_columns(dataset: ImageTextPairDataset) -> dd.DataFrame | None:
    """The id and the columns that were assigned to ``metadata``, or None when there are none."""
    added = dataset.added_columns()
    _check_rows_and_columns(dataset, added)
    if not added:
        return None
    frame = dataset.metadata
    if frame.npartitions != len(dataset.shards):
        raise UsageError("the metadata was repartitioned; change columns, not partitions")
    if dataset.id_col not in frame.columns:
        raise UsageError(f"the metadata has lost its id column '{dataset.id_col}'")
    chosen: dd.DataFrame = frame[[dataset.id_col, *[name for name in added if name != dataset.id_col]]]
    return chosen


def _check_rows_and_columns(dataset: ImageTextPairDataset, added: Sequence[str]) -> None:
    """Refuse what a save would silently leave out (dropped rows, new values in columns that were read), and values in
    the place of images or reasons."""
    taken = taken_columns(dataset.shards, dataset.id_col)
    for name in added:
        if name in taken and name != dataset.id_col:
            raise UsageError(
                f"the metadata's new column '{name}' would replace the column that holds {taken[name]}; assign it "
                "under another name"
            )
    made: Any = dataset.metadata.expr if dataset.has_metadata else None
    while type(made).__name__ in ("Assign", "Projection", "Filter", "DropnaFrame", "DropDuplicates", "Head", "Tail"):
        if type(made).__name__ == "Assign":
            again = [name for name in made.keys if name in dataset.metadata.columns and name not in added]
            if again:
                raise UsageError(f"the metadata's column '{again[0]}' was assigned anew; use a new name for it")
        elif type(made).__name__ != "Projection":
            raise UsageError(
                "the metadata has lost rows, but save_metadata() writes all of them; pass on_error='drop' to leave "
                "failed rows out, or mark rows in a boolean column and write them with to_webdataset()"
            )
        made = made.frame
