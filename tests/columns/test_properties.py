"""Properties against independent definitions: Pillow's statistics, numpy's percentiles, scipy's Laplacian."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageFilter, ImageStat
from scipy import ndimage

from curator_embed.columns import PROPERTIES, ImageProperties
from curator_embed.decoding.image import DecodedImage
from curator_embed.decoding.pillow import decode
from curator_embed.errors import UsageError

EVERYTHING = ImageProperties(tuple(PROPERTIES), prefix="")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def measured(data: bytes, *, honour_exif: bool = False) -> Mapping[str, Any]:
    return EVERYTHING.measure(decode(data, honour_exif=honour_exif))


def assert_as_defined(image: DecodedImage) -> None:
    found = EVERYTHING.measure(image)
    rgb, grey = np.asarray(image.rgb).astype(float), np.asarray(image.rgb.convert("L")).astype(float)
    wide, tall = image.rgb.size
    assert (found["width"], found["height"]) == (wide, tall)
    assert found["aspect_ratio"] == min(wide, tall) / max(wide, tall)
    assert found["file_size"] == len(image.encoded)
    means = ImageStat.Stat(image.rgb).mean
    assert [found["mean_red"], found["mean_green"], found["mean_blue"]] == pytest.approx(means, abs=1e-9)
    red, green, blue = means
    luminous = math.sqrt(0.241 * red**2 + 0.691 * green**2 + 0.068 * blue**2) / 255
    assert found["brightness"] == pytest.approx(luminous, abs=1e-12)
    by_pixel = np.sqrt(0.241 * rgb[..., 0] ** 2 + 0.691 * rgb[..., 1] ** 2 + 0.068 * rgb[..., 2] ** 2) / 255
    percentiles = [found["brightness_perc_5"], found["brightness_perc_99"]]
    assert percentiles == pytest.approx(np.percentile(by_pixel, [5, 99]), abs=1e-12)
    assert found["contrast"] == pytest.approx(grey.std() / 255, abs=1e-9)
    assert found["entropy"] == pytest.approx(image.rgb.entropy(), abs=1e-9)
    # scipy's "mirror" is OpenCV's default border.
    assert found["blur"] == pytest.approx(ndimage.laplace(grey, mode="mirror").var(), rel=1e-9, abs=1e-9)


def test_photographs(photos: dict[str, DecodedImage]) -> None:
    for image in photos.values():
        assert_as_defined(image)


def test_odd_shapes_and_modes(shapes: dict[str, DecodedImage]) -> None:
    for image in shapes.values():
        assert_as_defined(image)


def test_every_format(many_photos: dict[str, DecodedImage]) -> None:
    for image in many_photos.values():
        assert_as_defined(image)
    found = EVERYTHING.measure(many_photos["giphy.gif"])
    assert (found["format"], found["animated"], found["mode"]) == ("GIF", True, "P")


def test_a_line_of_pixels_is_mirrored_along_its_length_only() -> None:
    levels = np.array([[10, 20, 40, 80, 10]], np.uint8)
    along = np.array([20.0, 10, 20, -110, 140])
    for pixels in (levels, levels.T.copy()):
        assert measured(encoded(Image.fromarray(pixels), "PNG"))["blur"] == pytest.approx(along.var())


def test_blur_of_a_large_image_is_that_of_its_whole(photos: dict[str, DecodedImage]) -> None:
    # Large enough for several bands of rows.
    image = decode(encoded(photos["coffee.png"].rgb.resize((1500, 1100)), "BMP"))
    wanted = ndimage.laplace(np.asarray(image.grey).astype(float), mode="mirror").var()
    assert ImageProperties("blur").measure(image)["image_blur"] == pytest.approx(wanted, rel=1e-12)


def test_blurring_and_darkening_show(photos: dict[str, DecodedImage]) -> None:
    sharp = photos["chelsea.png"].rgb
    soft, dark = sharp.filter(ImageFilter.GaussianBlur(3)), sharp.point(lambda level: level // 4)
    found = [measured(encoded(image, "BMP")) for image in (sharp, soft, dark)]
    assert found[1]["blur"] < found[0]["blur"] / 5
    assert found[2]["brightness_perc_99"] < 0.32 < found[0]["brightness_perc_99"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("honour_exif", [False, True])
def test_orientation_is_told_whether_or_not_it_is_honoured(
    photos: dict[str, DecodedImage], kind: str, honour_exif: bool
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photos["chelsea.png"].rgb.resize((60, 40)), kind, exif=exif)
    found = measured(data, honour_exif=honour_exif)
    assert found["exif_orientation"] == 6
    turned = honour_exif or kind == "TIFF"  # Pillow turns TIFFs itself
    assert (found["width"], found["height"]) == ((40, 60) if turned else (60, 40))


@pytest.mark.parametrize("stated", [None, 0, 9])
def test_no_orientation_is_null(photos: dict[str, DecodedImage], stated: int | None) -> None:
    exif = Image.Exif()
    if stated is not None:
        exif[0x0112] = stated
    data = encoded(photos["chelsea.png"].rgb.resize((60, 40)), "JPEG", exif=exif)
    assert measured(data)["exif_orientation"] is None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_costs_the_orientation_only() -> None:
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 40)
    found = measured(data)
    assert found["exif_orientation"] is None and found["width"] == 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
@pytest.mark.parametrize("frames", [1, 3])
def test_animations_are_known_and_their_first_frame_is_kept(kind: str, frames: int) -> None:
    first, *rest = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")][:frames]
    data = encoded(first, kind, save_all=True, append_images=rest)
    image = decode(data)
    before = image.original.tobytes()
    assert EVERYTHING.measure(image)["animated"] is (frames > 1)
    assert image.original.tobytes() == before


def test_several_pictures_in_one_file_are_no_animation() -> None:
    pages = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("TIFF", "MPO"):
        data = encoded(pages[0], kind, save_all=True, append_images=pages[1:])
        for honour_exif in (False, True):
            found = measured(data, honour_exif=honour_exif)
            assert (found["format"], found["animated"]) == (kind, False)


def test_transparency_is_the_share_of_pixels_that_are_not_opaque() -> None:
    image = Image.new("RGBA", (10, 10), (1, 2, 3, 255))
    image.paste((0, 0, 0, 0), (0, 0, 10, 2))
    image.paste((0, 0, 0, 254), (0, 2, 10, 3))
    assert measured(encoded(image, "PNG"))["transparency"] == pytest.approx(0.3)
    assert measured(encoded(image.convert("RGB"), "PNG"))["transparency"] == 0
    keyed = Image.new("P", (10, 10), 1)
    keyed.putpalette([0, 0, 0, 255, 0, 0])
    keyed.paste(0, (0, 0, 5, 10))
    assert measured(encoded(keyed, "PNG", transparency=0))["transparency"] == pytest.approx(0.5)
    assert measured(encoded(keyed, "GIF", transparency=0))["transparency"] == pytest.approx(0.5)


def test_the_extension_is_not_believed(many_photos: dict[str, DecodedImage]) -> None:
    assert EVERYTHING.measure(many_photos["jpeg.tiff"])["format"] == "JPEG"


def test_columns_are_typed_and_prefixed(photos: dict[str, DecodedImage]) -> None:
    step = ImageProperties()
    found = step.measure(photos["rocket.jpg"])
    assert list(found) == list(step.columns()) and all(name.startswith("image_") for name in found)
    assert "image_brightness_perc_5" not in found
    for name, kind in step.columns().items():
        assert pa.array([found[name]], kind).to_pylist() == [found[name]]


def test_a_shorter_list_is_up_to_date_in_a_longer_one() -> None:
    assert ImageProperties("width").recipe() == ImageProperties().recipe()
    assert ImageProperties(honour_exif=True).recipe() != ImageProperties().recipe()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("width", "sharpness"), "no property is called 'sharpness'; there are width, height, mode"),
        ((), "no property was named"),
        (("blur", "blur"), "'blur' is named twice"),
    ],
)
def test_what_cannot_be_is_refused_at_once(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImageProperties(names)
