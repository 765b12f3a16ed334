"""How far a run is: a bar on a terminal or in a notebook, and in any case a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, Self

from tqdm.auto import tqdm

LINE_EVERY_S = 30.0
"""Seconds between two lines of the log."""

log = logging.getLogger(__name__)


class Progress:
    """Counts images; close it after use.

    Lines are logged at INFO where somebody wants to see progress and there is no bar, else at DEBUG.

    Args:
        total: images in all, None where not known.
        show: somebody wants to see it.
        counts: what is counted, where it is not images.
    """

    def __init__(self, total: int | None, show: bool, counts: str = "images") -> None:
        drawn = show and _can_draw()
        self._counts = counts
        unit = "img" if counts == "images" else counts
        self._bar: Any = tqdm(total=total, unit=unit, disable=not drawn, smoothing=0.1, dynamic_ncols=True)
        self._level = logging.INFO if show and not drawn else logging.DEBUG
        self._total, self._failed = total, 0
        self._began = self._told = time.monotonic()
        self.n = 0

    def update(self, images: int) -> None:
        """So many more are done."""
        self.n += images
        self._bar.update(images)
        now = time.monotonic()
        if now - self._told >= LINE_EVERY_S:
            self._told = now
            log.log(self._level, "%s", self._line(now - self._began))

    def set_postfix(self, *, failed: int) -> None:
        """So many of them have failed so far."""
        self._failed = failed
        self._bar.set_postfix(failed=failed, refresh=False)

    def set_postfix_str(self, text: str) -> None:
        """Say why nothing is being done; on the bar alone, because it is said again and again."""
        self._bar.set_postfix_str(text)

    def _line(self, seconds: float) -> str:
        rate = self.n / seconds
        of, left = "", ""
        if self._total:
            of = f" of {self._total:,} ({self.n / self._total:.0%})"
            missing = max(0, self._total - self.n)  # images of shards that are tried twice count twice on the way
            left = f", {tqdm.format_interval(missing / rate)} left" if rate else ""
        return f"{self.n:,}{of} {self._counts}, {self._failed:,} failed, {rate:,.1f} {self._counts}/s{left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()


def _can_draw() -> bool:
    """A bar redraws itself: in a file each of its states would stay."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
