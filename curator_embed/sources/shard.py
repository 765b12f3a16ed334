"""What every source produces: shards of samples. Kept apart from the sources so that
execution knows only this page.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa

from curator_embed.errors import Reason, redact
from curator_embed.sources.fitting import KnownFile, Twice


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as it is stored: an id, the encoded image, and what lies beside it.

    Attributes:
        key: the sample's own id within its shard (a webdataset key, a line of a path list).
        image: the encoded bytes of its image; ``None`` when it has none, or when ``error`` says why not.
        error: set when the source itself could not provide the bytes.
        detail: for people, to go with ``error``; never stored in the output.
        extras: small text members beside the image (``{"txt": "...", "json": {...}}``), parsed;
            filled only when the shard was asked for them.
    """

    key: str
    image: bytes | None
    error: Reason | None = None
    detail: str = ""
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredSample:
    """One sample's members as they lie in the source.

    Attributes:
        ordinal: its position in the order of ``Shard.samples``.
        members: (extension without the first dot, bytes) of each member, in their order.
    """

    ordinal: int
    members: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth telling about a shard that costs no row: a stale index, extra images. It shows no credentials."""

    shard: str
    path: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", redact(self.path))
        object.__setattr__(self, "message", redact(self.message))


@dataclass(frozen=True)
class Fitted:
    """Shards cut as the files that are there.

    Attributes:
        shards: in order; one for every file, and those that have no file yet.
        gone: per file, the ids of rows whose images are not there any more.
        twice: an id that two files have a row for; then there are no shards.
        given_up: tables whose images are cut otherwise than the files: the shards go without them.
    """

    shards: list[Shard]
    gone: Mapping[str, Sequence[str]] = field(default_factory=dict)
    twice: Twice | None = None
    given_up: Sequence[str] = ()


class Shard(ABC):
    """The unit of work, of parallelism and of recovery. Picklable, small, and immutable.

    ``samples`` is called once per run and read to its end by one thread; a source that wants
    to read ahead does so inside. Samples come in the order the source stores them.
    """

    name: str
    """Unique within the dataset; the stem of the output file."""

    part: str = ""
    """``{name}_{start}-{end}``: the share of a larger dataset that was opened, where runs may write several
    shares into one folder side by side; the same for all its shards. Empty: a run has its folder to itself."""

    by_position: bool = False
    """Named ``{name}_{start}-{end}`` by position in a list: one that has grown, or is cut into other pieces, gives the
    same rows other names."""

    grows: bool = False
    """Samples may come and go anywhere: rows belong to the files that are there by their ids, see ``fitted``."""

    named_tables: str | None = None
    """The folder of tables that was named when the dataset was opened; None: they lie where ``own_table`` says."""

    images_below: str = ""
    """Where the images lie when a fingerprint does not tell: the same list may be read below another folder."""

    replaces: tuple[Any, ...] | None = None
    """The version of its parquet (``Location.token``) that an overwriting run makes anew; any other is its own work."""

    image_columns: tuple[str, ...] = ()
    """Columns of the shard's own table that hold the images: no new output gets them unless asked to."""

    @abstractmethod
    def samples(self, *, id_col: str, extras: bool = False) -> Iterator[Sample]:
        """Yield every sample, bad ones too.

        Args:
            id_col: the dataset's id column. When it is not the source's own key, ``Sample.key`` is
                the value stored under that name beside the image, as text.
            extras: also parse the small members beside the image (captions, json).

        Raises:
            SourceError: the source cannot be used at all (not a tar, no access, ...).
        """

    def keys(self, *, id_col: str) -> list[str]:
        """``Sample.key`` of every sample, in order; sources that can tell without the images override this."""
        return [sample.key for sample in self.samples(id_col=id_col)]

    @abstractmethod
    def stored_samples(self, ordinals: Collection[int]) -> Iterator[StoredSample]:
        """Everything stored of some samples, byte for byte, in the order of the source.

        Args:
            ordinals: positions of the wanted samples in the order of ``samples``.
        """

    @abstractmethod
    def table_path(self) -> str | None:
        """Where the shard's metadata parquet lies, or None when it has none."""

    @abstractmethod
    def with_table(self, path: str) -> Shard:
        """The same images with another metadata parquet."""

    def with_tables_in(self, folder: str) -> Self:
        """The same images; a table that they do not have yet goes into this folder."""
        other = copy.copy(self)
        other.named_tables = folder
        return other

    @classmethod
    def fitted(cls, shards: Sequence[Shard], files: Iterable[KnownFile], *, tables: bool) -> Fitted:
        """The samples of all shards, cut as files have them that are there; new ones in shards of their own.

        Args:
            shards: the whole dataset.
            files: in the folder that is going to be written to; read once.
            tables: keep the shards' own tables, where the files do not say otherwise; False where the files are these.
        """
        return Fitted(list(shards))

    def replacing(self, version: tuple[Any, ...] | None) -> Shard:
        """The same shard for an overwriting run that is to make this version of its parquet anew."""
        other = copy.copy(self)
        other.replaces = version
        return other

    @abstractmethod
    def image_source(self) -> str | None:
        """The URL or path that holds the images, for messages; None when the images are missing."""

    def own_table(self) -> str | None:
        """Where this shard's parquet goes when it has none yet and no output path is given; None: nowhere."""
        source = self.image_source()
        if source is None:
            return None
        return f"{source[:-4] if source.lower().endswith('.tar') else source}.parquet"

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Identify the stored samples without reading them: size and mtime_ns or etag of the tar.

        Plain JSON values. Two equal fingerprints mean: the same samples.
        """

    def samples_changed(self, recorded: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        """Why a recorded fingerprint is not of the samples that are stored now, in a few words; "" where it is.

        Args:
            now: the shard's ``fingerprint()``, which the caller has at hand.
        """
        changed = [name for name in sorted({*recorded, *now}) if recorded.get(name) != now.get(name)]
        return f"{', '.join(changed)} differ" if changed else ""

    def pairing(self, id_col: str) -> dict[str, Any]:
        """How this shard's samples get the ids by which they meet their rows, as plain JSON values.

        Whatever changes which row gets which image belongs here: another id column, key rule, index or image column.
        """
        return {"id_col": id_col}

    def row_estimate(self) -> int | None:
        """Number of samples when it is known cheaply (an index, a parquet footer); else None."""
        return None

    def table_from_extras(self, samples: list[Sample]) -> pa.Table | None:
        """Build a metadata table for a shard that has none, from its samples' extras."""
        return None

    def notes(self) -> list[Note]:
        """What the last pass over ``samples`` noticed."""
        return []


def first_images(shards: Sequence[Shard], id_col: str, count: int) -> list[bytes]:
    """The first ``count`` encoded images of some shards, in the order they are stored."""
    found: list[bytes] = []
    for shard in shards:
        for sample in shard.samples(id_col=id_col):
            if sample.image is not None:
                found.append(sample.image)
            if len(found) >= count:
                return found
    return found
