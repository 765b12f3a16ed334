"""Values that a table must not hold: vectors without a direction, and what a step has no column for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curator_embed import get_client
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.embedders import ImageEmbedder
from curator_embed.errors import StepError
from curator_embed.execution.report import RunReport
from curator_embed.pipeline.pipeline import sound
from curator_embed.steps import BatchModel, ImageStep
from tests.rows import assert_embedded, table_rows, tar_images
from tests.shards import write_dataset
from tests.stub import ColourEmbedder, ColourModel


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterable[Any]:
    with get_client() as started:
        yield started
        started.cluster.close()


@pytest.fixture
def folder(tmp_path: Path, wheel_photos: list[Path]) -> Path:
    """Two shards of eight photographs, nine rows each."""
    return write_dataset(tmp_path / "in", wheel_photos, shards=2, samples=8)


def save(step: Any, folder: Path, *more: Any, **options: Any) -> RunReport:
    dataset = step(ImageTextPairDataset.from_webdataset(str(folder)))
    for other in more:
        dataset = other(dataset)
    return dataset.save_metadata(progress=False, **options)


# -- vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_what_a_sound_vector_is(kind: type[np.floating[Any]]) -> None:
    tiny, most = np.finfo(kind).smallest_subnormal, np.finfo(kind).max
    vectors = np.array(
        [[1, 2, 3], [0, 0, 0], [-0.0, 0, 0], [np.nan, 1, 1], [1, np.inf, 1], [1, 1, -np.inf], [0, 0, tiny],
         [0, -tiny, 0], [most, -most, 0], [0, 0, -np.nan]], kind,
    )  # fmt: skip
    wanted = [True, False, False, False, False, False, True, True, True, False]
    assert sound(vectors) == wanted
    assert sound(np.asfortranarray(vectors)) == wanted
    assert sound(vectors[::2, :]) == wanted[::2]
    assert sound(np.empty((0, 3), kind)) == []
    assert sound(np.empty((2, 0), kind)) == [False, False]


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_soundness_agrees_with_asking_every_value(kind: type[np.floating[Any]]) -> None:
    random = np.random.default_rng(0)
    bits = np.dtype(f"u{np.dtype(kind).itemsize}")
    vectors = random.integers(0, np.iinfo(bits).max, (3000, 2), bits, endpoint=True).view(kind)
    vectors[random.random(vectors.shape) < 0.4] = 0
    with np.errstate(invalid="ignore"):
        assert sound(vectors) == (np.isfinite(vectors).all(axis=1) & (vectors != 0).any(axis=1)).tolist()


class Odd(ColourModel):
    """Gives some images the vector that it is told to; which ones depends on their pixels alone."""

    def __init__(self, batch_size: int, value: float) -> None:
        super().__init__(batch_size)
        self.value = value

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        vectors = super().__call__(images)
        for vector, image in zip(vectors, images, strict=True):
            if is_odd(image):
                vector[:] = 0 if self.value == 0 else vector
                vector[3] = self.value
        return vectors


def is_odd(thumbnail: np.ndarray) -> bool:
    return bool(thumbnail.astype(int).sum() % 3 == 0)


class OddEmbedder(ColourEmbedder):
    """An embedder with such a model."""

    def __init__(self, value: float, column: str = "image_embedding", kind: pa.DataType = pa.float32()) -> None:  # noqa: B008
        super().__init__(column)
        self.value, self.kind = value, kind

    def columns(self) -> dict[str, pa.DataType]:
        return {self.column: pa.list_(self.kind)}

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        return Odd(self.batch_size, self.value)


def odd_keys(folder: Path) -> set[str]:
    import io

    from PIL import Image

    found = set()
    for key, data in tar_images(folder).items():
        with Image.open(io.BytesIO(data)) as image:
            if is_odd(np.asarray(image.convert("RGB").resize((8, 8)))):
                found.add(key)
    assert 0 < len(found) < 16
    return found


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_bad_vectors_are_failed_rows_with_a_reason(value: float, folder: Path) -> None:
    odd, images = odd_keys(folder), tar_images(folder)
    report = save(OddEmbedder(value), folder, ColourEmbedder("beside"))
    assert report.reasons == {"bad_vector": len(odd)}
    assert (report.read, report.failed, report.no_image) == (18, len(odd), 2)
    assert report.embedded == 16 - len(odd)
    for key, row in table_rows(folder).items():
        if key in odd:
            assert row["image_embedding"] is None and row["image_error"] == "bad_vector"
            assert row["beside"] is not None, "what another step made of the image stays"
        elif key in images:
            assert_embedded(row, images[key])
    again = save(OddEmbedder(value), folder, ColourEmbedder("beside"))
    assert again.shards["skipped"] == 2 and again.reasons == report.reasons


def test_float16_that_overflows_is_a_bad_vector(folder: Path) -> None:
    """The model's vectors are finite; its column cannot hold them."""
    odd = odd_keys(folder)
    assert save(OddEmbedder(7e4, kind=pa.float16()), folder).reasons == {"bad_vector": len(odd)}
    rows = table_rows(folder)
    assert {key for key, row in rows.items() if row["image_error"] == "bad_vector"} == odd
    assert all(np.isfinite(np.array(row["image_embedding"] or [1])).all() for row in rows.values())


