"""Which rows have no value, and why: one reason code a row, and their tally. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from curator_embed.errors import Reason


def error_codes(
    sample_of_row: np.ndarray,
    ambiguous: np.ndarray,
    has_image: Sequence[bool],
    failed: Sequence[Mapping[int, Reason]],
    given: Sequence[Collection[str]],
    keys: Sequence[str],
) -> list[str | None]:
    """One reason a row, None where all went well.

    Args:
        sample_of_row: int64 (rows,): the ordinal of each row's sample, -1 for none.
        ambiguous: bool (rows,): its id occurs unequally often in table and images.
        has_image: per sample, whether there is an image, or was one that could not be read.
        failed: why samples failed, by ordinal, what was found first coming first: reading, decoding, embedding.
        given: for each embedder that reads shards itself, the ids that it gave vectors for.
        keys: the id of each sample.
    """
    codes: list[str | None] = []
    for row, ordinal in enumerate(sample_of_row.tolist()):
        code: Reason | None = None
        if ambiguous[row]:
            code = Reason.AMBIGUOUS_ID
        elif ordinal < 0 or not has_image[ordinal]:
            code = Reason.NO_IMAGE
        else:
            code = next((reasons[ordinal] for reasons in failed if ordinal in reasons), None)
            if code is None and any(keys[ordinal] not in ids for ids in given):
                code = Reason.EMBED_ERROR
        codes.append(None if code is None else str(code))
    return codes


def merged(first: Sequence[str | None], then: Sequence[str | None]) -> list[str | None]:
    """One code a row: the first that names a reason. Either may have no code for the last rows, or none at all."""
    length = max(len(first), len(then))
    codes = [(*some, *[None] * (length - len(some))) for some in (first, then)]
    return [one if one is not None else other for one, other in zip(*codes, strict=True)]


def tally(codes: Sequence[str | None]) -> dict[str, Any]:
    """Count rows by what became of them: ``read``, ``embedded``, ``failed`` with ``reasons``, ``no_image``."""
    reasons = Counter(code for code in codes if code is not None)
    no_image = reasons.pop(str(Reason.NO_IMAGE), 0)
    failed = sum(reasons.values())
    return {
        "read": len(codes),
        "embedded": len(codes) - failed - no_image,
        "failed": failed,
        "no_image": no_image,
        "reasons": dict(sorted(reasons.items())),
    }
