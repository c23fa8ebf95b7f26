"""Orientation: one rule over formats and over everything that shows an image."""

import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from data_prep.build.images import encode
from mmpretrain.data import orientation as rule
from mmpretrain.data.decode import decode_image
from mmpretrain.data.formats import sniff
from mmpretrain.data.raster import read_header
from tests.data.generated import encoded

COLOURS = {"A": (250, 250, 250), "B": (250, 10, 10), "C": (10, 10, 250), "D": (10, 10, 10)}
# What an image stored as AB over CD shows (EXIF 2.32, tag 274: "row 0 is at the ..., column 0 at the ...")
SHOWN = {1: "AB CD", 2: "BA DC", 3: "DC BA", 4: "CD AB", 5: "AC BD", 6: "CA DB", 7: "DB CA", 8: "BD AC"}
WIDTH, HEIGHT = 64, 32
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot decode AVIF")


def stored() -> Image.Image:
    rows = [np.concatenate([np.full((HEIGHT // 2, WIDTH // 2, 3), COLOURS[c], np.uint8) for c in row], axis=1) for row in ("AB", "CD")]
    return Image.fromarray(np.concatenate(rows))


def seen(pixels: np.ndarray) -> str:
    """The quarters of an [H,W,3] image, each by its nearest colour."""
    height, width = pixels.shape[:2]
    points = [(height // 4, width // 4), (height // 4, 3 * width // 4), (3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4)]
    names = [min(COLOURS, key=lambda c: np.abs(pixels[y, x].astype(int) - COLOURS[c]).sum()) for y, x in points]
    return "".join(names[:2]) + " " + "".join(names[2:])


def exif(turn: int) -> bytes:
    """Orientation beside a ResolutionUnit written as RATIONAL, as Photoshop CS2 did: Pillow cannot write it back."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, turn, 0) + struct.pack("<HHII", 296, 5, 1, 8 + 2 + 24 + 4)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<III", 0, 2, 1)


def plain_exif(turn: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = turn
    return block.tobytes()


def xmp(turn: int, element: bool = False) -> bytes:
    tiff = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    inner = f"<rdf:Description {tiff}><tiff:Orientation>{turn}</tiff:Orientation></rdf:Description>"
    if not element:
        inner = f'<rdf:Description {tiff} tiff:Orientation="{turn}"/>'
    rdf = f'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">{inner}</rdf:RDF>'
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>'.encode()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks: bytes, last: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or after them."""
    plain = encoded(stored(), "PNG")
    place = plain.index(b"IEND") - 4 if last else plain.index(b"IDAT") - 4
    return plain[:place] + b"".join(chunks) + plain[place:]


def raw_profile(name: str, block: bytes, prefix: bytes = b"") -> bytes:
    """As ImageMagick writes it."""
    text = f"\n{name}\n{len(block):8d}\n{block.hex()}\n".encode()
    return chunk(b"zTXt", f"Raw profile type {name}".encode() + b"\0\0" + zlib.compress(prefix + text))


def itxt(packet: bytes, compressed: bool = False) -> bytes:
    text = zlib.compress(packet) if compressed else packet
    return chunk(b"iTXt", b"XML:com.adobe.xmp\0" + (b"\1" if compressed else b"\0") + b"\0\0\0" + text)


def deep(tiffinfo: dict) -> bytes:
    grey = np.asarray(stored(), np.uint16)[:, :, 0] * 200 + np.asarray(stored(), np.uint16)[:, :, 2] * 50
    return encoded(Image.fromarray(grey), "TIFF", tiffinfo=tiffinfo)


FILES = {
    "jpeg exif": lambda n: encoded(stored(), exif=exif(n)),
    "jpeg xmp": lambda n: encoded(stored(), xmp=xmp(n)),
    "jpeg xmp element": lambda n: encoded(stored(), xmp=xmp(n, element=True)),
    "jpeg exif over xmp": lambda n: encoded(stored(), exif=exif(n), xmp=xmp(n % 8 + 1)),
    "jpeg invalid exif, xmp": lambda n: encoded(stored(), exif=exif(0), xmp=xmp(n)),
    "cmyk jpeg exif": lambda n: encoded(stored().convert("CMYK"), exif=exif(n)),
    "cmyk jpeg xmp": lambda n: encoded(stored().convert("CMYK"), xmp=xmp(n)),
    "png exif": lambda n: png(chunk(b"eXIf", exif(n)[6:])),
    "png exif, marked, last": lambda n: png(chunk(b"eXIf", exif(n)), last=True),
    "png raw exif": lambda n: png(raw_profile("exif", exif(n))),
    "png raw APP1": lambda n: png(raw_profile("APP1", exif(n))),
    "png raw APP1 xmp": lambda n: png(raw_profile("APP1", rule.XMP + xmp(n))),
    "png raw xmp": lambda n: png(raw_profile("xmp", xmp(n))),
    "png xmp": lambda n: png(itxt(xmp(n))),
    "png xmp, compressed, last": lambda n: png(itxt(xmp(n), compressed=True), last=True),
    "png exif over xmp": lambda n: png(itxt(xmp(n % 8 + 1)), chunk(b"eXIf", exif(n)[6:])),
    "webp exif": lambda n: encoded(stored(), "WEBP", lossless=True, exif=exif(n)),
    "webp xmp": lambda n: encoded(stored(), "WEBP", lossless=True, xmp=xmp(n)),
    "webp exif over xmp": lambda n: encoded(stored(), "WEBP", lossless=True, exif=exif(n), xmp=xmp(n % 8 + 1)),
    "tiff": lambda n: encoded(stored(), "TIFF", tiffinfo={274: n}),
    "tiff lzw": lambda n: encoded(stored(), "TIFF", compression="tiff_lzw", tiffinfo={274: n}),
    "tiff xmp": lambda n: encoded(stored(), "TIFF", tiffinfo={700: xmp(n)}),
    "tiff over xmp": lambda n: encoded(stored(), "TIFF", tiffinfo={274: n, 700: xmp(n % 8 + 1)}),
    "bigtiff": lambda n: encoded(stored(), "TIFF", big_tiff=True, tiffinfo={274: n}),
    "bigtiff xmp": lambda n: encoded(stored(), "TIFF", big_tiff=True, tiffinfo={700: xmp(n)}),
    "avif": lambda n: encoded(stored(), "AVIF", quality=90, exif=plain_exif(n)),
}
CASES = [pytest.param(name, marks=needs_avif) if "avif" in name else name for name in FILES]


@pytest.mark.parametrize("turn", SHOWN)
@pytest.mark.parametrize("name", CASES)
def test_training_and_build_and_headers_turn_an_image_alike(name: str, turn: int) -> None:
    data = FILES[name](turn)
    size = (WIDTH, HEIGHT) if turn < 5 else (HEIGHT, WIDTH)
    pixels = decode_image(data).permute(1, 2, 0).numpy()
    assert (seen(pixels), pixels.shape[1::-1]) == (SHOWN[turn], size)
    header = read_header(data, str(sniff(data)))
    assert (header.width, header.height) == size

    anew = encode(data, None, "png", 95)
    assert anew is not None
    assert (anew.before, anew.after) == (size, size)
    written = decode_image(anew.data).permute(1, 2, 0).numpy()
    tolerance = 3 if name.startswith("jpeg") else 0  # libjpeg-turbo's fast path and Pillow's decoder differ in rounding
    assert np.abs(written.astype(int) - pixels).max() <= tolerance
    small = encode(data, HEIGHT // 2, None, 95)
    assert small is not None
    assert (small.before, small.after) == (size, (size[0] // 2, size[1] // 2))
    assert seen(decode_image(small.data).permute(1, 2, 0).numpy()) == SHOWN[turn]


@pytest.mark.parametrize("turn", SHOWN)
def test_a_tiff_of_16_bits_is_turned_too(turn: int) -> None:
    plain = decode_image(deep({}))[0].numpy()
    by_letter = dict(zip("ABCD", [plain[4, 4], plain[4, -4], plain[-4, 4], plain[-4, -4]]))
    assert len(set(by_letter.values())) == 4
    for tags in ({274: turn}, {700: xmp(turn)}):
        turned = decode_image(deep(tags))[0].numpy()
        assert turned.shape == ((HEIGHT, WIDTH) if turn < 5 else (WIDTH, HEIGHT))
        quarters = [turned[y, x] for y in (4, -4) for x in (4, -4)]
        assert quarters == [by_letter[letter] for letter in SHOWN[turn].replace(" ", "")]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_tags_of_tiff_are_read_in_both_byte_orders(order: str, big: bool) -> None:
    word = "Q" if big else "I"
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8)))
    entry = struct.pack(order + "HH" + word, 0x0112, 3, 1) + struct.pack(order + "H", 7) + bytes(6 if big else 2)
    assert rule.exif_orientation(head + struct.pack(order + ("Q" if big else "H"), 1) + entry) == 7


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_xmp_is_read_in_every_encoding(encoding: str) -> None:
    assert rule.xmp_orientation(xmp(5).decode().encode(encoding)) == 5
    assert rule.xmp_orientation(xmp(5).decode().replace('="5"', " = '5'").encode(encoding)) == 5
    assert rule.xmp_orientation(xmp(9).decode().encode(encoding)) is None


def test_an_orientation_behind_the_frame_header_counts() -> None:
    plain = encoded(stored())
    scan = plain.index(b"\xff\xda")
    block = exif(6)
    data = plain[:scan] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[scan:]
    assert tuple(decode_image(data).shape[1:]) == (WIDTH, HEIGHT)


@needs_avif
def test_an_avif_with_a_damaged_exif_block_is_read() -> None:
    block = Image.Exif()
    block[0x010F] = "a camera"
    sound = encoded(stored(), "AVIF", quality=90, exif=block.tobytes())
    place = sound.index(block.tobytes()[6:])
    data = sound[: place + 8] + b"\xff" * 12 + sound[place + 20 :]
    assert seen(decode_image(data).permute(1, 2, 0).numpy()) == SHOWN[1]


def test_decompressed_text_of_a_png_is_bounded() -> None:
    bombs = [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"0" * (64 << 20), 9))] * 100
    started = time.process_time()
    assert rule.stored_orientation(png(*bombs), "png") == 1
    assert time.process_time() - started < 1


def test_fill_bytes_without_end_cost_no_time() -> None:
    started = time.process_time()
    assert rule.jpeg_header(b"\xff\xd8" + b"\xff" * (64 << 20)) is None
    assert time.process_time() - started < 1


SEEDS = [FILES[name](6) for name in FILES if "avif" not in name]


@given(st.sampled_from(["jpeg", "png", "webp", "tiff", "gif", "bmp", "ppm"]), st.binary(max_size=400))
def test_any_bytes_have_an_orientation(kind: str, data: bytes) -> None:
    heads = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "webp": b"RIFF\0\0\0\0WEBP", "tiff": b"II+\0"}
    assert 1 <= rule.stored_orientation(heads.get(kind, b"") + data, kind) <= 8
    assert rule.exif_orientation(data) in (None, *range(1, 9))
    assert rule.xmp_orientation(data) in (None, *range(1, 9))


@given(st.sampled_from(SEEDS), st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_changed_bytes_leave_an_orientation(data: bytes, place: int, change: bytes) -> None:
    place %= len(data)
    kind = str(sniff(data))
    assert 1 <= rule.stored_orientation(data[:place] + change + data[place + len(change) :], kind) <= 8
