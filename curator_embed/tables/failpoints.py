"""Named points of a shard's life at which a test can kill the process.

Set ``CURATOR_EMBED_FAILPOINT=NAME`` or ``NAME:K`` (the K-th time, counted per process) and the
process dies by SIGKILL there, as a power cut would have it. With ``NAME:K:FILE`` only the first
process that gets there dies, the one that creates the file.
"""

from __future__ import annotations

import os
import signal
import threading

NAMES = (
    "shard.started",
    "shard.read",
    "shard.embedded",
    "output.temporary_opened",
    "output.temporary_written",
    "output.replaced",
    "shard.finished",
)

_lock = threading.Lock()
_hits: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Die here when the environment says so; else do nothing."""
    wanted = os.environ.get("CURATOR_EMBED_FAILPOINT")
    if not wanted:
        return
    target, _, rest = wanted.partition(":")
    nth, _, once = rest.partition(":")
    if target != name:
        return
    with _lock:
        _hits[name] = _hits.get(name, 0) + 1
        if _hits[name] == int(nth or 1) and (not once or _first(once)):
            os.kill(os.getpid(), signal.SIGKILL)


def _first(file: str) -> bool:
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
