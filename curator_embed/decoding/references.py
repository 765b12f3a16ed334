"""What code uses beside itself: closures, globals, and what it names of modules that are no installed packages.

Apart from ``digest`` because it reads code and makes no digest of it. Code of Python and of installed packages is known
by name and version; everybody else's can change from one run to the next.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

RECORDED = frozenset({"torch", "torchvision", "timm", "PIL", "numpy", __name__.partition(".")[0]})
"""Packages whose versions are recorded with a column, or promised to give the same; they make nothing out of date."""

_NOT_CODE = re.compile(
    r"__(dict|weakref|doc|module|qualname|annotate.*|annotations|slotnames|firstlineno|static_attributes|"
    r"abstractmethods|dataclass_\w+|match_args|orig_bases|parameters)__|_abc_impl"
)
"""Entries of a class that say nothing about what it does, or that Python adds when it likes."""


def is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package, so that its name and version say what it does."""
    top = (module or "").partition(".")[0]
    return bool(top) and _is_installed(top)


@functools.cache
def _is_installed(top: str) -> bool:
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top in sys.builtin_module_names or top == __name__.partition(".")[0]:
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return False
    places = [spec.origin] if spec is not None and spec.origin else []
    places += list(spec.submodule_search_locations or ()) if spec is not None else []
    homes = [PurePath(sysconfig.get_paths()[kind]) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]

    def is_home(place: str) -> bool:
        path = PurePath(place)
        here = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        return place in ("built-in", "frozen") or here or any(path.is_relative_to(home) for home in homes)

    return any(map(is_home, places))


def name_of(value: Any) -> tuple[str, ...] | None:
    """(module, name, version) where these say all about a value: an installed module, or a function or class of one.

    The version is empty for Python's own and for ``RECORDED`` packages. None for everything else.
    """
    if isinstance(value, types.ModuleType):
        owner, name = value.__name__, ""
    elif isinstance(value, type | types.FunctionType):
        owner, name = value.__module__, value.__qualname__
        if "<" in name:  # made by a function, of what that was given
            return None
    elif isinstance(value, types.BuiltinFunctionType):
        if not (value.__self__ is None or isinstance(value.__self__, types.ModuleType | type)):
            return None
        return value.__module__ or getattr(value.__self__, "__name__", ""), value.__qualname__
    elif isinstance(value, types.MethodDescriptorType | types.WrapperDescriptorType | types.ClassMethodDescriptorType):
        return value.__objclass__.__module__, value.__qualname__
    else:
        return None
    if not is_installed(owner):
        return None
    return owner, name, _version(owner.partition(".")[0])


@functools.cache
def _version(top: str) -> str:
    """Of an installed package."""
    if top in RECORDED or top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return ""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        own = getattr(sys.modules.get(top), "__version__", None)
        if isinstance(own, str):
            return own
        found = importlib.metadata.packages_distributions().get(top)  # which takes seconds
        return importlib.metadata.version(found[0]) if found else ""


def says_what_a_class_does(name: str) -> bool:
    """Whether an entry of a class's dictionary does; others Python adds, some of them only when it likes."""
    return _NOT_CODE.fullmatch(name) is None


def functions_of(kind: type) -> Iterator[types.FunctionType]:
    """Functions of a class itself, those within properties, classmethods and the like included."""
    for name, value in sorted(vars(kind).items()):
        if says_what_a_class_does(name):
            yield from (inner for inner in unwrapped(value) or [value] if isinstance(inner, types.FunctionType))


def unwrapped(value: Any) -> list[Any] | None:
    """What a property, a classmethod, a cached function and the like are made of; None for anything else."""
    if isinstance(value, property):
        return [part for part in (value.fget, value.fset, value.fdel) if part is not None]
    if isinstance(value, classmethod | staticmethod):
        return [value.__func__]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, functools.partialmethod):
        return [value.func, value.args, value.keywords]
    if isinstance(value, functools.singledispatchmethod):
        return [value.func]
    if isinstance(value, _CACHED):
        return [value.__wrapped__]
    return None


_CACHED = type(functools.lru_cache(lambda: None))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def used_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a function uses from outside, in the order of its code: closures, globals, and of modules
    that are no installed packages' whatever it names of them."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            yield name, None
    known, named = function.__globals__, dict.fromkeys(n for c in _codes(function.__code__) for n in c.co_names)
    for name in _global_names(function.__code__):
        if name not in known:
            continue  # a builtin, or not there yet: the code has the name
        if isinstance(known[name], types.ModuleType):
            yield from _used_of(known[name], named)
        else:
            yield name, known[name]
    for module in _imported(function):
        yield from _used_of(module, named)


_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})


def _global_names(code: types.CodeType) -> list[str]:
    instructions = (each for part in _codes(code) for each in dis.get_instructions(part))
    return list(dict.fromkeys(str(i.argval) for i in instructions if i.opname in _LOADS))


def _used_of(module: types.ModuleType, named: Iterable[str], seen: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """What code may use of a module, by the names in it; nothing of an installed package's, which code names anyway."""
    if is_installed(module.__name__) or module.__name__ in seen:
        return
    for name in named:
        value = vars(module).get(name)
        if isinstance(value, types.ModuleType):
            yield from _used_of(value, named, (*seen, module.__name__))
        elif name in vars(module):
            yield f"{module.__name__}.{name}", value


def _imported(function: types.FunctionType) -> Iterator[types.ModuleType]:
    """Modules that a function imports when it runs and that are no installed packages'."""
    package = function.__globals__.get("__package__") or ""
    for code in _codes(function.__code__):
        level = 0
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and isinstance(step.argval, int):
                level = step.argval
            elif step.opname == "IMPORT_NAME":
                name = f"{'.' * level}{step.argval}"
                if level == 0 and is_installed(str(step.argval)):
                    continue
                try:
                    yield importlib.import_module(name, package or None)
                except Exception:  # whatever a module does when it is imported; what is not there cannot change values
                    continue
