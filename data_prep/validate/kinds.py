"""Kinds of findings in shards, each with its severity and remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from mmpretrain.data.schema import IMAGE_EXTENSIONS

# bad: samples are lost; mend: some readers lose them, --repair corrects it; note: harmless by itself
Severity = Literal["bad", "mend", "note"]

_AGAIN = "fetch or build the shard again; --repair saves what can be read"
_DROP = "repair the source, or leave it out with --repair"
KINDS: dict[str, tuple[Severity, str]] = {
    "unreachable": ("bad", "check the path, the network and the rights; then run again"),
    "no_tar": ("bad", "fetch or build the shard again"),
    "missing_shard": ("bad", "fetch or build it, or correct the count file"),
    "cut": ("bad", _AGAIN),
    "corrupt_header": ("bad", _AGAIN),
    "zeros": ("bad", _AGAIN),
    "dangling_link": ("bad", "put the file itself in the shard; --repair drops what is left of the sample where it lacks a member"),
    "special_member": ("bad", "write the shard again with files in place of devices and FIFOs"),
    "sparse_member": ("bad", "write the shard again without --sparse"),
    "unreadable": ("bad", "the disk fails here: copy the shard from elsewhere"),
    "checksum": ("bad", _AGAIN),
    "missing_member": ("bad", "add it, leave the sample out with --repair, or state what is needed with --need"),
    "too_many_bytes": ("bad", "leave it out with --repair; a member of this size is a mistake or an attack"),
    "unknown_format": ("bad", _DROP),
    "undecodable_image": ("bad", _DROP),
    "too_many_pixels": ("bad", "resize it, raise --max-pixels (and max_pixels in the recipe), or leave it out with --repair"),
    "too_small": ("bad", "lower --min-side (and min_side in the recipe), or leave it out with --repair"),
    "too_many_scans": ("bad", "write it again as a JPEG of few scans, or leave it out with --repair"),
    "too_elongated": ("bad", "crop it, raise --max-aspect (and max_aspect in the recipe), or leave it out with --repair"),
    "empty_caption": ("bad", _DROP),
    "not_utf8": ("bad", "re-encode the text as UTF-8, or leave it out with --repair"),
    "bad_caption": ("bad", _DROP),
    "bad_json": ("bad", _DROP),
    "missing_field": ("bad", _DROP),
    "bad_label": ("bad", _DROP),
    "duplicate_key": ("mend", "--repair gives every sample a key of its own"),
    "dotted_key": ("mend", "--repair replaces the dots: the extension begins at a name's first dot"),
    "interleaved": ("mend", "--repair writes a sample's members side by side"),
    "unsafe_key": ("mend", "--repair sanitises the key"),
    "executable_member": ("mend", "never decode it: some readers run its content. --repair leaves the member out"),
    "odd_extension": ("mend", "--repair leaves the member out"),
    "count_disagrees": ("mend", "find out which is right; `python -m data_prep index` rewrites sizes.json"),
    "bad_count_file": ("mend", "correct or delete the file; `python -m data_prep index` rewrites sizes.json"),
    "index_disagrees": ("mend", "fetch the shard that the index was written for, or run `python -m data_prep index --replace`"),
    "bad_index": ("mend", "delete the index, and run `python -m data_prep index`"),
    "linked_member": ("note", "webdataset passes over links: --repair writes the bytes of the file that they lead to"),
    "link_to_folder": ("note", "its files are read where they lie; nothing is lost"),
    "index_outdated": ("note", "`python -m data_prep index` rewrites it"),
    "duplicate_across_shards": ("note", "harmless where it is another sample; `python -m data_prep dedup` finds copies"),
    "unusual_key": ("note", "quote it in shells; --repair sanitises it"),
    "control_characters": ("note", "clean the text if it will be shown"),
    "stray_member": ("note", "it belongs to no sample (no extension, or a dot file); readers skip it"),
    "compressed_member": ("note", "it is never unpacked"),
    "empty_shard": ("note", "delete it if that was not meant"),
}


def severity(kind: str) -> Severity:
    """Returns the severity of a kind."""
    return KINDS[kind][0]


@dataclass(frozen=True)
class Finding:
    """One problem. `key` is "" and `offset` -1 where it concerns a whole shard or file."""

    shard: str
    key: str
    offset: int
    kind: str
    detail: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"severity": severity(self.kind), "remedy": KINDS[self.kind][1]}


Problem = tuple[str, int, str]  # of a sample: kind, offset, detail


def is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS
