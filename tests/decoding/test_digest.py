"""Digests of code and state: every change is seen, nothing else is, and what cannot be seen is told."""

from __future__ import annotations

import functools
import json
import os
import sqlite3
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import transforms

from curator_embed.decoding.digest import MOST_OBJECTS, Digest, digest_of
from curator_embed.decoding.references import is_installed, name_of
from curator_embed.decoding.spec import OpaqueTransform, spec_from_transform

HELPER = """
def add(x): return x + VALUE
class Adder:
    def __call__(self, x): return x + VALUE
BY = VALUE
"""
CASES = {
    "lambda": "transform = lambda x: x + VALUE",
    "function": "def transform(x): return x + VALUE",
    "another function called": "def transform(x): return (abs, round)[VALUE - 1](x)",
    "operator": "def transform(x): return [x - 3, x + 3][VALUE - 1]",
    "function in a function": "def transform(x):\n    def add(y): return y + VALUE\n    return add(x)",
    "default": "def transform(x, by=VALUE): return x + by",
    "keyword default": "def transform(x, *, by=VALUE): return x + by",
    "attribute": "def transform(x): return x + transform.by\ntransform.by = VALUE",
    "closure": "def make(by):\n    def add(x): return x + by\n    return add\ntransform = make(VALUE)",
    "closure of a closure": (
        "def make(by):\n    def inner(x): return x + by\n    def add(x): return inner(x)\n    return add\n"
        "transform = make(VALUE)"
    ),
    "list in a closure": "def make(by):\n    return lambda x: x + by[0]\ntransform = make([VALUE])",
    "array in a closure": "def make(by):\n    return lambda x: x + by\ntransform = make(np.full(3, VALUE, np.float16))",
    "partial": "transform = functools.partial(operator.add, VALUE)",
    "partial keyword": "transform = functools.partial(torch.nn.functional.interpolate, size=VALUE)",
    "partial of a function": "def add(x, y): return x + y * VALUE\ntransform = functools.partial(add, 1)",
    "operator object": "transform = operator.itemgetter(VALUE)",
    "global constant": "BY = VALUE\ndef transform(x): return x + BY",
    "global list": "BY = [[VALUE]]\ndef transform(x): return x + BY[0][0]",
    "global function": "def add(x): return x + VALUE\ndef transform(x): return add(x)",
    "global function of a global function": (
        "def add(x): return x + VALUE\ndef more(x): return add(x)\ndef transform(x): return more(x)"
    ),
    "global in a nested lambda": "BY = VALUE\ndef transform(x): return (lambda y: y + BY)(x)",
    "global in a comprehension": "BY = VALUE\ndef transform(x): return [y + BY for y in x]",
    "global class": "class Add:\n    by = VALUE\ndef transform(x): return x + Add.by",
    "global object": "import types\nbag = types.SimpleNamespace(by=VALUE)\ndef transform(x): return x + bag.by",
    "functions that call each other": (
        "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - VALUE)\ntransform = even"
    ),
    "another module": "import helper\ndef transform(x): return helper.add(x)",
    "class of another module": "import helper\ntransform = helper.Adder()",
    "constant of another module": "import helper\ndef transform(x): return x + helper.BY",
    "name from another module": "from helper import add\ndef transform(x): return add(x)",
    "import when it runs": "def transform(x):\n    from helper import add\n    return add(x)",
    "module when it runs": "def transform(x):\n    import helper\n    return helper.add(x)",
    "module kept": "import helper\nclass Own:\n    def __init__(self): self.m = helper\n"
    "    def __call__(self, x): return self.m.add(x)\ntransform = Own()",
    "decorated": (
        "def twice(f):\n    @functools.wraps(f)\n    def call(x): return f(f(x))\n    return call\n"
        "@twice\ndef transform(x): return x + VALUE"
    ),
    "cached": "@functools.lru_cache\ndef transform(x): return x + VALUE",
    "object": "class Own:\n    def __init__(self, by): self.by = by\n    def __call__(self, x): return x + self.by\n"
    "transform = Own(VALUE)",
    "object's code": "class Own:\n    def __call__(self, x): return x + VALUE\ntransform = Own()",
    "parent's code": (
        "class Parent:\n    def add(self, x): return x + VALUE\nclass Own(Parent):\n"
        "    def __call__(self, x): return self.add(x)\ntransform = Own()"
    ),
    "class attribute": "class Own:\n    by = VALUE\n    def __call__(self, x): return x + self.by\ntransform = Own()",
    "class": "class transform:\n    def __init__(self, x): self.x = x + VALUE",
    "slots": (
        "class Own:\n    __slots__ = ('by',)\n    def __init__(self, by): self.by = by\n"
        "    def __call__(self, x): return x + self.by\ntransform = Own(VALUE)"
    ),
    "bound method": (
        "class Own:\n    def __init__(self, by): self.by = by\n    def add(self, x): return x + self.by\n"
        "transform = Own(VALUE).add"
    ),
    "bound method's code": "class Own:\n    def add(self, x): return x + VALUE\ntransform = Own().add",
    "bound method of a container": "transform = [VALUE, 2, 3].index",
    "class method": (
        "class Own:\n    by = VALUE\n    @classmethod\n    def add(cls, x): return x + cls.by\ntransform = Own.add"
    ),
    "static method": "class Own:\n    @staticmethod\n    def add(x): return x + VALUE\ntransform = Own.add",
    "property": (
        "class Own:\n    @property\n    def by(self): return VALUE\n    def __call__(self, x): return x + self.by\n"
        "transform = Own()"
    ),
    "cached property": (
        "class Own:\n    @functools.cached_property\n    def by(self): return VALUE\n"
        "    def __call__(self, x): return x + self.by\ntransform = Own()"
    ),
    "object in an object": (
        "class Inner:\n    def __init__(self, by): self.by = by\nclass Own:\n    def __init__(self, by):\n"
        "        self.inner = {'a': [Inner(by)]}\n        self.inner['self'] = self\n"
        "    def __call__(self, x): return x\ntransform = Own(VALUE)"
    ),
    "own state": (
        "class Own:\n    def __init__(self, by): self.by, self.file = by, open(os.devnull)\n"
        "    def __getstate__(self): return {'by': self.by}\n    def __call__(self, x): return x\n"
        "transform = Own(VALUE)"
    ),
    "dataclass": (
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Own:\n    by: int = 0\n"
        "    def __call__(self, x): return x + self.by\ntransform = Own(VALUE)"
    ),
    "named tuple": "import collections\nOwn = collections.namedtuple('Own', 'by')\ntransform = Own(VALUE).__add__",
    "enum": (
        "import enum\nclass Way(enum.Enum):\n    A = VALUE\n    B = 3\n"
        "def transform(x, way=Way.A): return x + way.value"
    ),
    "enum's member": "import enum\nclass Way(enum.Enum):\n    A = 1\n    B = 2\n"
    "transform = functools.partial(print, Way(VALUE))",
    "set of constants": "def transform(x): return x in {VALUE, 'a', 'b', 'c', 3.5}",
    "set": "def make(some): return lambda x: x in some\ntransform = make({'a', 'b', 'c', str(VALUE)})",
    "frozenset of tuples": "SOME = frozenset([('a', VALUE), ('b', 3)])\ndef transform(x): return x in SOME",
    "ordered dict": "import collections\nBY = collections.OrderedDict(a=VALUE)\ndef transform(x): return BY",
    "order of a dict": "BY = [dict(a=1, b=2), dict(b=2, a=1)][VALUE - 1]\ndef transform(x): return [f for f in BY]",
    "regular expression": "import re\nBY = re.compile(f'{VALUE}+')\ndef transform(x): return BY",
    "bytes": "BY = bytes([VALUE])\ndef transform(x): return BY",
    "path": "import pathlib\nBY = pathlib.PurePosixPath(f'/{VALUE}')\ndef transform(x): return BY",
    "date": "import datetime\nBY = datetime.date(2020, 1, VALUE)\ndef transform(x): return BY",
    "small float": "def transform(x): return x + 1e-300 * VALUE",
    "sign of zero": "BY = [0.0, -0.0][VALUE - 1]\ndef transform(x): return x * BY",
    "true or one": "BY = [1, True][VALUE - 1]\ndef transform(x): return x * BY",
    "array": "BY = np.array([[1.0, VALUE]])\ndef transform(x): return x * BY",
    "shape of an array": "BY = np.arange(6).reshape(VALUE, -1)\ndef transform(x): return x * BY",
    "type of an array": "BY = np.zeros(3, ['i4', 'f4'][VALUE - 1])\ndef transform(x): return x * BY",
    "array of objects": "BY = np.array([None, VALUE], object)\ndef transform(x): return x * BY",
    "numpy scalar": "BY = np.float32(VALUE)\ndef transform(x): return x * BY",
    "tensor": "BY = torch.tensor([1.0, VALUE])\ndef transform(x): return x * BY",
    "bfloat16": "BY = torch.tensor([1.0, VALUE], dtype=torch.bfloat16)[1]\ndef transform(x): return x * BY",
    "view of a tensor": "BY = torch.arange(6).reshape(2, 3).T[VALUE]\ndef transform(x): return x * BY",
    "torch type": "BY = [torch.float32, torch.float16][VALUE - 1]\ndef transform(x): return x.to(BY)",
    "weights": "transform = torch.nn.Linear(2, 2)\ntorch.nn.init.constant_(transform.weight, VALUE)\n"
    "torch.nn.init.zeros_(transform.bias)",
    "buffer that is not saved": "transform = torch.nn.Identity()\n"
    "transform.register_buffer('by', torch.tensor(VALUE), persistent=False)",
    "module's parameters": "transform = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.AvgPool2d(VALUE))",
    "module's code": "class Own(torch.nn.Module):\n    def forward(self, x): return x + VALUE\ntransform = Own()",
    "script": "class Own(torch.nn.Module):\n    def forward(self, x: torch.Tensor): return x + VALUE\n"
    "transform = torch.jit.trace(Own(), torch.zeros(2))",
    "compose": "transform = transforms.Compose([transforms.Resize(VALUE), lambda x: x])",
    "lambda in a compose": "transform = transforms.Compose([transforms.ToTensor(), lambda x: x + VALUE])",
    "closure of a library": "import contextlib\n@contextlib.contextmanager\ndef transform(x):\n    yield x + VALUE",
    "image": "from PIL import Image\nBY = Image.new('RGB', (2, 2), (VALUE, 0, 0))\ndef transform(x): return BY",
    "random state": "import random\nBY = random.Random(VALUE)\ndef transform(x): return BY",
    "generator of numbers": "BY = np.random.default_rng(VALUE)\ndef transform(x): return BY",
    "generator of torch": "BY = torch.Generator().manual_seed(VALUE)\ndef transform(x): return BY",
}
"""Source of a module with a ``transform`` -> every one differs for two VALUEs."""

