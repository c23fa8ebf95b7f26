"""The reader of img2dataset's output: numbered tars with a `_stats.json` beside each, which states its number of downloads."""

from __future__ import annotations

import json
from dataclasses import replace

from data_prep import files
from data_prep.build.readers.webdataset import Shards, shards
from data_prep.records import InputError

STATS = "_stats.json"


def _successes(place: str) -> int:
    """Reads the number of downloads from a `_stats.json`. Raises InputError."""
    try:
        count = json.loads(files.read_bytes(place))["successes"]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"successes is {count!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{place}: expected img2dataset's statistics with a count of `successes` ({error})") from error
    return count


def img2dataset(
    folder: str, members: tuple[str, ...] = (), require: tuple[str, ...] = (), keys: str = "keep", image: str | None = None
) -> Shards:
    """Opens a reader of the tars of a folder, which are checked against the counts of img2dataset.

    A missing tar that has statistics is reported as unreadable.

    Args:
        folder: output folder of img2dataset.
        members: see `webdataset.Shards`.
        require: see `webdataset.Shards`.
        keys: see `webdataset.Shards`.
        image: see `webdataset.shards`.

    Raises:
        InputError: the folder holds something else.
    """
    there = files.listing(folder)
    tars = [path for path in there if path.endswith(".tar")]
    stats = {path.removesuffix(STATS) + ".tar": path for path in there if path.endswith(STATS)}
    if not tars:
        parquet = any(path.endswith(".parquet") for path in there)
        hint = " It has parquet files: if they hold the images, use `build parquet`; if folders do, `build sidecar`." if parquet else ""
        raise InputError(f"{folder} holds no .tar of img2dataset (output_format webdataset).{hint}")
    if not stats:
        raise InputError(f"{folder} holds no NNNNN{STATS}, so it is not img2dataset's output. For other shards use `build shards`.")
    names = sorted({*tars, *stats})
    reader = shards(names, members, require, keys, image)
    return replace(reader, expected=tuple((tar, _successes(place), place.rpartition("/")[2]) for tar, place in sorted(stats.items())))
