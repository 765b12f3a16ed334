"""What determines a value, as one digest: code, parameters and state of functions and objects that somebody wrote.

The digest is the same in every process and changes when any of it does. Code of Python and of installed packages counts
by name and version (``references.name_of``). What has no state that can be read is told, not passed over.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import queue
import re
import sys
import threading
import types
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from curator_embed.decoding.references import (
    functions_of,
    is_installed,
    name_of,
    says_what_a_class_does,
    unwrapped,
    used_by,
)

MOST_OBJECTS = 100_000
"""Objects that are looked at; a transform that leads to more of them is not understood."""
DEEPEST = 100
"""Objects within objects that are looked at."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range, type(...), type(NotImplemented))
_NEUTRAL = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Thread,
    threading.local,
    queue.SimpleQueue,
    Executor,
)
"""What code needs to run, and no value depends on."""


@dataclass(frozen=True)
class Digest:
    """What could be seen of a value, and what could not.

    Attributes:
        sha256: of what could be seen, in hexadecimal.
        unseen: "where (type)" of every object that has no state that can be read.
    """

    sha256: str
    unseen: tuple[str, ...] = ()


def digest_of(value: Any, name: str) -> Digest:
    """Digest a function, a callable object or any other value.

    Counted are the code of functions, their closures, defaults and attributes, and what they use of their module and of
    others that are not installed packages; the state of objects, and the code of their classes; arrays and tensors by
    their bytes. An object that has a text as attribute ``digest`` stands for itself by that text, and one with a method
    ``digest_state`` by what that gives.

    Args:
        name: what it is called in ``unseen``.
    """
    walk = _Walk()
    walk.visit(value, name)
    return Digest(walk.hexdigest(), tuple(dict.fromkeys(walk.unseen)))


def digest_of_classes(kinds: Iterable[type]) -> str:
    """Digest the code of classes, where their source cannot be had, and what it uses; hexadecimal."""
    walk = _Walk()
    for kind in kinds:
        walk.visit(kind, kind.__name__)
    return walk.hexdigest()


def digest_around(kinds: Iterable[type]) -> str | None:
    """Digest what the code of classes uses of their modules and closures, the classes themselves left out.

    Returns:
        hexadecimal; None where they use nothing that is not an installed package's.
    """
    own, walk, found = set(kinds), _Walk(), False
    for function in (function for kind in kinds for function in functions_of(kind)):
        for name, value in used_by(function):
            if name_of(value) is None and not (isinstance(value, type) and value in own):
                walk.put("uses", name)
                walk.visit(value, name)
                found = True
    return walk.hexdigest() if found else None


