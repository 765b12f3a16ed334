"""``ImageEmbedder``: custom embedders of every shape, recipes, copies, and arrays without a dataset."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision import transforms

from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.spec import PreprocessSpec
from curator_embed.embedders import ImageEmbedder
from curator_embed.embedders.base import IMAGENET
from curator_embed.errors import CuratorEmbedError, ImageError, Reason, UsageError
from curator_embed.steps import Settings

TINY = PreprocessSpec("squash", (4, 4), (4, 4), "bilinear", (0.5,) * 3, (0.5,) * 3)


class MeanColour(ImageEmbedder):
    """Overrides the model alone, and says nothing to ``ImageEmbedder`` but the transform."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"transform": TINY, **options})

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda batch: batch.mean((2, 3))


class OwnReader(ImageEmbedder):
    """Overrides both, in the shape of NeMo Curator's documentation."""

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
        yield torch.full((2, 3), 2.0), {"key": ["a", "b"], "txt": ["x", "y"]}
        yield torch.tensor([[3.0, 4.0, 0.0]]), {"key": [tar_path]}

    def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return torch.nn.Identity()


class Seeded(ImageEmbedder):
    """A custom model that is a module."""

    seed: int | None = 3

    def load_embedding_model(self, device: str) -> torch.nn.Module:
        if self.seed is not None:
            torch.manual_seed(self.seed)
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))


