"""Decoded pixels a second of CPU time, for every format: ours against Pillow's `open` and `convert` (`paste` where there is alpha).

    python scripts/benchmarks/bench_decode.py [--quick] [--rounds 3] [--out FILE]

One picture of 400x400 in each format, with its common codings. Where Pillow decodes to the same, the pixels must agree. A format below a
megapixel a second would hold up a loader: none may be. BMP's run lengths and plain text are the worst cases of their formats.
"""

import io
import struct
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pictures
import torch
from common import Row, alternate, arguments, formatted, ratio, record
from PIL import Image, features

from mmpretrain.data.decode import decode_image

SLOWEST = 1.0  # megapixels/s
SAME = 1  # grey levels that decoders of one format may differ by
DIFFER = 256  # Pillow decodes to other values, or not at all


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def run_lengths(grey: np.ndarray) -> bytes:
    """A BMP of runs of one pixel each: the slowest that its encoding can be."""
    height, width = grey.shape
    ones = np.ones_like(grey)
    body = b"".join(np.stack([ones[y], grey[y]], 1).tobytes() + b"\0\0" for y in reversed(range(height))) + b"\0\1"
    palette = b"".join(bytes((i, i, i, 0)) for i in range(256))
    offset = 54 + len(palette)
    head = struct.pack("<IHHI", offset + len(body), 0, 0, offset)
    return b"BM" + head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0) + palette + body


def files(side: int) -> dict[str, tuple[bytes, int]]:
    """Format -> (file, grey levels that Pillow's pixels may differ by)."""
    image = pictures.picture(side, side, 0)
    grey, colour = image.convert("L"), np.asarray(image)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    clear = image.copy()
    clear.putalpha(grey)
    jpeg = partial(encoded, kind="JPEG", quality=90)
    made = {
        "JPEG": (jpeg(image), 2),
        "JPEG, progressive": (jpeg(image, progressive=True), 2),
        "JPEG, CMYK": (jpeg(image.convert("CMYK")), SAME),
        "PNG": (encoded(image, "PNG"), SAME),
        "PNG, alpha": (encoded(clear, "PNG"), SAME),
        "PNG, palette": (encoded(image.convert("P"), "PNG"), SAME),
        "PNG, grey of 16 bits": (encoded(deep, "PNG"), DIFFER),
        "WebP": (encoded(image, "WEBP", quality=90), SAME),
        "WebP, lossless": (encoded(image, "WEBP", lossless=True, method=1), SAME),
        "WebP, alpha": (encoded(clear, "WEBP", quality=90), SAME),
        "GIF": (encoded(image, "GIF"), SAME),
        "BMP": (encoded(image, "BMP"), SAME),
        "BMP, runs of one pixel": (run_lengths(np.asarray(grey)), SAME),
        "TIFF": (encoded(image, "TIFF"), SAME),
        "TIFF, LZW": (encoded(image, "TIFF", compression="tiff_lzw"), SAME),
        "TIFF, deflate": (encoded(image, "TIFF", compression="tiff_adobe_deflate"), SAME),
        "TIFF, grey of 16 bits": (encoded(deep, "TIFF"), DIFFER),
        "TIFF, grey of 16 bits, LZW": (encoded(deep, "TIFF", compression="tiff_lzw"), DIFFER),
        "TIFF, floats": (encoded(grey.convert("F"), "TIFF"), SAME),
        "PPM": (encoded(image, "PPM"), SAME),
        "PPM, maximum 100": (b"P6 %d %d 100\n" % (side, side) + (colour // 3).tobytes(), SAME),
        "PGM, maximum 65535": (encoded(deep, "PPM"), DIFFER),
        "PPM, plain": (b"P3 %d %d 255\n" % (side, side) + b" ".join(b"%d" % value for value in colour.ravel()), SAME),
    }
    if features.check("avif"):
        made["AVIF"] = encoded(image, "AVIF", speed=9), SAME
    return made


def pillow(data: bytes) -> np.ndarray:
    """uint8 [H,W,3]."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "RGBA":
        under = Image.new("RGB", image.size, (255, 255, 255))
        under.paste(image, mask=image.getchannel("A"))
        return np.array(under)
    return np.array(image.convert("RGB"))


def speed(decoder: Callable[[bytes], object], data: bytes, count: int, side: int) -> float:
    """Megapixels a second of CPU time, of all threads: AVIF's decoder starts some."""
    started = time.process_time()
    for _ in range(count):
        decoder(data)
    return count * side * side / 1e6 / (time.process_time() - started)


def main() -> None:
    parsed = arguments(__doc__, rounds=3)
    torch.set_num_threads(1)
    side = 100 if parsed.quick else 400
    for name, (data, tolerance) in files(side).items():
        pixels, theirs = decode_image(data).permute(1, 2, 0).numpy(), pillow(data)
        if tolerance < DIFFER and np.abs(pixels.astype(int) - theirs).max() > tolerance:
            raise RuntimeError(f"{name}: the pixels are not Pillow's")
        count = 1 if parsed.quick else max(1, min(20, round(speed(decode_image, data, 1, side) / 20)))
        runs = {"ours": partial(speed, decode_image, data, count, side), "Pillow": partial(speed, pillow, data, 1, side)}
        speeds = alternate(runs, parsed.rounds)
        times = ratio(speeds["ours"], speeds["Pillow"])
        met = sorted(speeds["ours"])[len(speeds["ours"]) // 2] >= SLOWEST
        rates = formatted(speeds["ours"], speeds["Pillow"], "megapixels/s")
        record(parsed, Row(f"decode, {name}", *rates, times, f"at least {SLOWEST:g} megapixel/s", met, {"bytes": len(data)}))


if __name__ == "__main__":
    main()