class Scaled(torch.nn.Module):
    """The mean of each channel, times a large number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) * self.factor


class ScaledEmbedder(ImageEmbedder):
    """Such a model as an embedder."""

    factor = 1e6

    def load_embedding_model(self, device: str) -> Scaled:
        return Scaled(self.factor).to(device)


@pytest.mark.parametrize(("normalize", "factor", "bad"), [(False, 1e6, True), (True, 1e6, False), (False, 0.0, True),
                                                          (True, 0.0, True), (False, 1.0, False)])  # fmt: skip
def test_embedders_with_and_without_normalisation(normalize: bool, factor: float, bad: bool, folder: Path) -> None:
    embedder = ScaledEmbedder("scaled", normalize_embeddings=normalize, dtype="float16", device="cpu")
    embedder.factor = factor
    if bad:
        with pytest.raises(Exception, match="bad_vector"):
            save(embedder, folder, on_error="raise")
    else:
        assert save(embedder, folder).embedded == 16


class OwnReader(ColourEmbedder):
    """Reads the tar itself; gives every third vector as it is told to, and one id twice."""

    reads_own_shards = True

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def embed_shard(self, source: str, device: str, id_col: str) -> Iterable[tuple[list[str], np.ndarray]]:
        keys = sorted(tar_images(Path(source).parent))
        keys = [key for key in keys if key.startswith(Path(source).stem)]
        for start in (0, 5):
            part = keys[start : start + 5]
            vectors = np.ones((len(part), 4), np.float64)
            vectors[::3] = [0 if self.value == 0 else 1, 0, 0, self.value]
            yield part, vectors


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e300])
def test_bad_vectors_of_an_embedder_that_reads_shards_itself(value: float, folder: Path) -> None:
    report = save(OwnReader(value), folder)
    assert report.reasons == {"bad_vector": 6} and report.embedded == 10
    for key, row in table_rows(folder).items():
        number = int(key[5:])
        if number == 8:
            assert row["image_error"] == "no_image"
        elif number in (0, 3, 5):
            assert (row["image_embedding"], row["image_error"]) == (None, "bad_vector")
        else:
            assert (row["image_embedding"], row["image_error"]) == ([1.0] * 4, None)


class Flat(BatchModel):
    """Gives numbers and no vectors."""

    batch_size = 4

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        return np.ones(len(images), np.float32)


class FlatEmbedder(ColourEmbedder):
    """An embedder with such a model."""

    def load_model(self, device: str, threads: int | None = None) -> BatchModel:
        return Flat()


def test_numbers_in_the_place_of_vectors_end_the_run(folder: Path) -> None:
    with pytest.raises(StepError, match=r"embeddings of shape \(4,\) for 4 images"):
        save(FlatEmbedder(), folder)


# -- image steps ------------------------------------------------------------------------------------


class Moody(ImageStep):
    """Gives what it is told to, in a column of whole numbers."""

    seen = 0

    def __init__(self, given: Any) -> None:
        self.given = given

    def columns(self) -> dict[str, pa.DataType]:
        return {"mood": pa.int8(), "why": pa.string()}

    def recipe(self) -> dict[str, Any]:
        return {"step": "moody"}

    def measure(self, image: DecodedImage) -> Mapping[str, Any]:
        Moody.seen += 1
        given: Mapping[str, Any] = self.given
        return given


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"moood": 1}, ["Moody.measure", "'moood'", "no column of its own (mood, why)"]),
        ({"mood": 1, 7: 1}, ["Moody.measure", "7", "(mood, why)"]),
        ([1], ["Moody.measure must give values by column, a dict, and gave list"]),
        (None, ["gave NoneType"]),
        ({"mood": 1000}, ["Moody gave 1000 for column 'mood' of image '000", "int8"]),
        ({"mood": "low"}, ["Moody gave 'low' for column 'mood' of image '000", "int8"]),
        ({"mood": 1, "why": 2.5}, ["Moody gave 2.5 for column 'why'", "string"]),
        ({"mood": 2.5}, ["Moody gave 2.5 for column 'mood'"]),
    ],
)
def test_what_a_step_has_no_column_for_ends_the_run(
    given: Any, words: list[str], tmp_path: Path, wheel_photos: list[Path]
) -> None:
    folder = write_dataset(tmp_path / "in", wheel_photos, shards=12, samples=8, missing=0)
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    Moody.seen = 0
    with pytest.raises(StepError) as told:
        save(Moody(given), folder)
    assert all(word in str(told.value) for word in words), told.value
    assert Moody.seen < 12 * 8, "the run did not go on with the other shards"
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before


@pytest.mark.parametrize("given", [{}, {"mood": None}, {"why": "dark"}, {"mood": np.int64(3), "why": None}])
def test_a_column_that_is_left_out_is_null(given: dict[str, Any], folder: Path) -> None:
    assert save(Moody(given), folder).embedded == 16
    table = pa.concat_tables([pq.read_table(path) for path in folder.glob("*.parquet")])
    for name in ("mood", "why"):
        value = given.get(name)
        assert table[name].to_pylist().count(None) == (2 if value is not None else 18)
