"""What mutants are made of a source, and how explanations are read. The runs themselves are `make test-mutation`."""

from __future__ import annotations

import ast

import pytest

from tests.mutation.mutants import mutants_of
from tests.mutation.run import EQUIVALENT, ROOT, TARGETS, read_explanations


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("x = a < b", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a == b", {"x = (a != b)"}),
        ("x = a and b", {"x = (a or b)", "x = (b)", "x = (a)"}),
        ("x = not a", {"x = (a)"}),
        ("x = 7", {"x = 8", "x = 6"}),
        ("x = True", {"x = False"}),
        ("x = 'name'", {"x = 'ame'"}),
        ("x = 'a sentence for people'", set()),
        ("x = a + b", {"x = (a - b)"}),
        ("x = {'k': a, 'l': b}", {"x = ({'l': b})", "x = ({'k': a})", "x = {'x': a, 'l': b}", "x = {'k': a, 'x': b}"}),
        ("x = {a, b}", {"x = ({b})", "x = ({a})"}),
        ("x = f(a, k=b)", {"x = (f(a))"}),
        ("x = min(a, b)", {"x = (max)(a, b)"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if True]"}),
        ("f(a)", {"pass"}),
        ("a.b = c", {"pass"}),
        ("raise E('why', 3)", {"pass"}),
        ("ü = a < 'ä'", {"ü = (a <= 'ä')", "ü = (a >= 'ä')", "ü = a < 'x'"}),
        ("def f(x: int = b): return x", {"def f(x: int = b): return None"}),
        ("def f(x: int = 1): pass", {"def f(x: int = 2): pass", "def f(x: int = 0): pass"}),
        ("Size = tuple[int, int]", set()),
        ("OTHER_IDS = 'other_ids'", set()),
    ],
)  # fmt: skip
def test_each_kind_of_change(line: str, changed: set[str]) -> None:
    found = mutants_of(f"import a\n\n{line}\n")
    assert {mutant.after for mutant in found} == changed
    assert all(mutant.line == 3 and mutant.before == line for mutant in found)


def test_conditions_and_early_returns_are_taken_away() -> None:
    source = "def f(a):\n    if a:\n        return 1\n    return None\n"
    found = {(mutant.line, mutant.after) for mutant in mutants_of(source)}
    returns = {(3, "pass"), (3, "return None"), (3, "return 2"), (3, "return 0")}
    assert found == {(2, "if True:"), (2, "if False:")} | returns


def test_every_mutant_is_a_program_and_differs() -> None:
    for target in TARGETS.values():
        source = (ROOT / target.module).read_text()
        mutants = mutants_of(source)
        assert len({mutant.source for mutant in mutants} | {source}) == len(mutants) + 1
        for mutant in mutants[::20]:  # all of them would take minutes, and differ in one line each
            ast.parse(mutant.source)
        assert all((ROOT / path).is_file() for path in target.tests)


def test_explanations_name_their_module_and_their_reason() -> None:
    text = "a/b.py\n\n- x = 1\n+ x = 2\n+ x = 0\n# why not\n\n- y\n+ z\n# other\n\nc.py\n- y\n+ z\n# third\n"
    found = [(one.module, one.before, one.after, one.reason) for one in read_explanations(text)]
    assert found == [
        ("a/b.py", "x = 1", "x = 2", "why not"), ("a/b.py", "x = 1", "x = 0", "why not"),
        ("a/b.py", "y", "z", "other"), ("c.py", "y", "z", "third"),
    ]  # fmt: skip
    modules = {target.module for target in TARGETS.values()}
    assert {one.module for one in read_explanations(EQUIVALENT.read_text())} <= modules
