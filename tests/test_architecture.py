"""What may import what: the table of rooms in docs/architecture.md, held against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import pytest

import curator_embed

PACKAGE = Path(curator_embed.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
FRONT = {"__init__", "__main__"}
"""The package's own front: what it offers is what the rooms have."""


def allowed() -> dict[str, set[str]]:
    """Room -> rooms that it may import, from the page's table."""
    rows = re.findall(r"^\| (`[^|]+`) \| [^|]+ \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    found = {room: set(re.findall(r"`(\w+)`", may)) for names, may in rows for room in re.findall(r"`(\w+)", names)}
    for names, may in rows:
        if may == "everything":
            found |= {room: set(found) for room in re.findall(r"`(\w+)", names)}
    # Who may import a room may import what that room may: the table names the nearest.
    while True:
        wider = {room: may | {below for near in may for below in found[near]} for room, may in found.items()}
        if wider == found:
            return found
        found = wider


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Rooms that a module imports when it runs (not for annotations alone), with the line."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "curator_embed" and rest:
                yield rest.partition(".")[0], node.lineno


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_room_is_on_the_page() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - FRONT
    assert rooms == set(allowed())


def test_rooms_import_only_what_they_may() -> None:
    may = allowed()
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line} imports {room}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if (own := room_of(path)) not in FRONT
        for room, line in imports(path)
        if room in may and room != own and room not in may[own]
    ]
    assert not wrong


ASKING = {"datasets", "execution", "pipeline", "cli", "report"}
"""Rooms that know steps by their contract alone."""


def test_steps_are_asked_by_their_contract_alone() -> None:
    """Neither by ``getattr``, which takes a forgotten answer for a default, nor as ``Any``, which no checker sees."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if room_of(path) in ASKING
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_past_the_contract(node)
    ]
    assert not wrong


def asks_past_the_contract(node: ast.AST) -> TypeGuard[ast.expr | ast.stmt]:
    if isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ("getattr", "hasattr", "vars"):
        return named_like_a_step(node.args[0])
    if isinstance(node, ast.AnnAssign | ast.arg) and node.annotation is not None:
        name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
        return ast.unparse(node.annotation) == "Any" and named_like_a_step(ast.Name(name))
    return False


def named_like_a_step(asked: ast.expr) -> bool:
    return re.search(r"(?<![a-z])(step|embedder)s?(?![a-z])", ast.unparse(asked)) is not None


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("getattr(step, 'device', None)", True),
        ("hasattr(self.job.steps[position], 'limits')", True),
        ("getattr(type(the_embedder), 'certify')", True),
        ("step: Any = job.steps[0]", True),
        ("def eager(step: Any) -> Any: ...", True),
        ("getattr(os, 'O_CLOEXEC', 0)", False),
        ("getattr(stepwise, 'x')", False),
        ("step: Step = job.steps[0]", False),
    ],
)
def test_what_asking_past_the_contract_is(code: str, wrong: bool) -> None:
    assert any(map(asks_past_the_contract, ast.walk(ast.parse(code)))) is wrong
