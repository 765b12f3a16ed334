"""Every message that advises something is provoked with the real command, and its advice is followed to the letter.

A case lays out files, runs what must succeed first, runs what is refused (or ends with a note), and then runs what the
message says. A refusal (status 2) changes nothing, not by a folder or a lock.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curator_embed.storage.location import Location
from curator_embed.tables.bookkeeping import Bookkeeping
from curator_embed.tables.lock import OutputLock
from tests.command import Ran
from tests.shards import crops, write_dataset, write_tar

Run = Callable[..., Ran]
Here = Callable[[Path], None]


def nothing(here: Path) -> None:
    """Nothing beside what every case has."""


@dataclass(frozen=True)
class Case:
    """One message.

    Attributes:
        wrong: the command that is refused or advises something.
        says: parts of what it says.
        remedy: what the message says to do, commands or what a person does by hand.
        right: looks at what came out.
        first: commands that succeed before, and what is done by hand.
        lay: lays out further files, after ``first``.
        status: of ``wrong``.
    """

    wrong: str
    says: Sequence[str]
    remedy: Sequence[str | Here]
    right: Here = nothing
    first: Sequence[str | Here] = ()
    lay: Here = nothing
    status: int = 2


# -- what is laid out ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, wheel_photos: list[Path]) -> Path:
    """A webdataset of two shards, a folder of images and a list of them, and a table with images."""
    folder = tmp_path_factory.mktemp("material")
    write_dataset(folder / "wds", wheel_photos, shards=2, samples=3)
    images = crops(wheel_photos[0], 5, size=48)
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        (folder / "images" / f"{number}.jpg").write_bytes(image)
    (folder / "list.txt").write_text("".join(f"{number}.jpg\n" for number in range(5)))
    (folder / "tables").mkdir()
    pq.write_table(pa.table({"key": list("abcde"), "image": images}), folder / "tables" / "0.parquet")
    return folder


def write(path: str, content: bytes | str) -> Here:
    def lay(here: Path) -> None:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return lay


def remove(path: str) -> Here:
    def lay(here: Path) -> None:
        shutil.rmtree(here / path) if (here / path).is_dir() else (here / path).unlink()

    return lay


def move(path: str, to: str) -> Here:
    def lay(here: Path) -> None:
        (here / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(here / path, here / to)

    return lay


def both(*layers: Here) -> Here:
    def lay(here: Path) -> None:
        for layer in layers:
            layer(here)

    return lay


def add_column(path: str, name: str) -> Here:
    def lay(here: Path) -> None:
        table = pq.read_table(here / path)
        pq.write_table(table.append_column(name, pa.array(["mine"] * table.num_rows)), here / path)

    return lay


def without_rows(path: str, keys: Sequence[str]) -> Here:
    def lay(here: Path) -> None:
        table = pq.read_table(here / path)
        pq.write_table(table.filter(pa.array([key not in keys for key in table["key"].to_pylist()])), here / path)

    return lay


def json_field(name: str) -> Here:
    """Tars alone, whose json members hold a field of this name."""

    def lay(here: Path) -> None:
        (here / "wds").mkdir()
        images = [(here / "images" / f"{number}.jpg").read_bytes() for number in range(2)]
        write_tar(here / "wds" / "00000.tar", [
            member for number, image in enumerate(images)
            for member in ((f"{number}.jpg", image), (f"{number}.json", json.dumps({name: "theirs"}).encode()))
        ])  # fmt: skip

    return lay


def weights_of(model: str) -> Here:
    """A state dict, as somebody trained it."""

    def lay(here: Path) -> None:
        import timm
        import torch

        torch.save(timm.create_model(model).state_dict(), here / f"{model}.pt")

    return lay


# -- what came out ---------------------------------------------------------------------------


def rows(folder: str, count: int, *columns: str, made: int | None = None) -> Here:
    """So many rows, with these columns, of which so many rows have values (all, where it is not said)."""

    def look(here: Path) -> None:
        tables = [pq.read_table(path) for path in sorted((here / folder).glob("*.parquet"))]
        assert sum(table.num_rows for table in tables) == count
        for name in columns:
            values = [value for table in tables for value in table[name].to_pylist()]
            assert sum(value is not None for value in values) == (count if made is None else made), name

    return look


def recipe(path: str, column: str, **wanted: Any) -> Here:
    def look(here: Path) -> None:
        entry = json.loads(pq.read_schema(here / path).metadata[b"curator_embed"])["columns"][column]["recipe"]
        assert {key: entry.get(key) for key in wanted} == wanted

    return look


PHASH = "columns wds --hash phash"
OUT = f"{PHASH} --output out"
LIST = "columns list.txt --root images --hash sha256 --output out"

CASES = {
    # in the way
    "made another way, overwrite": Case(
        f"{PHASH} --hash-size 4", ["was made another way", "Pass --overwrite"], [f"{PHASH} --hash-size 4 --overwrite"],
        both(rows("wds", 8, "phash", made=6), recipe("wds/00000.parquet", "phash", hash_size=4)), [PHASH],
    ),
    "made another way, another path": Case(
        f"{PHASH} --hash-size 4", ["or choose another output path"], [f"{PHASH} --hash-size 4 --output out"],
        both(recipe("wds/00000.parquet", "phash", hash_size=8), recipe("out/00000.parquet", "phash", hash_size=4)),
        [PHASH],
    ),
    "made another way, another name": Case(
        f"{PHASH} --hash-size 4", ["or column name"], [f"{PHASH} --hash-size 4 --prefix small_"],
        rows("wds", 8, "phash", "small_phash", made=6), [PHASH],
    ),
    "a column of somebody else": Case(
        PHASH, ["column 'phash' is already there and does not say what made it", "--overwrite"],
        [f"{PHASH} --overwrite"],
        both(rows("wds", 8, "phash", made=6), recipe("wds/00000.parquet", "phash", step="hash")),
        lay=both(add_column("wds/00000.parquet", "phash"), add_column("wds/00001.parquet", "phash")),
    ),
    "a file of somebody else": Case(
        OUT, ["is not an output of curator-embed", "--overwrite"], [f"{OUT} --overwrite"],
        rows("out", 8, "phash", made=6),
        lay=lambda here: (here / "out").mkdir() or pq.write_table(pa.table({"a": [1]}), here / "out/00001.parquet"),
    ),
    "a damaged output": Case(
        OUT, ["00001.parquet", "--overwrite"], [f"{OUT} --overwrite"], rows("out", 8, "phash", made=6), [OUT],
        write("out/00001.parquet", b"PAR1 no more"),
    ),
    "other options": Case(
        f"{OUT} --on-error drop", ["was written with other options", "--overwrite"],
        [f"{OUT} --on-error drop --overwrite"], rows("out", 6, "phash"), [OUT],
    ),
    "the output lacks the columns": Case(
        "columns wds --hash dhash --output out", ["without the new columns", "--metadata "],
        ["columns wds --hash dhash --metadata out"], rows("out", 8, "phash", "dhash", made=6), [OUT],
    ),
    "the dataset's own folder": Case(
        f"{PHASH} --output wds --overwrite", ["the dataset's own folder", "give no output path"], [PHASH],
        rows("wds", 8, "phash", made=6),
    ),
    "the dataset's own folder, for new files": Case(
        f"{PHASH} --output wds", ["wds_embedded"], [f"{PHASH} --output wds_embedded"],
        rows("wds_embedded", 8, "phash", made=6),
    ),
    "an output among the input": Case(
        "columns tables --hash phash --output tables/out", ["take it for input", "tables_out"],
        ["columns tables --hash phash --output tables_out"] * 2, rows("tables_out", 5, "phash"),
    ),
    "an output around the input": Case(
        "columns images --hash phash --output .", ["lies in the output folder", "/embedded"],
        ["columns images --hash phash --output ./embedded"], rows("embedded", 5, "phash"),
    ),
    "an empty output": Case(
        f"{PHASH} --output ''", ["--output is empty", "or leave it out"], [PHASH], rows("wds", 8, "phash", made=6)
    ),
    "nothing can be written": Case(
        f"{PHASH} --output file/out", ["cannot write there", "Choose another output path"], [OUT],
        rows("out", 8, "phash", made=6), lay=write("file", ""),
    ),
    "bookkeeping in two places": Case(
        OUT, ["both hold reports and locks", "Remove ", "out/.curator_embed"], [remove("out/.curator_embed"), OUT],
        rows("out", 8, "phash", made=6), [OUT],
        both(lambda here: (here / "out.curator_embed").mkdir(exist_ok=True), write("out/.curator_embed/x.json", "{}")),
    ),
    "state among the output": Case(
        f"{OUT} --state out/state", ["--state ", "Choose a folder outside"], [f"{OUT} --state state"],
        rows("out", 8, "phash", made=6),
    ),
    # ids and pairing
    "no such id column": Case(
        f"{PHASH} --id-col nosuch", ["no column 'nosuch'", "--id-col", "(it has: key"], [f"{PHASH} --id-col key"],
        rows("wds", 8, "phash", made=6),
    ),
    "another id column": Case(
        f"{OUT} --id-col url", ["paired another way", "--overwrite"], [f"{OUT} --id-col url --overwrite"],
        rows("out", 8, "phash", made=6), [OUT],
    ),
    "an id column that pairs nothing": Case(
        f"{OUT} --id-col caption", ["--id-col", "--overwrite"], [f"{OUT} --id-col key --overwrite"],
        rows("out", 8, "phash", made=6), status=0,
        lay=lambda here: [
            pq.write_table(pq.read_table(path).set_column(1, "caption", pa.array([f"no {n}" for n in range(4)])), path)
            for path in (here / "wds").glob("*.parquet")
        ],
    ),
    "images without a row": Case(
        PHASH, ["left out: pass an output path and --overwrite to get rows for them"], [f"{OUT} --overwrite"],
        rows("out", 8, "phash", made=6), status=0, lay=without_rows("wds/00000.parquet", ["000000001"]),
    ),
    "images without a row, columns that are copied": Case(
        OUT, ["left out, as columns are copied", "pass --overwrite to get rows"], [f"{OUT} --overwrite"],
        both(rows("out", 8, "phash", made=6), rows("wds", 7, "phash", made=5)),
        [without_rows("wds/00000.parquet", ["000000001"]), PHASH], status=0,
    ),
    "images without a row, in an output": Case(
        OUT, ["1 images have no row in the table, added as rows"], [OUT], rows("out", 8, "phash", made=6), status=0,
        lay=without_rows("wds/00000.parquet", ["000000001"]),
    ),
    "tables alone": Case(
        "columns T --hash phash", ["there are no images beside it", "--metadata"],
        ["columns wds --hash phash --metadata T"], rows("T", 8, "phash", made=6),
        lay=both(move("wds/00000.parquet", "T/00000.parquet"), move("wds/00001.parquet", "T/00001.parquet")),
    ),
    "tables that are not there": Case(
        f"{PHASH} --metadata nowhere", ["nowhere: no such folder", "--metadata"], [f"{PHASH} --metadata T"],
        rows("T", 8, "phash", made=6),
        lay=both(move("wds/00000.parquet", "T/00000.parquet"), move("wds/00001.parquet", "T/00001.parquet")),
    ),
    "an output as the source": Case(
        "columns out --hash dhash", ["give as SRC what it was made from, and this folder with --metadata"],
        ["columns wds --hash dhash --metadata out"], rows("out", 8, "phash", "dhash", made=6), [OUT],
    ),
    # in place, and what only a new folder may have
    "a limit in place": Case(
        f"{PHASH} --limit 2", ["give an output path as well"], [f"{PHASH} --limit 2 --output out"],
        rows("out", 2, "key"),
    ),
    "dropping rows in place": Case(
        f"{PHASH} --on-error drop", ["give an output path as well"], [f"{PHASH} --on-error drop --output out"],
        rows("out", 6, "phash"),
    ),
    "leaving columns out in place": Case(
        f"{PHASH} --keep-column caption", ["give an output path as well"],
        [f"{PHASH} --keep-column caption --output out"],
        rows("out", 8, "caption"),
    ),
    "a column that is not there": Case(
        f"{OUT} --keep-column nosuch", ["--keep-column names nosuch", "(it has: key"], [f"{OUT} --keep-column key"],
        rows("out", 8, "phash", made=6),
    ),
    # lists
    "a list cut otherwise": Case(
        f"{LIST} --images-per-file 3", ["--images-per-file 2"], [f"{LIST} --images-per-file 2"],
        rows("out", 5, "image_sha256"), [f"{LIST} --images-per-file 2 --end-line 4"],
    ),
    "a list that has grown": Case(
        f"{LIST} --images-per-file 2", ["added behind line 5, pass --start-line 5"],
        [f"{LIST} --images-per-file 2 --start-line 5"], rows("out", 7, "image_sha256"),
        [f"{LIST} --images-per-file 2"], lambda here: (here / "list.txt").open("a").write("0.jpg\n1.jpg\n"),
    ),
    "a list that has grown within its last file": Case(
        f"{LIST} --images-per-file 4", ["added behind line 5, pass --start-line 5"],
        [f"{LIST} --images-per-file 4 --start-line 5"], rows("out", 6, "image_sha256"),
        [f"{LIST} --images-per-file 4", lambda here: (here / "list.txt").open("a").write("0.jpg\n")],
    ),
    "a root that is not there": Case(
        "columns list.txt --root nowhere --hash sha256", ["no such folder", "--root"],
        ["columns list.txt --root images --hash sha256"], rows("list.txt_metadata", 5, "image_sha256"),
    ),
    "a root without the images": Case(
        "columns list.txt --root tables --hash sha256 --output out", ["--root"], [LIST], rows("out", 5, "image_sha256"),
        status=3,
    ),
    "a list of unknown ending": Case(
        "columns names.dat --root images --hash sha256", ["say --source path-list"],
        ["columns names.dat --root images --hash sha256 --source path-list"], rows("names.dat_metadata", 5, "path"),
        lay=move("list.txt", "names.dat"),
    ),
    "rows of a file said twice": Case(
        f"{LIST} --images-per-file 2 --inference-per-file 3", ["give one"], [f"{LIST} --images-per-file 2"],
        rows("out", 5, "image_sha256"),
    ),
    # what SRC is
    "one image": Case(
        "columns images/0.jpg --hash phash", ["images are given by their folder"],
        ["columns images --hash phash --output out"], rows("out", 5, "phash"),
    ),
    "images and tables of images, the folder": Case(
        "columns both --hash phash --output out", ["--source folder or --source parquet"],
        ["columns both --hash phash --output out --source folder"], rows("out", 5, "phash"),
        lay=both(move("images", "both"), move("tables/0.parquet", "both/0.parquet")),
    ),
    "images and tables of images, the tables": Case(
        "columns both --hash phash --output out", ["--source folder or --source parquet"],
        ["columns both --hash phash --output out --source parquet"], rows("out", 5, "phash"),
        lay=both(move("images", "both"), move("tables/0.parquet", "both/0.parquet")),
    ),
    "two columns of images": Case(
        "columns two --hash phash --output out --source parquet", ["Choose one with --image-col"],
        ["columns two --hash phash --output out --source parquet --image-col front"], rows("out", 5, "phash"),
        lay=lambda here: (here / "two").mkdir() or pq.write_table(
            pq.read_table(here / "tables/0.parquet").rename_columns(["key", "front"]).append_column(
                "back", pq.read_table(here / "tables/0.parquet")["image"]), here / "two/0.parquet"),
    ),
    "nothing to compute": Case(
        "columns wds", ["give --hash KIND", "or --properties"], ["columns wds --properties"],
        rows("wds", 8, "image_width", made=6),
    ),
    "a log that cannot be written": Case(
        f"{OUT} --log-dir list.txt", ["--log-dir list.txt: cannot write there"], [f"{OUT} --log-dir logs"],
        rows("out", 8, "phash", made=6),
    ),
    # models and clusters
    "no such model": Case(
        "embed wds --model test_resnt --output out", ["Did you mean: test_resnet"],
        ["embed wds --model test_resnet --compile off --output out"], rows("out", 8, "image_embedding", made=6),
    ),
    "two models, one column": Case(
        "embed wds --model test_resnet --model test_vit --output out", ["--model test_vit=COLUMN"],
        ["embed wds --model test_resnet --model test_vit=COLUMN --compile off --output out"],
        rows("out", 8, "image_embedding", "COLUMN", made=6),
    ),
    "an image size that does not fit": Case(
        "embed wds --model test_vit --image-size 161 --output out", ["Nearest sizes that do: 160"],
        ["embed wds --model test_vit --image-size 160 --output out"], rows("out", 8, "image_embedding", made=6),
    ),
    "no weights to download": Case(
        "embed wds --model lcnet_035 --pretrained --output out", ["no pretrained weights of lcnet_035; pass --weights"],
        [weights_of("lcnet_035"), "embed wds --model lcnet_035 --weights lcnet_035.pt --compile off --output out"],
        rows("out", 8, "image_embedding", made=6),
    ),
    "weights that are none": Case(
        "embed wds --model lcnet_035 --weights wds/00000.tar --output out", ["cannot be read as weights (not a pickle"],
        [weights_of("lcnet_035"), "embed wds --model lcnet_035 --weights lcnet_035.pt --compile off --output out"],
        rows("out", 8, "image_embedding", made=6),
    ),
    "random weights": Case(
        "embed wds --model lcnet_035 --compile off --output out",
        ["has random weights: pass --pretrained or --weights"],
        [weights_of("lcnet_035"), "embed wds --model lcnet_035 --weights lcnet_035.pt --compile off --output trained"],
        rows("trained", 8, "image_embedding", made=6), status=0,
    ),
    "a device that is none": Case(
        "embed wds --model test_resnet --device gpu --output out", ["--device gpu: use cpu"],
        ["embed wds --model test_resnet --device cpu --compile off --output out"],
        rows("out", 8, "image_embedding", made=6),
    ),
    "an option that Dask does not know": Case(
        f"{OUT} --cluster c.yaml", ["c.yaml: options.memory_limti", "did you mean 'memory_limit'?"],
        [write("c.yaml", "cluster: local\noptions: {memory_limit: 64GB}\n"), f"{OUT} --cluster c.yaml"],
        rows("out", 8, "phash", made=6), lay=write("c.yaml", "cluster: local\noptions: {memory_limti: 64GB}\n"),
    ),
    "a size among Dask's options": Case(
        f"{OUT} --cluster c.yaml", ["c.yaml: options.n_workers: ", "write gpus_per_node or workers_per_node"],
        [write("c.yaml", "cluster: local\nworkers_per_node: 1\n"), f"{OUT} --cluster c.yaml"],
        rows("out", 8, "phash", made=6), lay=write("c.yaml", "cluster: local\noptions: {n_workers: 1}\n"),
    ),
    "a cluster's file that is not there": Case(
        f"{OUT} --cluster c.yaml", ["c.yaml: cannot be read", "'cluster: local' and 'workers_per_node: 4'"],
        [write("c.yaml", "cluster: local\nworkers_per_node: 1\n"), f"{OUT} --cluster c.yaml"],
        rows("out", 8, "phash", made=6),
    ),
    "a list of paths in its folder": Case(
        "columns lists --hash sha256 --root images --output out", ["no images there, but 1 .txt", "pass the list file"],
        ["columns lists/list.txt --hash sha256 --root images --output out"], rows("out", 5, "image_sha256"),
        lay=move("list.txt", "lists/list.txt"),
    ),
    # what could not be read
    "a field that would give way, overwrite": Case(
        OUT, ["its json holds a field 'phash'", "--overwrite"], [f"{OUT} --overwrite"], rows("out", 2, "phash"),
        lay=both(remove("wds"), json_field("phash")), status=3,
    ),
    "a field that would give way, another name": Case(
        OUT, ["or choose another column name"], [f"{OUT} --prefix of_"], rows("out", 2, "phash", "of_phash"),
        lay=both(remove("wds"), json_field("phash")), status=3,
    ),
    "rows that fail under raise": Case(
        f"{OUT} --on-error raise", ["--on-error keep or --on-error drop"], [f"{OUT} --on-error keep --overwrite"],
        rows("out", 8, "phash", made=5), status=1,
        lay=lambda here: write_tar(here / "wds/00001.tar", [("000010000.jpg", b"<html>"), *[
            (f"00001000{n}.jpg", (here / "images" / f"{n}.jpg").read_bytes()) for n in (1, 2)]]),
    ),
    "a tar that is none": Case(
        OUT, ["00001.tar: not a tar", "restore or remove it"],
        [remove("wds/00001.tar"), move("kept.tar", "wds/00001.tar"), OUT],
        rows("out", 8, "phash", made=6), status=3,
        lay=both(move("wds/00001.tar", "kept.tar"), write("wds/00001.tar", b"no tar" * 500)),
    ),
    "a table that cannot be read": Case(
        OUT, ["00001.parquet: not a readable parquet file", "Restore it or remove it, then run again"],
        [remove("wds/00001.parquet"), OUT], rows("out", 7, "phash", made=6), status=3,
        lay=write("wds/00001.parquet", b"PAR1 no more"),
    ),
    "options that are no JSON": Case(
        f"{OUT} --storage-options '{{'", ["--storage-options is no JSON"], [f"{OUT} --storage-options '{{}}'"],
        rows("out", 8, "phash", made=6),
    ),
}  # fmt: skip


def tree(folder: Path) -> dict[str, int]:
    """Everything below a folder, folders among it, with the times of change of files."""
    return {str(p.relative_to(folder)): 0 if p.is_dir() else p.stat().st_mtime_ns for p in folder.rglob("*")}


def follow(steps: Sequence[str | Here], here: Path, run: Run) -> None:
    """Do what a person would do by hand, and run the commands, which succeed."""
    for step in steps:
        if callable(step):
            step(here)
        else:
            ran = run(*shlex.split(step), "--quiet")
            assert ran.status == 0, (step, ran.out, ran.err)


@pytest.mark.parametrize("name", CASES)
def test_the_remedy_that_is_told_works(
    name: str, run: Run, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    here = tmp_path / "here"
    shutil.copytree(material, here)
    monkeypatch.chdir(here)
    follow(case.first, here, run)
    case.lay(here)
    before = tree(here)
    ran = run(*shlex.split(case.wrong), "--quiet")
    assert ran.status == case.status, (ran.out, ran.err)
    assert "Traceback" not in ran.err
    told = ran.err + ran.out
    assert all(part in told for part in case.says), told
    if case.status == 2:
        assert tree(here) == before, "a refusal changes nothing"
    follow(case.remedy, here, run)
    case.right(here)


def test_a_lock_is_waited_for(run: Run, material: Path, tmp_path: Path) -> None:
    asked = ("columns", material / "wds", "--hash", "phash", "--output", tmp_path / "out", "--quiet")
    with OutputLock(Bookkeeping.of(Location.of(str(tmp_path / "out")))):
        ran = run(*asked)
        assert ran.status == 3 and "Wait for it" in ran.err and f"process {os.getpid()}" in ran.err
    assert run(*asked).status == 0


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("efficientnet_lite", "try '*efficientnet_lite*'"),
        ("*vit_base_patch32_klip*", "try 'vit_base_patch32_clip"),
        ("xyzzy", "'curator-embed models' lists all"),
    ],
)
def test_a_glob_that_is_advised_finds_models(run: Run, pattern: str, advice: str) -> None:
    ran = run("models", pattern)
    assert ran.status == 2 and advice in ran.err
    asked = shlex.split(ran.err.rpartition("; ")[2].replace("try", "models"))[:2] if "try" in advice else ["models"]
    assert run(*asked).status == 0
