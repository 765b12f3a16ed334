"""How fast a GPU run is, against what bounds it, and whether it computes the same: one script, one run, unattended.

    python -m benchmarks.gpu [--photos FOLDER] [--budget 450] [--output gpu.json]

1. ceilings: decode only (DALI alone, its options swept) and forward only (bf16, eager, compiled, CUDA graphs).
2. product: ``save_metadata`` from tars to parquet, its share of the smaller ceiling once it is under way (loading the
   model and starting the decoder take longer than so few images), and where the time went.
3. parity: embeddings of DALI's pixels and of timm's own transform, model by model.
4. bad: the product with 1 % and 10 % bad images, and with formats that only Pillow reads.
5. frames: ``get_client("gpu")`` with cuDF, saved, read back, compared with the CPU engine.

Every part is measured on the same photographs. A part that fails says so and the others go on; what no time is left for
is listed as left out. ``--device cpu`` runs everything with DALI's CPU operators, to try the script.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.images import encoded_images, write_shards
from curator_embed import get_client, load_embeddings
from curator_embed.datasets import ImageTextPairDataset
from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.dali import DaliDecoder
from curator_embed.decoding.pillow import decode
from curator_embed.decoding.reference import timm_transform
from curator_embed.decoding.spec import PreprocessSpec, openai_spec
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.embedders.cuda_graph import CapturedForward
from curator_embed.embedders.forward import prefers_channels_last
from curator_embed.execution.worker import PipelineKeeper

MODELS = {"ViT-B/32": 1024, "RN50x4": 512, "ViT-L/14": 512}
"""The three whose figures others have published, and the batch size of each."""

FAMILIES = (
    "vit_base_patch32_clip_224.openai", "vit_large_patch14_clip_quickgelu_224.openai", "resnet50x4_clip.openai",
    "tf_efficientnet_lite0.in1k", "resnet50.a1_in1k", "convnext_tiny.fb_in22k_ft_in1k", "swin_tiny_patch4_window7_224",
    "mobilenetv3_large_100.ra_in1k", "vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli",
    "regnety_032.ra_in1k", "deit3_small_patch16_224.fb_in1k", "efficientnet_b0.ra_in1k",
)  # fmt: skip
"""Shortest side and squash, bicubic and bilinear, several crop shares."""

DECODE_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    *({"hw_decoder_load": load} for load in (0.0, 0.5, 0.75, 0.9)),
    *({"lanes": lanes} for lanes in (1, 3, 4)),
    *({"batch_size": size} for size in (64, 512)),
    {"fancy_upsampling": False},
)
"""One at a time, each against the defaults."""


class Bench:
    """What was measured so far, and how much time is left."""

    def __init__(self, budget: float, output: Path | None) -> None:
        self.results: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._ends, self._output = time.monotonic() + budget, output

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def measure(self, part: str, name: str, seconds: float, work: Callable[[], Any]) -> Any:
        """Run one measurement that takes about so many seconds; keep its result or its error, and save all so far."""
        if self.seconds_left < seconds:
            self.left_out.append(f"{part}: {name}")
            return None
        try:
            result = work()
        except Exception as error:  # unattended: one failure must not cost the other figures
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        self.results.setdefault(part, {})[name] = result
        print(f"{part:<10}{name:<52}{_short(result)}", flush=True)
        if self._output is not None:
            self._output.write_text(json.dumps({**self.results, "left_out": self.left_out}, indent=2))
        return result


def _short(result: Any) -> str:
    if isinstance(result, float):
        return f"{result:,.1f}"
    if isinstance(result, dict):
        return "  ".join(f"{k} {_short(v)}" for k, v in result.items() if not isinstance(v, dict | list))
    return str(result)


# --- 1. ceilings --------------------------------------------------------------------------------


def decode_rate(images: Sequence[bytes], device: str, threads: int, seconds: float, **options: Any) -> float:
    """Images a second that DALI alone decodes and resizes, fed by as many threads as it has lanes and one more."""
    spec = openai_spec(224)
    settings = {"batch_size": 256, "lanes": 2, **options}
    decoder = DaliDecoder([spec], device=device, threads=threads, **settings)
    admitted = [image for data in images if (image := decoder.admit(data))]
    size = settings["batch_size"]
    chunks = [[admitted[(at + n) % len(admitted)] for n in range(size)] for at in range(0, len(admitted), size)]

    def work(number: int) -> int:
        turns = 0
        while time.perf_counter() < ends:
            decoder.decode(chunks[(number + turns) % len(chunks)])
            turns += 1
        return turns * size

    decoder.decode(chunks[0])  # first use allocates
    decoder.decode(chunks[-1])
    start = time.perf_counter()
    ends = start + seconds
    with ThreadPoolExecutor() as pool:
        done = sum(pool.map(work, range(settings["lanes"] + 1)))
    return done / (time.perf_counter() - start)


def forward_rate(name: str, batch: int, device: str, mode: str, seconds: float) -> float:
    """Images a second of the model alone, bf16 autocast, on one batch that lies on the device."""
    embedder = TimmImageEmbedder(name)
    model = embedder.load_embedding_model(device).eval()
    layout = torch.channels_last if prefers_channels_last(model) else torch.contiguous_format
    model = model.to(memory_format=layout)
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)
    values = torch.randn(batch, 3, *embedder.spec.output, device=device).to(memory_format=layout)
    kind = torch.device(device).type

    def forward(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            vectors: torch.Tensor = model(values)
            return vectors

    with torch.inference_mode():
        run = CapturedForward(forward, values) if mode == "CUDA graphs" else forward
        for _ in range(3):
            run(values)
        _synchronise(device)
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            for _ in range(2):  # one is launched while the other computes, as in a run
                run(values)
            passes += 2
            _synchronise(device)
    return batch * passes / (time.perf_counter() - start)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# --- 2. the product -----------------------------------------------------------------------------


def product(source: Path, name: str, batch: int, device: str, threads: int, **options: Any) -> dict[str, Any]:
    """``save_metadata`` of a webdataset; the run's own report, shortened, and its rate once it was under way."""
    with tempfile.TemporaryDirectory() as output, get_client("cpu") as client:
        embedder = TimmImageEmbedder(
            name,
            batch_size=batch,
            num_threads_per_worker=threads,
            device=device,
            decoder="dali",
            **{"compile": False, **options},
        )
        dataset = embedder(ImageTextPairDataset.from_webdataset(str(source), id_col="key"))
        (worker,) = client.cluster.workers.values()
        with Steady(PipelineKeeper.of(worker)) as steady:
            report = dataset.save_metadata(output, progress=False)
        client.cluster.close()
    found = report.to_dict()
    return {
        "steady_images_per_second": steady.rate(),
        **{key: found[key] for key in ("images_per_second", "wall_seconds", "read", "embedded", "failed", "reasons",
                                       "decoders", "time", "notes")},
    }  # fmt: skip