@dataclass
class _Walk:
    """Feeds a hash with what it finds, each object once."""

    hash: Any = field(default_factory=hashlib.sha256)
    unseen: list[str] = field(default_factory=list)
    left: list[int] = field(default_factory=lambda: [MOST_OBJECTS])
    depth: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)
    _kept: list[Any] = field(default_factory=list)

    def hexdigest(self) -> str:
        """Of all that was fed."""
        return str(self.hash.hexdigest())

    def put(self, tag: str, *texts: str | bytes) -> None:
        """Feed texts, so that no two sequences of them look alike."""
        for text in (tag, *texts):
            data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
            self.hash.update(len(data).to_bytes(8, "little"))
            self.hash.update(data)

    def miss(self, value: Any, path: str, why: str = "") -> None:
        """Note what cannot be seen."""
        kind = type(value)
        self.put("unseen", kind.__module__, kind.__qualname__)
        self.unseen.append(f"{path} ({why or f'{kind.__module__}.{kind.__qualname__}'.removeprefix('builtins.')})")

    def visit(self, value: Any, path: str) -> None:
        """Feed one value and all that it leads to."""
        if type(value) in _PLAIN:
            self._plain(value)
            return
        if id(value) in self._numbers:
            self.put("again", str(self._numbers[id(value)]))
            return
        self.left[0] -= 1
        if self.left[0] < 0 or self.depth >= DEEPEST:
            few = f"more than {MOST_OBJECTS:,} objects" if self.left[0] < 0 else f"more than {DEEPEST} levels"
            self.miss(value, path, few)
            return
        if type(value) is not tuple and type(value) is not frozenset:  # constants are shared or not, as it happens
            self._numbers[id(value)] = len(self._numbers)
            self._kept.append(value)  # else another object may get its id
        self.depth += 1
        try:
            self._object(value, path)
        finally:
            self.depth -= 1

    def _plain(self, value: Any) -> None:
        if isinstance(value, float):
            self.put("float", value.hex())
        elif isinstance(value, complex):
            self.put("complex", value.real.hex(), value.imag.hex())
        elif isinstance(value, bytes | bytearray):
            self.put(type(value).__name__, bytes(value))
        else:
            self.put(type(value).__name__, value if isinstance(value, str) else repr(value))

    def _object(self, value: Any, path: str) -> None:
        declared = _declared(value)
        if declared is not None:
            self.put("declared", declared)
        elif (name := name_of(value)) is not None:
            self.put("named", *name)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, types.CodeType):
            self._code(value, path)
        elif isinstance(value, types.MethodType):
            self.put("method")
            self.visit(value.__func__, path)
            self.visit(value.__self__, f"{path}.__self__")
        elif isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
            self.put("method of", value.__name__)
            self.visit(value.__self__, f"{path}.__self__")
        elif isinstance(value, type):
            self._class(value, path)
        elif isinstance(value, types.ModuleType):
            self._module(value, path)
        elif isinstance(value, enum.Enum):
            self.put("enum", type(value).__module__, type(value).__qualname__, value.name)
            self.visit(value.value, path)
        elif isinstance(value, _NEUTRAL):
            self.put("neutral", type(value).__qualname__)
        elif isinstance(value, logging.Logger):
            self.put("logger", value.name)
        elif isinstance(value, re.Pattern):
            self.put("pattern", str(value.flags))
            self.visit(value.pattern, path)
        elif (inner := unwrapped(value)) is not None:
            self.put("wrapper", type(value).__qualname__, str(len(inner)))
            for part in inner:
                self.visit(part, path)
        else:
            try:
                done = self._array(value)
            except Exception:  # of the many kinds of tensors some give no bytes
                self.miss(value, path)
                return
            if not done:
                self._container_or_instance(value, path)

    def _container_or_instance(self, value: Any, path: str) -> None:
        kind = type(value)
        if kind is tuple or kind is list:
            self.put(kind.__name__, str(len(value)))
            for number, item in enumerate(value):
                self.visit(item, f"{path}[{number}]")
        elif kind is dict or isinstance(value, types.MappingProxyType):
            self.put("dict", str(len(value)))
            for key, item in value.items():
                self.visit(key, f"{path} key")
                self.visit(item, f"{path}[{key!r}]" if isinstance(key, str | int) else f"{path}[...]")
        elif kind is set or kind is frozenset:
            self.put("set", str(len(value)), *sorted(self._alone(item, f"{path} item") for item in value))
        elif kind in (types.MemberDescriptorType, types.GetSetDescriptorType):
            self.put("slot", value.__name__)
        else:
            self._instance(value, path)

    def _alone(self, value: Any, path: str) -> str:
        """The digest of one value of many that have no order."""
        walk = _Walk(unseen=self.unseen, left=self.left, depth=self.depth)
        walk.visit(value, path)
        return walk.hexdigest()

    def _array(self, value: Any) -> bool:
        """Arrays, tensors and their types; False where it is none."""
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if torch is not None:
            if isinstance(value, torch.Tensor) and not value.is_meta:
                plain = value.detach().to("cpu").to_dense().contiguous()
                self.put("tensor", str(plain.dtype), str(tuple(plain.shape)))
                self.put("bytes", plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
                return True
            if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
                self.put("torch", str(value))
                return True
            if isinstance(value, torch.Generator):
                self.put("generator")
                self.visit(value.get_state(), "")
                return True
            if isinstance(value, torch.jit.ScriptModule | torch.jit.ScriptFunction):
                self.put("script", _SCRIPT_NOISE.sub("", str(value.inlined_graph)))
                state = value.state_dict() if isinstance(value, torch.jit.ScriptModule) else {}
                self.visit(dict(state), "")
                return True
        if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
            self.put("array", str(value.dtype), str(value.shape))
            if value.dtype.hasobject:
                self.visit(value.tolist(), "")
            else:
                self.put("bytes", value.tobytes())
            return True
        if numpy is not None and isinstance(value, numpy.ufunc):
            self.put("ufunc", value.__name__)
            return True
        return False

    def _function(self, value: types.FunctionType, path: str) -> None:
        self.put("function")
        self.visit(value.__code__, path)
        for part, what in (
            (value.__defaults__, "defaults"), (value.__kwdefaults__, "defaults"), (vars(value), "attributes"),
        ):  # fmt: skip
            self.visit(part or None, f"{path} {what}")
        if is_installed(value.__module__):  # made in an installed package by its code, for a caller: lambdas, closures
            self.put("named", value.__module__, value.__qualname__)
            self.visit([cell.cell_contents for cell in value.__closure__ or ()], f"{path} closure")
            return
        for name, used in used_by(value):
            self.put("uses", name)
            self.visit(used, f"{path}: {name}")
        self.put("end")

    def _code(self, value: types.CodeType, path: str) -> None:
        counts = value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags
        arguments = value.co_varnames[: value.co_argcount + value.co_kwonlyargcount]
        self.put("code", value.co_code, value.co_exceptiontable, repr(counts))
        for names in (arguments, value.co_names, value.co_freevars, value.co_cellvars, value.co_consts):
            self.put("parts", str(len(names)))
            for part in names:
                self.visit(part, path)

    def _class(self, value: type, path: str) -> None:
        self.put("class")
        if issubclass(value, enum.Enum):
            self.visit([(member.name, member.value) for member in value], path)
        for kind in value.__mro__:
            if (named := name_of(kind)) is not None:
                self.put("named", *named)
                continue
            for name, item in sorted(vars(kind).items()):
                is_member = isinstance(item, enum.Enum) or (name.startswith("_") and issubclass(kind, enum.Enum))
                if says_what_a_class_does(name) and not is_member:
                    self.put("has", name)
                    self.visit(item, f"{path}.{name}")
            self.put("end")

    def _module(self, value: types.ModuleType, path: str) -> None:
        """A module as a value: nobody knows what will be used of it, so all functions and classes of its own count."""
        self.put("module", value.__name__)
        for name, item in sorted(vars(value).items()):
            if getattr(item, "__module__", None) == value.__name__ or (type(item) in _PLAIN and name[:2] != "__"):
                self.put("has", name)
                self.visit(item, f"{path}.{name}")
        self.put("end")

    def _instance(self, value: Any, path: str) -> None:
        """An object: the code of its class, and what it would be pickled as."""
        self.put("instance")
        if callable(_static(type(value), "digest_state")):
            self.visit(type(value), path)
            self._state(value, value.digest_state(), path)
            return
        try:
            registered = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(4) if registered is None else registered(value)
        except Exception:  # there is no telling what a class raises
            self.miss(value, path)
            return
        self.visit(type(value), path)
        if isinstance(reduced, str):
            self.put("global", getattr(value, "__module__", None) or "", reduced)
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self.visit(make, path)
        self.put("made of", str(len(arguments)))
        for argument in arguments:
            if argument is not type(value):
                self.visit(argument, path)
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            self._state(value, part, path)
        self.visit(None if items is None else list(items), path)
        self.visit(None if pairs is None else dict(pairs), path)

    def _state(self, value: Any, state: Any, path: str) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            self.visit(state, path)
            return
        # What a cached property holds follows from the rest, and is there or not, as it happens.
        kept = {
            n: item for n, item in state.items() if not isinstance(_static(type(value), n), functools.cached_property)
        }
        self.put("state", str(len(kept)))
        for name, item in sorted(kept.items()):
            self.put("has", name)
            self.visit(item, f"{path}.{name}")


_SCRIPT_NOISE = re.compile(r"___torch_mangle_\d+\.|[ \t]+#.*$", re.MULTILINE)
"""What torch adds to the text of a script: a count of classes of one name, and where the code stood."""


def _static(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _declared(value: Any) -> str | None:
    """The text by which an object stands for itself, its attribute ``digest``."""
    if isinstance(value, types.ModuleType):
        return None
    try:
        text = value.digest
    except Exception:  # objects may do anything when they are asked for an attribute
        return None
    return text if isinstance(text, str) else None
