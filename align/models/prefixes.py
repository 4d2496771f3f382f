"""Sequences of a batch laid out in one row: no padding, and what several of them begin with only once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
SMALL = 256
"""tokens up to which a masked call costs less than several calls"""
_STEM = -1


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


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of the packed row whose attention is computed in one call, and which tokens each of them may see.

    The keys are those of `stem` (when there is one outside the part) and the part's own; without a `mask` the part is
    one sequence, seen causally.
    """

    begin: int
    end: int
    stem: tuple[int, int] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch as one row of T tokens: `ids` and `positions` (1, T), its parts, and where its answers are.

    For each of the n trained tokens, `sources` says which hidden state predicts it, `targets` which token it is, and
    `rows` and `columns` where its log-probability belongs in the padded batch. `last` is the place of the last token of
    every sequence.
    """

    ids: Tensor
    positions: Tensor
    trees: tuple[Tree, ...]
    parts: tuple[Part, ...]
    sources: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    last: Tensor


def parts_of(trees: tuple[Tree, ...], device: Any) -> tuple[Part, ...]:
    """The calls in which the attention of some trees is computed: few where they are small, exact where they are large.

    Small trees, and small branches of a large one, share a call under a mask; a large sequence has one of its own.
    """
    spans: list[tuple[int, int, tuple[int, int] | None, bool]] = []
    for tree in trees:
        if tree.ends[-1] - tree.start <= SMALL:
            _join(spans, tree.start, tree.ends[-1], None, single=len(tree.ends) == 1)
            continue
        spans.append((tree.start, tree.ends[0], None, True))
        stem = (tree.start, tree.stem_end)
        for begin, end in pairwise(tree.ends):
            if begin < end:
                _join(spans, begin, end, stem, single=False)
    seen = _Sight(trees, device)
    return tuple(
        Part(begin, end, stem, None if single else seen.mask(begin, end, stem)) for begin, end, stem, single in spans
    )


def _join(spans: list[Any], begin: int, end: int, stem: tuple[int, int] | None, *, single: bool) -> None:
    """Append a span, or widen the last one by it where both are small and see the same stem."""
    if spans:
        first, last, other, _ = spans[-1]
        if other == stem and last == begin and end - first <= SMALL:
            spans[-1] = (first, end, stem, False)
            return
    spans.append((begin, end, stem, single))


class _Sight:
    """Who may see whom in a packed row."""

    def __init__(self, trees: tuple[Tree, ...], device: Any) -> None:
        import torch

        tree_of: list[int] = []
        branch_of: list[int] = []
        for number, tree in enumerate(trees):
            tree_of += [number] * (tree.ends[-1] - tree.start)
            branch_of += [_STEM] * (tree.stem_end - tree.start)
            begins = (tree.stem_end, *tree.ends[:-1])
            for branch, (begin, end) in enumerate(zip(begins, tree.ends, strict=True)):
                branch_of += [branch] * (end - begin)
        self._tree, self._branch = torch.tensor(tree_of, device=device), torch.tensor(branch_of, device=device)
        self._place = torch.arange(len(tree_of), device=device)

    def mask(self, begin: int, end: int, stem: tuple[int, int] | None) -> Tensor:
        """Whether each token from `begin` to `end` sees each key, first those of the stem: (tokens, keys)."""
        import torch

        asks = self._place[begin:end]
        keys = asks if stem is None else torch.cat([self._place[stem[0] : stem[1]], asks])
        before = keys <= asks[:, None]
        related = self._tree[keys] == self._tree[asks][:, None]
        shared = (self._branch[keys] == _STEM) | (self._branch[keys] == self._branch[asks][:, None])
        return before & related & shared


def sequences_of(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, starts: Tensor | None
) -> list[Sequence]:
    """The sequences of a batch: rows without their padding, or the parts of a packed row that begin at `starts`."""
    ids = input_ids.tolist()
    targets = labels.tolist() if labels is not None else [[IGNORED] * len(row) for row in ids]
    if starts is not None:
        return [Sequence(ids[0][a:b], targets[0][a:b], 0, a) for a, b in pairwise(starts.tolist())]
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


def _shared_length(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with; the first and last in order differ where any two do."""
    first, last = min(rows), max(rows)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


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
        shared = _shared_length([sequence.tokens for _, sequence in members]) if len(members) > 1 else 0
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
        trees = tuple(self.trees)
        parts = parts_of(trees, device)
        return Packed(ids[None], positions[None], trees, parts, sources, targets, rows, columns, places)
