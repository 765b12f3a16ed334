"""The DALI engine beside the CPU's: the same outcome for every image, in whatever company."""

from __future__ import annotations

import io
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curator_embed import get_client, load_embeddings
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.image import DecodedImage
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.embedders.lite0 import MODEL, efficientnet_lite0_weights
from curator_embed.errors import Reason, UsageError
from curator_embed.execution.placing import engine_for
from curator_embed.pipeline.engines import CpuEngine, DaliEngine
from curator_embed.pipeline.pipeline import Pipeline, Prepared
from curator_embed.steps import BatchModel, ImageStep, Step
from tests.shards import crops, write_tar

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


class Size(ImageStep):
    """Columns that only a look at the decoded image gives."""

    def columns(self) -> dict[str, pa.DataType]:
        return {"mean": pa.float64()}

    def recipe(self) -> dict[str, Any]:
        return {"step": "mean"}

    def measure(self, image: DecodedImage) -> dict[str, Any]:
        return {"mean": float(np.asarray(image.rgb).mean())}


@pytest.fixture(scope="module")
def embedder() -> TimmImageEmbedder:
    return TimmImageEmbedder(MODEL, weights=efficientnet_lite0_weights(), device="cpu", batch_size=16)


def engines(*steps: Step) -> tuple[CpuEngine, DaliEngine]:
    return CpuEngine(steps), DaliEngine(steps, device="cpu", threads=2)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BAD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "markup": lambda data: b"<!DOCTYPE html><html><body>404</body></html>",
    "garbage": lambda data: random.Random(0).randbytes(5000),
    "head": lambda data: data[:300],
    "middle": lambda data: data[: len(data) // 2],
    "tail": lambda data: data[:-40],
    "overwritten": lambda data: data[: len(data) // 2] + b"\xff" * 200 + data[len(data) // 2 + 200 :],
    "pixels of a png": lambda data: (whole := png(Image.open(io.BytesIO(data))))[:300] + bytes(300) + whole[600:],
    "svg": lambda data: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
}


def spoiled(good: Sequence[bytes], share: float) -> list[bytes]:
    """Every kind of bad image in turn, spread evenly."""
    kinds, every = list(BAD.values()), round(1 / share)
    return [kinds[n // every % len(kinds)](data) if n % every == every // 2 else data for n, data in enumerate(good)]


def same_outcome(cpu: Prepared, dali: Prepared) -> None:
    assert dali.error == cpu.error
    assert dali.tensors.keys() == cpu.tensors.keys()
    assert dali.values == cpu.values
    assert (dali.decoder is None) == (cpu.decoder is None)


def test_every_file_of_the_collection_has_the_same_outcome(
    format_files: list[Path], clothing: list[Path], embedder: TimmImageEmbedder
) -> None:
    """The same reason, or embeddings at a cosine of 0.999."""
    paths = format_files + clothing[::4]
    encoded = [path.read_bytes() for path in paths]
    by_cpu, by_dali = (engine.prepare(encoded, [(0,)] * len(encoded)) for engine in engines(embedder))
    for cpu, dali in zip(by_cpu, by_dali, strict=True):
        same_outcome(cpu, dali)
    model = embedder.load_model("cpu")
    rows = [row for row, prepared in enumerate(by_cpu) if prepared.error is None]
    for some in (rows[first : first + 16] for first in range(0, len(rows), 16)):
        ours, theirs = (model([prepared[row].tensors[0] for row in some]) for prepared in (by_dali, by_cpu))
        assert (ours * theirs).sum(axis=1).min() >= 0.999, [paths[row].name for row in some]
    served = Counter(prepared.decoder for prepared in by_dali)
    assert served == {"dali": 17, "pillow": 11, None: 2}


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_bad_images_are_accounted_for_and_change_no_other(
    wheel_photos: list[Path], embedder: TimmImageEmbedder, share: float
) -> None:
    good = [image for path in wheel_photos for image in crops(path, 25, size=160)]
    cpu, dali = engines(embedder)
    wanted = [(0,)] * len(good)
    clean = dali.prepare(good, wanted)
    bad = spoiled(good, share)
    made, reference = dali.prepare(bad, wanted), cpu.prepare(bad, wanted)
    for before, after, data, theirs in zip(clean, made, bad, reference, strict=True):
        same_outcome(theirs, after)
        if after.error is None and after.decoder == "dali":
            assert torch.equal(before.tensors[0], after.tensors[0]), len(data)
    failed = Counter(prepared.error for prepared in made)
    assert failed[None] < len(good)
    assert sum(failed.values()) == len(good)
    assert {prepared.decoder for prepared in clean} == {"dali"}


def test_other_steps_are_served_from_the_same_bytes(wheel_photos: list[Path], embedder: TimmImageEmbedder) -> None:
    encoded = [*(path.read_bytes() for path in wheel_photos[:4]), b"", wheel_photos[0].read_bytes()[:4000]]
    wanted = [(0, 1), (1,), (0,), (0, 1), (0, 1), (1,)]
    by_cpu, by_dali = (engine.prepare(encoded, wanted) for engine in engines(embedder, Size()))
    for cpu, dali in zip(by_cpu, by_dali, strict=True):
        same_outcome(cpu, dali)
    assert [prepared.decoder for prepared in by_dali] == ["dali", "pillow", "dali", "dali", None, None]
    assert by_dali[0].values[1]["mean"] > 0


def test_what_pillow_finds_broken_is_broken_for_all(wheel_photos: list[Path], embedder: TimmImageEmbedder) -> None:
    """With DALI's pixels at hand but Pillow unable to decode, the row fails as it would on a CPU."""
    _, dali = engines(embedder, Size())
    dali._pillow.prepare = lambda encoded, wanted: [Prepared(error=Reason.CORRUPT)]  # type: ignore[method-assign]
    (made,) = dali.prepare([wheel_photos[0].read_bytes()], [(0, 1)])
    assert (made.error, made.tensors) == (Reason.CORRUPT, {})


def test_transforms_and_prepare_of_ones_own_run_by_their_own_code(
    wheel_photos: list[Path], embedder: TimmImageEmbedder
) -> None:
    class Own(TimmImageEmbedder):
        def prepare(self, image: DecodedImage) -> torch.Tensor:
            return super().prepare(image).flip(0)

    opaque = TimmImageEmbedder(MODEL, transform=lambda rgb: torch.full((3, 8, 8), rgb.width / 1000))
    own = Own(MODEL)
    encoded = [path.read_bytes() for path in wheel_photos[:3]]
    by_cpu, by_dali = (engine.prepare(encoded, [(0, 1, 2)] * 3) for engine in engines(embedder, opaque, own))
    for cpu, dali in zip(by_cpu, by_dali, strict=True):
        same_outcome(cpu, dali)
        assert torch.equal(cpu.tensors[1], dali.tensors[1])
        assert torch.equal(cpu.tensors[2], dali.tensors[2])
        assert dali.decoder == "dali"


def test_threads_share_the_engine(wheel_photos: list[Path], embedder: TimmImageEmbedder) -> None:
    _, dali = engines(embedder)
    good = [image for path in wheel_photos for image in crops(path, 6, size=128)]
    expected = dali.prepare(good, [(0,)] * len(good))
    results: dict[int, list[Prepared]] = {}

    def work(number: int) -> None:
        turned = good[number * 7 :] + good[: number * 7]
        results[number] = dali.prepare(turned, [(0,)] * len(good))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, made in results.items():
        back = made[len(made) - number * 7 :] + made[: len(made) - number * 7]
        assert all(torch.equal(a.tensors[0], b.tensors[0]) for a, b in zip(back, expected, strict=True))


# --- a whole run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with get_client() as started:
        yield started
        started.cluster.close()


def test_a_run_tells_who_decoded(
    tmp_path: Path, wheel_photos: list[Path], embedder: TimmImageEmbedder, client: Any
) -> None:
    good = crops(wheel_photos[0], 18, size=140)
    buffer = io.BytesIO()
    Image.open(wheel_photos[1]).convert("RGB").resize((90, 90)).save(buffer, "GIF")
    images = [*good, buffer.getvalue(), b"", good[0][:500]]
    for name in ("cpu", "dali"):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "00000.tar", [(f"{n:05d}.jpg", data) for n, data in enumerate(images)])
    reports = {}
    for name in ("cpu", "dali"):
        step = TimmImageEmbedder(
            MODEL,
            weights=embedder.weights,
            device="cpu",
            compile=False,
            decoder=name,  # type: ignore[arg-type]
        )
        dataset = step(ImageTextPairDataset.from_webdataset(str(tmp_path / name), id_col="key"))
        reports[name] = dataset.save_metadata(progress=False)
    assert reports["cpu"].decoders == {"pillow": 19}
    assert reports["dali"].decoders == {"dali": 18, "pillow": 1}
    assert reports["dali"].to_dict()["decoders"] == {"dali": 18, "pillow": 1}
    assert "18 dali, 1 pillow" in str(reports["dali"])
    assert reports["cpu"].reasons == reports["dali"].reasons == {"empty": 1, "truncated": 1}
    tables = [pq.read_table(tmp_path / name / "00000.parquet") for name in ("cpu", "dali")]
    assert tables[0]["image_error"].to_pylist() == tables[1]["image_error"].to_pylist()
    (_, a), (_, b) = (load_embeddings(str(tmp_path / name)) for name in ("cpu", "dali"))
    there = ~np.isnan(a).any(axis=1) & (np.linalg.norm(a, axis=1) > 0)
    assert (a * b).sum(axis=1)[there].min() >= 0.9999


def test_the_decoder_is_the_embedders_choice(embedder: TimmImageEmbedder) -> None:
    asks = {name: TimmImageEmbedder(MODEL, decoder=name) for name in ("auto", "cpu", "dali")}  # type: ignore[arg-type]
    assert engine_for("cpu", [asks["auto"]]) == "cpu"
    assert engine_for("cuda", [asks["auto"], Size()]) == "dali"
    assert engine_for("cuda:1", [asks["cpu"], asks["auto"]]) == "cpu"
    assert engine_for("cpu", [asks["dali"]]) == "dali"
    with pytest.raises(UsageError, match="share one decode"):
        engine_for("cuda", [asks["dali"], asks["cpu"]])
    with pytest.raises(UsageError, match="decoder must be one of"):
        TimmImageEmbedder(MODEL, decoder="gpu")  # type: ignore[arg-type]


# --- one batch under way ---------------------------------------------------------------------------


class Overlapping(BatchModel):
    """Numbers to vectors, later: remembers in which order batches were handed in and collected."""

    overlaps = True

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.events, self.most = batch_size, [], 0
        self._under_way = 0

    def __call__(self, images: Sequence[Any]) -> np.ndarray:
        return self.submit(images)()

    def submit(self, images: Sequence[Any]) -> Callable[[], np.ndarray]:
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        number = len(self.events) + 1
        self.events.append(number)

        def collect() -> np.ndarray:
            self._under_way -= 1
            return np.array([[image, -image - 1] for image in images], np.float32)

        return collect


class Numbers:
    """Images are numbers in decimal."""

    chunk = 4

    def prepare(self, encoded: Sequence[bytes], wanted: Sequence[tuple[int, ...]]) -> list[Prepared]:
        return [
            Prepared(tensors=dict.fromkeys(positions, int(data)))
            for data, positions in zip(encoded, wanted, strict=True)
        ]


def test_a_model_that_overlaps_has_one_batch_under_way() -> None:
    models = {0: Overlapping(4), 1: Overlapping(6)}
    pipeline = Pipeline(Numbers(), models, threads=2)
    try:
        for round_ in range(3):  # a second shard finds nothing stuck from the first
            with pipeline.shard((0, 1)) as opened:
                with pipeline.feeding():
                    for ordinal in range(50):
                        opened.submit(ordinal, str(ordinal + round_).encode())
                opened.wait()
            for position in models:
                vectors, present = opened.vectors[position].gather(np.arange(50))
                assert present.all()
                assert vectors[:, 0].tolist() == [ordinal + round_ for ordinal in range(50)]
    finally:
        pipeline.close()
    assert max(model.most for model in models.values()) == 2
