"""Images of more than 8 bits a sample, against values computed by hand; transparency beside them."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.build.images import encode
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.raster import flatten
from mmpretrain.data.schema import BadSample
from tests.data.generated import encoded

WIDTH, HEIGHT = 33, 16
BACKGROUND = (10, 200, 30)
LIMITS = ImageLimits(background=BACKGROUND)
GREY_INVERTED, GREY, RGB, CMYK = 0, 1, 2, 5


def scaled(value: int, highest: int) -> int:
    """To 0..255, rounded to the nearest; no value of an odd highest lies between two."""
    return int(Fraction(int(value) * 255, highest) + Fraction(1, 2))


def over(colour: int, alpha: int, under: int) -> int:
    return int(Fraction(colour * alpha + under * (255 - alpha), 255) + Fraction(1, 2))


def values(samples: int, bits: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[height, width, samples]: 0 and the highest value among them, and values that share their high bytes."""
    drawn = np.random.default_rng(bits).integers(0, 1 << bits, (height, width, samples), dtype=np.uint64)
    drawn[0, 0], drawn[0, 1] = 0, (1 << bits) - 1
    drawn[1, 0], drawn[1, 1] = (1 << bits) // 3, (1 << bits) // 3 + 1
    return drawn


def packed(rows: np.ndarray, bits: int, order: str) -> bytes:
    """[rows, values] -> bytes, each row from a new one. Bits of other widths than whole bytes come highest first."""
    if bits % 8 == 0:
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    out = b""
    for row in rows.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        out += int(text, 2).to_bytes(len(text) // 8, "big")
    return out


def tiff(
    pixels: np.ndarray,
    bits: int,
    photometric: int,
    order: str = "<",
    planar: bool = False,
    deflate: bool = False,
    tile: tuple[int, int] | None = None,
    rows: int = 5,
    big: bool = False,
    predictor: bool = False,
    **tags: tuple[int, ...],
) -> bytes:
    """A TIFF of [H,W,samples] unsigned values, written by hand."""
    height, width, samples = pixels.shape
    pieces = []
    for plane in [pixels[:, :, i : i + 1] for i in range(samples)] if planar else [pixels]:
        if tile:
            padded = np.pad(plane, ((0, -height % tile[1]), (0, -width % tile[0]), (0, 0)))
            blocks = [padded[y : y + tile[1], x : x + tile[0]] for y in range(0, height, tile[1]) for x in range(0, width, tile[0])]
        else:
            blocks = [plane[y : y + rows] for y in range(0, height, rows)]
        for block in blocks:
            if predictor:
                block = np.concatenate([block[:, :1], (block[:, 1:] - block[:, :-1]) % (1 << bits)], axis=1)
            piece = packed(block.reshape(len(block), -1), bits, order)
            pieces.append(zlib.compress(piece) if deflate else piece)
    offsets, place = [], 16 if big else 8
    for piece in pieces:
        offsets.append(place)
        place += len(piece) + len(piece) % 2
    fields = {
        256: (width,),
        257: (height,),
        258: (bits,) * samples,
        259: (8 if deflate else 1,),
        262: (photometric,),
        277: (samples,),
        284: (2 if planar else 1,),
        317: (2 if predictor else 1,),
    }
    if tile:
        fields |= {322: tile[:1], 323: tile[1:], 324: tuple(offsets), 325: tuple(len(p) for p in pieces)}
    else:
        fields |= {273: tuple(offsets), 278: (rows,), 279: tuple(len(p) for p in pieces)}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    word, size = ("Q", 8) if big else ("I", 4)
    entries, more = b"", b""
    after = place + (8 + 20 * len(fields) + 8 if big else 2 + 12 * len(fields) + 4)
    for number, field in sorted(fields.items()):
        code, kind = ("I", 4) if max(field) > 65535 or number in (273, 324) else ("H", 3)
        data = struct.pack(f"{order}{len(field)}{code}", *field)
        if len(data) > size:
            data, more = struct.pack(order + word, after + len(more)), more + data + bytes(len(data) % 2)
        entries += struct.pack(order + "HH" + word, number, kind, len(field)) + data.ljust(size, b"\0")
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, place) if big else struct.pack(order + "HI", 42, place)
    body = b"".join(piece + bytes(len(piece) % 2) for piece in pieces)
    return mark + head + body + struct.pack(order + ("Q" if big else "H"), len(fields)) + entries + bytes(size) + more


