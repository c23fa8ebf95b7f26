"""A control: the same shards with every caption on another sample. A model trained on them should do no better than chance.

    python scripts/shuffle_captions.py 'data/demo/pairs/*.tar' data/shuffled [--seed 0]

The members that speak of the image (txt, json) go together to the next sample of a random cycle; the others stay, labels too.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.samples import Shard, expand
from data_prep.writer import Record, write_shards

SPOKEN = ("txt", "json")


def shuffled(names: list[str], seed: int) -> Iterator[Record]:
    """Every sample with the words of its successor in one random cycle over all: none keeps its own."""
    shards = [Shard(name) for name in names]
    places = [(shard, i) for shard in shards for i in range(len(shard))]
    if len(places) < 2:
        raise ValueError(f"{', '.join(names)}: {len(places)} samples; at least two are needed to exchange captions")
    order = list(range(len(places)))
    random.Random(seed).shuffle(order)
    giver = {place: order[(n + 1) % len(order)] for n, place in enumerate(order)}
    for number, (shard, i) in enumerate(places):
        other, j = places[giver[number]]
        record, words = shard.read(i), other.read(j, SPOKEN)
        kept = {extension: data for extension, data in record.members.items() if extension not in SPOKEN}
        yield Record(f"{number:08d}", kept | words.members)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="paths, globs, brace ranges, folders")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        manifest = write_shards(shuffled(expand(arguments.shards), arguments.seed), arguments.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{manifest['num_samples']} samples in {len(manifest['shards'])} shards in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
