"""Mixtures: several datasets interleaved in given proportions, as `mix:` in a dataset YAML asks for.

A weight is a share of the mixed rows, not of a member's: members of weights 3 and 1 give three rows and one, however
large they are. `first_exhausted` (the default) gives as many rows as that allows without giving any row twice;
`all_exhausted` gives every row of every member at least once, so the smaller ones repeat; `rows:` gives a number.
Without a seed each member gives its first rows, evenly spread over the whole; with one, both are drawn at random.

A mixture is held in memory: how many rows it has is known only when its members were read.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from align.data.catalog import OPTION, Dataset, DatasetConfig, MixtureMember, catalogue, find
from align.data.digest import Digest
from align.data.row_errors import BadRow
from align.data.scan import BATCH, OnBadRow, Scan, scan
from align.data.views import natural_view
from align.errors import DataError, UsageError
from align.schema import Record, View


class Mixture(Scan):
    """A scan over a mixture, which also says what it took of each member."""

    members: list[dict[str, Any]]
    """name, digest and rows of each member, and how many rows it has (`of`)"""


class MemberShare(NamedTuple):
    """How many rows a member gives of those it has."""

    name: str
    rows: int
    of: int


def open_scan(
    spec: str,
    *,
    view: View | None = None,
    roots: Mapping[str, Path] | None = None,
    on_bad_row: OnBadRow = "error",
    on_bad: Callable[[BadRow], None] | None = None,
) -> Scan:
    """A pass over a dataset or a mixture, as `scan` gives it; errors in a member name the member."""
    dataset = find(spec)
    if not dataset.config.mix:
        return scan(spec, view=view, roots=roots, on_bad_row=on_bad_row, on_bad=on_bad)
    list(leaves(dataset))  # unknown members and circles are told before anything is read

    def batches(found: Scan) -> Iterator[list[Record]]:
        sets = []
        for member in dataset.config.mix:
            part = open_scan(
                member_spec(member, dataset.folder), view=view, roots=roots, on_bad_row=on_bad_row, on_bad=on_bad
            )
            records = [record for batch in part for record in batch]
            _add_account(found, part)
            sets.append((part, records))
        yield from _give(found, dataset, sets)

    mixture = Mixture(dataset.name, batches)
    mixture.members = []
    return mixture


def member_spec(member: MixtureMember, folder: Path) -> str:
    """The spec of a member: a file is looked up beside the YAML first, as a source is."""
    target = OPTION.split(member.name)[0]
    beside = folder / target
    return str(folder / member.name) if target not in catalogue() and beside.exists() else member.name


def leaves(dataset: Dataset, above: tuple[tuple[Path, str], ...] = ()) -> Iterator[Dataset]:
    """Every dataset with a source that a dataset is made of; UsageError for a mixture that holds itself."""
    if not dataset.config.mix:
        yield dataset
        return
    name = OPTION.split(dataset.name)[0]
    here = (dataset.folder.resolve(), name)
    if here in above:
        circle = " > ".join([*(one for _, one in above[above.index(here) :]), name])
        raise UsageError(f"{name}: the mixture holds itself ({circle}); take it out of one of them")
    for member in dataset.config.mix:
        try:
            found = find(member_spec(member, dataset.folder))
        except (DataError, UsageError) as error:
            raise type(error)(f"{dataset.name}: member {error}") from None
        yield from leaves(found, (*above, here))


def share_out(config: DatasetConfig, sizes: Mapping[str, int]) -> list[MemberShare]:
    """How many rows each member gives; `sizes` are the rows each has, by name.

    Raises DataError when `rows:` asks for more than a member has and none may repeat.
    """
    weights = {member.name: Fraction(str(member.weight)) for member in config.mix}
    parts = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    ends = {name: sizes[name] / part for name, part in parts.items()}
    repeat = config.stopping == "all_exhausted"
    total = math.ceil(max(ends.values())) if repeat else math.floor(min(ends.values()))
    if config.rows is not None and config.rows > total and not repeat:
        short = min(ends, key=ends.__getitem__)
        raise DataError(
            f"rows: {config.rows} rows need {math.ceil(config.rows * parts[short])} of {short}, which has "
            f"{sizes[short]}; ask for {total} at most, or let rows repeat with stopping: all_exhausted"
        )
    total = config.rows or total
    total = min(total, config.limit or total)
    counts = {name: math.floor(total * part) for name, part in parts.items()}
    # The rows that rounding down left over go to the members that lost most by it.
    left = total - sum(counts.values())
    for name in sorted(parts, key=lambda name: counts[name] - total * parts[name])[:left]:
        counts[name] += 1
    return [MemberShare(name, counts[name], sizes[name]) for name in parts]


def interleave(sets: list[list[Record]], counts: list[int], seed: int | None) -> list[Record]:
    """`counts` rows of each set; evenly spread in their own order, or drawn and ordered by the seed.

    A set with fewer rows than its count begins anew, in another order where there is a seed.
    """
    dice = None if seed is None else random.Random(seed)
    rows = [itertools.islice(_endless(records, dice), count) for records, count in zip(sets, counts, strict=True)]
    places = [
        ((number + 0.5) / count if dice is None else dice.random(), index)
        for index, count in enumerate(counts)
        for number in range(count)
    ]
    return [next(rows[index]) for _, index in sorted(places)]


def _endless(records: list[Record], dice: random.Random | None) -> Iterator[Record]:
    while True:
        yield from records if dice is None else dice.sample(records, len(records))


def _give(found: Scan, dataset: Dataset, sets: list[tuple[Scan, list[Record]]]) -> Iterator[list[Record]]:
    """The mixed rows in batches, once every member was read."""
    config = dataset.config
    _require_one_kind(dataset, [records for _, records in sets])
    if not all(records for _, records in sets):
        return
    sizes = {member.name: len(records) for member, (_, records) in zip(config.mix, sets, strict=True)}
    try:
        shares = share_out(config, sizes)
    except DataError as error:
        raise DataError(f"{dataset.name}: {error}") from None
    mixed = interleave([records for _, records in sets], [share.rows for share in shares], config.seed)
    told = ", ".join(f"{share.rows} of {share.name} ({share.of})" for share in shares)
    found.notes.append(f"{dataset.name}: mixes {told}")
    if isinstance(found, Mixture):
        found.members = [
            {"name": share.name, "digest": part.digest, "rows": share.rows, "of": share.of}
            for share, (part, _) in zip(shares, sets, strict=True)
        ]
    digest = Digest()
    for start in range(0, len(mixed), BATCH):
        batch = mixed[start : start + BATCH]
        found.kept += len(batch)
        for record in batch:
            digest.add(record)
        yield batch
    found.digest, found.repeated = digest.value, digest.repeated


def _require_one_kind(dataset: Dataset, sets: list[list[Record]]) -> None:
    kinds = {
        member.name: natural_view(records[0])
        for member, records in zip(dataset.config.mix, sets, strict=True)
        if records
    }
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name} gives {kind}" for name, kind in kinds.items())
        raise DataError(f"{dataset.name}: its members differ in kind ({told}); ask for a view that all can give")


def _add_account(found: Scan, part: Scan) -> None:
    found.rows += part.rows
    found.bad += part.bad
    found.equal.update(part.equal)
    found.reasons.update(part.reasons)
    found.skipped.update(part.skipped)
    found.notes += part.notes