@pytest.fixture
def tar(tmp_path: Path, encoded: list[bytes]) -> str:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w") as archive:
        for number, data in enumerate([*encoded, b"no image"]):
            member = tarfile.TarInfo(f"{number:04d}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


# --- custom embedders -----------------------------------------------------------------------------


def test_a_model_alone_is_enough(encoded: list[bytes]) -> None:
    embedder = MeanColour(normalize_embeddings=False)
    assert not embedder.reads_own_shards
    assert embedder.embedding_dim == 3
    runner = embedder.load_model("cpu")
    image = Image.open(io.BytesIO(encoded[0]))
    prepared = embedder.prepare(DecodedImage(encoded[0], image, "PNG"))
    assert prepared.dtype == torch.uint8 and prepared.shape == (3, 4, 4)
    expected = (prepared.float() / 255 - 0.5).div(0.5).mean((1, 2))
    np.testing.assert_allclose(runner([prepared])[0], expected.numpy(), atol=1e-6)


def test_the_default_reader_yields_what_decodes(tar: str, encoded: list[bytes]) -> None:
    embedder = MeanColour()
    batches = list(embedder.load_dataset_shard(tar))
    assert [len(meta["key"]) for _, meta in batches] == [16, 4]
    assert [key for _, meta in batches for key in meta["key"]] == [f"{n:04d}" for n in range(20)]
    assert all(batch.dtype == torch.float32 and batch.shape[1:] == (3, 4, 4) for batch, _ in batches)
    ids, vectors = zip(*embedder.embed_shard(tar, "cpu"), strict=True)
    assert [len(part) for part in ids] == [16, 4] and ids[1][-1] == "0019"
    np.testing.assert_allclose(np.concatenate(vectors), embedder.embed(encoded), atol=1e-6)


def test_own_shards_are_read_by_the_embedder() -> None:
    embedder = OwnReader("mine")
    assert embedder.reads_own_shards and embedder.embedding_dim is None
    (first, vectors), (second, last) = embedder.embed_shard("x.tar", "cpu")
    assert (first, second) == (["a", "b"], ["x.tar"])
    np.testing.assert_allclose(vectors, np.full((2, 3), 3**-0.5), atol=1e-6)
    np.testing.assert_allclose(last, [[0.6, 0.8, 0]], atol=1e-6)
    raw = OwnReader("mine", normalize_embeddings=False, dtype="float16")
    assert next(raw.embed_shard("x.tar", "cpu"))[1].tolist() == [[2.0] * 3] * 2
    assert raw.columns() == {"image_embedding": pa.list_(pa.float16())}
    assert embedder.recipe()["preprocessing"] is None


class OnlyReader(ImageEmbedder):
    """Overrides reading alone: the model is the one the name stands for."""

    def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
        yield torch.zeros(1, 3, 160, 160), {"key": [1]}


def test_reading_alone_is_enough_where_the_name_is_a_models(monkeypatch: pytest.MonkeyPatch) -> None:
    from curator_embed.embedders.catalogue import Blueprint

    asked: list[bool] = []
    build = Blueprint.build

    def no_download(self: Blueprint, *, pretrained: bool = False, weights: Any = None) -> torch.nn.Module:
        asked.append(pretrained)
        return build(self)

    monkeypatch.setattr(Blueprint, "build", no_download)
    ((ids, vectors),) = OnlyReader("test_vit").embed_shard("x.tar", "cpu")
    assert ids == [1] and vectors.shape == (1, 64) and asked == [True]
    with pytest.raises(UsageError, match="no model named 'custom'"):
        next(OnlyReader().embed_shard("x.tar", "cpu"))


@pytest.mark.parametrize(
    ("batch", "metadata", "message"),
    [
        (torch.zeros(2, 3), {"name": ["a", "b"]}, "without 'key'"),
        (torch.zeros(2, 3), [{"key": "a"}, {"key": "b"}], "gave list"),
        (torch.zeros(2, 3), {"key": ["a"]}, "for 1 ids of x.tar"),
        (torch.zeros(2), {"key": ["a", "b"]}, "must be"),
    ],
)
def test_a_reader_that_breaks_the_contract_is_told(batch: torch.Tensor, metadata: Any, message: str) -> None:
    class Wrong(OwnReader):
        def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
            yield batch, metadata

    with pytest.raises(UsageError, match=message):
        list(Wrong().embed_shard("x.tar", "cpu"))


def test_ids_come_from_the_id_column_where_it_is_there() -> None:
    class Two(OwnReader):
        def load_dataset_shard(self, tar_path: str) -> Iterable[tuple[Any, dict[str, Any]]]:
            yield torch.ones(1, 3), {"key": ["k"], "uid": [17]}

    assert next(Two().embed_shard("x.tar", "cpu", "uid"))[0] == [17]
    assert next(Two().embed_shard("x.tar", "cpu"))[0] == ["k"]


# --- the recipe -----------------------------------------------------------------------------------


def test_a_recipe_is_plain_and_the_same_everywhere() -> None:
    embedder = Seeded("mine", batch_size=1024, device="cpu")
    recipe = embedder.recipe()
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["batch_shape"] == [16, 3, 224, 224]
    assert recipe["preprocessing"] == IMAGENET.to_dict()
    assert recipe["threads"] is None and recipe["compile"] is None
    assert set(recipe["software"]) == {"torch", "timm", "pillow"}
    assert Seeded("mine", batch_size=1024, device="cpu").recipe() == recipe
    assert pickle.loads(pickle.dumps(embedder)).recipe() == recipe


@pytest.mark.parametrize(
    "change",
    [
        {"model_name": "other"},
        {"dtype": "float16"},
        {"normalize_embeddings": False},
        {"transform": TINY},
        {"honour_exif": True},
        {"max_image_pixels": 1000},
        {"batch_size": 8},
    ],
)
def test_what_changes_values_changes_the_recipe(change: dict[str, Any]) -> None:
    plain = {"model_name": "mine", "device": "cpu"}
    assert Seeded(**plain | change).recipe() != Seeded(**plain).recipe()


def test_weights_and_code_of_a_custom_embedder_count() -> None:
    class OtherSeed(Seeded):
        seed = 4

    plain, other = Seeded("mine").recipe(), OtherSeed("mine").recipe()
    assert plain["weights"] != other["weights"]
    assert plain["code"] != other["code"]
    assert MeanColour().recipe()["weights"] is None


def test_a_gpu_works_in_its_own_batch_and_precision() -> None:
    on_gpu = Seeded("mine", batch_size=1024).on_device("cuda:1").recipe()
    assert on_gpu["device"] == "cuda" and on_gpu["batch_shape"][0] == 1024 and on_gpu["precision"] == "bfloat16"
    assert Seeded("mine", autocast=False).on_device("cuda").recipe()["precision"] == "float32"
    assert Seeded("mine").on_device("cpu").recipe()["precision"] == "float32"


def test_settling_fixes_threads_and_compile_of_a_copy() -> None:
    embedder = Seeded("mine", device="cpu")
    settled = embedder.settled(Settings(2))
    assert (settled.recipe()["threads"], settled.recipe()["compile"]) == (2, False)
    assert embedder.recipe()["threads"] is None
    assert embedder.settled(Settings(1, compile=True)).recipe()["compile"] is True
    assert Seeded("mine", compile=True, device="cpu").settled(Settings(1)).recipe()["compile"] is True
    assert settled.load_model("cpu", 7).options.threads == 2
    assert embedder.load_model("cpu", 1).options.threads == 1
    # On a GPU the number of CPU threads has no say.
    assert embedder.on_device("cuda").settled(Settings(2)).recipe()["threads"] is None


def test_a_worker_with_other_weights_is_stopped() -> None:
    embedder = Seeded("mine", device="cpu")
    embedder.recipe()
    there = pickle.loads(pickle.dumps(embedder))
    there.load_model("cpu")
    there.seed = None  # random each time
    with pytest.raises(CuratorEmbedError, match="not those the run was planned with"):
        there.load_model("cpu")


def test_models_do_not_travel(encoded: list[bytes]) -> None:
    embedder = Seeded("mine", device="cpu")
    before = len(pickle.dumps(embedder))
    expected = embedder.embed(encoded[:2])
    assert len(pickle.dumps(embedder)) < before + 200
    assert np.array_equal(pickle.loads(pickle.dumps(embedder)).embed(encoded[:2]), expected)
    assert np.array_equal(copy.copy(embedder).embed(encoded[:2]), expected)


def test_classifiers_follow_the_embedder() -> None:
    class Dataset:
        steps: tuple[Any, ...] = ()

        def with_step(self, step: Any) -> Dataset:
            grown = Dataset()
            grown.steps = (*self.steps, step)
            return grown

    embedder = MeanColour(classifiers=[lambda dataset: dataset.with_step("score")])
    assert embedder(Dataset()).steps == (embedder, "score")  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, float16"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_threads_per_worker": 1.5}, "num_threads_per_worker"),
        ({"compile": "yes"}, "compile"),
        ({"device": "tpu9"}, "not a torch device"),
        ({"transform": 224}, "transform"),
    ],
)
def test_contradictions_are_refused_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageEmbedder("mine", **wrong)


