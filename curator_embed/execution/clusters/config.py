"""What every cluster file may say, and how one is read.

Each kind of cluster is a frozen dataclass in a module of its own; its fields are the keys that its file may have.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from curator_embed.errors import UsageError
from curator_embed.execution.clusters.signatures import first_unknown, nearest

KINDS = {
    "local": "local.LocalConfig",
    "ssh": "ssh.SshConfig",
    "slurm": "jobqueue.SlurmConfig",
    "pbs": "jobqueue.PbsConfig",
    "lsf": "jobqueue.LsfConfig",
    "kubernetes": "kubernetes.KubernetesConfig",
    "databricks": "databricks.DatabricksConfig",
    "scheduler": "running.RunningConfig",
}
"""Kind -> where its config lies, imported when a file names it: every kind may need a package of its own."""

ON_THE_NODE = {"on_the_node": True}
"""``metadata`` of fields that a shell on the nodes expands: their $NAMES are left alone here."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What all kinds of clusters have in common.

    Attributes:
        nodes: machines, jobs or pods.
        gpus_per_node: GPUs of each; every GPU gets one worker. 0 for workers without a GPU.
        workers_per_node: workers on each machine without GPUs.
        threads_per_worker: shards a worker works on at a time (2 lets one be written while the next is read).
        wait_for_workers: a run begins when so many workers have come; the others join it when they do.
        wait_seconds: how long to wait for those.
        options: handed on, as they are, to the class of Dask's that starts the cluster.
        path: the file all this was read from, for messages.

    Raises:
        UsageError: a number that cannot be.
    """

    kind: ClassVar[str]
    synonyms: ClassVar[Mapping[str, str]] = {}
    """Other names that a file may use for a key: what the cluster's own documentation calls it."""

    nodes: int = 1
    gpus_per_node: int = 0
    workers_per_node: int = 1
    threads_per_worker: int = 2
    wait_for_workers: int = 1
    wait_seconds: float = 600
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: str = "<config>"

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("workers_per_node", 1), ("threads_per_worker", 1),
                            ("wait_for_workers", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise self.wrong(name, f"{getattr(self, name)} is too few; at least {least}")
        if not self.wait_seconds >= 0:  # not a number compares false
            raise self.wrong("wait_seconds", f"{self.wait_seconds} is no time to wait; seconds, 0 or more")

    def check(self) -> None:
        """See what can be seen before anything is started: packages, programs, GPUs, the names of ``options``.

        Raises:
            UsageError: the file asks for something that cannot be here.
            MissingExtra: a package that this kind needs is not installed.
        """

    def start(self) -> Any:
        """Start it.

        Returns:
            Something ``distributed.Client`` takes: a cluster object, or a scheduler's address.

        Raises:
            UsageError: the file asks for something that cannot be.
            MissingExtra: a package that this kind needs is not installed.
            CuratorEmbedError: it did not start.
        """
        raise NotImplementedError

    def cores_per_worker(self) -> int | None:
        """CPU cores that each worker will have, as far as the file says."""
        return None

    def where_to_look(self) -> str:
        """What a person should look at when workers do not come: the end of "look at ..."."""
        return "the workers' logs, and at whether the workers can reach the scheduler (firewall, network interface)"

    def why_none_can_come(self, cluster: Any) -> str | None:
        """While workers are waited for: why waiting is in vain, None as long as it is not.

        Args:
            cluster: what ``start`` returned.
        """
        return None

    @property
    def workers(self) -> int:
        """Workers of all nodes together: one per GPU, or ``workers_per_node``."""
        return self.nodes * (self.gpus_per_node or self.workers_per_node)

    def wrong(self, key: str, why: str) -> UsageError:
        """An error about one key of the file."""
        return UsageError(f"{self.path}: {key}: {why}")

    def check_names(self, key: str, given: Mapping[str, Any], owner: str, *targets: Callable[..., Any]) -> None:
        """For a key whose value is a mapping of somebody else's options.

        Args:
            owner: who takes them, for the message.
            targets: what it hands them on to, by whose signatures they are checked.

        Raises:
            UsageError: one that nobody knows; the message names it, and one that is spelled alike.
        """
        if given and (unknown := first_unknown(given, *targets)) is not None:
            raise self.wrong(f"{key}.{unknown[0]}", f"{owner} has no such option{unknown[1]}")

    def check_wait(self) -> None:
        """For kinds that start a known number of workers.

        Raises:
            UsageError: more workers are waited for than there will be.
        """
        if self.wait_for_workers > self.workers:
            each = "gpus_per_node" if self.gpus_per_node else "workers_per_node"
            raise self.wrong(
                "wait_for_workers", f"{self.wait_for_workers} will never come; nodes x {each} makes {self.workers}"
            )

    def check_size(self, key: str) -> None:
        """For a field that holds an amount of memory.

        Raises:
            UsageError: it is none.
        """
        from dask.utils import parse_bytes

        try:
            sound = parse_bytes(getattr(self, key)) > 0
        except (ValueError, OverflowError):
            sound = False
        if not sound:
            raise self.wrong(key, f"'{getattr(self, key)}' is no size; for instance '64GiB'")


def read_cluster(source: str | os.PathLike[str] | Mapping[str, Any]) -> ClusterConfig:
    """Read what a cluster is from a YAML file, or from a mapping with the same keys.

    The key ``cluster`` names the kind; the others are the fields of that kind's class. A file with nothing but
    ``scheduler: tcp://...`` or ``scheduler_file: ...`` connects to what runs there. ``$NAME`` and ``${NAME}`` in
    values stand for environment variables of this process, except in keys that a shell on the nodes reads
    (``job_script_prologue``, ``local_directory``).

    Raises:
        UsageError: the file cannot be read or used; the message names the file, the key and what would be right.
    """
    if isinstance(source, Mapping):
        path, said = "<config>", dict(source)
    else:
        path = os.fspath(source)
        said = _load(path)
    try:
        return _config(said, path)
    except RecursionError:
        raise UsageError(f"{path}: it contains itself (a YAML alias inside of what it names)") from None


def _load(path: str) -> dict[Any, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            said = yaml.safe_load(file)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a YAML file: it is no UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}). Such a file holds lines like 'cluster: local' and "
            "'workers_per_node: 4'"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date that is none
        raise UsageError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(said, dict):
        raise UsageError(f"{path}: must hold 'key: value' lines, beginning with 'cluster: slurm' or another kind")
    return said