HEAD = "import functools, operator, os\nimport numpy as np\nimport torch\nfrom torchvision import transforms\n"


def made(source: str, value: int) -> Any:
    """The transform of a module that is made anew, as an edited file is after a restart."""
    helper, module = types.ModuleType("helper"), types.ModuleType("somebodys")
    exec(compile(HELPER.replace("VALUE", str(value)), "helper.py", "exec"), vars(helper))
    sys.modules |= {"helper": helper, "somebodys": module}
    exec(compile(HEAD + source.replace("VALUE", str(value)), "somebodys.py", "exec"), vars(module))
    return module.transform


@pytest.fixture(autouse=True)
def no_modules() -> Iterator[None]:
    yield
    for name in ("helper", "somebodys"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_every_change_is_seen_and_nothing_else(case: str) -> None:
    one, again, other = (digest_of(made(CASES[case], value), "transform") for value in (1, 1, 2))
    assert one == again
    assert one.sha256 != other.sha256
    assert one.unseen == ()


SCRIPT = """
import json, sys, warnings
sys.path.insert(0, {repo!r})
warnings.simplefilter("ignore")
from tests.decoding.test_digest import CASES, made
from curator_embed.decoding.digest import digest_of
print(json.dumps({{case: digest_of(made(source, 1), "transform").sha256 for case, source in CASES.items()}}))
"""


def test_digests_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(repo=str(Path(__file__).parents[2])))

    def digests(hash_seed: str) -> dict[str, str]:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(ran.stdout)
        return found

    first = digests("1")
    assert digests("2") == first
    assert first.keys() == CASES.keys()
    assert first["lambda"] == first["function"], "names of functions do not count"