# --- embed ----------------------------------------------------------------------------------------


def test_paths_bytes_and_pictures_give_the_same(
    tmp_path: Path, encoded: list[bytes], pictures: list[Image.Image]
) -> None:
    paths = []
    for number, data in enumerate(encoded):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(data)
    embedder = Seeded("mine", device="cpu")
    expected = embedder.embed(encoded)
    assert expected.shape == (20, 5) and expected.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
    for same in (paths, [str(path) for path in paths], pictures, (picture for picture in pictures)):
        assert np.array_equal(embedder.embed(same), expected)
    mixed = embedder.embed([paths[3], encoded[1], pictures[2]])
    assert np.array_equal(mixed, expected[[3, 1, 2]])
    url = f"file://{paths[0]}"
    assert np.array_equal(embedder.embed([url]), expected[:1])


def test_embed_gives_float32_whatever_the_column_is(encoded: list[bytes]) -> None:
    assert MeanColour(dtype="float16").embed(encoded[:1]).dtype == np.float32


def test_no_images_give_no_rows() -> None:
    assert MeanColour().embed([]).shape == (0, 3)


def test_errors_name_the_image(tmp_path: Path, encoded: list[bytes]) -> None:
    embedder = MeanColour()
    (tmp_path / "page.jpg").write_bytes(b"<html></html>")
    with pytest.raises(ImageError, match=r"images\[1\] \(.*page\.jpg\)") as caught:
        embedder.embed([encoded[0], tmp_path / "page.jpg"])
    assert caught.value.reason is Reason.NOT_AN_IMAGE
    with pytest.raises(ImageError, match=r"images\[0\] \(.*absent\.jpg\)") as caught:
        embedder.embed([tmp_path / "absent.jpg"])
    assert caught.value.reason is Reason.READ_ERROR
    with pytest.raises(ImageError, match=r"images\[0\]") as caught:
        embedder.embed([Image.open(io.BytesIO(encoded[0][: len(encoded[0]) // 2]))])
    assert caught.value.reason is Reason.CORRUPT
    with pytest.raises(UsageError, match=r"not int"):
        embedder.embed([7])  # type: ignore[list-item]
    for single in ("photo.jpg", encoded[0], Path("photo.jpg")):
        with pytest.raises(UsageError, match="a list of images"):
            embedder.embed(single)  # type: ignore[arg-type]


def test_limits_and_exif_are_honoured(encoded: list[bytes]) -> None:
    with pytest.raises(ImageError) as caught:
        MeanColour(max_image_pixels=100).embed(encoded[:1])
    assert caught.value.reason is Reason.TOO_LARGE
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    upright.save(buffer, "PNG", exif=exif)

    class Corner(MeanColour):
        def load_embedding_model(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda batch: batch[:, :1, 0, 0]

    plain, turned = (Corner(honour_exif=on, normalize_embeddings=False).embed for on in (False, True))
    assert plain([buffer.getvalue()]) == plain([Image.open(buffer)]) == 1
    assert turned([buffer.getvalue()]) == turned([Image.open(buffer)]) == -1


def test_transforms_are_read_or_run_as_they_are(encoded: list[bytes]) -> None:
    normal = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    read = MeanColour(transform=transforms.Compose([transforms.Resize((4, 4)), *normal]))
    assert read.spec == TINY
    odd = MeanColour(transform=transforms.Compose([transforms.Resize((4, 4)), transforms.Grayscale(3), *normal]))
    assert not odd.spec.understood
    grey = odd.embed(encoded[:3])
    assert np.allclose(grey[:, 0], grey[:, 1]) and not np.allclose(read.embed(encoded[:3])[:, 0], grey[:, 0])
    assert odd.embedding_dim is None
    assert odd.recipe()["batch_shape"] == [16, 3, None, None]


def test_certify_compares_with_the_spelt_out_transform(wheel_photos: list[Path]) -> None:
    report = Seeded("mine").certify([path.read_bytes() for path in wheel_photos[:4]])
    assert report.holds and report.images == 4 and report.min_cosine is not None


# --- CUDA graphs ----------------------------------------------------------------------------------


def test_cuda_graphs_are_in_the_recipe_where_they_are_asked_for() -> None:
    """And leave recipes of before the option as they were."""
    with_graphs = Seeded("mine", cuda_graphs=True).on_device("cuda")
    assert with_graphs.settled(Settings(1)).recipe()["cuda_graphs"] is True
    assert "cuda_graphs" not in Seeded("mine").on_device("cuda").recipe()


def test_cuda_graphs_without_a_gpu_or_one_shape_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a GPU, and this run is on the device 'cpu'"):
        Seeded("mine", cuda_graphs=True, device="cpu")
    with pytest.raises(UsageError, match="needs a GPU"):
        Seeded("mine", cuda_graphs=True).on_device("cpu")
    with pytest.raises(UsageError, match="load_dataset_shard"):
        OwnReader("mine", cuda_graphs=True)


def test_a_few_images_are_embedded_as_they_are(encoded: list[bytes]) -> None:
    """``embed`` needs no graph, and so no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: it would be used")
    assert np.array_equal(Seeded("mine", cuda_graphs=True).embed(encoded), Seeded("mine").embed(encoded))


def test_planning_for_a_gpu_needs_none() -> None:
    """The process that plans a run leaves the GPUs to the workers."""
    planned = Seeded("mine", device="cuda", batch_size=1024)
    assert planned.embedding_dim == 5
    assert not torch.cuda.is_initialized()


def test_a_gpu_that_is_not_there_is_told(encoded: list[bytes]) -> None:
    with pytest.raises(UsageError, match=r"device='cuda:99' was asked for, .* Pass device='cpu'"):
        MeanColour(device="cuda:99").embed(encoded[:1])
    assert len(MeanColour(device="cpu").embed(encoded[:1])) == 1
