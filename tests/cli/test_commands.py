"""Every command, its options and its exit statuses: 0 done, 1 rows failed under raise, 2 bad usage, 3 no way on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed import __version__
from curator_embed.cli.main import app
from curator_embed.errors import CuratorEmbedError
from curator_embed.execution.gpus import why_no_gpu
from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock
from tests.command import REPO, Ran, start
from tests.rows import table_rows, tar_members
from tests.shards import write_dataset

Run = Callable[..., Ran]
MODEL = "test_resnet.r160_in1k"
OTHER = "test_resnet.r160_in1k"
QUICK = ("--model", MODEL, "--compile", "off", "--quiet")


def tree(folder: Path) -> dict[str, int]:
    """Every file below a folder with its time of change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def made_by(path: Path, column: str = "image_embedding") -> dict[str, Any]:
    footer = json.loads(pq.read_schema(path).metadata[b"curator_embed"])
    return dict(footer["columns"][column]["recipe"])


# -- embed -----------------------------------------------------------------------------------


def test_embed_in_place(run: Run, source: Path) -> None:
    ran = run("embed", source, *QUICK)
    assert ran.status == 0, ran.err
    rows = table_rows(source)
    assert len(rows) == 14
    assert sum(row["image_embedding"] is not None for row in rows.values()) == 11
    for word in ("rows read", "14", "embedded", "not_an_image", "no image", "images/s", "busy"):
        assert word in ran.out
    assert "random weights" in ran.err
    again = run("embed", source, *QUICK)
    assert again.status == 0
    assert "2 skipped" in again.out


def test_embed_to_json(run: Run, source: Path, tmp_path: Path) -> None:
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--json")
    told = json.loads(ran.out)
    assert ran.status == 0
    assert (told["read"], told["embedded"], told["failed"], told["no_image"]) == (14, 11, 1, 2)
    assert told["reasons"] == {"not_an_image": 1}
    assert told["shards"]["done"] == 2
    assert set(told["time"]) == {"read", "decode", "model", "write", "idle"}
    assert told["settings"]["image_embedding"]["model"] == MODEL


