"""DALI with CPU operators against timm's own transforms, in bad company, and after its own failures.

The graph is the one that runs on a GPU; what only a GPU can show lies in tests/gpu.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from curator_embed.decoding.cpu import normalise
from curator_embed.decoding.dali import MAX_PIXELS, Admitted, DaliDecoder, _Graph, _refused, passes, waves
from curator_embed.decoding.geometry import plan
from curator_embed.decoding.pillow import Limits, decode
from curator_embed.decoding.reference import transform_of
from curator_embed.decoding.spec import PreprocessSpec, openai_spec
from curator_embed.embedders import TimmImageEmbedder
from curator_embed.embedders.lite0 import MODEL, efficientnet_lite0_weights
from curator_embed.errors import CuratorEmbedError, ImageError, MissingExtra

MEAN, STD = (0.5,) * 3, (0.5,) * 3
SPECS = {
    "openai": openai_spec(224),
    "timm": PreprocessSpec("shortest", (248, 248), (224, 224), "bicubic", MEAN, STD),
    "bilinear": PreprocessSpec("shortest", (256, 256), (224, 224), "bilinear", MEAN, STD),
    "squash": PreprocessSpec("squash", (224, 224), (224, 224), "bicubic", MEAN, STD),
    "contain": PreprocessSpec("contain", (224, 224), (224, 224), "bicubic", MEAN, STD, fill=(124, 116, 104)),
    "cover": PreprocessSpec("cover", (256, 320), (192, 256), "lanczos", MEAN, STD),
    "padded": PreprocessSpec("shortest", (160, 160), (224, 200), "bicubic", MEAN, STD, fill=(9, 200, 30)),
    "none": PreprocessSpec("none", (224, 224), (224, 224), "bicubic", MEAN, STD),
}
SHAPES = {"upscaled": (150, 100), "tall": (120, 900), "wide": (1200, 150), "small": (70, 64), "large": (1500, 1200)}


def decoder(*specs: PreprocessSpec, **options: Any) -> DaliDecoder:
    return DaliDecoder(specs, **{"device": "cpu", "batch_size": 16, "threads": 2, "lanes": 1, **options})


@pytest.fixture(scope="session")
def pictures(photo: Image.Image, wheel_photos: list[Path], encode: Callable[..., bytes]) -> dict[str, bytes]:
    """Encoded photographs as they are, and one in shapes that go wrong."""
    found = {path.stem: path.read_bytes() for path in wheel_photos}
    shaped = {name: photo.resize(size, Image.Resampling.BICUBIC) for name, size in SHAPES.items()}
    return found | {name: encode(image, "PNG") for name, image in shaped.items()}


@pytest.fixture(scope="session")
def embed() -> Callable[[torch.Tensor], torch.Tensor]:
    """EfficientNet-Lite0 with its ImageNet weights: float32 (n, 3, H, W) -> unit vectors."""
    model = TimmImageEmbedder(MODEL, weights=efficientnet_lite0_weights()).load_embedding_model("cpu").eval()

    def vectors(batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.nn.functional.normalize(model(batch).double(), dim=-1)

    return vectors


# --- the same pixels ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_of_spec_is_within_the_promise(
    kind: str, pictures: dict[str, bytes], embed: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """At most 0.3 grey levels in the mean, and the same embeddings."""
    spec, transform = SPECS[kind], transform_of(SPECS[kind])
    dali = decoder(spec)
    admitted = {name: image for name, encoded in pictures.items() if (image := dali.admit(encoded))}
    assert len(admitted) == len(pictures) - (2 if kind == "contain" else 0), "strips are padded: Pillow's"
    inputs = [images[0] for images in dali.decode(list(admitted.values())) if images is not None]
    assert len(inputs) == len(admitted)
    assert all(image.dtype == torch.uint8 and image.shape == (3, *spec.crop) for image in inputs)
    ours = normalise(inputs, spec)
    theirs = torch.stack([transform(decode(image.encoded).rgb) for image in admitted.values()])
    levels = ((ours - theirs) * 255 * torch.tensor(spec.std).view(3, 1, 1)).abs().mean(dim=(1, 2, 3))
    assert levels.max() <= 0.3, dict(zip(admitted, levels.tolist(), strict=True))
    cosines = (embed(ours) * embed(theirs)).sum(dim=1)
    assert cosines.min() >= 0.9999, dict(zip(admitted, cosines.tolist(), strict=True))


def test_one_decode_serves_several_models(pictures: dict[str, bytes]) -> None:
    kinds = ("timm", "bilinear", "squash", "cover")
    names = ("coffee", "china", "large")
    several, singly = decoder(*(SPECS[kind] for kind in kinds)), [decoder(SPECS[kind]) for kind in kinds]
    made = several.decode([image for name in names if (image := several.admit(pictures[name]))])
    for position, alone in enumerate(singly):
        expected = alone.decode([image for name in names if (image := alone.admit(pictures[name]))])
        for ours, theirs in zip(made, expected, strict=True):
            assert ours is not None and theirs is not None
            assert torch.equal(ours[position], theirs[0])


def test_photographs_within_a_level(clothing: list[Path]) -> None:
    """Rounding between the passes as Pillow does is what makes this possible."""
    photos = [path.read_bytes() for path in clothing[::3]]
    spec = SPECS["timm"]
    dali, transform = decoder(spec), transform_of(spec)
    made = dali.decode([image for image in map(dali.admit, photos) if image])
    assert len(made) == len(photos) > 10
    for encoded, images in zip(photos, made, strict=True):
        assert images is not None
        difference = (images[0] - ((transform(decode(encoded).rgb) + 1) * 127.5).round()).abs()
        assert difference.max() <= 2
        assert difference.mean() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("honour", [False, True])
def test_exif_is_honoured_exactly_when_asked(
    photo: Image.Image, encode: Callable[..., bytes], orientation: int, honour: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(photo.resize((300, 200)), "JPEG", quality=95, exif=exif)
    spec = PreprocessSpec("none", (320, 320), (320, 320), "bicubic", MEAN, STD)
    dali = decoder(spec, honour_exif=honour)
    admitted = dali.admit(encoded)
    assert admitted is not None
    (images,) = dali.decode([admitted])
    assert images is not None
    theirs = transform_of(spec)(decode(encoded, honour_exif=honour).rgb)
    assert torch.equal(normalise([images[0]], spec)[0] > 0, theirs > 0)


@pytest.mark.parametrize("kind", SPECS)
def test_two_passes_show_what_the_plan_keeps(kind: str) -> None:
    for height, width in ((533, 400), (100, 1000), (1000, 100), (224, 224), (37, 61)):
        todo = plan(SPECS[kind], height, width)
        first, second = passes(todo)
        assert second.size == (todo.vertical.length, todo.horizontal.length)
        upright, across = (first, second) if todo.vertical_first else (second, first)
        for axis, part, direction in ((todo.vertical, upright, 0), (todo.horizontal, across, 1)):
            assert (part.end[direction] - part.start[direction]) / part.size[direction] == pytest.approx(axis.scale)
            assert part.start[direction] == pytest.approx(axis.start * axis.source / axis.resized)
        # What the other direction's pass does not touch, it shows whole.
        assert first.start[int(todo.vertical_first)] == 0
        assert first.end[int(todo.vertical_first)] == first.size[int(todo.vertical_first)]
        assert second.end[int(not todo.vertical_first)] == first.size[int(not todo.vertical_first)]


# --- what is admitted ---------------------------------------------------------------------------


def test_extreme_and_small_shapes_are_left_to_pillow(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    dali = decoder(SPECS["openai"])
    for size in ((3, 8000), (8000, 3), (1, 1), (63, 200)):
        assert dali.admit(encode(photo.resize(size), "PNG")) is None
    assert dali.admit(encode(photo.resize((64, 200)), "PNG")) is not None


def test_limits_hold(photo: Image.Image, encode: Callable[..., bytes]) -> None:
    encoded = encode(photo.resize((300, 300)), "PNG")
    assert decoder(SPECS["openai"], limits=Limits(300 * 300 - 1)).admit(encoded) is None
    assert decoder(SPECS["openai"], limits=Limits(max_resized_pixels=300 * 300 - 1)).admit(encoded) is None
    assert decoder(SPECS["openai"], limits=Limits(300 * 300, 300 * 300)).admit(encoded) is not None


def test_runs_hold_so_many_images_and_pixels() -> None:
    def image(pixels: int) -> Admitted:
        return Admitted(b"", (1, pixels), ())

    sizes = [10, 10, 10, 95, 10, 200, 5, *[1] * 9]
    cut = list(waves([image(pixels) for pixels in sizes], most_images=4, most_pixels=100))
    assert [sizes[wave] for wave in cut] == [[10, 10, 10], [95], [10], [200], [5, 1, 1, 1], [1, 1, 1, 1], [1, 1]]
    assert list(waves([], 4)) == []
    assert MAX_PIXELS * 3 < 256 << 20


# --- bad company ----------------------------------------------------------------------------------


def corrupted(encoded: bytes) -> bytes:
    """A PNG with damaged pixels whose checksums are right: it is admitted, and then DALI raises."""
    start = encoded.index(b"IDAT")
    end = start + 4 + int.from_bytes(encoded[start - 4 : start], "big")
    chunk = encoded[start : start + 40] + bytes(64) + encoded[start + 104 : end]
    return encoded[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + encoded[end + 4 :]


def test_a_bad_image_costs_no_other_and_changes_none(pictures: dict[str, bytes]) -> None:
    dali = decoder(SPECS["timm"], SPECS["squash"])
    names = ["upscaled", "coffee", "tall", "china", "wide", "astronaut", "flower"]
    good = [image for name in names if (image := dali.admit(pictures[name]))]
    alone = dali.decode(good)
    bad = dali.admit(corrupted(pictures["large"]))
    assert bad is not None
    for places in ((0,), (3,), (7,), (0, 1, 6), (2, 5, 9)):
        batch: list[Admitted] = list(good)
        for place in places:
            batch.insert(place, bad)
        made = dali.decode(batch)
        assert [row for row, images in enumerate(made) if images is None] == list(places)
        kept = [images for images in made if images is not None]
        for ours, theirs in zip(kept, alone, strict=True):
            assert theirs is not None
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_file_that_is_not_as_large_as_its_header_said_is_refused(pictures: dict[str, bytes]) -> None:
    dali = decoder(SPECS["timm"])
    right = dali.admit(pictures["coffee"])
    assert right is not None
    wrong = Admitted(right.encoded, (right.size[1], right.size[0]), (plan(SPECS["timm"], *right.size[::-1]),))
    made = dali.decode([right, wrong, right])
    assert [images is None for images in made] == [False, True, False]


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "zeroed": lambda data, rng: bytes(len(data)),
    "set": lambda data, rng: b"\xff" * len(data),
    "random": lambda data, rng: rng.randbytes(len(data)),
    "shuffled": lambda data, rng: bytes(rng.sample(list(data), len(data))),
    "flipped": lambda data, rng: bytes([data[0] ^ 0xFF]) + data[1:],
    "cut out": lambda data, rng: b"",
}


@pytest.mark.parametrize("options", [{"quality": 90}, {"progressive": True}], ids=["baseline", "progressive"])
def test_damaged_jpegs_have_pillows_outcome(
    wheel_photos: list[Path], encode: Callable[..., bytes], options: dict[str, Any]
) -> None:
    """Refused where Pillow refuses, but for 1 in 100; and the same pixels where both decode around the damage."""
    dali = decoder(PreprocessSpec("none", (180, 240), (180, 240), "bicubic", (0.0,) * 3, (1.0,) * 3))
    rng = random.Random(0)
    refused_by_pillow = disagreements = compared = 0
    for path in wheel_photos:
        encoded = encode(Image.open(path).convert("RGB").resize((240, 180)), "JPEG", **options)
        for damage in DAMAGE.values():
            for _ in range(4):
                place = rng.randrange(200, len(encoded) - 100)
                broken = encoded[:place] + damage(encoded[place : place + 100], rng) + encoded[place + 100 :]
                admitted = dali.admit(broken)
                images = dali.decode([admitted])[0] if admitted else None
                try:
                    rgb = decode(broken).rgb
                except ImageError:
                    refused_by_pillow += 1
                    disagreements += images is not None
                    continue
                if images is not None:
                    compared += 1
                    assert torch.equal(images[0], torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
                                       .view(180, 240, 3).permute(2, 0, 1))  # fmt: skip
    assert refused_by_pillow > 20
    assert compared > 60
    assert disagreements <= 0.01 * len(wheel_photos) * 24


def test_without_dali_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingExtra, match=r"'curator-embed\[cuda13\]' or 'curator-embed\[cuda12\]'"):
        decoder(SPECS["timm"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to start on")
def test_without_a_gpu_the_error_says_how_to_go_on() -> None:
    with pytest.raises(CuratorEmbedError, match=r"does not start on the device 'cuda:0': .*decoder='cpu'"):
        decoder(SPECS["timm"], device="cuda:0")


# --- a pipeline that fails ----------------------------------------------------------------------


class Broken:
    """A DALI pipeline that raises whatever it is given."""

    def __init__(self, message: str) -> None:
        self.message, self.runs = message, 0

    def feed_input(self, name: str, data: Any) -> None:
        pass

    def run(self) -> Any:
        self.runs += 1
        raise RuntimeError(self.message)


def test_a_dead_pipeline_is_built_anew(pictures: dict[str, bytes]) -> None:
    dali = decoder(SPECS["timm"])
    good = [image for name in ("coffee", "china", "flower") if (image := dali.admit(pictures[name]))]
    with dali._lane() as lane:
        lane._pipe = broken = Broken("Error in CPU operator `nvidia.dali.fn.decoders.image`: nvImageCodec failure")
    assert all(images is not None for images in dali.decode(good))
    assert broken.runs > 1


def test_what_is_no_images_fault_is_not_hidden(pictures: dict[str, bytes]) -> None:
    dali = decoder(SPECS["timm"])
    good = [image for name in ("coffee", "china") if (image := dali.admit(pictures[name]))]
    with dali._lane() as lane:
        working, lane._pipe = lane._pipe, Broken("Error in GPU operator `nvidia.dali.fn.resize`: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        dali.decode(good)
    with dali._lane() as lane:
        lane._pipe = working
    assert all(images is not None for images in dali.decode(good)), "the lane was handed back"


DECODER = (
    "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`,\nwhich was used in the "
    'pipeline definition with the following traceback:\n\n  File "/out of memory/dali.py", line 1\n\nencountered:\n\n'
)


@pytest.mark.parametrize(
    ("met", "images_fault"),
    [
        ("nvImageCodec failure: '#3'", True),
        ("nvImageCodec failure: '#13'", True),
        ("nvImageCodec failure: '#19'", True),
        ("Failed to decode sample #0 : ", True),
        ("nvImageCodec failure: '#5'", False),
        ("nvImageCodec failure: '#1'", False),
        ("nvImageCodec failure: '#21'", False),
        ("Can't allocate 16777216 bytes on device 0.", False),
        ("CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered", False),
    ],
)
def test_a_devices_fault_is_not_taken_for_an_images(met: str, images_fault: bool) -> None:
    """DALI names the operator in both cases; where it was defined says nothing."""
    assert _refused(RuntimeError(f"{DECODER}{met}\nCurrent pipeline object is no longer valid.")) is images_fault


@pytest.mark.parametrize("honour_exif", [False, True])
def test_the_gpus_graph_can_be_described_without_one(honour_exif: bool) -> None:
    """DALI knows the operators and arguments; the decoder is the mixed one, all else follows, sizes are the host's."""
    graph = _Graph(tuple(SPECS.values()), torch.device("cuda"), 8, 2, honour_exif, 1.0, True)
    pipe = graph.describe(None)
    described = pipe.serialize()
    assert all(word in described for word in (b"mixed", b"hw_decoder_load", b"jpeg_fancy_upsampling", b"affine"))
    assert [output.device for output in pipe._graph_outputs] == ["cpu", *["gpu"] * len(SPECS)]
