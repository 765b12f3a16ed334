"""What makes an embedder this one and no other: its class's code, its transform, and what both use."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curator_embed import get_client
from curator_embed.cli.wording import telling
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.embedders import ImageEmbedder, TimmImageEmbedder
from curator_embed.errors import UsageError
from curator_embed.steps import Settings
from tests.shards import write_dataset

TINY = PreprocessSpec("squash", (4, 4), (4, 4), "bilinear", (0.5,) * 3, (0.5,) * 3)


class Mean(ImageEmbedder):
    """The mean of each channel."""

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda batch: batch.mean((2, 3))


class Grey:
    """A transform with a parameter: squares of one grey."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.full((3, self.side, self.side), sum(image.resize((1, 1)).getpixel((0, 0))) / 765 + self.side)

    def squared(self, image: Image.Image) -> torch.Tensor:
        return self(image) ** 2


CONNECTION = sqlite3.connect(":memory:", check_same_thread=False)


def connected(image: Image.Image) -> torch.Tensor:
    """A transform that uses an object in C that nobody can look into."""
    return Grey(2)(image) + CONNECTION.total_changes


# -- the class's code -------------------------------------------------------------------------------


OWN = """
from curator_embed.embedders import ImageEmbedder
{before}
class Own(ImageEmbedder):
    def load_embedding_model(self, device):
        return {model}
"""


@pytest.fixture
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Write somebody's module and import it, as a process that has just been started does."""
    monkeypatch.syspath_prepend(str(tmp_path))
    # Bytecode is known by the second its source was written in: two modules written in one would be taken for one.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write_and_import(before: str = "", model: str = "len") -> Any:
        (tmp_path / "somebodys.py").write_text(OWN.format(before=before, model=model))
        sys.modules.pop("somebodys", None)
        importlib.invalidate_caches()
        return importlib.import_module("somebodys")

    yield write_and_import
    sys.modules.pop("somebodys", None)


def code_of(module: Any) -> Any:
    return module.Own(transform=TINY, device="cpu").recipe()["code"]


def test_a_class_that_uses_nothing_of_its_module_is_its_source(somebodys: Callable[..., Any]) -> None:
    """As in version 0.1.0, so that what was made then stays valid."""
    module = somebodys(model="lambda batch: batch.mean((2, 3))")
    assert code_of(module) == hashlib.sha256(inspect.getsource(module.Own).encode()).hexdigest()


@pytest.mark.parametrize(
    ("before", "model"),
    [
        ("def mean(batch): return batch.mean((2, 3)) * {}", "mean"),
        ("BY = {}", "lambda batch: batch.mean((2, 3)) * BY"),
        ("from torch import nn\nclass Net(nn.Module):\n    def forward(self, batch): return batch * {}", "Net()"),
        ("def decorated(kind):\n    kind.by = {}\n    return kind\n@decorated\nclass Parent: pass", "Parent.by"),
    ],
)
def test_what_a_class_uses_of_its_module_counts(before: str, model: str, somebodys: Callable[..., Any]) -> None:
    first, again, other = (code_of(somebodys(before.format(by), model)) for by in (1, 1, 2))
    assert first == again != other


def test_the_source_is_that_of_the_code_that_runs(somebodys: Callable[..., Any], tmp_path: Path) -> None:
    """A file that is edited while a session goes on is not what the session runs."""
    module = somebodys(model="lambda batch: batch.mean((2, 3))")
    before = code_of(module)
    (tmp_path / "somebodys.py").write_text(OWN.format(before="", model="lambda batch: batch.mean((2, 3)) * 2"))
    assert code_of(module) == before
    assert code_of(somebodys(model="lambda batch: batch.mean((2, 3)) * 2")) != before


def test_classes_without_source_are_known_by_their_code() -> None:
    """As typed into an interactive interpreter."""

    def typed(by: int) -> Any:
        scope: dict[str, Any] = {"ImageEmbedder": ImageEmbedder, "__name__": "__main__"}
        exec(OWN.format(before="", model=f"lambda batch: batch.mean((2, 3)) * {by}"), scope)
        return scope["Own"](transform=TINY, device="cpu").recipe()["code"]

    assert len(typed(1)) == 64
    assert typed(1) == typed(1) != typed(2)


def test_a_text_named_digest_stands_for_a_class(somebodys: Callable[..., Any]) -> None:
    module = somebodys("BY = 1", "lambda batch: BY")
    module.Own.digest = "v1"
    assert code_of(module) == "v1"


@pytest.mark.filterwarnings("ignore:.*random weights")
def test_the_packages_own_embedders_have_no_code_and_nothing_that_cannot_be_repeated() -> None:
    recipe = TimmImageEmbedder("test_resnet.r160_in1k", device="cpu").recipe()
    assert set(recipe) == {
        "step", "class", "model", "weights", "preprocessing", "honour_exif", "max_image_pixels", "batch_shape",
        "device", "decoder", "threads", "compile", "precision", "normalize", "dtype", "software", "architecture",
    }  # fmt: skip
    assert recipe["preprocessing"] == TimmImageEmbedder("test_resnet.r160_in1k").blueprint.spec().to_dict()


