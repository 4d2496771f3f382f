"""Sequences of a batch laid out in one row: no padding, and what several of them begin with only once."""

from __future__ import annotations

import os.path
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a padded batch: its tokens and labels, and where its first token stands."""

    tokens: list[int]
    labels: list[int]
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences that begin alike, as spans of the packed row: the stem they share, then what each goes on with."""

    start: int
    stem_end: int
    ends: tuple[int, ...]

    @property
    def branches(self) -> Iterable[tuple[int, int]]:
        """Start and end of each branch."""
        return zip((self.stem_end, *self.ends[:-1]), self.ends, strict=True)


@dataclass(slots=True)
class Packed:
    """A batch as one row of T tokens: `ids` and `positions` (1, T), the trees in it, and where its answers are.

    For each of the n trained tokens, `sources` says which hidden state predicts it, `targets` which token it is, and
    `rows` and `columns` where its log-probability belongs in the padded batch. `last` is the place of the last token of
    every sequence.
    """

    ids: Tensor
    positions: Tensor
    trees: tuple[Tree, ...]
    sources: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    last: Tensor
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def mask(self, tree: Tree, begin: int, end: int) -> Tensor:
        """Which keys (the stem, then the branch) each token of a branch may see: (branch, stem + branch)."""
        import torch

        stem, branch = tree.stem_end - tree.start, end - begin
        found = self._masks.get((stem, branch))
        if found is None:
            ones = torch.ones(branch, stem + branch, dtype=torch.bool, device=self.ids.device)
            found = self._masks[stem, branch] = ones.tril(stem)
        return found


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, starts: Tensor | None
) -> list[Sequence]:
    """The sequences of a batch: rows without their padding, or the parts of a packed row that begin at `starts`."""
    ids = input_ids.tolist()
    targets = labels.tolist() if labels is not None else [[IGNORED] * len(row) for row in ids]
    if starts is not None:
        edges = [*starts.tolist()]
        return [Sequence(ids[0][a:b], targets[0][a:b], 0, a) for a, b in zip(edges, edges[1:], strict=False)]
    found = []
    for row, (tokens, wanted) in enumerate(zip(ids, targets, strict=True)):
        kept = attention_mask[row].tolist() if attention_mask is not None else [1] * len(tokens)
        begin, count = kept.index(1), sum(kept)
        found.append(Sequence(tokens[begin : begin + count], wanted[begin : begin + count], row, begin))
    return found


def pack(sequences: list[Sequence], keys: list[Hashable], device: Any) -> Packed:
    """Lay out sequences so that those with one key share what they begin with."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    layout = _Layout()
    for members in groups.values():
        layout.add([(index, sequences[index]) for index in members])
    return layout.packed(device)


def prompt_keys(sequences: list[Sequence]) -> list[Hashable]:
    """A key for each sequence by what stands before its first trained token."""
    keys: list[Hashable] = []
    for index, sequence in enumerate(sequences):
        trained = next((place for place, label in enumerate(sequence.labels) if label != IGNORED), 0)
        keys.append(tuple(sequence.tokens[:trained]) if trained else index)
    return keys


def pair_keys(sequences: list[Sequence]) -> list[Hashable]:
    """A key for each sequence of a batch whose second half answers the prompts of the first."""
    half = len(sequences) // 2
    return [index % half for index in range(len(sequences))] if len(sequences) % 2 == 0 else list(range(len(sequences)))


class _Layout:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.trees: list[Tree] = []
        self.trained: list[tuple[int, int, int, int]] = []
        self.last: dict[int, int] = {}

    def add(self, members: list[tuple[int, Sequence]]) -> None:
        """Append sequences that may share their beginning."""
        stem = os.path.commonprefix([sequence.tokens for _, sequence in members])
        shared = len(stem) if len(members) > 1 else 0
        start = len(self.ids)
        self._extend(members[0][1].tokens[:shared], 0)
        ends = []
        for index, sequence in members:
            begin = len(self.ids)
            self._extend(sequence.tokens[shared:], shared)
            ends.append(len(self.ids))
            places = [
                start + place if place < shared else begin + place - shared for place in range(len(sequence.tokens))
            ]
            self.last[index] = places[-1]
            self.trained += [
                (places[place - 1], label, sequence.row, sequence.column + place - 1)
                for place, label in enumerate(sequence.labels)
                if label != IGNORED and place > 0
            ]
        self.trees.append(Tree(start, start + shared, tuple(ends)))

    def _extend(self, tokens: list[int], position: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))

    def packed(self, device: Any) -> Packed:
        """The finished row."""
        import torch

        sources, targets, rows, columns = (
            torch.tensor(self.trained, dtype=torch.long, device=device).reshape(-1, 4).unbind(1)
        )
        last = [self.last[index] for index in range(len(self.last))]
        ids, positions, places = (torch.tensor(each, device=device) for each in (self.ids, self.positions, last))
        return Packed(ids[None], positions[None], tuple(self.trees), sources, targets, rows, columns, places)
