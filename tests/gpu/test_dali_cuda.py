"""The DALI engine on a real GPU: pixels, bad company, and whole runs, against the CPU engine and timm."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali", reason="DALI is not installed (extra: cuda13 or cuda12)")

from curator_embed import get_client, load_embeddings
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.dali import DaliDecoder
from curator_embed.decoding.pillow import decode
from curator_embed.decoding.reference import timm_transform, transform_of
from curator_embed.decoding.spec import PreprocessSpec, openai_spec
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.pipeline.engines import CpuEngine, DaliEngine
from tests.shards import write_tar

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*random weights")]

MEAN, STD = (0.5,) * 3, (0.5,) * 3
SPECS = {
    "openai": openai_spec(224),
    "bilinear": PreprocessSpec("shortest", (256, 256), (224, 224), "bilinear", MEAN, STD),
    "squash": PreprocessSpec("squash", (384, 384), (384, 384), "bicubic", MEAN, STD),
    "contain": PreprocessSpec("contain", (224, 224), (224, 224), "bicubic", MEAN, STD, fill=(124, 116, 104)),
    "cover": PreprocessSpec("cover", (256, 320), (192, 256), "lanczos", MEAN, STD),
    "none": PreprocessSpec("none", (224, 224), (224, 224), "bicubic", MEAN, STD),
}
FAMILIES = (
    "vit_base_patch32_clip_224.openai", "resnet50x4_clip.openai", "tf_efficientnet_lite0.in1k", "resnet50.a1_in1k",
    "convnext_tiny.fb_in22k_ft_in1k", "swin_tiny_patch4_window7_224", "mobilenetv3_large_100.ra_in1k",
    "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli", "regnety_032.ra_in1k",
    "deit3_small_patch16_224.fb_in1k", "efficientnet_b0.ra_in1k",
)  # fmt: skip


def gpu_decoder(*specs: PreprocessSpec) -> DaliDecoder:
    return DaliDecoder(specs, device="cuda", batch_size=64, threads=4)


def reencoded(data: bytes, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_specs_from_one_decode(photos: list[bytes]) -> None:
    """Chroma is interpolated on the device as libjpeg does, but not by the same code: a little more than on a CPU."""
    decoder = gpu_decoder(*SPECS.values())
    admitted = [image for data in photos if (image := decoder.admit(data))]
    made = decoder.decode(admitted)
    assert admitted
    assert all(images is not None for images in made)
    for position, (kind, spec) in enumerate(SPECS.items()):
        transform = transform_of(spec)
        for image, tensors in zip(admitted, made, strict=True):
            assert tensors is not None
            assert tensors[position].is_cuda
            assert tensors[position].shape == (3, *spec.crop)
            theirs = transform(decode(image.encoded).rgb)
            levels = (normalise([tensors[position].cpu()], spec)[0] - theirs).abs()
            assert float((levels * torch.tensor(spec.std).view(3, 1, 1) * 255).mean()) <= 1.5, kind


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_those_of_timms_transform(photos: list[bytes], name: str) -> None:
    embedder = TimmImageEmbedder(name, device="cuda")
    assert isinstance(embedder.spec, PreprocessSpec)
    decoder, transform = gpu_decoder(embedder.spec), timm_transform(embedder.blueprint.config)
    admitted = [image for data in photos[:32] if (image := decoder.admit(data))]
    made = [images[0] for images in decoder.decode(admitted) if images is not None]
    assert len(made) == len(admitted) > 0
    theirs = torch.stack([transform(decode(image.encoded).rgb) for image in admitted])
    ours = normalise([image.cpu() for image in made], embedder.spec)
    model = embedder.load_embedding_model("cuda").eval()
    with torch.inference_mode():
        a, b = (torch.cat([model(part.cuda()).double() for part in batch.split(16)]) for batch in (ours, theirs))
    assert float(torch.nn.functional.cosine_similarity(a, b).min()) >= 0.999


def test_every_file_of_the_collection_has_the_cpu_engines_outcome(format_files: list[Path]) -> None:
    embedder = TimmImageEmbedder("resnet18.a1_in1k", device="cuda")
    encoded = [path.read_bytes() for path in format_files]
    wanted = [(0,)] * len(encoded)
    by_cpu = CpuEngine([embedder]).prepare(encoded, wanted)
    by_dali = DaliEngine([embedder], device="cuda", threads=4).prepare(encoded, wanted)
    assert [prepared.error for prepared in by_dali] == [prepared.error for prepared in by_cpu]
    rows = [row for row, prepared in enumerate(by_cpu) if prepared.error is None]
    assert all(by_dali[row].tensors[0].is_cuda for row in rows), "what Pillow decoded is brought to the device"
    model = embedder.load_model("cuda")
    for some in (rows[first : first + 16] for first in range(0, len(rows), 16)):
        ours, theirs = (model([prepared[row].tensors[0] for row in some]) for prepared in (by_dali, by_cpu))
        assert (ours * theirs).sum(axis=1).min() >= 0.999


def broken_png(data: bytes) -> bytes:
    whole = reencoded(data, "PNG")
    return whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :]


BAD: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: b"",
    lambda data: b"<html></html>",
    lambda data: data[: len(data) // 2],
    lambda data: random.Random(0).randbytes(4000),
    lambda data: data[: len(data) // 3] + b"\xff" * 200 + data[len(data) // 3 + 200 :],
    broken_png,
    lambda data: data[:200] + bytes(60) + data[260:],
)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_bad_images_cost_no_other_and_change_none(photos: list[bytes], share: float) -> None:
    embedder = TimmImageEmbedder("resnet18.a1_in1k", device="cuda")
    engine = DaliEngine([embedder], device="cuda", threads=4)
    good = [photos[n % len(photos)] for n in range(400)]
    every = round(1 / share)
    spoiled = [BAD[n // every % len(BAD)](data) if n % every == 5 else data for n, data in enumerate(good)]
    wanted = [(0,)] * len(good)
    clean, made, reference = (
        engine.prepare(good, wanted),
        engine.prepare(spoiled, wanted),
        CpuEngine([embedder]).prepare(spoiled, wanted),
    )
    for row, (before, after, theirs) in enumerate(zip(clean, made, reference, strict=True)):
        assert after.error == theirs.error, row
        if row % every != 5:
            assert torch.equal(before.tensors[0], after.tensors[0]), row


@pytest.fixture
def source(tmp_path: Path, photos: list[bytes]) -> Path:
    """A tar of photographs in several formats, one of them bad."""
    images = [photos[n % len(photos)] for n in range(300)]
    images[7], images[8] = reencoded(images[7], "GIF"), b"<html></html>"
    images[9] = reencoded(images[9], "PNG")
    folder = tmp_path / "source"
    folder.mkdir()
    write_tar(folder / "00000.tar", [(f"{n:05d}.jpg", data) for n, data in enumerate(images)])
    return folder


def save(source: Path, output: Path, device: str, **options: Any) -> Any:
    embedder = TimmImageEmbedder("resnet18.a1_in1k", device=device, batch_size=64, compile=False, **options)
    dataset = embedder(ImageTextPairDataset.from_webdataset(str(source), id_col="key"))
    return dataset.save_metadata(str(output), progress=False)


def test_a_run_on_the_gpu_equals_one_on_the_cpu(tmp_path: Path, source: Path) -> None:
    with get_client("cpu") as client:
        on_gpu = save(source, tmp_path / "gpu", "cuda")
        again = save(source, tmp_path / "again", "cuda")
        on_cpu = save(source, tmp_path / "cpu", "cpu")
        client.cluster.close()
    assert on_gpu.decoders == {"dali": 298, "pillow": 1} == again.decoders
    assert (on_gpu.embedded, on_gpu.reasons) == (on_cpu.embedded, on_cpu.reasons) == (299, {"not_an_image": 1})
    (ids, ours), (same_ids, theirs) = (load_embeddings(str(tmp_path / name)) for name in ("gpu", "cpu"))
    assert list(ids) == list(same_ids)
    there = np.linalg.norm(np.nan_to_num(theirs), axis=1) > 0
    assert there.sum() == 299
    assert (ours * theirs).sum(axis=1)[there].min() >= 0.999
    columns = [pq.read_table(tmp_path / name / "00000.parquet").schema.remove_metadata() for name in ("gpu", "cpu")]
    assert columns[0] == columns[1]


def test_a_recorded_model_gives_the_same_and_all_memory_comes_back(tmp_path: Path, source: Path) -> None:
    with get_client("cpu") as client:
        before = torch.cuda.memory_allocated()
        reports = {
            name: save(source, tmp_path / name, "cuda", cuda_graphs=graphs)
            for name, graphs in (("plain", False), ("graphs", True))
        }
        after = torch.cuda.memory_allocated()
        client.cluster.close()
    assert reports["graphs"].to_dict()["notes"] == reports["plain"].to_dict()["notes"]
    assert after <= before + (16 << 20), "models and buffers go with their run"
    (_, ours), (_, theirs) = (load_embeddings(str(tmp_path / name)) for name in reports)
    there = np.linalg.norm(np.nan_to_num(theirs), axis=1) > 0
    assert there.sum() == 299
    assert (ours * theirs).sum(axis=1)[there].min() >= 0.9999


def test_pillow_can_feed_the_gpu_too(tmp_path: Path, source: Path) -> None:
    with get_client("cpu") as client:
        report = save(source, tmp_path / "pillow", "cuda", decoder="cpu")
        client.cluster.close()
    assert report.decoders == {"pillow": 299}


def test_frames_are_cudf_and_hold_what_pyarrow_wrote(tmp_path: Path, source: Path) -> None:
    cudf = pytest.importorskip("cudf", reason="cuDF is not installed (extra: cuda13 or cuda12)")
    pytest.importorskip("dask_cuda", reason="dask-cuda is not installed (extra: cuda13 or cuda12)")
    with get_client("gpu") as client:
        saved = save(source, tmp_path / "out", "cuda").dataset
        frame = saved.metadata.compute()
        client.cluster.close()
    assert isinstance(frame, cudf.DataFrame)
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert frame["key"].to_arrow().to_pylist() == table["key"].to_pylist()
    assert frame["image_embedding"].to_arrow().to_pylist() == table["image_embedding"].to_pylist()