def expected(pixels: np.ndarray, bits: int, photometric: int) -> np.ndarray:
    """uint8 [3,H,W] of L or RGB values, one by one."""
    highest = (1 << bits) - 1
    eight = np.array([scaled(v, highest) for v in pixels.ravel()], np.uint8).reshape(pixels.shape)
    if photometric == GREY_INVERTED:
        eight = 255 - eight
    return np.broadcast_to(eight.transpose(2, 0, 1), (3, *eight.shape[:2]))


STORAGE = {
    "strips": {},
    "big-endian": {"order": ">"},
    "one strip": {"rows": HEIGHT},
    "tiles": {"tile": (16, 16)},
    "tiles, big-endian": {"tile": (16, 16), "order": ">"},
    "deflate": {"deflate": True},
    "deflate, big-endian": {"deflate": True, "order": ">"},
    "deflate, tiles": {"deflate": True, "tile": (16, 16)},
    "BigTIFF": {"big": True},
    "BigTIFF, big-endian": {"big": True, "order": ">"},
}
PLANAR = {f"{name}, planar": {**options, "planar": True} for name, options in STORAGE.items()}


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("photometric", [GREY, GREY_INVERTED])
@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15, 16])
def test_grey_tiff_has_the_values_computed_by_hand(bits: int, photometric: int, storage: str) -> None:
    pixels = values(1, bits)
    decoded = decode_image(tiff(pixels, bits, photometric, **STORAGE[storage])).numpy()
    assert (decoded == expected(pixels, bits, photometric)).all()


@pytest.mark.parametrize("storage", STORAGE | PLANAR)
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_rgb_tiff_has_the_values_computed_by_hand(bits: int, storage: str) -> None:
    pixels = values(3, bits)
    decoded = decode_image(tiff(pixels, bits, RGB, **(STORAGE | PLANAR)[storage])).numpy()
    assert (decoded == expected(pixels, bits, RGB)).all()


@pytest.mark.parametrize("storage", ["deflate", "deflate, big-endian", "deflate, tiles"])
@pytest.mark.parametrize(("samples", "photometric"), [(1, GREY), (3, RGB)])
@pytest.mark.parametrize("planar", [False, True])
def test_a_predictor_is_undone(samples: int, photometric: int, planar: bool, storage: str) -> None:
    pixels = values(samples, 16)
    data = tiff(pixels, 16, photometric, predictor=True, planar=planar and samples > 1, **STORAGE[storage])
    assert (decode_image(data).numpy() == expected(pixels, 16, photometric)).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"])
@pytest.mark.parametrize("predictor", [1, 2])
def test_what_libtiff_writes_is_read(compression: str, predictor: int) -> None:
    pixels = values(1, 16)
    tags = {} if compression == "packbits" else {317: predictor}
    data = encoded(Image.fromarray(pixels[:, :, 0].astype(np.uint16)), "TIFF", compression=compression, tiffinfo=tags)
    assert (decode_image(data).numpy() == expected(pixels, 16, GREY)).all()


@pytest.mark.parametrize("predictor", [1, 3])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_floats_are_read(compression: str, predictor: int) -> None:
    pixels = np.linspace(0, 1, WIDTH * HEIGHT, dtype=np.float32).reshape(HEIGHT, WIDTH)
    tags = {} if compression == "raw" else {317: predictor}
    data = encoded(Image.fromarray(pixels), "TIFF", compression=compression, tiffinfo=tags)
    assert (decode_image(data)[0].numpy() == np.rint(pixels.astype(np.float64) * 255)).all()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "u4"])