PLAIN = st.sampled_from([None, True, False, 0, 1, 0.0, -0.0, 1.0, "", b""])
VALUES = st.recursive(
    PLAIN | st.integers() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    | st.tuples(inner, inner) | st.frozensets(st.text(max_size=3) | st.integers(), max_size=4),
    max_leaves=8,
)  # fmt: skip


def told(value: Any) -> str:
    """A value with its types, sets in order, so that two are the same exactly when this is."""
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(told, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(f'{told(key)}: {told(item)}' for key, item in value.items())})"
    if isinstance(value, frozenset):
        return f"set({', '.join(sorted(map(told, value)))})"
    return f"{type(value).__name__}({value!r})"


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES)
def test_values_that_differ_have_digests_that_differ(one: Any, other: Any) -> None:
    same = told(one) == told(other)
    assert (digest_of(one, "x").sha256 == digest_of(other, "x").sha256) is same
    assert (digest_of([one, other], "x") == digest_of([other, one], "x")) is same


def test_what_is_shared_is_not_what_is_equal_and_cycles_end() -> None:
    inner = [1]
    assert digest_of([inner, inner], "x") != digest_of([[1], [1]], "x")
    inner.append(inner)  # type: ignore[arg-type]
    assert digest_of(inner, "x").unseen == ()