def test_every_option_reaches_the_run(run: Run, source: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(timm.create_model(MODEL).state_dict(), weights)
    out = tmp_path / "out"
    ran = run(
        "embed", source, "--model", MODEL, "--output", out, "--weights", weights, "--column", "vector", "--batch-size",
        5, "--threads", 2, "--id-col", "url", "--on-error", "drop", "--dtype", "float16", "--image-size", 96,
        "--compile", "off", "--device", "cpu", "--decoder", "cpu", "--certify", "--json",
    )  # fmt: skip
    assert ran.status == 0, ran.err
    told = json.loads(ran.out)
    assert told["certificate"]["vector"]["holds"] is True
    assert told["certificate"]["vector"]["max_difference"] <= 2
    assert "random weights" not in ran.err
    rows = table_rows(out, "url")
    assert len(rows) == 11
    schema = pq.read_schema(out / "00000.parquet")
    assert schema.field("vector").type == pa.list_(pa.float16())
    recipe = made_by(out / "00000.parquet", "vector")
    assert recipe["batch_shape"] == [5, 3, 96, 96]
    assert (recipe["dtype"], recipe["compile"], recipe["device"]) == ("float16", False, "cpu")
    assert recipe["decoder"] == "cpu"


def test_reports_and_locks_lie_where_they_shall(run: Run, source: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "kept" / "here"
    asked = ("columns", source, "--hash", "phash", "--output", out, "--state", state, "--quiet")
    assert run(*asked).status == 0
    assert {path.suffix for path in out.iterdir()} == {".parquet"} and not Path(f"{out}.curator_embed").exists()
    assert [path.name.partition("-")[0] for path in state.iterdir()] == ["report"]
    told = json.loads(run("info", out, "--state", state, "--json").out)
    assert told["bookkeeping"] == [str(state)] and told["last_run"].startswith("20") and told["held_by"] == ""
    assert f"reports: in {state}, last run 20" in run("info", out, "--state", state).out
    assert json.loads(run("info", out, "--json").out)["bookkeeping"] == []
    with OutputLock(Bookkeeping.of(Location.of(str(out)), str(state))):
        refused = run(*asked)
        assert refused.status == 3 and "another run holds this output" in refused.err
        assert f"in use: process {os.getpid()} on " in run("info", out, "--state", state).out
    assert "1 skipped" not in run(*asked).out and "2 skipped" in run(*asked).out
    for wrong in (out / "state", out):
        refused = run(*asked[:-2], wrong, "--quiet")
        assert refused.status == 2 and f"--state {wrong}" in refused.err and "leave --state out" in refused.err
    assert run(*asked[:-3], "--quiet").status == 0, "left out, as the message says"
    (tmp_path / "file").touch()
    refused = run(*asked[:-2], tmp_path / "file", "--quiet")
    assert refused.status == 2 and f"{tmp_path / 'file'}: cannot write there" in refused.err


def test_reports_in_one_place_of_several_folders(
    run: Run, source: Path, tmp_path: Path, wheel_photos: list[Path]
) -> None:
    write_dataset(source / "deeper", wheel_photos, shards=1, samples=2)
    ran = run("columns", source, "--hash", "phash", "--state", tmp_path / "state", "--json", "--quiet")
    assert ran.status == 0 and json.loads(ran.out)["shards"]["done"] == 3, ran.err
    assert not list(tmp_path.rglob("*.curator_embed"))
    told = json.loads(run("info", source, "--state", tmp_path / "state", "--json").out)
    assert (told["tables"], told["tables_in"], told["tables_folders"]) == (3, str(source), 2)
    assert "in 2 folders below" in run("info", source).out


def test_a_certificate_is_printed(run: Run, source: Path, tmp_path: Path) -> None:
    """Of a run that finds everything finished, too; --json has the figures."""
    asked = ("embed", source, *QUICK, "--output", tmp_path / "out", "--certify")
    for _ in range(2):
        ran = run(*asked)
        assert ran.status == 0, ran.err
        (line,) = [line for line in ran.out.splitlines() if line.startswith("certified")]
        assert "image_embedding: agrees with the model's own preprocessing on 11 images: at most " in line
        assert "grey levels apart" in line and "cosine at least " in line
        assert "note           certify" not in ran.out
    told = json.loads(run(*asked, "--json").out)["certificate"]["image_embedding"]
    assert (told["holds"], told["images"]) == (True, 11)
    assert "certified" not in run(*asked[:-1]).out


def test_two_models_in_one_pass(run: Run, source: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    weights = tmp_path / "a=b.safetensors"
    save_file(timm.create_model(OTHER).state_dict(), weights)
    models = ("--model", MODEL, "--model", f"{OTHER}=other", "--weights", f"other={weights}")
    ran = run("embed", source, *models, "--compile", "off", "--output", tmp_path / "out", "--quiet")
    assert ran.status == 0, ran.err
    assert ran.err.count("random weights") == 1 and f"note: {MODEL} has random weights" in ran.err
    path = tmp_path / "out" / "00000.parquet"
    assert made_by(path, "image_embedding")["model"] == MODEL
    assert made_by(path, "other")["model"] == OTHER
    rows = table_rows(tmp_path / "out").values()
    assert sum(row["image_embedding"] is not None and row["other"] is not None for row in rows) == 11


def test_a_cluster_file(run: Run, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: local\nworkers_per_node: 1\n")
    ran = run("columns", source, "--hash", "phash", "--cluster", file, "--quiet")
    assert ran.status == 0, ran.err
    assert all((row["phash"] is None) == (row["image_error"] is not None) for row in table_rows(source).values())


def test_tables_in_another_folder(run: Run, source: Path, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    tables.mkdir()
    for path in source.glob("*.parquet"):
        path.rename(tables / path.name)
    assert run("embed", source, *QUICK, "--metadata", tables).status == 0
    assert len(table_rows(tables)) == 14
    assert not list(source.glob("*.parquet"))


def test_a_limit_and_overwriting(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("embed", source, *QUICK, "--output", out, "--limit", 3).status == 0
    assert len(table_rows(out)) == 3
    assert run("embed", source, *QUICK, "--output", out).status == 0
    assert len(table_rows(out)) == 14
    refused = run("embed", source, *QUICK, "--output", out, "--image-size", 96)
    assert refused.status == 2
    assert "made another way" in refused.err and "overwrite" in refused.err
    assert run("embed", source, *QUICK, "--output", out, "--image-size", 96, "--overwrite").status == 0


def test_index_files_choose_samples(run: Run, source: Path, tmp_path: Path) -> None:
    """A hand-written index of a subset is a filter, with --use-index-files only."""
    assert run("index-tars", source).status == 0
    index = source / "00000.idx"
    first, *lines = index.read_text().splitlines()
    assert first == "v1.2 6"
    index.write_text("\n".join(["v1.2 2", *lines[:2]]) + "\n")
    later = (source / "00000.tar").stat().st_mtime_ns + 10**9
    os.utime(index, ns=(later, later))
    for options, embedded in (((), 11), (("--use-index-files",), 7)):
        out = tmp_path / f"out{len(options)}"
        told = json.loads(run("embed", source, *QUICK, "--output", out, "--json", *options).out)
        assert told["embedded"] == embedded
        assert told["read"] == 14


@pytest.mark.slow
def test_worker_processes(run: Run, source: Path, tmp_path: Path) -> None:
    told = json.loads(run("embed", source, *QUICK, "--output", tmp_path / "out", "--workers", 2, "--json").out)
    assert (told["workers"], told["read"], told["embedded"]) == (2, 14, 11)


@pytest.mark.parametrize(
    ("options", "asked"),
    [(("--workers", 3), {"n_workers": 3}), (("--scheduler", "tcp://a:1"), {"scheduler_address": "tcp://a:1"}),
     ((), None), (("--workers", 1), None), *([] if why_no_gpu() else [(("--gpu",), {"cluster_type": "gpu"})])],
)  # fmt: skip
def test_which_client_is_asked_for(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], asked: dict[str, Any] | None
) -> None:
    """Processes take long to start: here only that the options mean the client they say."""
    from curator_embed.execution import clients

    calls: list[dict[str, Any]] = []

    def remember(cluster_type: str = "cpu", **given: Any) -> Any:
        calls.append({"cluster_type": cluster_type, **given})
        raise CuratorEmbedError("far enough")

    monkeypatch.setattr(clients, "get_client", remember)
    # In place, with a limit: refused by the run itself, where no client is asked for.
    ran = run("embed", source, *QUICK, "--limit", 1, *options)
    assert ran.status == (2 if asked is None else 3), ran.err
    wanted = [] if asked is None else [{"cluster_type": "cpu", **asked}]
    assert [{k: v for k, v in call.items() if v is not None} for call in calls] == wanted


def test_somebodys_scheduler(run: Run, source: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(processes=False, protocol="tcp", **options) as cluster:
        ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--scheduler", cluster.scheduler_address)
        assert ran.status == 0, ran.err
        assert cluster.status.name == "running", "it is not ours to close"
    both = run("embed", source, *QUICK, "--scheduler", "tcp://127.0.0.1:1", "--workers", 2)
    assert both.status == 2 and "--scheduler" in both.err


def test_no_scheduler_there(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dask
    import distributed  # noqa: F401  brings its defaults, which would go with the setting if they came within it

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        ran = run("embed", source, *QUICK, "--scheduler", "tcp://127.0.0.1:9")
    assert ran.status == 3
    assert "tcp://127.0.0.1:9" in ran.err and "Traceback" not in ran.err


# -- exit statuses ---------------------------------------------------------------------------


def test_status_1_rows_failed(run: Run, source: Path, tmp_path: Path) -> None:
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--on-error", "raise")
    assert ran.status == 1
    assert "000010002" in ran.err and "not_an_image" in ran.err and "00001.tar" in ran.err
    assert [p.name for p in (tmp_path / "out").glob("*.parquet")] == ["00000.parquet"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("embed", "SRC"), "--model"),
        (("embed", "SRC", "--model", "resnet5O"), "resnet50"),
        (("embed", "/nowhere/at/all", "--model", MODEL), "/nowhere/at/all"),
        (("embed", "SRC", "--model", MODEL, "--nosuch"), "--nosuch"),
        (("embed", "SRC", "--model", MODEL, "--on-error", "ignore"), "ignore"),
        (("embed", "SRC", "--model", MODEL, "--on-error", "drop"), "output path"),
        (("embed", "SRC", "--model", MODEL, "--limit", "2"), "output path"),
        (("embed", "SRC", "--model", MODEL, "--limit", "0"), "--limit"),
        (("embed", "SRC", "--model", MODEL, "--dtype", "float8"), "float8"),
        (("embed", "SRC", "--model", MODEL, "--batch-size", "0"), "--batch-size"),
        (("embed", "SRC", "--model", MODEL, "--id-col", "nosuch"), "nosuch"),
        (("embed", "SRC", "--model", MODEL, "--pretrained", "--weights", "w.pth"), "--weights"),
        (("embed", "SRC", "--model", MODEL, "--weights", "/nowhere/w.pth"), "/nowhere/w.pth"),
        (("embed", "SRC", "--model", MODEL, "--storage-options", "{"), "--storage-options"),
        (("embed", "SRC", "--model", MODEL, "--storage-options", "[]"), "--storage-options"),
        (("embed", "SRC", "--model", MODEL, "--device", "abacus"), "abacus"),
        (("embed", "SRC", "--model", MODEL, "--device", "cuda:99"), "--device cuda:99"),
        (("embed", "SRC", "--model", "test_vit.r160_in1k", "--image-size", "161"), "161"),
        (("embed", "SRC", "--model", MODEL, "--model", "test_resnet"), "--model test_resnet=COLUMN"),
        (("embed", "SRC", "--model", f"{MODEL}="), "NAME=COLUMN"),
        (("embed", "SRC", "--model", MODEL, "--model", "test_resnet=b", "--weights", "w.pth"), "COLUMN=PATH"),
        (("embed", "SRC", "--model", MODEL, "--cluster", "c.yaml", "--workers", "2"), "--cluster and --workers"),
        (("embed", "SRC", "--model", MODEL, "--cluster", "/nowhere/c.yaml"), "/nowhere/c.yaml"),
        (("columns", "SRC", "--hash", "phash", "--scheduler-file", "/nowhere/s.json"), "/nowhere/s.json"),
        (("info", "/nowhere/at/all"), "/nowhere/at/all"),
        (("models", "nosuchmodel"), "nosuchmodel"),
        (("index-tars", "/nowhere/at/all"), "/nowhere/at/all"),
        (("certify", "SRC", "--model", "nosuch"), "nosuch"),
        (("nosuch",), "nosuch"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, tuple) else "",
)
def test_status_2_bad_usage(run: Run, source: Path, arguments: tuple[str, ...], words: str) -> None:
    before = tree(source)
    ran = run(*(str(source) if argument == "SRC" else argument for argument in arguments))
    assert ran.status == 2, (ran.out, ran.err)
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert {n: t for n, t in tree(source).items() if not n.startswith("_")} == before


def test_status_3_a_broken_shard(run: Run, source: Path, tmp_path: Path) -> None:
    (source / "00000.tar").write_bytes(b"no tar" * 500)
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out")
    assert ran.status == 3
    assert "00000.tar" in ran.err and "rows read" in ran.err
    assert list(table_rows(tmp_path / "out")) == pq.read_table(source / "00001.parquet")["key"].to_pylist()
    assert ran.out == "" and ran.err.endswith("error: 1 of 2 shards could not be worked on; the others are finished\n")
    assert ran.err.count("not a tar") == 1
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--json")
    assert ran.status == 3
    assert json.loads(ran.out)["shards"] == {"done": 0, "skipped": 1, "failed": 1, "left": 0}
    assert "the others are finished. 00000: " in ran.err and ran.err.count("not a tar") == 1


def test_status_3_somebody_holds_the_output(run: Run, source: Path, tmp_path: Path) -> None:
    with OutputLock(Bookkeeping.of(Location.of(str(tmp_path / "out")))):
        ran = run("embed", source, *QUICK, "--output", tmp_path / "out")
    assert ran.status == 3
    assert f"process {os.getpid()} on " in ran.err
    assert run("embed", source, *QUICK, "--output", tmp_path / "out").status == 0


def test_status_3_weights_that_cannot_be_had(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub to download from is no reason for a stack trace, and not status 1, which says that rows failed."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ran = run("embed", source, *QUICK, "--pretrained")
    assert ran.status == 3, ran.err
    assert MODEL in ran.err and "--weights PATH" in ran.err
    assert "Traceback" not in ran.err


def test_status_3_what_nobody_foresaw(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace for whoever mends it, and no status that a script would read as "some rows failed"."""
    from curator_embed.datasets import ImageTextPairDataset

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr(ImageTextPairDataset, "save_metadata", fails)
    ran = run("embed", source, *QUICK)
    assert ran.status == 3
    assert "Traceback" in ran.err and ran.err.rstrip().endswith("error: something unforeseen")


# -- dry run ---------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing(run: Run, source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--dry-run")
    assert ran.status == 0, ran.err
    for word in ("shards", "rows left", "14", "to write", "free", "images/s", "time"):
        assert word in ran.out
    told = json.loads(run("embed", source, *QUICK, "--output", tmp_path / "out", "--dry-run", "--json").out)
    assert (told["shards"], told["done"], told["rows"]) == (2, 0, 14)
    assert told["bytes_to_write"] > 14 * 4 * 64 and told["bytes_free"] > 0
    assert told["images_per_second"] > 0 and told["seconds"] > 0
    assert told["conflicts"] == []
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()
    run("embed", source, *QUICK)
    ran = run("embed", source, *QUICK, "--output", tmp_path / "out", "--dry-run")
    assert ran.status == 0, ran.err
    assert "images/s" not in ran.out  # all columns are there to be copied: nothing to time
    ran = run("embed", source, *QUICK, "--model", f"{MODEL}=second", "--output", tmp_path / "out", "--dry-run")
    assert ran.status == 0 and "images/s" in ran.out


CLUSTERS = {
    "none": ((), "1 worker on this machine"),
    "workers": (("--workers", 2), "2 workers on this machine"),
    "local": (("--cluster", "cluster: local\nworkers_per_node: 2\n"), "2 workers on this machine"),
    "slurm": (
        ("--cluster", "cluster: slurm\nnodes: 3\ncores_per_node: 8\nworkers_per_node: 2\nmemory_per_node: 1GB\n"
         "walltime: '1:00:00'\n"), "6 workers of {file}, 4 cores each",
    ),
    "ssh": (("--cluster", "cluster: ssh\nhosts: [nowhere.invalid, other.invalid]\n"), "as this machine has"),
    "scheduler": (("--scheduler", "tcp://nowhere.invalid:1"), "a machine like this one"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_dry_run_starts_no_cluster_and_leaves_nothing(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whatever scheduler, job or worker were started would leave a mark."""
    import dask
    import psutil

    options, said = CLUSTERS[kind]
    place = tmp_path / "aside"
    (place / "bin").mkdir(parents=True)
    for program in ("sbatch", "ssh"):
        (place / "bin" / program).write_text(f"#!/bin/sh\ntouch '{place}/{program} was called'\n")
        (place / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}/bin:{os.environ['PATH']}")
    (place / "preload.py").write_text(f"open({str(place / 'a scheduler or a worker was started')!r}, 'w').close()\n")
    if options and options[0] == "--cluster":
        (place / "cluster.yaml").write_text(str(options[1]))
        options = ("--cluster", str(place / "cluster.yaml"))
    before, processes = tree(tmp_path), len(psutil.Process().children(recursive=True))
    preload = {f"distributed.{who}.preload": [str(place / "preload.py")] for who in ("scheduler", "worker", "nanny")}
    with dask.config.set(preload):
        ran = run(
            "embed", source, *QUICK, "--output", tmp_path / "new" / "out", "--log-dir", tmp_path / "logs", "--dry-run",
            *options,
        )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "planned for" in ran.out and said.format(file=place / "cluster.yaml") in ran.out, ran.out
    assert "images/s per worker" in ran.out and "rows left" in ran.out
    assert tree(tmp_path) == before and not (tmp_path / "new").exists() and not (tmp_path / "logs").exists()
    assert len(psutil.Process().children(recursive=True)) == processes


def test_a_dry_run_knows_what_is_done_and_in_the_way(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("embed", source, *QUICK, "--output", out)
    told = json.loads(run("embed", source, *QUICK, "--output", out, "--dry-run", "--json").out)
    assert (told["shards"], told["done"], told["rows"], told["bytes_to_write"]) == (2, 2, 0, 0)
    (out / "00001.parquet").unlink()
    told = json.loads(run("embed", source, *QUICK, "--output", out, "--dry-run", "--json").out)
    assert (told["done"], told["rows"]) == (1, 7)
    other = run("embed", source, *QUICK, "--output", out, "--dry-run", "--image-size", 96)
    assert "00000.parquet" in other.out and "made another way" in other.out


# -- the other commands ----------------------------------------------------------------------


def test_info(run: Run, source: Path, tmp_path: Path) -> None:
    before = json.loads(run("info", source, "--json").out)
    assert (before["tars"], before["tables"], before["rows"]) == (2, 2, 14)
    assert before["made"] == {}
    run("embed", source, *QUICK, "--output", tmp_path / "out")
    told = json.loads(run("info", tmp_path / "out", "--json").out)
    assert told["rows"] == 14
    assert told["columns"]["image_embedding"] == "list<element: float>"
    assert told["made"]["image_embedding"][0]["recipe"]["model"] == MODEL
    assert told["made"]["image_embedding"][0]["files"] == 2
    assert told["counts"] == {"read": 14, "embedded": 11, "failed": 1, "no_image": 2, "reasons": {"not_an_image": 1}}
    text = run("info", tmp_path / "out").out
    for word in (MODEL, "2 parquet files, 14 rows", "11 embedded", "not_an_image 1", "caption", "image_error"):
        assert word in text
    (tmp_path / "out" / "00001.parquet").write_bytes(b"damaged")
    damaged = run("info", tmp_path / "out")
    assert damaged.status == 0
    assert "problem" in damaged.out and "00001.parquet" in damaged.out


def test_models(run: Run) -> None:
    listed = run("models", "*tf_efficientnet_lite0*")
    assert listed.status == 0
    (line,) = [line for line in listed.out.splitlines() if "tf_efficientnet_lite0" in line]
    for word in ("224", "1280", "understood"):
        assert word in line
    (row,) = json.loads(run("models", "ViT-B/32", "--json").out)
    assert (row["name"], row["dim"], row["patch_size"], row["understood"]) == ("ViT-B/32", 512, 32, True)


def test_certify(run: Run, source: Path) -> None:
    before = tree(source)
    ran = run("certify", source, "--model", MODEL, "--images", 5, "--json")
    told = json.loads(ran.out)
    assert ran.status == 0
    assert told["images"] == 5 and told["holds"] is True
    assert told["max_difference"] <= 2 and told["min_cosine"] >= 0.9999
    assert "pillow" in {name.lower() for name in told["versions"]}
    assert tree(source) == before
    assert "cosine" in run("certify", source, "--model", MODEL, "--images", 2).out


def test_doctor(run: Run) -> None:
    ran = run("doctor")
    assert ran.status == 0
    for word in ("python", "torch", "nvidia driver", "gpu", "nvidia-dali", "faiss", "pip install 'curator-embed["):
        assert word in ran.out
    told = json.loads(run("doctor", "--json").out)
    assert {finding["state"] for finding in told["findings"]} <= {"ok", "missing", "broken"}
    assert told["conclusion"] == ran.out.splitlines()[-1]


def test_index_tars(run: Run, source: Path) -> None:
    ran = run("index-tars", source, "--json")
    assert json.loads(ran.out) == [str(source / "00000.idx"), str(source / "00001.idx")]
    lines = (source / "00001.idx").read_text().splitlines()
    assert lines[0] == "v1.2 6"
    data, members = (source / "00001.tar").read_bytes(), tar_members(source / "00001.tar")
    for line in lines[1:]:
        fields = line.split()
        for extension, offset, size, name in zip(*[iter(fields)] * 4, strict=True):
            assert name.endswith(extension)
            assert data[int(offset) : int(offset) + int(size)] == members[name]
    assert "0 indexes written" in run("index-tars", source).out
    assert "2 indexes written" in run("index-tars", source, "--overwrite").out


def test_index_tars_knows_the_options_of_buckets(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "curator_embed.sources.webdataset.index_tars", lambda src, **options: asked.append((src, options)) or []
    )
    assert run("index-tars", "s3://bucket/x", "--endpoint", "http://localhost:1", "--anonymous").status == 0
    ((src, options),) = asked
    assert src == "s3://bucket/x" and options["overwrite"] is False
    assert options["storage_options"]["endpoint_url"] == "http://localhost:1" and options["storage_options"]["anon"]
    refused = run("index-tars", source, "--endpoint", "http://localhost:1")
    assert refused.status == 2 and "--endpoint is for buckets" in refused.err


def test_index_tars_names_a_damaged_tar_and_indexes_the_others(run: Run, source: Path) -> None:
    (source / "00000.tar").write_bytes(b"no tar" * 500)
    ran = run("index-tars", source)
    assert ran.status == 3
    assert "00000.tar" in ran.err
    assert (source / "00001.idx").is_file()


# -- help and start-up -----------------------------------------------------------------------


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.strip() == __version__
    told = run("--help").out
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert name in told
        here = run(name, "--help")
        assert here.status == 0
        assert len(here.out) > 200, "help that teaches"
    embed = run("embed", "--help").out
    for option in (
        "--output", "--model", "--weights", "--pretrained", "--batch-size", "--workers", "--threads", "--id-col",
        "--on-error", "--dtype", "--certify", "--scheduler", "--limit", "--dry-run", "--overwrite", "--json",
    ):  # fmt: skip
        assert option in embed


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from curator_embed.cli import main\n"
        "try:\n    main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {{'torch', 'timm', 'dask', 'distributed', 'pyarrow', 'numpy', 'pandas', 'PIL'}} & set(sys.modules)\n"
        "sys.exit('imported: ' + ', '.join(sorted(heavy)) if heavy else 0)\n"
    )
    best = 60.0
    for arguments in (["--help"], ["embed", "--help"], ["--version"]):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments=arguments)], cwd=REPO, capture_output=True, text=True
        )
        best = min(best, time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
    assert best < 2, "under a second on a quiet machine"


# -- stopping --------------------------------------------------------------------------------

SHARDS = 100


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Iterator[Path]:
    """Shards enough for a run of some seconds."""
    yield write_dataset(tmp_path_factory.mktemp("many") / "source", wheel_photos, shards=SHARDS, samples=5)


SLOW = ("--model", MODEL, "--compile", "off", "--batch-size", 4)


def wait_for_first(output: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob("*.parquet")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_finishes_shards_in_flight(number: signal.Signals, run: Run, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("embed", many, *SLOW, "--output", out)
    wait_for_first(out, process)
    if number is signal.SIGTERM:  # somebody starts the same again meanwhile
        other = run("embed", many, *SLOW, "--output", out, "--quiet")
        assert other.status == 3
        assert f"process {process.pid} on " in other.err
    asked = time.monotonic()
    process.send_signal(number)
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 3, complaints
    assert time.monotonic() - asked < 60
    assert "shards left; run the same again" in complaints
    assert "Traceback" not in complaints
    there = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert 0 < len(there) < SHARDS
    assert all(pq.read_table(out / name).num_rows == 6 for name in there)
    assert not list(out.glob("*.tmp-*"))
    again = json.loads(run("embed", many, *SLOW, "--output", out, "--json").out)
    assert again["shards"] == {"done": SHARDS - len(there), "skipped": len(there), "failed": 0, "left": 0}
    assert again["read"] == SHARDS * 6
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there
    vectors = [row["image_embedding"] for row in table_rows(out).values()]
    assert sum(vector is not None for vector in vectors) == SHARDS * 5
    assert np.isfinite([vector for vector in vectors if vector is not None]).all()


@pytest.mark.slow
def test_a_second_interrupt_drops_what_is_in_flight(run: Run, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("embed", many, "--model", "vit_small_patch16_224", "--compile", "off", "--output", out)
    wait_for_first(out, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == 3, complaints
    assert time.monotonic() - asked < 15
    assert "interrupted" in complaints
    assert all(pq.read_table(path).num_rows == 6 for path in out.glob("*.parquet"))
    assert not list(out.glob("*.tmp-*"))
    with OutputLock(Bookkeeping.of(Location.of(str(out)))):
        pass  # nobody holds it any more
