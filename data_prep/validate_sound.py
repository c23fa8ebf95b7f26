"""Samples that are sound beyond doubt, told at little cost: the others are examined in full, which says what is wrong with them."""

from __future__ import annotations

from collections import Counter

from data_prep.validate_layout import MAX_KEY, Layout
from data_prep.validate_members import COMPRESSED, EXECUTABLE, EXTENSION, Checks, image, most_bytes, role_of, text
from mmpretrain.data.index import BYTES, checksum
from mmpretrain.data.schema import SAFE_KEY, BadSample, image_extension
from mmpretrain.data.tar import read_at


class Sound:
    """Is sample i sound beyond doubt? It then has one plain key, nothing odd among its members, and passes every check."""

    def __init__(self, layout: Layout, checks: Checks) -> None:
        index = layout.index
        self._file, self._size, self._checks, self._crossed = layout.file, layout.size, checks, layout.crossed
        self._keys, self._names = index.keys, index.extensions
        self._starts, self._kinds = index.starts.tolist(), index.extension.tolist()
        self._offsets, self._sizes = index.offset.tolist(), index.size.tolist()
        known = index.checksum is not None and index.checksum.shape[1] == BYTES
        self._checksums = memoryview(index.checksum.tobytes()) if known and checks.checksums else None
        # Behind damage, and where the checksums are of another kind, everything is examined in full.
        self._any = layout.trusted and (index.checksum is None or known or not checks.checksums)
        self._times: Counter[tuple[int, ...]] = Counter()
        self._roles: dict[tuple[int, ...], list[str] | None] = {}  # by the kinds of a sample's members

    def __call__(self, i: int) -> bool:
        key = self._keys[i]
        if not self._any or len(key) > MAX_KEY or not SAFE_KEY.fullmatch(key) or (self._crossed is not None and self._crossed[i]):
            return False
        first, end = self._starts[i], self._starts[i + 1]
        kinds = tuple(self._kinds[first:end])
        if kinds not in self._roles:
            self._roles[kinds] = self._plan([self._names[kind] for kind in kinds])
        roles = self._roles[kinds]
        try:
            good = roles is not None and all(map(self._member, range(first, end), roles))
        except (BadSample, OSError):
            return False
        if good:
            self._times[kinds] += 1
        return good

    @property
    def members(self) -> Counter[str]:
        """Extension -> how many of the sound samples have it."""
        found: Counter[str] = Counter()
        for kinds, times in self._times.items():
            found.update({self._names[kind]: times for kind in kinds})
        return found

    def _plan(self, extensions: list[str]) -> list[str] | None:
        """The members' roles; None where some of them, or their absence, must be reported."""
        picture = image_extension(extensions)
        for wanted in self._checks.need:
            if (picture is None) if wanted == "image" else (wanted not in extensions):
                return None
        if any("." in e or e in EXECUTABLE or e in COMPRESSED or not EXTENSION.fullmatch(e) for e in extensions):
            return None
        return [role_of(extension, self._checks, picture) for extension in extensions]

    def _member(self, m: int, role: str) -> bool:
        offset, size = self._offsets[m], self._sizes[m]
        if offset + size > self._size or size > most_bytes(role, self._checks):
            return False
        whole = None
        if self._checksums is not None:
            whole = read_at(self._file, offset, size)
            if checksum(whole) != self._checksums[m * BYTES : (m + 1) * BYTES]:
                return False
        if role == "image":
            image(lambda length: whole[:length] if whole is not None else read_at(self._file, offset, length), size, self._checks)
        elif role:
            return text(read_at(self._file, offset, size) if whole is None else whole, role, self._checks) is None
        return True