def _config(said: Mapping[Any, Any], path: str) -> ClusterConfig:
    kind_of = _kind(said, path)
    fields = {item.name: item for item in dataclasses.fields(kind_of) if item.name != "path"}
    hints = get_type_hints(kind_of)
    values: dict[str, Any] = {}
    for key, value in said.items():
        if key == "cluster":
            continue
        name = kind_of.synonyms.get(key, key) if isinstance(key, str) else key
        if name not in fields:
            known = [*fields, *kind_of.synonyms]
            raise UsageError(
                f"{path}: unknown key {key!r} of a {kind_of.kind} cluster{nearest(key, known)}. "
                f"Known are {', '.join(sorted(fields))}"
            )
        if name in values:
            raise UsageError(f"{path}: {key}: '{name}' is given twice, under two names; keep one")
        if not _fits(value, hints[name]):  # shown as it is written: a variable's value may be a secret
            raise UsageError(f"{path}: {key}: must be {_described(hints[name])}, and is {value!r}{_hint(value)}")
        values[name] = value if fields[name].metadata.get("on_the_node") else _expanded(value, path, key)
    needed = [
        name for name, item in fields.items() if item.default is MISSING and item.default_factory is MISSING
    ]  # fmt: skip
    missing = [name for name in needed if name not in values]
    if missing:
        lacking = ", ".join(f"'{name}' ({_described(hints[name])})" for name in missing)
        raise UsageError(f"{path}: a {kind_of.kind} cluster needs the key{'s' * (len(missing) > 1)} {lacking}")
    return kind_of(path=path, **values)


def _kind(said: Mapping[Any, Any], path: str) -> type[ClusterConfig]:
    name = said.get("cluster")
    if name is None and {"scheduler", "scheduler_file"} & set(said):
        name = "scheduler"
    if name is None:
        raise UsageError(f"{path}: needs a line 'cluster: KIND'; kinds are {', '.join(KINDS)}")
    if not isinstance(name, str) or name not in KINDS:
        raise UsageError(
            f"{path}: cluster: {name!r} is no kind of cluster{nearest(name, KINDS)}. Kinds are {', '.join(KINDS)}"
        )
    module, _, attribute = KINDS[name].partition(".")
    found: type[ClusterConfig] = getattr(import_module(f"{__package__}.{module}"), attribute)
    return found


_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def _expanded(value: Any, path: str, key: Any) -> Any:
    """Environment variables in all strings of a value."""
    if isinstance(value, str):

        def variable(match: re.Match[str]) -> str:
            name = match[1] or match[2] or ""
            if name not in os.environ:
                raise UsageError(f"{path}: {key}: the environment variable '{name}' is not set; export it first")
            return os.environ[name]

        return _VARIABLE.sub(variable, value)
    if isinstance(value, Mapping):
        return {k: _expanded(v, path, key) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_expanded(v, path, key) for v in value]
    return value


_SCALARS: dict[Any, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("text", (str,)),
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML has a field's type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if kind in (None, type(None)):
        return value is None
    if kind in _SCALARS:
        return isinstance(value, _SCALARS[kind][1]) and (kind is bool or not isinstance(value, bool))
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(one, inner[0]) for one in value)
    raise TypeError(f"a cluster file cannot hold {kind}")  # a mistake in the class, not in a file


def _described(kind: Any) -> str:
    """A field's type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _SCALARS:
        return _SCALARS[kind][0]
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in inner if one is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(str(one) for one in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping ('name: value' lines, indented)"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list ('- ...' lines), each {_described(inner[0])}"
    return "something else"


def _hint(value: Any) -> str:
    """YAML takes 12:00:00 for a number in base 60, and yes for true."""
    if isinstance(value, bool):
        return " (YAML reads yes, no, on and off so; put it in quotes for text)"
    if isinstance(value, int | float):
        return " (put it in quotes for text; YAML takes 12:00:00 for a number too)"
    return ""
