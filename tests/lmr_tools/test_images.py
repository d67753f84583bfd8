"""Decoding: what is accepted comes out right, what is hostile or broken gets its reason."""

import io
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image as PilImage

from lmr_tools.images import BadImage, decode, downscale, encode_png, upscale


def photo(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(picture: PilImage.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_lossless_formats_come_out_as_they_went_in(kind: str) -> None:
    image = photo()
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(saved(PilImage.fromarray(image), kind, **options)), image)


def test_exif_turn_is_applied() -> None:
    image = photo()
    exif = PilImage.Exif()
    exif[274] = 6  # shown turned by 90 degrees clockwise
    turned = decode(saved(PilImage.fromarray(image), "PNG", exif=exif))
    assert np.array_equal(turned, np.rot90(image, -1))


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    encoded = cv2.imencode(".png", values)[1].tobytes()
    assert np.array_equal(decode(encoded)[:, :, 0], np.rint(values / 257).astype(np.uint8))


def test_rgb_16_bit_keeps_its_high_byte() -> None:
    values = np.random.default_rng(1).integers(0, 65536, (48, 64, 3)).astype(np.uint16)
    encoded = cv2.imencode(".png", values)[1].tobytes()
    difference = decode(encoded)[:, :, ::-1].astype(int) - values / 257
    assert np.abs(difference).max() <= 1


def test_transparency_lies_over_white_and_cmyk_becomes_rgb() -> None:
    clear = np.zeros((40, 40, 4), np.uint8)
    assert (decode(saved(PilImage.fromarray(clear, "RGBA"), "PNG")) == 255).all()
    red = PilImage.new("CMYK", (40, 40), (0, 255, 255, 0))
    pixel = decode(saved(red, "JPEG", quality=95))[20, 20]
    assert pixel[0] > 200 and pixel[1] < 60 and pixel[2] < 60


def test_a_truncated_jpeg_is_refused_at_every_length() -> None:
    data = saved(PilImage.fromarray(photo(200, 200)), "JPEG", quality=90)
    for share in (0.02, 0.3, 0.9):
        with pytest.raises(BadImage) as caught:
            decode(data[: int(len(data) * share)])
        assert caught.value.reason in {"broken", "not an image"}


def test_a_jpeg_is_decoded_no_larger_than_needed() -> None:
    random = np.random.default_rng(3)
    coarse = PilImage.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    picture = coarse.resize((1600, 1200), PilImage.Resampling.BICUBIC)
    turned = PilImage.Exif()
    turned[0x112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, exif=turned)
    sizes = {enough: decode(buffer.getvalue(), enough=enough).shape[:2] for enough in (1201, 600, 599, 300, 8)}
    assert sizes == {1201: (1600, 1200), 600: (800, 600), 599: (800, 600), 300: (400, 300), 8: (200, 150)}
    small = np.asarray(picture.reduce(4).rotate(-90, expand=True), np.int64)
    assert np.abs(decode(buffer.getvalue(), enough=300) - small).mean() < 1
    for length in (len(buffer.getvalue()) // 2, len(buffer.getvalue()) - 40):
        with pytest.raises(BadImage):
            decode(buffer.getvalue()[:length], enough=8)
    png = encode_png(np.asarray(picture))
    assert decode(png, enough=8).shape == (1200, 1600, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a shopping list", "not an image"),
        (b"GIF89a" + bytes(100), "not an image"),
    ],
)
def test_what_is_no_picture_says_so(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_animation_bomb_and_ribbon_are_refused_before_decoding() -> None:
    frames = [PilImage.new("RGB", (40, 40), color) for color in ("red", "blue")]
    animated = saved(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    bomb = saved(PilImage.new("1", (20000, 20000)), "PNG")
    ribbon = saved(PilImage.new("RGB", (4000, 20)), "PNG")
    for data, reason in ((animated, "animated"), (bomb, "too many pixels"), (ribbon, "extreme aspect ratio")):
        with pytest.raises(BadImage) as caught:
            decode(data)
        assert caught.value.reason == reason


def test_the_pixel_limit_is_the_one_that_is_told() -> None:
    def headed(width: int, height: int) -> bytes:
        head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        body = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        return body + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))

    for side, reason in ((14100, "broken"), (14200, "too many pixels")):  # 199 and 202 megapixels
        with pytest.raises(BadImage) as caught:
            decode(headed(side, side))
        assert caught.value.reason == reason
    assert "200000000" in caught.value.detail


def test_a_photo_that_memory_does_not_suffice_for_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lmr_tools.images._to_rgb", short)
    with pytest.raises(BadImage, match="unreadable: memory ran out"):  # the scan looks at such a file again
        decode(encode_png(np.zeros((8, 8, 3), np.uint8)))


def test_a_refusal_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BadImage("broken", "why")))  # noqa: S301
    assert (error.reason, error.detail, str(error)) == ("broken", "why", "broken: why")


def test_png_bytes_are_a_function_of_the_pixels() -> None:
    image = photo()
    assert encode_png(image) == encode_png(image.copy())
    assert np.array_equal(decode(encode_png(image)), image)


def test_scaling_is_pillow_bicubic_and_refuses_odd_sizes() -> None:
    image = photo()
    small = downscale(image)
    bicubic = PilImage.fromarray(image).resize((16, 12), PilImage.Resampling.BICUBIC)
    assert np.array_equal(small, np.asarray(bicubic))
    assert upscale(small).shape == image.shape
    with pytest.raises(ValueError, match="63x48 is not a multiple of 4"):
        downscale(image[:, :63])
