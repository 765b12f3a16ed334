"""What the library says reaches the command's users in the command's words."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import curator_embed
from curator_embed.cli.source_options import SourceOptions
from curator_embed.cli.wording import PHRASES, RENAMED, in_options, telling
from curator_embed.execution import progress
from curator_embed.execution.progress import Progress

Run = Callable[..., Any]

PYTHON_ONLY = {
    "config",  # several clusters asked for at once: the command checks that itself
    "connections",
    "honour_exif",
    "key",
    "max_shards",  # of to_webdataset, which no command calls
    "old_id_col",
    "reading",  # its fields are options
    "samples_per_shard",
}
"""Keywords in messages that no command can lead to."""


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Name it with image_col= or id_col=", "Name it with --image-col or --id-col"),
        ("Pass overwrite=True to replace it", "Pass --overwrite to replace it"),
        ("use on_error='keep' or on_error='drop'.", "use --on-error keep or --on-error drop."),
        ("Check root=, the permissions", "Check --root, the permissions"),
        ("pass pretrained=True or weights=PATH for", "pass --pretrained or --weights PATH for"),
        ("image_size=100 does not fit", "--image-size 100 does not fit"),
        ("weights='my file.pt': no such file", "--weights 'my file.pt': no such file"),
        ("dataset='' begins", "--dataset '' begins"),
        ("metadata_path='/x/y'. Nothing", "--metadata /x/y. Nothing"),
        ("columns= chooses others", "--keep-column chooses others"),
        ("cluster_type='gpu' needs one", "--gpu needs one"),
        (
            "another column name (image_embedding_column=...)",
            "another column name (--column NAME, or --model MODEL=NAME)",
        ),
        ("another column name (prefix=...)", "another column name (--prefix ...)"),
        ("Without DALI goes decoder='cpu'; ", "Without DALI goes --decoder cpu; "),
        ("with limit=5.", "with --limit 5."),
        ("pass reading=ReadPolicy(links='any')", "pass --links any"),
        ("pass reading=ReadPolicy(urls='public', allow=...) w", "pass --urls public, --allow ... w"),
        # not the command's to say
        ("overwrite=False", "overwrite=False"),
        ("max_shards=0", "max_shards=0"),
        ("/data/dataset=laion/limit=5/0.tar: no such file", "/data/dataset=laion/limit=5/0.tar: no such file"),
        ("dataset=laion/0.tar", "dataset=laion/0.tar"),
        ("https://h/x?root=1", "https://h/x?root=1"),
        ("a == b, root==x", "a == b, root==x"),
    ],
)
def test_keywords_become_options(message: str, words: str) -> None:
    assert in_options(message) == words


def keywords_in_messages() -> Iterator[tuple[str, str]]:
    """(keyword, where) of everything that looks like ``keyword=`` in the package's strings, docstrings left out."""
    package = Path(curator_embed.__file__).parent
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
                for keyword in re.findall(r"(?<![\w/.:=-])([a-z][a-z_]+)=(?![=\"])", node.value):
                    yield keyword, f"{file.relative_to(package)}:{node.lineno}"


def test_every_keyword_that_a_message_names_is_an_option_too() -> None:
    phrases = {phrase.partition("=")[0] for phrase in PHRASES}
    found = [
        (keyword, where)
        for keyword, where in keywords_in_messages()
        if not where.startswith(("cli/", "execution/clusters/"))  # options already, and keys of job scripts
        and keyword not in PYTHON_ONLY | phrases
    ]
    assert len(found) > 20  # else the search is broken
    unsaid = [(keyword, where) for keyword, where in found if not in_options(f"{keyword}=").startswith("--")]
    assert not unsaid, f"make it an option, or tell {__name__} why not"
    assert all(in_options(f"{keyword}=").startswith("--") for keyword in RENAMED)


def test_errors_and_reports_of_the_command(run: Run, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = run("columns", source, "--properties", "--output", out, "--on-error", "raise")
    assert ran.status == 1
    assert "--on-error keep" in ran.err and "on_error" not in ran.err
    assert ran.err.rstrip().endswith("error: rows failed, under --on-error raise")
    assert ran.err.count("1 of 7 rows failed") == 1
    assert run("columns", source, "--properties", "--output", out).status == 0
    ran = run("columns", source, "--hash", "phash", "--output", out)
    assert ran.status == 2 and f"--metadata {out}" in ran.err
    ran = run("columns", out, "--hash", "phash")
    assert ran.status == 2 and "an output of this command" in ran.err


def test_some_columns_are_kept(run: Run, source: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    ran = run("columns", source, "--hash", "phash", "--output", tmp_path / "out", "--keep-column", "caption", "--quiet")
    assert ran.status == 0, ran.err
    assert pq.read_schema(tmp_path / "out" / "00000.parquet").names == ["key", "caption", "phash", "image_error"]
    ran = run("columns", source, "--hash", "phash", "--output", tmp_path / "2", "--keep-column", "nope")
    assert ran.status == 2 and "--keep-column names nope: not in" in ran.err


def test_warnings_of_the_library_are_notes(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("curator_embed.anything")
    with telling():
        logger.warning("with device='cuda' %d do", 2)
        logger.info("far")
        logger.debug("nothing")
    logger.warning("after")
    assert capsys.readouterr().err == "note: with --device cuda 2 do\nfar\n"


def test_progress_is_lines_where_no_bar_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    caplog.set_level(logging.DEBUG, logger="curator_embed")
    with Progress(1000, show=True) as bar:
        bar.set_postfix(failed=3)
        bar.update(100)
    with Progress(None, show=False) as bar:
        bar.update(1)
    first, second = caplog.records
    assert re.fullmatch(r"100 of 1,000 \(10%\) images, 3 failed, [\d,.]+ images/s, \d\d:\d\d left", first.getMessage())
    assert re.fullmatch(r"1 images, 0 failed, [\d,.]+ images/s", second.getMessage())
    assert (first.levelno, second.levelno) == (logging.INFO, logging.DEBUG)
    assert capsys.readouterr().err == ""


def test_progress_is_in_the_log_of_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with SourceOptions(log_dir=str(tmp_path), end_line=9).logging("some/list.txt") as write:
        with Progress(10, show=False) as bar:
            bar.update(5)
        write("Check root=")
    lines = [line.partition(" ")[2] for line in (tmp_path / "list_0.txt").read_text().splitlines()]
    assert lines[0] == "begin list, lines 0 to 9"
    assert lines[1].startswith("5 of 10 (50%) images, 0 failed")
    assert lines[2:] == ["Check --root", "end"]
    with pytest.raises(KeyboardInterrupt), SourceOptions(log_dir=str(tmp_path)).logging("some/list.txt"):
        raise KeyboardInterrupt
    last = (tmp_path / "list_0.txt").read_text().splitlines()[-1]
    assert last.endswith("error: KeyboardInterrupt")
