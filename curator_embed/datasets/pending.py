"""What may be pending on a dataset: known kinds of steps, whose columns replace nothing that rows are made of.

Ids, reasons, images and columns of another step are nobody's target, with ``overwrite=True`` or without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from curator_embed.errors import UsageError
from curator_embed.sources.shard import Shard
from curator_embed.steps import BatchStep, ImageStep, Step
from curator_embed.tables.provenance import ERROR_COLUMN


def taken_columns(shards: Iterable[Shard], id_col: str) -> dict[str, str]:
    """Columns that nobody may write, each with what it holds."""
    images = {name: "the images" for shard in shards for name in shard.image_columns}
    return {
        **images,
        ERROR_COLUMN: "the reasons why images failed",
        id_col: "the ids, by which rows and images are paired",
    }


def check_step(step: Step, pending: Sequence[Step], taken: Mapping[str, str]) -> None:
    """See that a step can be run and that its columns are its own.

    Args:
        pending: the steps before it.
        taken: from ``taken_columns``.

    Raises:
        UsageError: it is of no known kind, adds nothing, or would write a column that is not its own.
    """
    _check_kind(step)
    columns = step.columns()
    name = type(step).__name__
    if not columns:
        raise UsageError(f"{name} adds no column: its columns() is empty. Have it name what it writes")
    for column, kind in columns.items():
        if not isinstance(column, str) or not column or not isinstance(kind, pa.DataType):
            raise UsageError(
                f"{name}.columns() must give column names and their pyarrow types, not {column!r}: {kind!r}"
            )
        if isinstance(step, BatchStep) and not (pa.types.is_list(kind) and pa.types.is_floating(kind.value_type)):
            raise UsageError(f"{name}: column '{column}' is {kind}, but embeddings are lists: pa.list_(pa.float32())")
        if column in taken:
            raise UsageError(
                f"{name} would write the column '{column}', which holds {taken[column]}; overwrite=True does not "
                f"replace it. {_rename(step)}"
            )
    others = {column for other in pending for column in other.columns()}
    doubled = [column for column in columns if column in others]
    if doubled:
        raise UsageError(f"two steps would write the column '{doubled[0]}'. {_rename(step, 'one of them')}")


def _check_kind(step: Step) -> None:
    name = type(step).__name__
    if not isinstance(step, ImageStep | BatchStep):
        raise UsageError(
            f"{name} is neither an ImageStep nor a BatchStep, so a run would not know what to show it. Derive it from "
            "ImageStep (single images) or BatchStep (a model) of curator_embed.steps, or from ImageEmbedder"
        )
    if isinstance(step, BatchStep) and step.reads_own_shards and type(step).embed_shard is BatchStep.embed_shard:
        raise UsageError(f"{name} says that it reads shards itself (reads_own_shards), but has no embed_shard")


def _rename(step: Step, which: str = "it") -> str:
    if step.column_argument:
        return f"Give {which} another column name ({step.column_argument}=...)"
    return f"Have {type(step).__name__}.columns() name another"
