"""Pictures of every kind come out upright and in eight bits, and broken ones are named."""

import io

import numpy as np
import pytest
from PIL import Image

from memtune.errors import InputError
from memtune.storage import decode

RAMP = np.linspace(0, 1, 400).reshape(20, 20)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :12] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: [0], 3: [0, 1], 4: [1], 5: "transpose", 6: "right", 7: "transverse", 8: "left"}.get(orientation, [])
    upright = np.asarray(decode({"bytes": saved(Image.fromarray(picture), exif=exif), "path": None}))
    expected = {"transpose": picture.swapaxes(0, 1), "right": np.rot90(picture, -1), "left": np.rot90(picture)}
    expected["transverse"] = np.rot90(picture, 2).swapaxes(0, 1)
    if isinstance(turned, list):
        flipped = picture
        for axis in turned:
            flipped = np.flip(flipped, axis=1 - axis)
        assert np.array_equal(upright, flipped)
    else:
        assert np.array_equal(upright, expected[turned])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_values_of_more_bits_keep_their_range(bits):
    values = np.round(RAMP * (2**bits - 1)).astype(np.uint16)
    found = np.asarray(decode(saved(Image.fromarray(values)), 1)).astype(float)
    assert np.abs(found - 255 * RAMP).max() <= 1


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (255, 0), (65535, 0), (2, -1), (4000, 96000)])
def test_floats_keep_what_they_show(scale, shift):
    image = Image.fromarray((RAMP * scale + shift).astype(np.float32))
    found = np.asarray(decode(saved(image, "TIFF"))).astype(float)[..., 0]
    assert np.abs(found - 255 * RAMP).max() <= 1.1


def test_values_that_are_not_finite():
    image = Image.fromarray(np.full((4, 4), np.nan, np.float32))
    with pytest.raises(InputError, match="not finite"):
        decode(saved(image, "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode(mode, channels):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)).convert(mode)
    found = decode(picture, channels)
    assert found.mode == {1: "L", 3: "RGB"}[channels]
    assert found.size == (9, 12)


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_whatever_holds_it(tmp_path):
    picture = Image.new("RGB", (8, 8), "green")
    picture.save(tmp_path / "a.png")
    held = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
        picture,
        np.asarray(picture),
    ]
    for value in [*held, {"path": str(tmp_path / "a.png"), "bytes": None}]:
        assert np.array_equal(np.asarray(decode(value)), np.asarray(picture))
    for value in (None, {"bytes": None, "path": None}, 7, [picture], str(tmp_path / "none.png"), tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            decode(value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_any_broken_byte_is_an_error_of_ours_or_none(kind):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    data = saved(picture, kind)
    places = np.random.default_rng(1).integers(0, len(data), 150)
    for place in places.tolist():
        broken = bytearray(data)
        broken[place] ^= 0xA5
        for value in (bytes(broken), bytes(broken[:place])):
            try:
                assert decode(value).mode == "RGB"
            except InputError:
                continue


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_that_says_it_is_huge_is_not_decoded(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 399)
    with pytest.raises(InputError, match="it says that it has 20 x 20 pixels"):
        decode(saved(Image.new("L", (20, 20))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    assert decode(saved(Image.new("L", (20, 20)))).size == (20, 20)


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)], ids=str)
@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("int64", 255), ("uint16", 65535), ("float64", 1.0)])
def test_arrays_of_any_type(dtype, most, channels):
    values = np.broadcast_to(RAMP.reshape(20, 20, *[1] * len(channels)), (20, 20, *channels))
    scaled = values * most
    if dtype != "float64":
        scaled = np.round(scaled)
    found = np.asarray(decode(scaled.astype(dtype))).astype(float)
    assert found.shape == (20, 20, 3)
    assert np.abs(found - 255 * RAMP[..., None]).max() <= 1.1


def test_truths_are_black_and_white():
    found = np.asarray(decode(RAMP > 0.5, 1))
    assert np.array_equal(found, np.where(RAMP > 0.5, 255, 0))


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((3, 20, 20), np.uint8),
        np.zeros((20, 20), complex),
        np.zeros((0, 20)),
        np.zeros(5),
        np.full((2, 2), "a"),
    ],
    ids=lambda values: f"{values.dtype} {values.shape}",
)
def test_arrays_that_are_no_pictures(values):
    with pytest.raises(InputError, match=r"got an array of .* expected numbers \(height, width\)"):
        decode(values)
