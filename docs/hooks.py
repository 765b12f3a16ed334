"""What the documentation takes from the code while it is built, so that it cannot say something else.

``<!-- help: embed -->`` becomes the command's own help, ``<!-- reasons -->`` the table of reason codes,
``<!-- notebook: 02-folder-to-table -->`` a tutorial's text and code, and the home page is the README.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in one page's markers."""
    if page.file.src_uri == "index.md":
        return _home()
    markdown = re.sub(r"<!-- help: ?([a-z-]*) -->", lambda match: _help(match[1]), markdown)
    markdown = re.sub(r"<!-- notebook: ([a-z0-9-]+) -->", lambda match: _notebook(match[1]), markdown)
    return markdown.replace("<!-- reasons -->", _reasons())


def _home() -> str:
    """The README, its links turned into those of the site; files outside it become plain names."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\[([^]]+)\]\(docs/([^)]+)\)", r"[\1](\2)", text)
    text = re.sub(r"\(tutorials/\d+-([a-z-]+)\.ipynb\)", r"(tutorial-\1.md)", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|[a-z-]+\.md\))([^)]+)\)|\[([^]]+)\]\(CHANGELOG\.md\)", _plain, text)


def _plain(match: re.Match[str]) -> str:
    return f"`{match[2] or 'CHANGELOG.md'}`"


def _help(name: str) -> str:
    from typer.testing import CliRunner

    from curator_embed.cli.main import app

    result = CliRunner().invoke(app, [*filter(None, [name]), "--help"], prog_name="curator-embed", terminal_width=96)
    if result.exit_code != 0:
        raise ValueError(f"docs name a command that is not there: {name}")
    return f"```text\n{result.stdout.strip()}\n```"


def _notebook(name: str) -> str:
    """A notebook's cells as markdown; it is kept without outputs, so there are none to show."""
    cells = json.loads((REPO / "tutorials" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    fences = {"markdown": "{}", "code": "```python\n{}\n```"}
    shown = [fences[cell["cell_type"]].format("".join(cell["source"])) for cell in cells]
    where = f"*This is the notebook `tutorials/{name}.ipynb`. Run it to see its tables and pictures.*"
    return "\n\n".join([shown[0], where, *shown[1:]])


def _reasons() -> str:
    from curator_embed.errors import Reason

    source = inspect.getsource(Reason)
    rows = re.findall(r'= "([a-z_]+)"  # (.+)', source)
    if [code for code, _ in rows] != list(Reason):
        raise ValueError("a reason code has no comment that says what it means")
    return "\n".join(["| code | what it means |", "|---|---|", *(f"| `{code}` | {why} |" for code, why in rows)])
