"""A data frame's partitions, one a shard, as values that the driver has computed beside its units."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import dask.dataframe as dd
import pyarrow as pa
from distributed import Client, Future

from curator_embed.errors import UsageError
from curator_embed.execution.job import ShardReport
from curator_embed.execution.report import RunReport
from curator_embed.execution.work import Round, UnitJob, Work
from curator_embed.tables.pairing import ids_as_text


class Partitions:
    """The partitions of a frame, each computed when a unit needs it and let go when the unit is done.

    Args:
        frame: one partition a shard. Where its partitions depend on each other (a mean over all rows), it is computed
            once and kept on the workers: else each partition would compute all others again.
    """

    def __init__(self, client: Client, frame: dd.DataFrame) -> None:
        self._client = client
        self._kept = None if _is_independent(frame) else frame.persist()
        self._parts = (frame if self._kept is None else self._kept).to_delayed()

    def __len__(self) -> int:
        return len(self._parts)

    def compute(self, positions: Sequence[int], only_on: Collection[str] | None) -> Future[Any]:
        """Some partitions, as a list.

        Args:
            only_on: the workers that this try may use; None for any.
        """
        from dask.delayed import delayed

        some = delayed(list)([self._parts[position] for position in positions])
        found: Future[Any] = self._client.compute(some, workers=None if only_on is None else sorted(only_on))
        return found


class PartWork(Work):
    """Units of which each needs some partitions of a frame; collects what was found out about each."""

    counts = "rows"

    def __init__(self, units: Sequence[Any], job: UnitJob, parts: Partitions, total: int | None = None) -> None:
        self.units, self.todo, self.job, self.parts, self.total = units, range(len(units)), job, parts, total
        self.threads = {}
        self.found: dict[int, Any] = {}  # what was found out, by position

    def rounds(self, workers: int, report: RunReport) -> Iterator[Round]:
        """All units beside each other, a task each: they come with partitions, which are large."""
        yield Round([(position,) for position in self.todo], self.job)

    def needs(self, position: int) -> Sequence[int]:
        """Positions of the partitions that a unit needs."""
        return [position]

    def given(self, position: int, only_on: Collection[str] | None) -> Future[Any]:
        """The unit's partitions, as a list."""
        return self.parts.compute(self.needs(position), only_on)

    def settle(self, position: int, report: ShardReport) -> None:
        """Keep what was found."""
        self.found[position] = report.found


def _is_independent(frame: dd.DataFrame) -> bool:
    """Whether every partition can be computed from its own shard alone."""
    from dask.dataframe.dask_expr._expr import Blockwise

    return all(isinstance(node, Blockwise) for node in frame.optimize(fuse=False).expr.walk())


def column_of(part: Any, name: str) -> pa.Array:
    """One column of a partition, pandas' or cuDF's, as an array."""
    series = part[name]
    if hasattr(series, "to_pandas"):
        series = series.to_pandas()
    array = pa.array(series, from_pandas=True)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def ids_of(part: Any, id_col: str) -> list[str | None]:
    """A partition's ids as the text under which they are compared."""
    return ids_as_text(column_of(part, id_col))


def check_partitions(frame: dd.DataFrame, shards: int, id_col: str) -> None:
    """See that a frame still is one of these shards.

    Raises:
        UsageError: it has other partitions, or lost its ids.
    """
    if frame.npartitions != shards:
        raise UsageError("the metadata was repartitioned; change columns, not partitions")
    if id_col not in frame.columns:
        raise UsageError(f"the metadata has lost its id column '{id_col}'")
