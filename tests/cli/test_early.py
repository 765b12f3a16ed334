"""What can be refused at once is refused before torch is imported and before a cluster starts: one line, status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.execution.gpus import driver, torch_built_for, why_no_gpu
from tests.command import REPO, Ran
from tests.shards import crops, write_dataset

Run = Callable[..., Ran]
MODEL = "test_resnet"
EMBED = ("embed", "SRC", "--model", MODEL)

FILES = {
    "typo.yaml": "cluster: local\nworkers_per_node: 2\noptions:\n  memory_limti: 1GB\n",
    "size.yaml": "cluster: local\noptions:\n  n_workers: 3\n",
    "nested.yaml": "cluster: local\noptions:\n  scheduler_kwargs: {prt: 3}\n",
    "key.yaml": "cluster: local\nworkers: 2\n",
    "gpu.yaml": "cluster: local\ngpus_per_node: 2\n",
    "ssh.yaml": "cluster: ssh\nhosts: [nowhere.invalid]\noptions:\n  worker_options: {nthread: 2}\n",
    "login.yaml": "cluster: ssh\nhosts: [nowhere.invalid]\nconnect_options: {user_name: ada}\n",
    "slurm.yaml": "cluster: slurm\ncores_per_node: 1\nmemory_per_node: 1GB\nwalltime: '1:00:00'\n",
    "spark.yaml": "cluster: databricks\n",
    "broken.yaml": "cluster: [\n",
    "nothing.pt": "",
}


class Case(NamedTuple):
    arguments: tuple[str, ...]
    words: tuple[str, ...]
    unless: bool = False
    """This machine has what the case wants to be missing."""


DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
NO_GPU = bool(why_no_gpu())
CASES = {
    "device": Case((*EMBED, "--device", "cuda"), ("--device cuda", "needs an NVIDIA GPU", "--device cpu"), not NO_GPU),
    "device of many": Case((*EMBED, "--device", "cuda:99"), ("--device cuda:99", "GPU")),
    "no device": Case((*EMBED, "--device", "abacus"), ("--device abacus", "cuda:0")),
    "gpu": Case((*EMBED, "--gpu"), ("--gpu", "needs an NVIDIA GPU"), not NO_GPU),
    "gpu of a file": Case((*EMBED, "--cluster", "gpu.yaml"), ("gpu.yaml: gpus_per_node: 2",), not NO_GPU),
    "option": Case((*EMBED, "--cluster", "typo.yaml"), ("typo.yaml: options.memory_limti", "'memory_limit'")),
    "size in options": Case((*EMBED, "--cluster", "size.yaml"), ("size.yaml: options.n_workers", "workers_per_node")),
    "option below": Case((*EMBED, "--cluster", "nested.yaml"), ("options.scheduler_kwargs.prt", "'port'")),
    "key": Case((*EMBED, "--cluster", "key.yaml"), ("key.yaml: unknown key 'workers'", "'workers_per_node'")),
    "no yaml": Case((*EMBED, "--cluster", "broken.yaml"), ("broken.yaml: not a YAML file",)),
    "ssh option": Case((*EMBED, "--cluster", "ssh.yaml"), ("options.worker_options.nthread", "'nthreads'")),
    "ssh login": Case((*EMBED, "--cluster", "login.yaml"), ("connect_options.user_name", "'username'")),
    "slurm": Case((*EMBED, "--cluster", "slurm.yaml"), ("slurm.yaml: there is no 'sbatch' on the PATH",)),
    "databricks": Case((*EMBED, "--cluster", "spark.yaml"), ("spark.yaml", "SPARK_LOCAL_IP")),
    "cluster for columns": Case(("columns", "SRC", "--properties", "--cluster", "typo.yaml"), ("memory_limti",)),
    "scheduler file": Case((*EMBED, "--scheduler-file", "no.json"), ("--scheduler-file no.json: no such file",)),
    "model": Case(("embed", "SRC", "--model", "resnet5O"), ("'resnet5O'", "Did you mean: resnet50")),
    "second model": Case((*EMBED, "--model", "vit_b32=b"), ("'vit_b32'", "ViT-B/32")),
    "model to certify": Case(("certify", "SRC", "--model", "nosuch"), ("'nosuch'",)),
    "no weights": Case((*EMBED, "--weights", "no.pt"), ("--weights no.pt: cannot be read (No such file",)),
    "folder of weights": Case((*EMBED, "--weights", "."), ("--weights .: cannot be read (Is a directory)",)),
    "weights to certify": Case(("certify", "SRC", "--model", MODEL, "--weights", "no.pt"), ("no.pt: cannot be read",)),
    "source": Case(("embed", "nowhere", "--model", MODEL), ("nowhere: no such file or folder",)),
    "list": Case(("embed", "nowhere.txt", "--model", MODEL), ("nowhere.txt",)),
    "empty output": Case((*EMBED, "--output", ""), ("--output is empty",)),
    "blank output": Case(("columns", "SRC", "--properties", "--output", " "), ("--output is empty",)),
    "empty source": Case(("embed", "", "--model", MODEL), ("SRC is empty",)),
    "empty tables": Case((*EMBED, "--metadata", ""), ("--metadata is empty",)),
    "output is the source": Case((*EMBED, "--output", "source", "--overwrite"), ("the dataset's own folder",)),
    "output in the source": Case(
        ("embed", "tables", "--model", MODEL, "--output", "tables/out"), ("tables_out", "the next run would take it"),
    ),
    "source in the output": Case((*EMBED, "--output", "."), ("lies in the output folder (source)", "/embedded")),
    "protocol of the output": Case((*EMBED, "--output", "foo://b/o"), ("foo://b/o: cannot be opened", "foo")),
    "extra of the output": Case(
        (*EMBED, "--output", "gs://bucket/out"), ("'gcsfs'", "pip install 'curator-embed[gcs]'"),
        find_spec("gcsfs") is not None,
    ),
    "extra of the source": Case(
        ("embed", "az://bucket/in", "--model", MODEL), ("'adlfs'", "pip install 'curator-embed[azure]'"),
        find_spec("adlfs") is not None,
    ),
    "decoder": Case(
        (*EMBED, "--decoder", "dali"), ("'nvidia-dali'", "--decoder dali"), DALI
    ),
}  # fmt: skip
CASES = {name: case for name, case in CASES.items() if not case.unless}

CHILD = """
import contextlib, io, json, sys
from curator_embed.cli import main
for name, arguments in json.load(sys.stdin).items():
    said, status = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([name, status, said.getvalue(), "torch" in sys.modules]), flush=True)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> dict[str, tuple[int, str, bool]]:
    """Case -> (status, all that was said, whether torch had been imported by then), from one process for all."""
    folder = tmp_path_factory.mktemp("early")
    write_dataset(folder / "source", wheel_photos, shards=1, samples=2)
    (folder / "tables").mkdir()
    images = crops(wheel_photos[0], 2)
    pq.write_table(pa.table({"key": ["a", "b"], "image": images}), folder / "tables" / "0.parquet")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    asked = {
        name: ["source" if argument == "SRC" else argument for argument in case.arguments]
        for name, case in CASES.items()
    }
    environment = {key: value for key, value in os.environ.items() if key != "SPARK_LOCAL_IP"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(asked), cwd=folder, capture_output=True, text=True,
        env={**environment, "PYTHONPATH": str(REPO), "PATH": "/nowhere"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before, "nothing was left behind"
    return {name: tuple(rest) for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_before_torch_is_there(name: str, told: dict[str, tuple[int, str, bool]]) -> None:
    status, said, with_torch = told[name]
    assert status == 2, said
    assert not with_torch
    assert all(word in said for word in CASES[name].words), said
    assert len(said.splitlines()) == 1 and said.startswith("error: "), said


def test_a_value_that_dask_cannot_use_is_told_by_the_file_and_no_traceback(
    run: Run, source: Path, tmp_path: Path
) -> None:
    """Only Dask knows which values it takes: it says so when it starts, and starts nothing."""
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: local\nworkers_per_node: 2\noptions:\n  memory_limit: plenty\n")
    ran = run("columns", source, "--hash", "phash", "--cluster", file, "--output", tmp_path / "out", "--quiet")
    assert ran.status == 2, ran.err
    assert f"error: {file}: options: Dask cannot start a cluster with memory_limit (ValueError: " in ran.err
    assert "plenty" in ran.err and "Traceback" not in ran.err


def test_what_torch_is_built_for_is_read_without_importing_it() -> None:
    import torch

    assert torch_built_for() == (torch.version.cuda or "")


def test_what_is_said_of_gpus_is_what_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert bool(why_no_gpu()) != torch.cuda.is_available()
    if driver() is None:
        assert "no NVIDIA driver" in why_no_gpu()
    monkeypatch.setattr("curator_embed.execution.gpus.torch_built_for", lambda: None)
    assert why_no_gpu() == "", "only torch can tell"
