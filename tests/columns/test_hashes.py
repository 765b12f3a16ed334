"""Hashes are imagehash's, digit for digit; checksums are hashlib's."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curator_embed.columns import HASH_KINDS, ImageHasher
from curator_embed.decoding.image import DecodedImage, once
from curator_embed.errors import UsageError

QUICK: dict[str, Callable[..., object]] = {
    "phash": imagehash.phash,
    "dhash": imagehash.dhash,
    "ahash": imagehash.average_hash,
    "whash": imagehash.whash,
}


def assert_equal_to_imagehash(images: Mapping[str, DecodedImage], kinds: tuple[str, ...], hash_size: int = 8) -> None:
    hasher = ImageHasher(kinds, hash_size)
    for name, image in images.items():
        wanted = {kind: str(QUICK[kind](image.rgb, hash_size=hash_size)) for kind in kinds if kind in QUICK}
        if "colorhash" in kinds:
            wanted["colorhash"] = str(imagehash.colorhash(image.rgb))
        if "crop_resistant" in kinds:
            wanted["crop_resistant"] = str(imagehash.crop_resistant_hash(image.rgb))
        assert hasher.measure(image) == wanted, name


ALL = (*QUICK, "colorhash", "crop_resistant")


@pytest.mark.filterwarnings("ignore:Level value")
def test_photographs(photos: dict[str, DecodedImage]) -> None:
    assert_equal_to_imagehash(photos, ALL)


@pytest.mark.filterwarnings("ignore:Level value")
def test_odd_shapes_and_modes(shapes: dict[str, DecodedImage]) -> None:
    assert_equal_to_imagehash(shapes, ALL)


def test_every_format_and_many_photographs(many_photos: dict[str, DecodedImage]) -> None:
    assert_equal_to_imagehash(many_photos, (*QUICK, "colorhash"))


def test_crop_resistant_on_many_photographs(many_photos: dict[str, DecodedImage]) -> None:
    some = dict(list(many_photos.items())[::12])
    assert_equal_to_imagehash(some, ("crop_resistant",))


@pytest.mark.parametrize("seed", range(4))
def test_crop_resistant_on_images_of_many_regions(seed: int) -> None:
    # Blobs near the size at which a region counts, in number enough to reach the place where imagehash stops looking.
    noise = np.random.default_rng(seed).integers(0, 256, (12 + 3 * seed, 14 + 2 * seed, 3), np.uint8)
    image = Image.fromarray(noise).resize((300, 280), Image.Resampling.BICUBIC)
    wanted = str(imagehash.crop_resistant_hash(image))
    assert wanted.count(",") > 3
    assert ImageHasher("crop_resistant").measure(DecodedImage(b"", image, "PNG")) == {"crop_resistant": wanted}


@pytest.mark.parametrize("levels", [(0, 110), (60, 125), (0, 131, 255)])
@pytest.mark.parametrize("upright", [True, False])
def test_crop_resistant_where_segments_are_thinner_than_a_pixel(levels: tuple[int, ...], upright: bool) -> None:
    pixels = np.tile(np.array(levels, np.uint8), (40, 1))
    image = DecodedImage(b"", Image.fromarray(pixels if upright else pixels.T.copy()), "PNG")
    assert_equal_to_imagehash({"stripes": image}, ("crop_resistant",))


@given(
    st.integers(2, 21),
    st.integers(1, 50),
    st.integers(1, 50),
    st.sampled_from(["RGB", "L", "RGBA", "CMYK", "1"]),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_any_size_of_hash_and_image(hash_size: int, width: int, height: int, mode: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = DecodedImage(b"", Image.fromarray(noise).convert(mode), "PNG")
    assert_equal_to_imagehash({"noise": image}, ("phash", "dhash", "ahash", "colorhash"), hash_size)


@pytest.mark.parametrize("hash_size", [2, 4, 16, 32])
@pytest.mark.filterwarnings("ignore:Level value")
def test_other_sizes_of_photographs(photos: dict[str, DecodedImage], hash_size: int) -> None:
    assert_equal_to_imagehash(photos, ("phash", "whash", "ahash", "dhash"), hash_size)


def test_checksums(photos: dict[str, DecodedImage]) -> None:
    image = photos["rocket.jpg"]
    assert ImageHasher(("sha256", "pixel_sha256")).measure(image) == {
        "image_sha256": hashlib.sha256(image.encoded).hexdigest(),
        "pixel_sha256": hashlib.sha256(np.asarray(image.rgb).tobytes()).hexdigest(),
    }


def test_threads_give_what_one_thread_gives(photos: dict[str, DecodedImage]) -> None:
    hasher = ImageHasher(tuple(HASH_KINDS))
    images = list(photos.values())
    alone = [hasher.measure(image) for image in images]
    fresh = [DecodedImage(image.encoded, image.original, image.format) for image in images * 3]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(hasher.measure, fresh)) == alone * 3


def test_threads_convert_different_images_side_by_side() -> None:
    both = threading.Barrier(2, timeout=20)

    class Meeting:
        @once
        def value(self) -> int:
            return both.wait()

    # A lock shared by the instances, as cached_property has one before Python 3.12, would keep them from meeting.
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda meeting: meeting.value, [Meeting(), Meeting()])) == [0, 1]


def test_grey_and_rgb_are_made_once(photos: dict[str, DecodedImage]) -> None:
    image = photos["rocket.jpg"]
    assert image.grey is image.grey and image.rgb is image.rgb


def test_a_hasher_travels() -> None:
    hasher = ImageHasher(("whash", "colorhash"), 16, max_image_pixels=1000)
    copy = pickle.loads(pickle.dumps(hasher))
    assert copy.recipe() == hasher.recipe() and copy.columns() == hasher.columns()


def test_the_size_counts_only_where_it_matters() -> None:
    assert ImageHasher("phash", 8).recipe() != ImageHasher("phash", 16).recipe()
    assert ImageHasher("colorhash", 8).recipe() == ImageHasher("colorhash", 16).recipe()
    assert ImageHasher("phash").recipe()["software"]["imagehash"] == imagehash.__version__.split(".")[0]


@pytest.mark.parametrize(
    ("kinds", "hash_size", "message"),
    [
        (("phash", "fhash"), 8, "no hash is called 'fhash'; there are phash, dhash, ahash"),
        ((), 8, "no kind of hash was named"),
        (("dhash", "phash", "dhash"), 8, "'dhash' is named twice"),
        (("sha256", "image_sha256"), 8, "'image_sha256' is named twice"),
        (("phash",), 1, "hash_size must be a whole number of at least 2, not 1"),
        (("phash",), 8.0, "hash_size must be a whole number"),
        (("whash",), 12, "whash needs a hash_size that is a power of two, not 12"),
    ],
)
def test_what_cannot_be_is_refused_at_once(kinds: tuple[str, ...], hash_size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageHasher(kinds, hash_size)


def test_importing_is_cheap() -> None:
    code = "import sys, curator_embed.columns as c; c.ImageHasher(); c.ImageProperties(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "scipy", "pywt", "dask", "imagehash"} & set(loaded)