def test_numbers_without_a_range_are_read_in_both_byte_orders(kind: str, storage: str) -> None:
    bits, signed = 8 * int(kind[1]), kind[0] == "i"
    low, high = (-100, 100) if signed else (0, 1) if kind[0] == "f" else (0, 3_000_000_000)
    wanted = np.linspace(low, high, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH, 1).astype(f"<{kind}")
    raw = wanted.view(f"<u{bits // 8}").astype(np.uint64)
    data = tiff(raw, bits, GREY, t339=({"u": 1, "i": 2, "f": 3}[kind[0]],), **STORAGE[storage])
    decoded = decode_image(data)[0].numpy().astype(int)
    exact = (wanted[:, :, 0].astype(np.float64) - low) / (high - low) * 255
    assert np.abs(decoded - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("storage", STORAGE | PLANAR)
@pytest.mark.parametrize(("samples", "photometric"), [(2, GREY), (4, RGB)])
@pytest.mark.parametrize("bits", [12, 16])
def test_alpha_of_more_than_8_bits_is_composited(bits: int, samples: int, photometric: int, storage: str) -> None:
    pixels = values(samples, bits)
    decoded = decode_image(tiff(pixels, bits, photometric, t338=(2,), **(STORAGE | PLANAR)[storage]), LIMITS).numpy()
    highest = (1 << bits) - 1
    for y, x in np.ndindex(HEIGHT, WIDTH):
        *colour, alpha = [scaled(v, highest) for v in pixels[y, x]]
        wanted = [over(c, alpha, under) for c, under in zip(colour * (3 // len(colour)), BACKGROUND)]
        assert decoded[:, y, x].tolist() == wanted


def test_colours_multiplied_by_alpha_are_divided() -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 32768)
    colour = np.stack([np.full((HEIGHT, WIDTH), v) for v in (0, 16384, 32768)], axis=2)
    data = tiff(np.concatenate([colour, alpha], axis=2), 16, RGB, t338=(1,))
    wanted = [over(c, 128, under) for c, under in zip((0, 128, 255), BACKGROUND)]
    assert decode_image(data, LIMITS)[:, 3, 3].tolist() == wanted


def test_extra_samples_that_are_not_alpha_are_ignored() -> None:
    pixels = values(4, 16)
    assert (decode_image(tiff(pixels, 16, RGB, t338=(0,))).numpy() == expected(pixels[:, :, :3], 16, RGB)).all()


@pytest.mark.parametrize("planar", [False, True])
def test_cmyk_of_16_bits_is_read_as_of_8(planar: bool) -> None:
    pixels = values(4, 16)
    eight = np.array([scaled(v, 65535) for v in pixels.ravel()], np.uint8).reshape(pixels.shape)
    wanted = np.asarray(Image.fromarray(eight, "CMYK").convert("RGB")).transpose(2, 0, 1)
    assert (decode_image(tiff(pixels, 16, CMYK, planar=planar)).numpy() == wanted).all()


@pytest.mark.parametrize(
    ("bits", "samples", "photometric", "options"),
    [
        (24, 1, GREY, {}),  # bits that no reader of this project knows
        (16, 1, 3, {}),  # a palette of 65,536 colours
        (16, 3, 6, {}),  # YCbCr
        (16, 3, 8, {}),  # Lab
        (16, 3, GREY, {}),  # three samples of one colour
        (16, 2, GREY, {"t258": (16, 12)}),
        (16, 1, GREY, {"t259": (7,)}),  # JPEG
        (16, 1, GREY, {"t339": (5,)}),  # complex
        (8, 3, 6, {}),  # YCbCr with subsampled colours, not compressed
    ],
)
def test_what_cannot_be_decoded_rightly_is_refused_in_words(bits: int, samples: int, photometric: int, options: dict) -> None:
    whole = max(8, -(-bits // 8) * 8)
    pixels = values(samples, min(bits, 16))
    data = tiff(pixels, 16 if whole > 16 else whole, photometric, **({"t258": (bits,) * samples} | options))
    with pytest.raises(BadSample) as caught:
        decode_image(data)
    assert caught.value.reason == "undecodable_image"
    assert f"{samples} samples of" in caught.value.detail
    assert "0x" not in caught.value.detail


def test_a_tiff_with_a_strip_missing_is_refused() -> None:
    pixels = values(1, 16)
    data = tiff(pixels, 16, GREY)
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(tiff(pixels, 16, GREY, t273=(8,), t279=(WIDTH * 10,)))
    with pytest.raises(BadSample, match="undecodable_image"):
        decode_image(data[: 8 + WIDTH * 2])


def test_a_palette_stated_in_8_bits_has_its_colours() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 256))
    indices = values(1, 8)
    for factor in (1, 257):
        data = tiff(indices, 8, 3, t320=tuple((colours * factor).ravel().tolist()))
        assert (decode_image(data).numpy() == colours[:, indices[:, :, 0].astype(int)]).all()


# PNG


def png(pixels: np.ndarray, bits: int, colour_type: int, transparent: tuple[int, ...] = (), interlaced: bool = False) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, _ = pixels.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b""
    for y, x, down, right in passes:
        for row in pixels[y::down, x::right]:
            raw += b"\0" + packed(row.reshape(1, -1), bits, ">") if row.size else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, interlaced))
    clear = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + clear + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("with_colour", [False, True])
def test_grey_png_has_the_values_computed_by_hand(bits: int, with_colour: bool, interlaced: bool) -> None:
    pixels = values(1, bits)
    key = int(pixels[1, 0, 0])  # its neighbour differs in the lowest bit alone
    decoded = decode_image(png(pixels, bits, 0, (key,) if with_colour else (), interlaced), LIMITS).numpy()
    wanted = expected(pixels, bits, GREY).copy()
    if with_colour:
        wanted[:, pixels[:, :, 0] == key] = np.array(BACKGROUND)[:, None]
    assert (decoded == wanted).all()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("with_colour", [False, True])
def test_rgb_png_has_the_values_computed_by_hand(bits: int, with_colour: bool, interlaced: bool) -> None:
    pixels = values(3, bits)
    key = tuple(int(v) for v in pixels[1, 0])
    decoded = decode_image(png(pixels, bits, 2, key if with_colour else (), interlaced), LIMITS).numpy()
    wanted = expected(pixels, bits, RGB).copy()
    if with_colour:
        clear = (pixels == np.array(key)).all(axis=2)
        assert 0 < clear.sum() < 10
        wanted[:, clear] = np.array(BACKGROUND)[:, None]
    assert (decoded == wanted).all()


@pytest.mark.parametrize(("colour_type", "samples"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_png_with_alpha_has_the_values_computed_by_hand(bits: int, colour_type: int, samples: int, interlaced: bool) -> None:
    pixels = values(samples, bits)
    decoded = decode_image(png(pixels, bits, colour_type, interlaced=interlaced), LIMITS).numpy()
    for y, x in np.ndindex(HEIGHT, WIDTH):
        *colour, alpha = [scaled(v, (1 << bits) - 1) for v in pixels[y, x]]
        assert decoded[:, y, x].tolist() == [over(c, alpha, under) for c, under in zip(colour * (3 // len(colour)), BACKGROUND)]


# PNM


@pytest.mark.parametrize("highest", [1, 100, 254, 255, 256, 1023, 4095, 65534, 65535])
@pytest.mark.parametrize("form", [2, 3, 5, 6])
def test_pnm_of_any_maximum_value_has_the_values_computed_by_hand(form: int, highest: int) -> None:
    samples = 3 if form in (3, 6) else 1
    pixels = np.random.default_rng(highest).integers(0, highest + 1, (HEIGHT, WIDTH, samples))
    head = b"P%d # a comment\n%d\t%d # another\n%d\n" % (form, WIDTH, HEIGHT, highest)
    if form > 3:
        body = pixels.astype(">u2" if highest > 255 else "u1").tobytes()
    else:
        body = b"# between\n" + b"\r\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in pixels)
    eight = np.array([scaled(v, highest) for v in pixels.ravel()], np.uint8).reshape(pixels.shape)
    decoded = decode_image(head + body).numpy()
    if highest % 2 == 0:  # 127.5 and the like
        assert np.abs(decoded.astype(int) - eight.transpose(2, 0, 1)).max() <= 1
    else:
        assert (decoded == eight.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("form", [5, 6])
def test_dark_pnm_of_16_bits_stays_dark(form: int) -> None:
    body = struct.pack(">H", 200) * (WIDTH * HEIGHT * (3 if form == 6 else 1))
    assert decode_image(b"P%d %d %d 65535\n" % (form, WIDTH, HEIGHT) + body).max() == 1


@pytest.mark.parametrize("spaced", [False, True])
def test_plain_pbm_is_black_where_it_is_one(spaced: bool) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (HEIGHT, WIDTH))
    body = (b" " if spaced else b"").join(b"%d" % bit for bit in bits.ravel())
    assert (decode_image(b"P1\n%d %d\n" % (WIDTH, HEIGHT) + body)[0].numpy() == 255 * (1 - bits)).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"P5 20 20 65536\n" + bytes(800), "maximum value of 65536"),
        (b"P5 20 20 0\n" + bytes(800), "maximum value of 0"),
        (b"P5 20 20 100\n" + bytes(399), "399 of 400 bytes"),
        (b"P5 20 20\n", "no maximum value"),
        (b"P6 99999999999 20 255\n", "no width"),
        (b"P5 20 20 100x" + bytes(800), "white space"),
        (b"P2 20 20 100\n" + b"7 " * 399, "399 of 400 values"),
        (b"P2 20 20 100\n" + b"101 " * 400, "a value of 101"),
        (b"P2 20 20 100\n" + b"-1 " * 400, "b'-' among"),
        (b"P2 20 20 100\n" + b"1" * 4000, "more than 10 digits"),
        (b"P2 20 20 100\n", "0 of 400"),
        (b"P1 20 20\n" + b"2" * 400, "b'2' among"),
    ],
)
def test_an_invalid_pnm_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(BadSample, match=words):
        decode_image(data)


# Transparency


def test_compositing_rounds_to_the_nearest_for_every_colour_and_alpha() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    for under in (0, 1, 10, 127, 128, 200, 254, 255):
        image = Image.fromarray(np.stack([colour, colour, colour, alpha], axis=2).astype(np.uint8))
        wanted = (colour * alpha + under * (255 - alpha) + 127) // 255
        assert (np.asarray(flatten(image, (under, under, under))) == wanted[:, :, None]).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_build_lays_transparency_over_white_as_training_does(kind: str) -> None:
    rgba = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    data = encoded(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    flat = encode(data, None, "jpeg", 100)
    kept = encode(data, None, "png", 95)
    assert flat is not None
    assert kept is not None
    assert (decode_image(kept.data) == decode_image(data)).all()
    wanted = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())
    out = io.BytesIO()
    wanted.save(out, "JPEG", quality=100, subsampling=0)
    assert flat.data == out.getvalue()


DEEP = [
    tiff(values(3, 16), 16, RGB, planar=True),
    tiff(values(1, 12), 12, GREY, tile=(16, 16), deflate=True),
    tiff(values(4, 16), 16, RGB, big=True, t338=(1,)),
    tiff(values(1, 32), 32, GREY, order=">", t339=(3,), deflate=True),
    png(values(3, 16), 16, 2, (1, 2, 3)),
    png(values(2, 16), 16, 4, interlaced=True),
    b"P6 33 16 1000\n" + bytes(33 * 16 * 6),
    b"P3 33 16 1000\n" + b"77 " * (33 * 16 * 3),
]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(DEEP), st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=6)), min_size=1, max_size=4), st.data()
)
def test_changed_bytes_give_an_image_or_a_bad_sample(data: bytes, changes: list[tuple[int, bytes]], draw: st.DataObject) -> None:
    for place, change in changes:
        place = place % len(data) if draw.draw(st.booleans()) else max(0, len(data) - 1 - place % 220)  # directories lie at the end
        data = data[:place] + change + data[place + len(change) :]
    reasons = {"undecodable_image", "unknown_format", "too_many_pixels", "too_small", "too_elongated", "too_many_scans"}
    try:
        image = decode_image(data, ImageLimits(max_pixels=1_000_000, min_side=1))
        reason = "undecodable_image" if image.shape[0] == 3 else "an image of another number of channels"
    except BadSample as error:
        reason = error.reason
    assert reason in reasons
