"""Every image and caption that a stranger may put in a shard."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.orientation import orientation
from mmpretrain.data.schema import BadSample
from tests.data.generated import encoded, picture


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: int = 2) -> None:
    assert found.dtype == torch.uint8
    assert found.shape == wanted.shape
    assert (found.int() - wanted.int()).abs().max() <= tolerance


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_agree_with_pillow(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(), kind, **options)
    close(decode_image(data), pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette(mode: str) -> None:
    image = picture().convert(mode)
    close(decode_image(encoded(image, "PNG")), pixels(image))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    image = picture().convert("CMYK")
    close(decode_image(encoded(image, kind)), pixels(image), 12)


def test_grey_jpeg() -> None:
    image = picture().convert("L")
    close(decode_image(encoded(image)), pixels(image), 12)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_composited_on_the_background(mode: str, kind: str) -> None:
    image = picture().convert(mode)
    image.putalpha(Image.new("L", image.size, 0))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = decode_image(encoded(image, kind, **options), ImageLimits(background=(10, 200, 30)))
    assert found.flatten(1).unique(dim=1).T.tolist() == [[10, 200, 30]]


def test_half_alpha_is_the_mean() -> None:
    image = Image.new("RGBA", (16, 16), (100, 0, 200, 128))
    found = decode_image(encoded(image, "PNG"), ImageLimits(background=(0, 100, 200)))
    assert found[:, 0, 0].tolist() == [50, 50, 200]


def test_palette_and_rgb_transparency() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert decode_image(encoded(image, "PNG", transparency=1))[:, 0, 0].tolist() == [255, 255, 255]
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    assert decode_image(encoded(image, "PNG", transparency=(1, 2, 3)))[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # red left, blue right
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encoded(image, kind, exif=exif))
    assert tuple(found.shape[1:]) == ((20, 40) if orientation in (1, 3) else (40, 20))
    red_at_start = found[0, 3, 3] > 128
    assert bool(red_at_start) == (orientation in (1, 6))


@pytest.mark.parametrize("orientation", range(10))
def test_a_jpeg_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation  # 0 and 9 mean nothing
    data = encoded(picture(size=(40, 24)), exif=exif)
    close(decode_image(data), pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


def exif_block(order: str, *orientations: int) -> bytes:
    """A directory of so many orientation tags, behind one of another kind."""
    tags = [struct.pack(order + "HHII", 0x0100, 4, 1, 9)]
    tags += [struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0) for orientation in orientations]
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(tags))
    return b"Exif\0\0" + start + b"".join(tags) + bytes(4)


def with_blocks(plain: bytes, *blocks: bytes) -> bytes:
    return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block for block in blocks) + plain[2:]


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_and_the_first_of_two_blocks(order: str) -> None:
    plain = encoded(picture(size=(40, 24)))
    turned = decode_image(with_blocks(plain, exif_block(order, 6)))
    close(turned, pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(with_blocks(plain, exif_block(order, 6)))))))
    close(decode_image(with_blocks(plain, exif_block(order, 6), exif_block(order, 3))), turned, 0)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"\xff" * 300])
def test_an_exif_block_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    plain = encoded(picture())
    close(decode_image(with_blocks(plain, b"Exif\0\0" + exif)), decode_image(plain), 0)


def test_a_progressive_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    plain = encoded(picture(size=(64, 64)), progressive=True)
    close(decode_image(plain), pixels(Image.open(io.BytesIO(plain))))
    last = plain.rindex(b"\xff\xda")
    data = plain[:-2] + plain[last:-2] * 200 + plain[-2:]
    with pytest.raises(BadSample, match="too_many_scans: a progressive JPEG of 2"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x01\x87\x69\0\x09\0\0\0\x01\xff\xff\xff\xf0" + bytes(4), b"junk"]
)
def test_a_sound_picture_with_a_damaged_exif_block_is_read(kind: str, exif: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    close(decode_image(encoded(picture(), kind, exif=b"Exif\0\0" + exif, **options)), pixels(picture()))


@pytest.mark.parametrize(("kind", "packed"), [(3, "H"), (4, "I"), (8, "h"), (9, "i")])
@pytest.mark.parametrize("order", ["<", ">"])
def test_an_orientation_may_be_any_whole_number(order: str, kind: int, packed: str) -> None:
    value = struct.pack(order + packed, 8).ljust(4, b"\0")
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    block = b"Exif\0\0" + start + struct.pack(order + "HHI", 0x0112, kind, 1) + value + bytes(4)
    assert orientation(block) == 8
    assert orientation(block[:-6]) == 1  # cut


def test_a_jpeg_with_stray_bytes_is_read_as_pillow_reads_it() -> None:
    plain = encoded(picture())
    scan = plain.index(b"\xff\xda")
    data = plain[:scan] + bytes(7) + plain[scan:]
    with pytest.raises(ValueError, match="xtraneous"):
        simplejpeg.decode_jpeg(data)
    close(decode_image(data), pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_rescaled(kind: str) -> None:
    ramp = np.linspace(0, 65535, 32 * 24).reshape(24, 32).astype(np.uint16)
    found = decode_image(encoded(Image.fromarray(ramp), kind))
    close(found[0], torch.from_numpy(np.rint(ramp / 257).astype(np.uint8)), 1)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0), (-3.0, 9.0)])
def test_float_tiff_is_rescaled(low: float, high: float) -> None:
    ramp = np.linspace(low, high, 32 * 24, dtype=np.float32).reshape(24, 32)
    found = decode_image(encoded(Image.fromarray(ramp), "TIFF"))[0]
    assert found.min() == 0
    assert found.max() == 255
    assert abs(found.float().mean() - 127.5) < 1


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in [(250, 0, 0), (0, 250, 0)]]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode_image(data)[:, 0, 0].tolist() == pytest.approx([250, 0, 0], abs=6)


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("size", "reason"), [((30_000, 30_000), "too_many_pixels"), ((1, 3000), "too_small"), ((100, 3000), "too_elongated")]
)
def test_size_is_judged_from_the_header(size: tuple[int, int], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(bomb(*size))  # no pixels follow: decoding could only fail as undecodable
    assert caught.value.reason == reason
    assert str(size[0]) in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_images_are_bad(kind: str) -> None:
    data = encoded(picture(size=(96, 96)), kind)
    for cut in (len(data) // 2, 20):
        with pytest.raises(BadSample) as caught:
            decode_image(data[:cut])
        assert caught.value.reason in ("undecodable_image", "too_small")


@pytest.mark.parametrize("data", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<html>", b"\0\0\0\x1cftypheic", b"<svg/>", b"\x80\x04pickle"])
def test_only_allowed_formats_reach_a_decoder(data: bytes) -> None:
    with pytest.raises(BadSample, match="unknown_format"):
        decode_image(data)


def test_garbage_after_a_good_signature_is_bad() -> None:
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"GIF89a", b"BM", b"II*\0", b"P6\n"):
        with pytest.raises(BadSample):
            decode_image(start + b"\x07" * 60)


def test_a_png_that_libpng_gives_up_on_is_bad_and_no_crash() -> None:
    rows = b"".join(b"\x09" + bytes(40 * 3) for _ in range(30))  # there is no filter 9; every checksum is right

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 30, 8, 2, 0, 0, 0))
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
