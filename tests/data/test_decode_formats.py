"""Formats that Pillow decodes on some machines alone, what libraries print, and hostile bytes of every format."""

import io
import logging
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from data_prep.build.images import encode
from mmpretrain.data import codec_messages, raster
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.formats import sniff
from mmpretrain.data.schema import IMAGE_EXTENSIONS, BadSample
from tests.data.generated import encoded, picture
from tests.data.test_decode_deep import GREY, RGB, tiff, values

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot decode AVIF")


@needs_avif
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_avif_is_decoded(mode: str) -> None:
    image = picture(size=(64, 48)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.new("L", image.size, 0))
    decoded = decode_image(encoded(image, "AVIF", quality=100), ImageLimits(background=(10, 200, 30)))
    if mode == "RGBA":
        assert decoded.flatten(1).unique(dim=1).T.tolist() == [[10, 200, 30]]
    else:
        wanted = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int)
        assert np.abs(decoded.numpy() - wanted).mean() < 4


@needs_avif
def test_an_avif_sequence_gives_its_first_image() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in [(250, 0, 0), (0, 250, 0)]]
    data = encoded(frames[0], "AVIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[:, 5, 5].tolist() == pytest.approx([250, 0, 0], abs=8)


def test_avif_without_a_decoder_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "_has_avif", lambda: False)
    with pytest.raises(BadSample, match=r"unknown_format: AVIF, .*install pillow>=11\.3"):
        decode_image(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "avif"),
        (b"\0\0\0\x1cftypavis\0\0\0\0avifmif1miaf", "avif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "avif"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", None),
        (b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf", None),
        (b"\0\0\0\x1cftypisom\0\0\0\0isomavc1mp41", None),
        (b"II+\0\x08\0\0\0", "tiff"),
        (b"MM\0+\0\x08\0\0", "tiff"),
    ],
)
def test_formats_are_told_by_their_first_bytes(data: bytes, kind: str | None) -> None:
    assert sniff(data) == kind


def test_every_format_that_is_sniffed_has_an_extension() -> None:
    assert {"jpg" if kind == "jpeg" else kind for kind in raster.PILLOW_FORMATS} <= set(IMAGE_EXTENSIONS)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
def test_bigtiff_of_8_bits_is_read_in_both_byte_orders(order: str, deflate: bool) -> None:
    pixels = values(3, 8)
    decoded = decode_image(tiff(pixels, 8, RGB, order=order, deflate=deflate, big=True)).numpy()
    assert (decoded == pixels.transpose(2, 0, 1)).all()


def test_bigtiff_with_jpeg_inside_is_read_as_tiff_is() -> None:
    image = picture(size=(64, 48))
    plain, big = (encoded(image, "TIFF", compression="jpeg", big_tiff=big) for big in (False, True))
    assert sniff(big) == "tiff"
    assert (decode_image(plain) == decode_image(big)).all()


def test_a_progressive_jpeg_of_endless_scans_is_refused_by_build_too() -> None:
    for image in (picture(size=(64, 64)), picture(size=(64, 64)).convert("CMYK")):
        plain = encoded(image, progressive=True)
        last = plain.rindex(b"\xff\xda")
        data = plain[:-2] + plain[last:-2] * 200 + plain[-2:]
        for decoder in (decode_image, lambda data: encode(data, None, "png", 95)):
            with pytest.raises(BadSample, match="too_many_scans"):
                decoder(data)


# What libraries print


def with_a_warning() -> bytes:
    """A sound TIFF of which Pillow warns: two units of its resolution."""
    return tiff(values(3, 8), 8, RGB, t296=(2, 2))


@pytest.fixture
def fresh_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_messages, "_kinds", set())
    monkeypatch.setattr(warnings, "showwarning", codec_messages._collect)  # pytest puts its own there


def test_a_kind_of_warning_is_logged_once(fresh_kinds: None, caplog: pytest.LogCaptureFixture) -> None:
    data = with_a_warning()
    with caplog.at_level(logging.WARNING):
        decoded = [decode_image(data) for _ in range(20)]
    assert (decoded[-1].numpy() == values(3, 8).transpose(2, 0, 1)).all()
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1
    assert "tag 296 had too many entries" in texts[0]


