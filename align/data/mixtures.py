"""Mixtures: how many rows each of several datasets gives, and in which order, as `mix:` in a dataset YAML asks.

A weight is a share of the mixed rows, not of a member's: members of weights 3 and 1 give three rows and one, however
large they are. `first_exhausted` (the default) gives as many rows as that allows without giving any row twice;
`all_exhausted` gives every row of every member at least once, so the smaller ones repeat; `rows:` gives a number.
Without a seed each member gives its first rows, evenly spread over the whole; with one, both are drawn at random.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from fractions import Fraction

from align.data.catalog import MixtureDataset
from align.data.record_sets import natural_view
from align.errors import DataError
from align.schema import Record


def require_one_kind(mixture: str, sets: Mapping[str, list[Record]]) -> None:
    """Raise DataError when the records of the members, which are given by name, are of different kinds."""
    kinds = {name: natural_view(records[0]) for name, records in sets.items() if records}
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} gives {kind}" for name, kind in kinds.items())
        raise DataError(f"{mixture}: its members differ in kind ({listed}); ask for a view that all can give")


def share_rows(config: MixtureDataset, sizes: Mapping[str, int], mixture: str = "") -> dict[str, int]:
    """Return how many rows each member gives; `sizes` are the rows each has, by name.

    Raises DataError when `rows:` asks for more than a member has and none may repeat.
    """
    weights = {member.name: Fraction(str(member.weight)) for member in config.mix}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    ends = {name: sizes[name] / share for name, share in shares.items()}
    repeat = config.stopping == "all_exhausted"
    total = math.ceil(max(ends.values())) if repeat else math.floor(min(ends.values()))
    if config.rows is not None and config.rows > total and not repeat:
        short = min(ends, key=ends.__getitem__)
        raise DataError(
            f"{mixture}: rows: {config.rows} rows need {math.ceil(config.rows * shares[short])} of {short}, which has "
            f"{sizes[short]}; ask for {total} at most, or let rows repeat with stopping: all_exhausted"
        )
    total = config.rows or total
    total = min(total, config.limit or total)
    counts = {name: math.floor(total * share) for name, share in shares.items()}
    # The rows that rounding down left over go to the members that lost most by it.
    for name in sorted(shares, key=lambda name: counts[name] - total * shares[name])[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def interleave(sets: list[list[Record]], counts: list[int], seed: int | None) -> list[Record]:
    """Return `counts` rows of each set; evenly spread in their own order, or drawn and ordered by the seed.

    A set with fewer rows than its count begins anew, in another order where there is a seed.
    """
    rng = None if seed is None else random.Random(seed)
    rows = [itertools.islice(_repeat(records, rng), count) for records, count in zip(sets, counts, strict=True)]
    positions = [
        ((number + 0.5) / count if rng is None else rng.random(), index)
        for index, count in enumerate(counts)
        for number in range(count)
    ]
    return [next(rows[index]) for _, index in sorted(positions)]


def _repeat(records: list[Record], rng: random.Random | None) -> Iterator[Record]:
    while True:
        yield from records if rng is None else rng.sample(records, len(records))
