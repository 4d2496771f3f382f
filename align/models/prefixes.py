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
_SHARED = -1


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One sequence of a padded batch: its tokens and labels, and where its first token stands."""

    tokens: list[int]
    labels: list[int]
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Sequences that begin alike, as spans of the packed row: the prefix they share, then what each goes on with."""

    start: int
    prefix_end: int
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """Tokens of the packed row whose attention is computed in one call, and which tokens each of them may see.

    The keys are those of `prefix` (when there is one outside the segment) and the segment's own; without a `mask` the
    segment is one sequence under a causal mask.
    """

    begin: int
    end: int
    prefix: tuple[int, int] | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch as one row of T tokens: `ids` and `positions` (1, T), its segments, and where its answers are.

    For each of the n trained tokens, `sources` says which hidden state predicts it, `targets` which token it is, and
    `rows` and `columns` where its log-probability belongs in the padded batch. `last` is the place of the last token of
    every sequence.
    """

    ids: Tensor
    positions: Tensor
    trees: tuple[PrefixTree, ...]
    segments: tuple[AttentionSegment, ...]
    sources: Tensor
    targets: Tensor
    rows: Tensor
    columns: Tensor
    last: Tensor


def attention_segments(trees: tuple[PrefixTree, ...], device: Any) -> tuple[AttentionSegment, ...]:
    """Return the calls in which the attention of some trees is computed: few for small ones, exact for large ones.

    Small trees, and small continuations of a large one, share a call under a mask; a large sequence has one of its own.
    """
    spans: list[tuple[int, int, tuple[int, int] | None, bool]] = []
    for tree in trees:
        if tree.ends[-1] - tree.start <= SMALL:
            _join(spans, tree.start, tree.ends[-1], None, single=len(tree.ends) == 1)
            continue
        spans.append((tree.start, tree.ends[0], None, True))
        prefix = (tree.start, tree.prefix_end)
        for begin, end in pairwise(tree.ends):
            if begin < end:
                _join(spans, begin, end, prefix, single=False)
    seen = _AttentionMask(trees, device)
    return tuple(
        AttentionSegment(begin, end, prefix, None if single else seen.mask(begin, end, prefix))
        for begin, end, prefix, single in spans
    )


def _join(spans: list[Any], begin: int, end: int, prefix: tuple[int, int] | None, *, single: bool) -> None:
    """Append a span, or widen the last one by it where both are small and see the same prefix."""
    if spans:
        first, last, other, _ = spans[-1]
        if other == prefix and last == begin and end - first <= SMALL:
            spans[-1] = (first, end, prefix, False)
            return
    spans.append((begin, end, prefix, single))


class _AttentionMask:
    """The attention mask of a packed row, built for a span at a time."""

    def __init__(self, trees: tuple[PrefixTree, ...], device: Any) -> None:
        import torch

        tree_of: list[int] = []
        continuation_of: list[int] = []
        for number, tree in enumerate(trees):
            tree_of += [number] * (tree.ends[-1] - tree.start)
            continuation_of += [_SHARED] * (tree.prefix_end - tree.start)
            begins = (tree.prefix_end, *tree.ends[:-1])
            for continuation, (begin, end) in enumerate(zip(begins, tree.ends, strict=True)):
                continuation_of += [continuation] * (end - begin)
        self._tree, self._continuation = (
            torch.tensor(tree_of, device=device),
            torch.tensor(continuation_of, device=device),
        )
        self._place = torch.arange(len(tree_of), device=device)

    def mask(self, begin: int, end: int, prefix: tuple[int, int] | None) -> Tensor:
        """Return whether each token from `begin` to `end` sees each key, first those of the prefix: (tokens, keys)."""
        import torch

        asks = self._place[begin:end]
        keys = asks if prefix is None else torch.cat([self._place[prefix[0] : prefix[1]], asks])
        before = keys <= asks[:, None]
        related = self._tree[keys] == self._tree[asks][:, None]
        shared = (self._continuation[keys] == _SHARED) | (self._continuation[keys] == self._continuation[asks][:, None])
        return before & related & shared


def token_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, starts: Tensor | None
) -> list[TokenRow]:
    """Return the sequences of a batch: rows without padding, or the parts of a packed row that begin at `starts`."""
    ids = input_ids.tolist()
    targets = labels.tolist() if labels is not None else [[IGNORED] * len(row) for row in ids]
    if starts is not None:
        return [TokenRow(ids[0][a:b], targets[0][a:b], 0, a) for a, b in pairwise(starts.tolist())]
    rows = []
    for row, (tokens, row_labels) in enumerate(zip(ids, targets, strict=True)):
        real = attention_mask[row].tolist() if attention_mask is not None else [1] * len(tokens)
        begin, count = real.index(1), sum(real)
        rows.append(TokenRow(tokens[begin : begin + count], row_labels[begin : begin + count], row, begin))
    return rows


def pack(sequences: list[TokenRow], keys: list[Hashable], device: Any) -> PackedBatch:
    """Lay out sequences so that those with one key share what they begin with."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    layout = _RowBuilder()
    for members in groups.values():
        layout.add([(index, sequences[index]) for index in members])
    return layout.packed(device)


def prompt_keys(sequences: list[TokenRow]) -> list[Hashable]:
    """Return a key for each sequence by what stands before its first trained token."""
    keys: list[Hashable] = []
    for index, sequence in enumerate(sequences):
        trained = next((position for position, label in enumerate(sequence.labels) if label != IGNORED), 0)
        keys.append(tuple(sequence.tokens[:trained]) if trained else index)
    return keys


def pair_keys(sequences: list[TokenRow]) -> list[Hashable]:
    """Return a key for each sequence of a batch whose second half answers the prompts of the first."""
    half = len(sequences) // 2
    return [index % half for index in range(len(sequences))] if len(sequences) % 2 == 0 else list(range(len(sequences)))


def _shared_length(rows: list[list[int]]) -> int:
    """Return the number of tokens all rows begin with; the first and last in order differ where any two do."""
    first, last = min(rows), max(rows)
    return next((position for position, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


class _RowBuilder:
    """A packed row under construction."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.trees: list[PrefixTree] = []
        self.trained: list[tuple[int, int, int, int]] = []
        self.last: dict[int, int] = {}

    def add(self, members: list[tuple[int, TokenRow]]) -> None:
        """Append sequences that may share their beginning."""
        shared = _shared_length([sequence.tokens for _, sequence in members]) if len(members) > 1 else 0
        start = len(self.ids)
        self._extend(members[0][1].tokens[:shared], 0)
        ends = []
        for index, sequence in members:
            begin = len(self.ids)
            self._extend(sequence.tokens[shared:], shared)
            ends.append(len(self.ids))
            positions = [
                start + position if position < shared else begin + position - shared
                for position in range(len(sequence.tokens))
            ]
            self.last[index] = positions[-1]
            self.trained += [
                (positions[position - 1], label, sequence.row, sequence.column + position - 1)
                for position, label in enumerate(sequence.labels)
                if label != IGNORED and position > 0
            ]
        self.trees.append(PrefixTree(start, start + shared, tuple(ends)))

    def _extend(self, tokens: list[int], position: int) -> None:
        self.ids += tokens
        self.positions += range(position, position + len(tokens))

    def packed(self, device: Any) -> PackedBatch:
        """Return the finished row."""
        import torch

        sources, targets, rows, columns = (
            torch.tensor(self.trained, dtype=torch.long, device=device).reshape(-1, 4).unbind(1)
        )
        last = [self.last[index] for index in range(len(self.last))]
        ids, positions, last_positions = (
            torch.tensor(values, device=device) for values in (self.ids, self.positions, last)
        )
        trees = tuple(self.trees)
        segments = attention_segments(trees, device)
        return PackedBatch(ids[None], positions[None], trees, segments, sources, targets, rows, columns, last_positions)