def test_kinds_without_end_are_cut_off_in_words(fresh_kinds: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for i in range(200):
            codec_messages._log_once("Pillow: odd " + "abcdefghij"[i % 10] + "klmnopqrst"[i // 10 % 10] + "!" * (i // 100))
    assert len(caplog.records) == codec_messages.MAX_KINDS + 1
    assert "further kinds are not logged" in caplog.records[-1].getMessage()


def test_warnings_of_others_are_shown_as_ever() -> None:
    script = (
        "import warnings\nfrom mmpretrain.data import codec_messages\n"
        "with codec_messages.collected() as inside:\n    warnings.warn('within')\nassert inside == ['Pillow: within'], inside\n"
        "warnings.warn('outside')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "UserWarning: outside" in done.stderr


def test_threads_collect_their_own_warnings() -> None:
    barrier, lists = threading.Barrier(4), {}

    def work(name: str) -> None:
        with codec_messages.collected() as messages:
            barrier.wait(10)
            for _ in range(20):
                codec_messages._collect(f"of {name}", UserWarning, "file", 1)
            barrier.wait(10)
            lists[name] = list(messages)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lists == {name: [f"Pillow: of {name}"] * 20 for name in lists}
    assert len(lists) == 4


def test_errors_of_libtiff_stand_in_the_reason_and_not_on_stderr(tmp_path: Path) -> None:
    pixels = values(1, 8)
    data = tiff(pixels, 8, GREY, deflate=True, rows=16)
    damaged = data[:12] + b"\xff" * 20 + data[32:]
    (tmp_path / "damaged.tiff").write_bytes(damaged)
    script = (
        "import sys\nfrom mmpretrain.data.decode import decode_image\nfrom mmpretrain.data.schema import BadSample\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "for _ in range(50):\n    try:\n        decode_image(data)\n    except BadSample as error:\n        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "damaged.tiff")], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 50
    assert "libtiff: ZIPDecode" in lines[0]


# Hostile bytes


def rle(compression: int) -> bytes:
    bits, body = (8, b"\x05\x07\x00\x03abc\x00" * 90 + b"\0\1") if compression == 1 else (4, b"\x05\x17" * 120 + b"\0\0\0\1")
    palette = bytes(4 * (1 << bits))
    offset = 54 + len(palette)
    head = (offset + len(body)).to_bytes(4, "little") + bytes(4) + offset.to_bytes(4, "little")
    numbers = b"".join(value.to_bytes(4, "little") for value in (40, 24, 24)) + (1).to_bytes(2, "little") + bits.to_bytes(2, "little")
    tail = b"".join(value.to_bytes(4, "little") for value in (compression, len(body), 0, 0, 1 << bits, 0))
    return b"BM" + head + numbers + tail + palette + body


def samples() -> list[bytes]:
    image = picture(size=(48, 32))
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    files = [encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")]
    files += [encoded(rgba, kind) for kind in ("PNG", "WEBP", "TIFF")] + [rle(1), rle(2)]
    files += [encoded(image, "TIFF", compression=codec) for codec in ("tiff_lzw", "jpeg", "packbits")]
    files += [encoded(image.convert("P"), kind) for kind in ("PNG", "TIFF", "BMP")] + [encoded(image.convert("CMYK"))]
    return files + ([encoded(image, "AVIF"), encoded(rgba, "AVIF")] if features.check("avif") else [])


SAMPLES = samples()


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6),
    st.booleans(),
)
def test_changed_bytes_of_any_format_give_an_image_or_a_bad_sample(data: bytes, changes: list[tuple[int, bytes]], early: bool) -> None:
    for place, change in changes:
        place %= min(len(data), 400) if early else len(data)
        data = data[:place] + change + data[place + len(change) :]
    details, started = [], time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for decoder in (
            lambda data: decode_image(data, ImageLimits(max_pixels=1_000_000, min_side=1)),
            lambda data: raster.read_header(data, kind) if (kind := sniff(data)) else None,
        ):
            try:
                decoder(data)
            except BadSample as error:
                details.append(error.detail)
    assert time.process_time() - started < 5
    assert not [detail for detail in details if "object at 0x" in detail]


def test_the_message_of_an_unreadable_image_holds_no_memory_address() -> None:
    for start in (b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"GIF89a", b"BM", b"II*\0", b"P6\n", b"\0\0\0\x1cftypavif"):
        with pytest.raises(BadSample) as caught:
            decode_image(start + b"\x07" * 60)
        assert "0x" not in caught.value.detail
        with pytest.raises(BadSample) as caught:
            encode(start + b"\x07" * 60, None, "png", 95)
        assert "0x" not in caught.value.detail


def test_a_profile_that_describes_other_colours_is_not_written() -> None:
    def profiled(space: bytes) -> bytes:
        return bytes(16) + space + bytes(108)

    cmyk = encoded(picture().convert("CMYK"), "JPEG", icc_profile=profiled(b"CMYK"))
    rgb = encoded(picture(), "JPEG", icc_profile=profiled(b"RGB "))
    for data, kept in ((cmyk, None), (rgb, profiled(b"RGB "))):
        written = encode(data, None, "png", 95)
        assert written is not None
        assert Image.open(io.BytesIO(written.data)).info.get("icc_profile") == kept
