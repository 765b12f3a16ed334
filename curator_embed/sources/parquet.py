"""Parquet files that hold the images themselves, as img2dataset's parquet format and Hugging Face write them.

The image column is binary, or a struct of ``bytes`` and ``path``. It is streamed a few rows at a time, one
piece ahead, and goes into no output but the file it came from.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curator_embed.errors import Reason, SourceError, UsageError
from curator_embed.sources.extras import id_text
from curator_embed.sources.path_list import extension
from curator_embed.sources.shard import Note, Sample, Shard, StoredSample
from curator_embed.sources.webdataset import expand_braces
from curator_embed.storage import files
from curator_embed.storage.files import StorageOptions, redact, unreadable
from curator_embed.storage.gate import Gate, Refusals, Unread
from curator_embed.storage.objects import ReadPolicy, read_many

ROWS_AT_A_TIME = 64
REMOTE_BLOCK_BYTES = 8 << 20

_USUAL_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
_FOOTER_KEY = b"curator_embed"
_HUGGING_FACE_KEY = b"huggingface"


class ParquetShard(Shard):
    """One parquet file with its images. Picklable and small.

    Args:
        name: unique within the dataset; the stem of the output file.
        path: path or URL of the file.
        image_col: the column that holds the images.
        id_col: the column of ids.
        own: where rows go without an output path, when the file has no column ``id_col``: ids are then made
            of the shard's name and the row, and the file is not changed. None when it has one.
        storage_options: passed to fsspec.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        image_col: str,
        id_col: str = "key",
        own: str | None = None,
        storage_options: StorageOptions = None,
        policy: ReadPolicy | None = None,
    ) -> None:
        self.name, self.path, self.image_col = name, path, image_col
        self.id_col, self.own = id_col, own
        self.storage_options, self.policy = dict(storage_options or {}), policy or ReadPolicy()
        self.table = path if own is None else None
        self.image_columns = (image_col,)
        self._notes: list[Note] = []

    def __repr__(self) -> str:
        return f"ParquetShard({self.name!r}, {redact(self.path)!r})"  # never storage_options: they may hold secrets

    @property
    def numbered(self) -> bool:
        """Whether ids are made up."""
        return self.own is not None

    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield a sample a row, in order.

        A row without bytes whose struct names a path has its image there, below the parquet file's folder. What else
        such a path may be is for the gate to say (``Gate.of_parquet``).

        Raises:
            SourceError: no parquet file, a column is missing, or it cannot be read (on).
        """
        self._notes = []
        nameless = 0
        gate, refusals = self._gate(), Refusals()
        with self._open() as parquet:
            for keys, images, paths in _one_ahead(self._batches(parquet, range(parquet.num_row_groups))):
                elsewhere = [p for key, image, p in zip(keys, images, paths, strict=True) if key and not image and p]
                reads = read_many(map(gate.admit, elsewhere), self.storage_options, self.policy)
                for key, image, path in zip(keys, images, paths, strict=True):
                    if not key:
                        nameless += 1
                        continue
                    answer = next(reads) if not image and path else image
                    if isinstance(answer, Unread):
                        refusals.add(path or "", answer)
                        yield Sample(key, None, answer.reason, answer.detail)
                    else:
                        yield Sample(key, answer)
        if refusals.count:
            self._notes.append(Note(self.name, redact(self.path), refusals.note()))
        if nameless:
            what = f"{nameless} rows have no value in '{self.id_col}' and keep theirs without an image"
            self._notes.append(Note(self.name, redact(self.path), f"{what}; choose another with id_col="))

    def keys(self, *, id_col: str) -> list[str]:
        """The ids of all rows that have one, in order; no image is read."""
        with self._open() as parquet:
            return [key for key in self._keys(parquet) if key]

    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """The encoded images of some rows, under the extension that their bytes call for.

        A row whose image is named by a path, and is not there or refused, has no members.

        Raises:
            SourceError: the file cannot be read, or the image of a wanted row lies elsewhere and cannot be.
        """
        gate = self._gate()
        with self._open() as parquet:
            rows = [row for row, key in enumerate(self._keys(parquet)) if key]
            wanted = {row: ordinal for ordinal, row in enumerate(rows) if ordinal in ordinals}
            first = 0
            for group in range(parquet.num_row_groups):
                after = first + parquet.metadata.row_group(group).num_rows
                if any(first <= row < after for row in wanted):
                    row = first
                    for _, images, paths in self._batches(parquet, [group]):
                        for image, path in zip(images, paths, strict=True):
                            if row in wanted:
                                yield StoredSample(wanted[row], self._member(image, path, gate))
                            row += 1
                first = after

    def _member(self, image: bytes | None, path: str | None, gate: Gate) -> tuple[tuple[str, bytes], ...]:
        if not image and path:
            (answer,) = read_many([gate.admit(path)], self.storage_options, self.policy)
            if isinstance(answer, Unread) and answer.reason not in (Reason.NOT_FOUND, Reason.REFUSED):
                where = gate.shown(path)
                raise SourceError(where, f"cannot be read ({answer.detail})", "Restore it, or leave its row out")
            image = None if isinstance(answer, Unread) else answer
        return () if image is None else ((extension(path or "", image), image),)

    def table_path(self) -> str | None:
        """The file itself, until the rows are stored elsewhere; None where its ids are made up."""
        return self.table

    def with_table(self, path: str) -> ParquetShard:
        """The same images with another metadata parquet."""
        other = copy.copy(self)
        other.table, other._notes = path, []
        return other

    def table_from_extras(self, samples: list[Sample]) -> pa.Table:
        """Made-up ids, and the file's own columns without the images.

        What Hugging Face notes about them in the file stays: names of classes, say. It is looked up by column, so
        those that are gone or new do no harm.
        """
        with self._open() as parquet, self._naming():
            names = [name for name in parquet.schema_arrow.names if name not in (self.image_col, self.id_col)]
            table = parquet.read(columns=names).slice(0, len(samples))
        ids = pa.array([sample.key for sample in samples], pa.string())
        if not names:
            return pa.table({self.id_col: ids})
        features = {key: value for key, value in (table.schema.metadata or {}).items() if key == _HUGGING_FACE_KEY}
        return table.replace_schema_metadata(features or None).add_column(0, self.id_col, ids)

    def image_source(self) -> str:
        """The file."""
        return self.path

    def own_table(self) -> str:
        """The file itself; where its ids are made up, a file in a folder beside, or in that of the named tables."""
        if self.own is not None and self.named_tables is not None:
            return f"{self.named_tables}/{self.name}.parquet"
        return self.own or self.path

    def fingerprint(self) -> dict[str, Any]:
        """Size and mtime or etag of the file as it was before columns were added to it in place.

        A file that carries our footer remembers them: adding columns changes the file, not its images.
        """
        with self._open() as parquet:
            recorded = _recorded(parquet.schema_arrow)
        return recorded or {"images": files.fingerprint(self.path, self.storage_options)}

    def pairing(self, id_col: str) -> dict[str, Any]:
        """The id column and the image column."""
        return {"id_col": id_col, "image_col": self.image_col}

    def row_estimate(self) -> int:
        """The number of rows."""
        with self._open() as parquet:
            return int(parquet.metadata.num_rows)

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed."""
        return list(self._notes)

    # --- reading --------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        with open_parquet(self.path, self.storage_options) as parquet:
            yield parquet

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the file in whatever reading it raises."""
        try:
            yield
        except (pa.ArrowException, OSError) as exc:
            raise unreadable(self.path, exc) from exc

    def _batches(
        self, parquet: pq.ParquetFile, groups: Sequence[int]
    ) -> Iterator[tuple[list[str | None], list[bytes | None], list[str | None]]]:
        """(keys, images, paths) of a few rows at a time; paths are None where the column has none.

        Keys are made up only where all row groups are read.
        """
        schema = parquet.schema_arrow
        for wanted in (self.image_col, *(() if self.numbered else (self.id_col,))):
            if wanted not in schema.names:
                raise SourceError(
                    redact(self.path),
                    f"has no column '{wanted}' (it has: {', '.join(schema.names[:12])})",
                    "Name it with image_col= or id_col=",
                )
        row = 0
        columns = [self.image_col] if self.numbered else list(dict.fromkeys([self.id_col, self.image_col]))
        with self._naming():
            for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups=list(groups), columns=columns):
                images = batch.column(self.image_col)
                nothing: list[Any] = [None] * len(batch)
                paths = nothing
                if pa.types.is_struct(images.type):
                    valid = images.is_valid().to_pylist()
                    has_path = images.type.get_field_index("path") >= 0
                    paths = _masked(images.field("path").to_pylist(), valid) if has_path else nothing
                    data = _masked(images.field("bytes").to_pylist(), valid)
                else:
                    data = images.to_pylist()
                if self.numbered:
                    keys: list[str | None] = [self._row_id(row + i) for i in range(len(batch))]
                else:
                    keys = [_key(value) for value in batch.column(self.id_col).to_pylist()]
                row += len(batch)
                yield keys, data, paths

    def _keys(self, parquet: pq.ParquetFile) -> list[str | None]:
        """The key of every row; None for rows without an id."""
        if self.numbered:
            return [self._row_id(row) for row in range(parquet.metadata.num_rows)]
        with self._naming():
            return [_key(value) for value in parquet.read(columns=[self.id_col]).column(self.id_col).to_pylist()]

    def _gate(self) -> Gate:
        """What paths in the image column may open."""
        return Gate.of_parquet(self.path, self.policy.links, self.policy.urls)

    def _row_id(self, row: int) -> str:
        return f"{self.name}_{row:08d}"


def find_parquets(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    id_col: str | None = None,
    image_col: str | None = None,
    storage_options: StorageOptions = None,
    policy: ReadPolicy | None = None,
) -> list[ParquetShard]:
    """Find parquet files with images; see ``ImageTextPairDataset.from_parquet``."""
    asked = [os.fspath(p) for p in ([path] if isinstance(path, str | os.PathLike) else path)]
    found: list[str] = []
    base: str | None = None
    for one in (plain for text in asked for plain in expand_braces(text)):
        if not files.is_remote(one):
            one = os.path.abspath(files.local_path(one))
        if one.lower().endswith((".parquet", ".pq")) and not any(c in one for c in "*?["):
            found.append(files.normal(one, storage_options))
        elif files.is_folder(one, storage_options):
            base = files.normal(one, storage_options).rstrip("/")
            found += files.list_files(one, (".parquet", ".pq"), storage_options, recursive=True)
        else:
            found += [p for p in files.glob_files(one, storage_options) if p.lower().endswith((".parquet", ".pq"))]
    found = list(dict.fromkeys(found))
    if not found:
        raise UsageError(f"{', '.join(map(redact, asked))}: no *.parquet there. Give a folder, a file or a glob")
    if len(asked) > 1 or base is None:
        folders = [p.rpartition("/")[0] for p in found]
        base = os.path.commonpath(folders) if not files.is_remote(found[0]) else _common(folders)
    with open_parquet(found[0], storage_options) as parquet:
        schema = parquet.schema_arrow
    column = image_column(schema, image_col, found[0])
    if id_col is not None and id_col not in schema.names:
        raise UsageError(f"{redact(found[0])}: no column '{id_col}' (it has: {', '.join(schema.names[:12])})")
    names = {p: os.path.splitext(p)[0].removeprefix(base).strip("/").replace("/", "__") for p in found}
    return [
        ParquetShard(
            names[p],
            p,
            image_col=column,
            id_col=id_col or "key",
            own=None if (id_col or "key") in schema.names else f"{base}_metadata/{names[p]}.parquet",
            storage_options=storage_options,
            policy=policy,
        )
        for p in sorted(found, key=lambda p: files.natural_key(names[p]))
    ]


def image_column(schema: pa.Schema, asked: str | None, path: str) -> str:
    """The column that holds images: the one asked for, one of a usual name, or the only one that can.

    Raises:
        UsageError: there is none, or one cannot be told from another; the message names those that could be.
    """
    able: list[str] = [item.name for item in schema if _holds_bytes(item.type)]
    if asked is not None:
        if asked in able:
            return asked
        kind = f"holds {schema.field(asked).type}, no image bytes" if asked in schema.names else "is not there"
        raise UsageError(f"{redact(path)}: image column '{asked}' {kind}; those that can hold images: {able or 'none'}")
    usual = [name for name in _USUAL_NAMES if name in able]
    if usual or len(able) == 1:
        return (usual or able)[0]
    if able:
        raise UsageError(f"{redact(path)}: several columns can hold images: {able}. Choose one with image_col=")
    raise UsageError(
        f"{redact(path)}: no column holds bytes (it has: {', '.join(schema.names[:12])}). A table of paths is opened "
        "as a path list, the tables of a webdataset with their tars"
    )


@contextmanager
def open_parquet(path: str, storage_options: StorageOptions = None) -> Iterator[pq.ParquetFile]:
    """Open a parquet file anywhere, to be streamed.

    Raises:
        SourceError: it is not there, or no parquet file.
    """
    with ExitStack() as stack:
        try:
            if files.is_remote(path):
                fs, inner = files.filesystem(path, storage_options)
                fs.invalidate_cache(inner)
                source: Any = stack.enter_context(fs.open(inner, "rb", block_size=REMOTE_BLOCK_BYTES))
            else:
                source = stack.enter_context(pa.OSFile(files.local_path(path)))
            # Without pre-buffering a row group is read as it is consumed: it may hold gigabytes.
            parquet = stack.enter_context(pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20))
        except pa.ArrowInvalid as exc:
            raise SourceError(redact(path), "not a readable parquet file", "Restore it or remove it") from exc
        except Exception as exc:  # every file system has exceptions of its own
            raise unreadable(path, exc) from None
        yield parquet


def _key(value: Any) -> str | None:
    """An id as the text under which rows are compared; None when it is no id."""
    if isinstance(value, bytes):
        return str(value, "utf-8", "surrogateescape")
    return None if value != value else id_text(value)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        at = kind.get_field_index("bytes")
        return at >= 0 and _holds_bytes(kind.field(at).type)
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _recorded(schema: pa.Schema) -> dict[str, Any] | None:
    """Which images this file's own columns were made from, as our footer in it tells."""
    import json

    raw = (schema.metadata or {}).get(_FOOTER_KEY)
    try:
        columns = json.loads(raw)["columns"] if raw is not None else {}
        found = [made["samples"]["images"] for made in columns.values() if "images" in made.get("samples", {})]
        # Version 0.1.0 kept the column's name there as well.
        return {"images": {key: found[0][key] for key in found[0] if key != "column"}} if found else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Fetch the next batch in a thread while the last is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            yield batch


def _masked(values: list[Any], valid: list[bool]) -> list[Any]:
    return [value if there else None for value, there in zip(values, valid, strict=True)]


def _common(folders: Sequence[str]) -> str:
    parts = [folder.split("/") for folder in folders]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return "/".join(parts[0][:shared])
