"""Reading cluster files: the kinds, their keys and values, and what is said about those that are wrong."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.execution.clusters import ClusterConfig, read_cluster
from curator_embed.execution.clusters.config import KINDS
from tests.conftest import REPO

SLURM = {"cluster": "slurm", "cores_per_node": 8, "memory_per_node": "32GiB", "walltime": "01:00:00"}
EXAMPLES = sorted((REPO / "examples" / "clusters").glob("*.yaml"))


def write(folder: Path, said: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(said if isinstance(said, str) else yaml.safe_dump(said), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    config = read_cluster(path)
    assert config.path == str(path)
    assert config.gpus_per_node > 0 or "gpu" not in path.stem
    assert path.read_text().startswith("#"), "an example says what it is for"


def test_there_is_an_example_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    assert {read_cluster(path).kind for path in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_it_is_called(kind: str) -> None:
    module, _, name = KINDS[kind].partition(".")
    assert getattr(import_module(f"curator_embed.execution.clusters.{module}"), name).kind == kind


def test_values_arrive(tmp_path: Path) -> None:
    said = {**SLURM, "nodes": 4, "gpus_per_node": 2, "wait_for_workers": 8, "wait_seconds": 90, "queue": None,
            "job_extra_directives": ["--exclusive"], "options": {"scheduler_options": {"port": 8786}}}  # fmt: skip
    config = read_cluster(write(tmp_path, said))
    found = dataclasses.asdict(config)
    assert {key: found[key] for key in said if key != "cluster"} == {k: v for k, v in said.items() if k != "cluster"}
    assert (config.kind, config.workers, config.path) == ("slurm", 8, str(tmp_path / "cluster.yaml"))


def test_a_mapping_is_as_good_as_a_file() -> None:
    assert read_cluster(SLURM) == dataclasses.replace(read_cluster(dict(SLURM)))
    assert read_cluster(SLURM).path == "<config>"


@pytest.mark.parametrize("said", [{"scheduler": "tcp://10.0.0.1:8786"}, {"scheduler_file": "scheduler.json"}])
def test_an_address_alone_is_a_running_scheduler(said: dict[str, Any]) -> None:
    config = read_cluster(said)
    assert config.kind == "scheduler" and config == read_cluster({"cluster": "scheduler", **said})


def test_environment_variables_stand_for_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", "p1")
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    config: Any = read_cluster({
        **SLURM, "account": "${PROJECT}-gpu", "log_directory": "/logs/$PROJECT", "local_directory": "$SLURM_TMPDIR",
        "job_script_prologue": ["source $HOME/env.sh"], "options": {"scheduler_options": {"host": "${PROJECT}.host"}},
    })  # fmt: skip
    assert (config.account, config.log_directory) == ("p1-gpu", "/logs/p1")
    assert config.options == {"scheduler_options": {"host": "p1.host"}}
    assert config.local_directory == "$SLURM_TMPDIR", "the shell of the node knows it"
    assert config.job_script_prologue == ["source $HOME/env.sh"]


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ("- slurm", r"'key: value' lines"),
    "empty": ("", r"'key: value' lines"),
    "no yaml": ("cluster: [slurm", r"not a YAML file.*line 1"),
    "a tag": ("cluster: !!python/object:os.system {}", r"not a YAML file"),
    "no date": ("cluster: slurm\nqueue: 2026-13-45", r"not a YAML file.*month"),
    "recursive": ("cluster: slurm\noptions: &a {b: *a}", r"contains itself"),
    "no kind": ({"nodes": 2}, r"needs a line 'cluster: KIND'; kinds are local, ssh, slurm"),
    "unknown kind": ({"cluster": "slrum"}, r"'slrum' is no kind of cluster \(did you mean 'slurm'\?\)"),
    "kind of no type": ({"cluster": ["slurm"]}, r"is no kind of cluster"),
    "unknown key": ({**SLURM, "wall_time": 1}, r"'wall_time' of a slurm cluster \(did you mean 'walltime'\?\)"),
    "key of another kind": ({**SLURM, "hosts": ["a"]}, r"unknown key 'hosts' of a slurm cluster"),
    "our own field": ({**SLURM, "path": "x"}, r"unknown key 'path'"),
    "key of no type": ("cluster: local\n3: 4", r"unknown key 3 of a local cluster"),
    "missing": ({"cluster": "slurm", "cores_per_node": 8},
                r"a slurm cluster needs the keys 'memory_per_node' \(text\), 'walltime' \(text\)$"),
    "two names": ({**SLURM, "queue": "a", "partition": "b"}, r"'queue' is given twice"),
    "text for a number": ({**SLURM, "nodes": "four"}, r"nodes: must be a whole number, and is 'four'"),
    "true for a number": ("cluster: local\nworkers_per_node: yes", r"workers_per_node.*whole number.*YAML reads yes"),
    "half a node": ({**SLURM, "nodes": 1.5}, r"nodes: must be a whole number, and is 1\.5"),
    "a time of base 60": ("cluster: slurm\ncores_per_node: 1\nmemory_per_node: 1GB\nwalltime: 12:00:00",
                          r"walltime: must be text, and is 43200 \(put it in quotes"),
    "no time": ({**SLURM, "walltime": "1 day"}, r"walltime: '1 day' is not HH:MM:SS"),
    "no size": ({**SLURM, "memory_per_node": "plenty"}, r"memory_per_node: 'plenty' is no size"),
    "less than nothing": ({**SLURM, "memory_per_node": "-1GB"}, r"'-1GB' is no size"),
    "more than a number": ({**SLURM, "memory_per_node": "1e999GB"}, r"'1e999GB' is no size"),
    "text for a list": ({**SLURM, "job_extra_directives": "--exclusive"}, r"must be a list .*each text"),
    "list of numbers": ({**SLURM, "job_extra_directives": [1]}, r"must be a list .*each text"),
    "list for a mapping": ({**SLURM, "options": [1]}, r"options: must be a mapping"),
    "no nodes": ({**SLURM, "nodes": 0}, r"nodes: 0 is too few; at least 1"),
    "fewer GPUs than none": ({**SLURM, "gpus_per_node": -1}, r"gpus_per_node: -1 is too few"),
    "no time to wait": ("cluster: local\nwait_seconds: .nan", r"wait_seconds: nan is no time"),
    "waiting for ever": ({**SLURM, "nodes": 2, "wait_for_workers": 3}, r"wait_for_workers: 3 .* makes 2"),
    "several local nodes": ({"cluster": "local", "nodes": 2}, r"nodes: a local cluster is one machine"),
    "no hosts": ({"cluster": "ssh", "hosts": []}, r"hosts: is empty"),
    "hosts and nodes": ({"cluster": "ssh", "hosts": ["a", "b"], "nodes": 3}, r"nodes: 3, but 'hosts' names 2"),
    "two schedulers": ({"scheduler": "tcp://a:1", "scheduler_file": "f"}, r"one of the two"),
    "no scheduler": ({"cluster": "scheduler"}, r"one of the two"),
    "size of a running one": ({"scheduler": "tcp://a:1", "nodes": 2}, r"nodes: .*cannot go with a running scheduler"),
    "unset variable": ({**SLURM, "account": "${NO_SUCH_NAME}"}, r"account: the environment variable 'NO_SUCH_NAME'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    said, message = WRONG[case]
    path = write(tmp_path, said)
    with pytest.raises(UsageError, match=message) as found:
        read_cluster(path)
    assert str(found.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read .*'cluster: local' and 'workers_per_node: 4'"):
        read_cluster(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match=r"cannot be read"):
        read_cluster(tmp_path)
    binary = tmp_path / "cluster.yaml"
    binary.write_bytes(b"cluster: \xff")
    with pytest.raises(UsageError, match=r"cluster\.yaml: not a YAML file: it is no UTF-8"):
        read_cluster(binary)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
FIELDS = sorted({
    item.name for place in KINDS.values()
    for item in dataclasses.fields(
        getattr(import_module(f"curator_embed.execution.clusters.{place.partition('.')[0]}"), place.partition(".")[2])
    )
})  # fmt: skip
LIKELY = {
    "cluster": st.sampled_from([*KINDS, "slurms"]),
    "cores_per_node": st.integers(-1, 8),
    "memory_per_node": st.sampled_from(["1GiB", "1", "-1", "x", "1e999GB"]),
    "walltime": st.sampled_from(["1:00:00", "24:00", "99:99:99"]),
    "hosts": st.lists(st.text(max_size=4), max_size=2),
    "scheduler": st.text(max_size=4),
    "image": st.text(max_size=4),
}
MAPPINGS = st.tuples(
    st.fixed_dictionaries({}, optional=LIKELY),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4) | st.integers(), VALUES, max_size=4),
).map(lambda both: {**both[1], **both[0]})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=MAPPINGS)
def test_whatever_a_file_says_it_is_a_config_or_a_usage_error_that_names_it(
    said: dict[Any, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, yaml.safe_dump(said, allow_unicode=True))
    try:
        config = read_cluster(path)
    except UsageError as error:
        assert str(path) in str(error)
    else:
        assert isinstance(config, ClusterConfig) and config.path == str(path)
        assert config.kind == said.get("cluster", "scheduler")
        try:
            config.check()
        except CuratorEmbedError as error:
            assert str(path) in str(error) or "scheduler_file=" in str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="clustersm: -{}[]&*!|>'\"\n\t#%0123456789", max_size=60))
def test_whatever_is_in_a_file(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as found:  # no such text is a whole cluster
        read_cluster(path)
    assert str(path) in str(found.value)
