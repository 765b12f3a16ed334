"""``TimmImageEmbedder``: NeMo Curator's arguments, timm's own results, and a really pretrained model."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.pillow import decode
from curator_embed.embedders import ImageEmbedder, TimmImageEmbedder
from curator_embed.embedders import timm as timm_room
from curator_embed.embedders.lite0 import MODEL, efficientnet_lite0_weights
from curator_embed.embedders.timm import COMPILE_REPAYS_AFTER
from curator_embed.errors import CuratorEmbedError, UsageError
from curator_embed.steps import Settings

pytestmark = pytest.mark.filterwarnings("ignore:.*has random weights")


def test_the_arguments_of_nemo_curator_work_by_name_and_position() -> None:
    names = list(inspect.signature(TimmImageEmbedder).parameters)
    assert names[:9] == [
        "model_name", "pretrained", "batch_size", "num_threads_per_worker", "image_embedding_column",
        "normalize_embeddings", "classifiers", "autocast", "use_index_files",
    ]  # fmt: skip
    embedder = TimmImageEmbedder(
        "vit_large_patch14_clip_quickgelu_224.openai",
        pretrained=False, batch_size=1024, num_threads_per_worker=16, normalize_embeddings=True,
    )  # fmt: skip
    assert embedder.embedding_dim == 768
    assert list(embedder.columns()) == ["image_embedding"]


def test_random_weights_are_announced_where_the_embedder_is_made() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embedder = TimmImageEmbedder("test_vit")
        pickle.loads(pickle.dumps(embedder)).load_model("cpu")
    assert [str(w.message).split(":")[0] for w in caught] == ["test_vit has random weights"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_embeddings_are_timms_own(name: str, encoded: list[bytes]) -> None:
    embedder = TimmImageEmbedder(name, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
        expected = torch.nn.functional.normalize(model(batch)).numpy()
    found = embedder.embed(encoded)
    assert found.shape == (20, embedder.embedding_dim)
    assert (found * expected).sum(1).min() > 0.9999


def test_the_recipe_names_architecture_and_weights() -> None:
    recipe = TimmImageEmbedder("test_vit", device="cpu").recipe()
    assert recipe["architecture"] == "test_vit"
    assert len(recipe["weights"]) == 64
    assert "code" not in recipe
    assert TimmImageEmbedder("test_vit", image_size=176, device="cpu").recipe() != recipe


def test_weights_count_by_contents_and_not_by_path(tmp_path: Path) -> None:
    state = timm.create_model("test_vit").state_dict()
    for name, value in (("a", state), ("b", state), ("c", {k: v + 1 for k, v in state.items()})):
        torch.save(value, tmp_path / f"{name}.pth")
    a, b, c = (TimmImageEmbedder("test_vit", weights=tmp_path / f"{n}.pth", device="cpu").recipe() for n in "abc")
    assert a == b and a != c
    assert str(tmp_path) not in str(a)


def test_a_file_of_weights_is_looked_for_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        TimmImageEmbedder("test_vit", weights=tmp_path / "absent.pth")


def test_compiling_repays_for_convolutions_on_a_cpu_over_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_room, "cpu_compiler_found", lambda: True)
    many = COMPILE_REPAYS_AFTER
    convolutional, transformer = (TimmImageEmbedder(name, device="cpu") for name in ("test_resnet", "test_vit"))
    assert convolutional.compile_repays(many)
    assert not convolutional.compile_repays(many - 1)
    assert not convolutional.compile_repays(None)
    assert not transformer.compile_repays(many)
    assert not convolutional.on_device("cuda").compile_repays(many)
    assert convolutional.settled(Settings(2), images=many).recipe()["compile"] is True
    assert TimmImageEmbedder("test_resnet", compile=False).settled(Settings(2), images=many).compile is False
    monkeypatch.setattr(timm_room, "cpu_compiler_found", lambda: False)
    assert not convolutional.compile_repays(many)


def test_a_subclass_may_bring_another_model(encoded: list[bytes]) -> None:
    class Other(TimmImageEmbedder):
        def load_embedding_model(self, device: str) -> Any:
            return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    other = Other("test_resnet", device="cpu")
    assert other.embedding_dim == 3
    assert other.embed(encoded[:2]).shape == (2, 3)
    assert not other.compile_repays(10**9)


@pytest.mark.parametrize("name", ["test_vit", "ViT-B/32"])
def test_certify_compares_with_the_preprocessing_the_name_promises(name: str, wheel_photos: list[Path]) -> None:
    report = TimmImageEmbedder(name, device="cpu").certify([path.read_bytes() for path in wheel_photos[:4]])
    assert report.holds, report
    assert report.images == 4


# --- the golden tensors of OpenAI's own preprocessing ---------------------------------------------


def test_openai_preprocessing_reproduces_the_golden_tensors(
    clip_images: dict[str, bytes], openai_tensors: dict[str, np.ndarray]
) -> None:
    embedder = TimmImageEmbedder("ViT-B/32", device="cpu")
    for name, expected in openai_tensors.items():
        prepared = embedder.prepare(decode(clip_images[name]))
        levels = np.abs(normalise([prepared], embedder.spec)[0].numpy() - expected) * 0.27 * 255
        assert levels.max() < 2.1 and (levels > 1.1).mean() < 1e-4


# --- a really pretrained model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(lite0: Path) -> TimmImageEmbedder:
    return TimmImageEmbedder(MODEL, weights=lite0, device="cpu")


def test_the_conversion_is_the_same_every_time_and_kept(lite0: Path, tmp_path: Path) -> None:
    again = efficientnet_lite0_weights(tmp_path / "new" / "folder")
    assert again.read_bytes() == lite0.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == [again.name]
    changed = again.stat().st_mtime_ns
    assert efficientnet_lite0_weights(tmp_path / "new" / "folder") == again
    assert again.stat().st_mtime_ns == changed


def test_a_strange_package_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curator_embed.embedders.lite0.PACKAGE_SHA256", "0" * 64)
    with pytest.raises(CuratorEmbedError, match="not the checkpoint of"):
        efficientnet_lite0_weights(tmp_path)


def test_real_weights_know_a_cup_of_espresso(lite0: Path, wheel_photos: list[Path]) -> None:
    from curator_embed.embedders.weights import load_weights

    model = timm.create_model(MODEL)
    load_weights(model, lite0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    (coffee,) = (path for path in wheel_photos if path.stem == "coffee")
    with torch.inference_mode():
        scores = model.eval()(transform(Image.open(coffee).convert("RGB"))[None])[0]
    assert timm.data.ImageNetInfo().index_to_description(int(scores.argmax())) == "espresso"


def test_variants_are_nearest_to_their_originals(embedder: TimmImageEmbedder, wheel_photos: list[Path]) -> None:
    originals = [Image.open(path).convert("RGB") for path in wheel_photos]
    variants = []
    for photo in originals:
        width, height = photo.size
        smaller = photo.crop((width // 10, height // 10, width * 9 // 10, height * 9 // 10)).resize((300, 260))
        buffer = io.BytesIO()
        smaller.save(buffer, "JPEG", quality=60)
        variants.append(buffer.getvalue())
    similarity = embedder.embed(variants) @ embedder.embed(originals).T
    assert similarity.argmax(1).tolist() == list(range(len(originals)))


def neighbours(vectors: np.ndarray) -> np.ndarray:
    """The row of each unit vector's nearest neighbour."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    return similarity.argmax(1)


def test_nearest_clothes_are_timms_and_of_the_same_kind(
    embedder: TimmImageEmbedder, lite0: Path, clothing: list[Path]
) -> None:
    overlay = {"file": str(lite0)}
    model = timm.create_model(MODEL, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in clothing])
        timms = torch.nn.functional.normalize(model(batch)).numpy()
    nearest = neighbours(embedder.embed(clothing))
    assert nearest.tolist() == neighbours(timms).tolist()
    kinds = np.array([path.parent.name for path in clothing])
    assert (kinds[nearest] == kinds).mean() == 0.7  # by chance: 0.08


def test_names_are_loaded_on_first_use_only() -> None:
    import subprocess
    import sys

    code = (
        "import sys, curator_embed.embedders\n"
        "assert not {'torch', 'timm', 'pyarrow'} & set(sys.modules), 'heavy imports'"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    assert issubclass(TimmImageEmbedder, ImageEmbedder)
