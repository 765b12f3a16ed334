"""Small faults for a module's source: one change each, so that a test suite can be asked whether it sees them.

Pure functions from source to mutants; `run.py` runs the tests against them.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

Span = tuple[int, int]
"""Start and end of a piece of source, in characters."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        line: the line it begins on, counted from 1.
        before, after: the whole lines it touches, white space collapsed.
        source: the module with the change.
    """

    line: int
    before: str
    after: str
    source: str


COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "argmin": "argmax",
    "argmax": "argmin", "minimum": "maximum", "maximum": "minimum", "startswith": "endswith",
    "endswith": "startswith", "sorted": "list",
}  # fmt: skip
"""Functions and methods that are easily mistaken for each other."""

GENERIC = {"Callable", "Iterable", "Literal", "Mapping", "Sequence", "dict", "frozenset", "list", "set", "tuple"}
"""What a name for a type begins with, as in ``Size = tuple[int, int]``."""
REMOVABLE = (ast.Raise, ast.Return, ast.Continue, ast.Break, ast.Delete, ast.AugAssign)


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines, each source once."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    def span(node: ast.stmt | ast.expr | ast.keyword) -> Span:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    found: dict[str, Mutant] = {}
    for node, changed in _changes(tree):
        start, end = span(node)
        text = changed if isinstance(changed, str) else ast.unparse(ast.fix_missing_locations(changed))
        if isinstance(node, ast.expr) and isinstance(changed, ast.expr) and not isinstance(changed, ast.Constant):
            text = f"({text})"
        mutated = source[:start] + text + source[end:]
        first, last = source.rfind("\n", 0, start) + 1, source.find("\n", end)
        after = mutated[first : last + len(mutated) - len(source)]
        line = source.count("\n", 0, start) + 1
        found.setdefault(mutated, Mutant(line, _collapsed(source[first:last]), _collapsed(after), mutated))
    found.pop(source, None)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _collapsed(text: str) -> str:
    return " ".join(text.split())


Change = tuple[ast.stmt | ast.expr, ast.AST | str]
"""A node, and what stands in its place: a node, or source."""


def _changes(tree: ast.Module) -> Iterator[Change]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    last = {node.body[-1] for node in functions if isinstance(node.body[-1], ast.Return)}
    indices = {node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)}
    for node in _worth_changing(tree):
        match node:
            case ast.Compare():
                yield from _comparisons(node)
            case ast.BoolOp():
                yield from _conditions(node)
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield node, node.operand
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                yield node, ast.BinOp(left, ARITHMETIC[type(op)](), right)
            case ast.Constant():
                yield from ((node, ast.Constant(value)) for value in _other_values(node.value))
            case ast.Dict():
                yield from _without_one(node, ("keys", "values"))
            case ast.List() | ast.Set() | ast.Tuple() if not isinstance(getattr(node, "ctx", None), ast.Store):
                if node not in indices:
                    yield from _without_one(node, ("elts",))
            case ast.Call():
                yield from _without_one(node, ("keywords",))
                yield from _other_function(node)
            case ast.If() | ast.IfExp() | ast.While():
                yield from ((node.test, ast.Constant(value)) for value in (True, False) if _ends(node, value))
            case ast.comprehension(ifs=tests):
                yield from ((test, ast.Constant(True)) for test in tests)
            case (
                ast.Expr(value=ast.Call() | ast.Await() | ast.Yield())
                | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
            ):
                yield node, "pass"
        if isinstance(node, REMOVABLE) and node not in last:
            yield node, "pass"
        if isinstance(node, ast.Return) and node.value is not None:
            yield node, "return None"


def _ends(node: ast.AST, value: bool) -> bool:
    """Whether a condition that is always this can come to an end."""
    return not (isinstance(node, ast.While) and value)


def _worth_changing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below, without what is read by people and type checkers only."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _is_for_readers(child):
                continue
            yield child
            if isinstance(child, ast.Raise):  # the type and the message of an error are for people, too
                continue
            yield from _worth_changing(child)


def _is_for_readers(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Assert():
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))) if text == name.lower():
            return True  # a member of an enumeration, written as it is called
        case ast.Assign(value=ast.Subscript(value=ast.Name(id=name))):
            return name in GENERIC
    return False


def _comparisons(node: ast.Compare) -> Iterator[Change]:
    for place, op in enumerate(node.ops):
        for other in COMPARISONS[type(op)]:
            changed = copy.deepcopy(node)
            changed.ops[place] = other()
            yield node, changed


def _conditions(node: ast.BoolOp) -> Iterator[Change]:
    yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    for place in range(len(node.values)):
        rest = node.values[:place] + node.values[place + 1 :]
        yield node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1]
    if isinstance(value, str | bytes) and len(value.split()) < 2:  # more than a word is for people
        return [value[1:] or ("x" if isinstance(value, str) else b"x")]
    return []


def _without_one(node: ast.expr, lists: tuple[str, ...]) -> Iterator[Change]:
    for place in range(len(getattr(node, lists[0]))):
        changed = copy.deepcopy(node)
        for name in lists:
            del getattr(changed, name)[place]
        yield node, changed


def _other_function(node: ast.Call) -> Iterator[Change]:
    match node.func:
        case ast.Name(id=name) if name in NAMES:
            yield node.func, ast.Name(NAMES[name])
        case ast.Attribute(value=value, attr=name) if name in NAMES:
            yield node.func, ast.Attribute(value, NAMES[name])
