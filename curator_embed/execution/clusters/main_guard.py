"""Scripts without ``if __name__ == "__main__":``, told before a process is started that would run them again.

Apart from the clusters because it looks at the caller's own code. A worker process imports the script that started
it; where the call that starts workers is not guarded, each worker comes to it, too, and dies over it.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
import sys
from types import FrameType


def imported_by_a_worker() -> bool:
    """Whether this process is one that multiprocessing starts, still importing the script that started it."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def unguarded_call() -> str | None:
    """The place in the script that the caller was reached from, if a worker's import would come to it again.

    Returns:
        "path/to/script.py, line 3"; None where the call is guarded, or where no script is imported again: notebooks,
        ``python -c``, ``python -m package``.
    """
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    spec = getattr(main, "__spec__", None)
    if path is None or (spec is not None and spec.name.rpartition(".")[2] == "__main__"):
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and os.path.abspath(frame.f_code.co_filename) == os.path.abspath(path):
            return None if _is_guarded(path, frame.f_lineno) else f"{path}, line {frame.f_lineno}"
        frame = frame.f_back
    return None


def _is_guarded(path: str, line: int) -> bool:
    """Whether the statement on this line lies in an ``if`` about ``__name__``."""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return True  # not to be judged: the worker says so itself
    return any(
        isinstance(node, ast.If)
        and "__name__" in ast.unparse(node.test)
        and node.lineno <= line <= (node.end_lineno or line)
        for node in tree.body
    )