class Steady:
    """Watches the images that come out of a worker's pipeline, for the rate between its first batches and its last."""

    EVERY_S = 0.02

    def __init__(self, keeper: PipelineKeeper) -> None:
        self._keeper, self._seen = keeper, [(time.perf_counter(), 0)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Steady:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.EVERY_S):
            count = sum(pipeline.images for pipeline in self._keeper.pipelines())
            if count > self._seen[-1][1]:
                self._seen.append((time.perf_counter(), count))

    def rate(self) -> float | None:
        """Images a second after the first fifth of them; None of a run too short to tell."""
        last, total = self._seen[-1]
        began, before = next((seen for seen in self._seen if seen[1] >= total / 5), self._seen[-1])
        return round((total - before) / (last - began), 2) if last > began else None


@contextmanager
def dataset_of(images: Sequence[bytes], count: int) -> Iterator[Path]:
    """``count`` images, repeating what there is, as webdataset shards; in memory where there is room."""
    repeated = [images[n % len(images)] for n in range(count)]
    memory, needed = Path("/dev/shm"), 1.1 * sum(map(len, repeated)) + 2048 * count
    in_memory = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(dir=memory if in_memory else None) as folder:
        yield write_shards(Path(folder), repeated, per_shard=1000)


# --- 3. parity ------------------------------------------------------------------------------------


def parity(name: str, images: Sequence[bytes], device: str) -> dict[str, Any]:
    """Smallest cosine between the embeddings of DALI's pixels and of timm's transform, in float32."""
    embedder = TimmImageEmbedder(name, device=device)
    spec = embedder.spec
    assert isinstance(spec, PreprocessSpec)
    decoder = DaliDecoder([spec], device=device, batch_size=64, threads=4, lanes=1)
    transform = timm_transform(embedder.blueprint.config)
    admitted = [image for data in images if (image := decoder.admit(data))]
    made = decoder.decode(admitted)
    kept = [(image, tensors[0]) for image, tensors in zip(admitted, made, strict=True) if tensors is not None]
    ours = normalise([tensor.cpu() for _, tensor in kept], spec)
    theirs = torch.stack([transform(decode(image.encoded).rgb) for image, _ in kept])
    levels = (ours - theirs).abs() * torch.tensor(spec.std).view(3, 1, 1) * 255
    model = embedder.load_embedding_model(device).eval()
    vectors = []
    with torch.inference_mode():
        for batch in (ours, theirs):
            rows = [model(part.to(device)).double().cpu() for part in batch.split(16)]
            vectors.append(torch.nn.functional.normalize(torch.cat(rows), dim=-1))
    cosines = (vectors[0] * vectors[1]).sum(dim=1)
    return {
        "resize": spec.resize,
        "interpolation": spec.interpolation,
        "images": len(kept),
        "mean_levels": round(float(levels.mean()), 4),
        "max_levels": round(float(levels.max()), 1),
        "min_cosine": f"{float(cosines.min()):.6f}",
    }