# -- what cannot be seen ----------------------------------------------------------------------------


class Connected:
    """A transform with an object in C that nobody can look into."""

    def __init__(self) -> None:
        self.parts = [{"connection": sqlite3.connect(":memory:")}]

    def __call__(self, image: Any) -> Any:
        return image


def yields() -> Iterator[int]:
    yield 1


def unseen_in_a_closure() -> Any:
    source = yields()
    return lambda image: next(source)


CONNECTION = sqlite3.connect(":memory:")


def uses_a_global(image: Any) -> Any:
    return CONNECTION.total_changes


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (Connected, "transform.parts[0]['connection'] (sqlite3.Connection)"),
        (unseen_in_a_closure, "transform: source (generator)"),
        (lambda: uses_a_global, "transform: CONNECTION (sqlite3.Connection)"),
        (lambda: functools.partial(uses_a_global, yields()), "(generator)"),
        (lambda: open(os.devnull).read, "transform.__self__ (_io.TextIOWrapper)"),  # noqa: SIM115
        (lambda: memoryview(b"x"), "transform (memoryview)"),
        (lambda: nested(200), "(more than 100 levels)"),
        (lambda: [[n] for n in range(MOST_OBJECTS + 5)], "(more than 100,000 objects)"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_cannot_be_seen_is_named(make: Any, where: str) -> None:
    found = digest_of(make(), "transform")
    assert any(where in text for text in found.unseen), found.unseen


def test_what_no_value_depends_on_is_no_obstacle() -> None:
    class Careful:
        def __init__(self) -> None:
            self.lock, self.again, self.ready = threading.Lock(), threading.RLock(), threading.Event()

        def __call__(self, image: Any) -> Any:
            return image

    assert digest_of(Careful(), "transform").unseen == ()
    assert digest_of(Careful(), "transform") == digest_of(Careful(), "transform")


def test_a_text_named_digest_stands_for_an_object() -> None:
    one, other = Connected(), Connected()
    one.digest = other.digest = "first"  # type: ignore[attr-defined]
    assert digest_of(one, "transform") == digest_of(other, "transform")
    assert digest_of(one, "transform").unseen == ()
    other.digest = "second"  # type: ignore[attr-defined]
    assert digest_of(one, "transform") != digest_of(other, "transform")
    whole = digest_of(transforms.Compose([transforms.ToTensor(), one]), "transform")
    assert whole.unseen == () and whole != digest_of(transforms.Compose([transforms.ToTensor(), other]), "transform")

    def function(image: Any) -> Any:
        return CONNECTION.total_changes

    function.digest = "v1"  # type: ignore[attr-defined]
    assert digest_of(function, "transform").unseen == ()


# -- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "installed"),
    [("os.path", True), ("torch.nn", True), ("numpy", True), ("curator_embed.steps", True), ("builtins", True),
     ("__main__", False), ("tests.stub", False), ("nowhere_at_all", False), (None, False), ("", False)],
)  # fmt: skip
def test_what_is_installed(module: str | None, installed: bool) -> None:
    assert is_installed(module) is installed


def test_versions_of_packages_that_are_not_recorded_count() -> None:
    import open_clip
    import sklearn

    assert name_of(transforms.Resize) == ("torchvision.transforms.transforms", "Resize", "")
    assert name_of(np.add) is None and name_of(np.dtype) == ("numpy", "dtype", "")
    assert name_of(sklearn) == ("sklearn", "", sklearn.__version__)
    assert name_of(open_clip.image_transform) == ("open_clip.transform", "image_transform", open_clip.__version__)
    assert name_of(test_what_is_installed) is None


def test_a_transform_reads_the_same_in_every_process() -> None:
    """What people read is compared too."""
    spec = spec_from_transform(transforms.Compose([transforms.ToTensor(), Connected(), functools.partial(max, 3)]))
    assert isinstance(spec, OpaqueTransform)
    told = spec.to_dict()
    assert told["why"] == "Connected"
    assert told["description"] == "Compose(ToTensor(), Connected, partial(max))"
    assert spec.identity() == Digest(spec.digest, spec.identity().unseen)