SCRIPT = """
import json, sys, warnings
import torch
from curator_embed.embedders import ImageEmbedder

WORDS = {"a", "b", "c", "d", "e"}
def mean(batch): return batch.mean((2, 3)) + len(WORDS)

class Own(ImageEmbedder):
    def load_embedding_model(self, device): return mean

def grey(names):
    def transform(image, sizes=frozenset(["x", "y", 3, 4.5])):
        return torch.ones(3, 2, 2) * ("a" in names) + len(sizes)
    return transform

print(json.dumps(Own("mine", transform=grey(WORDS), device="cpu").recipe(), sort_keys=True))
"""


def test_recipes_are_the_same_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def told(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": hash_seed}
        ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
        return ran.stdout

    first = told("1")
    assert len(json.loads(first)["code"]) == len(json.loads(first)["preprocessing"]["sha256"]) == 64
    assert told("2") == first


# -- its transform ----------------------------------------------------------------------------------


def test_a_transform_is_looked_at_when_a_run_begins_and_then_stays() -> None:
    """It may change between two runs of one process; what a run itself changes of it is another matter."""
    transform = Grey(2)
    embedder = Mean("mine", transform=transform, device="cpu")
    before = embedder.recipe()
    settled = embedder.settled(Settings(1))
    transform.side = 3
    assert embedder.recipe()["preprocessing"] != before["preprocessing"]
    assert settled.recipe()["preprocessing"] == before["preprocessing"]
    there = pickle.loads(pickle.dumps(settled))
    assert there.recipe() == settled.recipe()
    assert json.loads(json.dumps(settled.recipe())) == settled.recipe()


class OwnTransform(Mean):
    """Its transform is a method of its own."""

    def __init__(self, by: int) -> None:
        self.by = by
        super().__init__("mine", transform=self.scaled, device="cpu")

    def scaled(self, image: Image.Image) -> torch.Tensor:
        return torch.ones(3, 2, 2) * self.by


def test_a_transform_that_is_a_method_of_its_embedder() -> None:
    one, again, other = OwnTransform(1), OwnTransform(1), OwnTransform(2)
    again.embed([Image.new("RGB", (3, 3))])
    again.weights_sha256()
    recipes = [embedder.recipe()["preprocessing"] for embedder in (one, again, other)]
    assert recipes[0] == recipes[1] != recipes[2]
    assert "unrepeatable" not in one.recipe()


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[Any]:
    with get_client() as started:
        yield started
        started.cluster.close()


@pytest.fixture
def folder(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    return write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=3, missing=0)


def save(transform: Any, folder: Path, **options: Any) -> Any:
    embedder = Mean("mine", transform=transform, device="cpu", normalize_embeddings=False)
    return embedder(ImageTextPairDataset.from_webdataset(str(folder))).save_metadata(progress=False, **options)


def vectors(folder: Path) -> list[Any]:
    return [value for path in sorted(folder.glob("*.parquet")) for value in pq.read_table(path)["image_embedding"]]


@pytest.mark.parametrize(
    "make",
    [Grey, lambda side: Grey(side).squared, lambda side: lambda image: Grey(2)(image) + side],
    ids=["object", "bound method", "closure"],
)
def test_a_transform_that_has_changed_is_not_taken_for_done(make: Callable[[int], Any], folder: Path) -> None:
    assert save(make(2), folder).embedded == 6
    assert save(make(2), folder).shards["skipped"] == 2
    before = vectors(folder)
    with pytest.raises(UsageError, match=r"'image_embedding' was made another way \(preprocessing: "):
        save(make(3), folder)
    assert vectors(folder) == before
    assert save(make(3), folder, overwrite=True).embedded == 6
    assert vectors(folder) != before


def test_what_cannot_be_told_never_counts_as_done_and_the_message_says_what_helps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by_then: list[str] = []
    handler = logging.Handler(logging.WARNING)  # of our own: Dask's cluster quietens those that are there
    monkeypatch.setattr(handler, "emit", lambda record: told_by_then.append(record.getMessage()))
    with telling(handler):
        assert save(connected, folder).embedded == 6
    why = "transform: CONNECTION (sqlite3.Connection) has no state that can be read"
    assert why in "\n".join(told_by_then)
    with pytest.raises(UsageError) as told:
        save(connected, folder)
    for words in (why, "'image_embedding' was made another way", "attribute digest", "pass a PreprocessSpec"):
        assert words in str(told.value)
    assert save(connected, folder, overwrite=True).embedded == 6
    # What it advises: a text of one's own, which then decides, or a spec.
    monkeypatch.setattr(connected, "digest", "first", raising=False)
    assert save(connected, folder, overwrite=True).embedded == 6
    assert save(connected, folder).shards["skipped"] == 2
    monkeypatch.setattr(connected, "digest", "second")
    with pytest.raises(UsageError, match="was made another way"):
        save(connected, folder)
    assert save(TINY, folder, overwrite=True).embedded == 6
    assert save(TINY, folder).shards["skipped"] == 2