# --- 4. bad images and rare formats -----------------------------------------------------------------


def spoiled(images: Sequence[bytes], share: float) -> list[bytes]:
    """Replace a share of the images, evenly spread, by what downloads leave behind."""
    rng = random.Random(0)
    kinds: tuple[Callable[[bytes], bytes], ...] = (
        lambda data: b"",
        lambda data: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        lambda data: data[: len(data) // 2],
        lambda data: rng.randbytes(4000),
        lambda data: data[: len(data) // 3] + b"\xff" * 200 + data[len(data) // 3 + 200 :],
        _broken_png,
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :],
    )
    every = round(1 / share)
    return [kinds[n // every % len(kinds)](data) if n % every == 0 else data for n, data in enumerate(images)]


def _broken_png(data: bytes) -> bytes:
    """Told by its checksums alone."""
    whole = reencoded(data, "PNG")
    return whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :]


def reencoded(data: bytes, kind: str) -> bytes:
    """The same picture in another format."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def mixed_formats(images: Sequence[bytes], share: float) -> list[bytes]:
    """A share of the images as GIF and AVIF, which only Pillow reads."""
    every, kinds = round(1 / share), ("GIF", "AVIF")
    return [reencoded(data, kinds[n // every % 2]) if n % every == 0 else data for n, data in enumerate(images)]


# --- 5. data frames ---------------------------------------------------------------------------------


def frames(images: Sequence[bytes], count: int) -> dict[str, Any]:
    """Save on a Dask-CUDA worker, read back as cuDF, compare with the same run on the CPU engine."""
    vectors = {}
    with dataset_of(images, count) as source, tempfile.TemporaryDirectory() as folder:
        kinds = {}
        for kind, device in (("gpu", "cuda"), ("cpu", "cpu")):
            with get_client(kind) as client:
                embedder = TimmImageEmbedder("tf_efficientnet_lite0", device=device, autocast=False, compile=False)
                dataset = embedder(ImageTextPairDataset.from_webdataset(str(source), id_col="key"))
                saved = dataset.save_metadata(f"{folder}/{kind}", progress=False).dataset
                assert saved is not None
                frame = saved.metadata.compute()
                kinds[kind] = f"{type(frame).__module__.partition('.')[0]}.{type(frame).__name__}"
                rows = len(frame)
                client.cluster.close()
            vectors[kind] = load_embeddings(f"{folder}/{kind}")
    (ids, ours), (same_ids, theirs) = vectors["gpu"], vectors["cpu"]
    assert list(ids) == list(same_ids)
    cosine = float((ours * theirs).sum(axis=1).min())
    return {"rows": rows, "gpu_frame": kinds["gpu"], "cpu_frame": kinds["cpu"], "min_cosine": f"{cosine:.6f}"}


# --- all of it ----------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "cores": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
    }
    for package in ("torch", "timm", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "cudf-cu13", "dask"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(bench: Bench) -> str:
    """What a person reads first: each model's ceilings, its product rate and the ratio; then the bad images."""
    results = bench.results
    sweep = results.get("decode", {})
    best = max((rate for rate in sweep.values() if isinstance(rate, float)), default=0.0)
    default = sweep.get("defaults", 0.0)
    lines = [f"decode only: {default:,.0f} images/s with the defaults, {best:,.0f} at best", ""]
    lines.append(
        f"{'model':<12}{'forward':>10}{'compiled':>10}{'graphs':>10}{'product':>10}{'of ceiling':>12}{'idle':>7}"
    )
    for name in MODELS:
        rates = [results.get("forward", {}).get(f"{name} {mode}") for mode in ("eager", "compiled", "CUDA graphs")]
        made = results.get("product", {}).get(name) or {}
        rate = made.get("steady_images_per_second")
        shown = [f"{value:,.0f}" if isinstance(value, float) else "-" for value in (*rates, rate)]
        ceiling = min((v for v in (rates[0], default) if isinstance(v, float) and v), default=None)
        ratio = f"{rate / ceiling:.0%}" if rate and ceiling else "-"
        idle = f"{made['time']['idle'] / made['wall_seconds']:.0%}" if rate else "-"
        lines.append(f"{name:<12}" + "".join(f"{value:>10}" for value in shown) + f"{ratio:>12}{idle:>7}")
    bad = results.get("bad", {})
    rates_of = {name: made.get("steady_images_per_second") for name, made in bad.items()}
    clean = [rate for name, rate in rates_of.items() if name.startswith("clean") and rate]
    if clean:
        lines.append("")
        for name, rate in rates_of.items():
            if rate:
                lines.append(f"{name:<28}{rate:>10,.0f} images/s  {rate / statistics.mean(clean):.2f} of clean")
    worst = [made["min_cosine"] for made in results.get("parity", {}).values() if "min_cosine" in made]
    if worst:
        lines += ["", f"parity: {len(worst)} families, smallest cosine {min(worst)}"]
    lines += ["", f"left out for lack of time: {', '.join(bench.left_out) or 'nothing'}"]
    return "\n".join(lines)


def main() -> None:
    """Run everything within the budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs; default: those in scikit-image's wheel")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--images", type=int, default=30_000, help="images of a product run on the fastest model")
    parser.add_argument("--distinct", type=int, default=1_000, help="different photographs among them")
    parser.add_argument("--threads", type=int, default=16, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a decode or forward measurement")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for all of it")
    parser.add_argument("--output", type=Path, help="keep the JSON here, written after every measurement")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*random weights")
    device, threads, seconds = options.device, options.threads, options.seconds

    # A CPU is for trying the script: small batches, or it never ends.
    models = {name: MODELS[name] if device.startswith("cuda") else 16 for name in options.models}
    bench = Bench(options.budget, options.output)
    bench.measure("machine", "packages", 0, lambda: machine(device))
    images = encoded_images(options.distinct, options.photos)
    sizes = {"images": len(images), "mean_kb": round(statistics.mean(map(len, images)) / 1000, 1)}
    bench.measure("machine", "photographs", 0, lambda: sizes)

    # In the order of what would be missed most, should time run out.
    bench.measure("decode", "defaults", seconds, lambda: decode_rate(images, device, threads, seconds))
    for name, batch in models.items():
        bench.measure(
            "forward",
            f"{name} eager",
            2 * seconds,
            lambda n=name, b=batch: forward_rate(n, b, device, "eager", seconds),
        )
    fastest = next(iter(models.items()))
    with dataset_of(images, options.images) as source:
        for name, batch in models.items():
            bench.measure("product", name, 20, lambda n=name, b=batch: product(source, n, b, device, threads))
        if device.startswith("cuda"):
            bench.measure(
                "product", f"{fastest[0]} CUDA graphs", 20,
                lambda: product(source, *fastest, device, threads, cuda_graphs=True),
            )  # fmt: skip
    for name in FAMILIES:
        bench.measure("parity", name, 8, lambda n=name: parity(n, images[:64], device))
    kinds: dict[str, Callable[[], Sequence[bytes]]] = {
        "clean": lambda: images,
        "1 % bad": lambda: spoiled(images, 0.01),
        "10 % bad": lambda: spoiled(images, 0.1),
        "10 % GIF and AVIF": lambda: mixed_formats(images, 0.1),
        "clean again": lambda: images,
    }
    for name, made in kinds.items():

        def run(made: Callable[[], Sequence[bytes]] = made) -> dict[str, Any]:
            with dataset_of(made(), options.images // 2) as source:
                return product(source, *fastest, device, threads)

        bench.measure("bad", name, 20, run)
    if device.startswith("cuda"):
        bench.measure("frames", "cuDF", 40, lambda: frames(images, 200))
    for choice in DECODE_OPTIONS[1:]:
        name = ", ".join(f"{key}={value}" for key, value in choice.items())
        bench.measure("decode", name, seconds + 3, lambda c=choice: decode_rate(images, device, threads, seconds, **c))
    if device.startswith("cuda"):
        for mode in ("compiled", "CUDA graphs"):
            for name, batch in models.items():
                bench.measure(
                    "forward", f"{name} {mode}", 60,
                    lambda n=name, b=batch, m=mode: forward_rate(n, b, device, m, seconds),
                )  # fmt: skip
    print("\n" + table(bench) + "\n")
    print(json.dumps({**bench.results, "left_out": bench.left_out}))


if __name__ == "__main__":
    main()
