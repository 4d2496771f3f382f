"""Sequences of a batch laid out in one row: no padding, and what several of them begin with only once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
SMALL = 256
"""tokens up to which a masked call costs less than several calls"""


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
        for begin, end in pairwise(tree.ends):
            if begin < end:
                _join(spans, begin, end, (tree.start, tree.prefix_end), single=False)
    build_mask = _mask_builder(trees, device)
    return tuple(
        AttentionSegment(begin, end, prefix, None if single else build_mask(begin, end, prefix))
        for begin, end, prefix, single in spans
    )


def _join(spans: list[Any], begin: int, end: int, prefix: tuple[int, int] | None, *, single: bool) -> None:
    """Append a span, or widen the last one by it where both are small and see the same prefix."""
    first, last, other, _ = spans[-1] if spans else (0, None, None, False)
    if last == begin and other == prefix and end - first <= SMALL:
        spans[-1] = (first, end, prefix, False)
    else:
        spans.append((begin, end, prefix, single))


def _mask_builder(trees: tuple[PrefixTree, ...], device: Any) -> Callable[..., Tensor]:
    tree_of: list[int] = []
    part_of: list[int] = []  # 0 is the shared prefix of a tree, then come its continuations
    for number, tree in enumerate(trees):
        for part, (begin, end) in enumerate(pairwise((tree.start, tree.prefix_end, *tree.ends))):
            tree_of += [number] * (end - begin)
            part_of += [part] * (end - begin)
    places = torch.arange(len(tree_of), device=device)
    owners, parts = torch.tensor(tree_of, device=device), torch.tensor(part_of, device=device)

    def build(begin: int, end: int, prefix: tuple[int, int] | None) -> Tensor:
        """Return whether each token from `begin` to `end` sees each key, first those of the prefix: (tokens, keys)."""
        asks = places[begin:end]
        keys = asks if prefix is None else torch.cat([places[slice(*prefix)], asks])
        related = owners[keys] == owners[asks][:, None]
        shared = (parts[keys] == 0) | (parts[keys] == parts[asks][:, None])
        return (keys <= asks[:, None]) & related & shared

    return build


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
        own = slice(begin := real.index(1), begin + sum(real))
        rows.append(TokenRow(tokens[own], row_labels[own], row, begin))
    return rows


def pack(sequences: list[TokenRow], keys: list[Hashable], device: Any) -> PackedBatch:
    """Lay out sequences so that those with one key share what they begin with."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    ids: list[int] = []
    positions: list[int] = []
    trees = []
    trained: list[tuple[int, int, int, int]] = []
    last = [0] * len(sequences)
    for members in groups.values():
        shared = _shared_length([sequences[index].tokens for index in members]) if len(members) > 1 else 0
        start = len(ids)
        ids += sequences[members[0]].tokens[:shared]
        positions += range(shared)
        ends = []
        for index in members:
            sequence = sequences[index]
            begin = len(ids)
            ids += sequence.tokens[shared:]
            positions += range(shared, len(sequence.tokens))
            ends.append(len(ids))
            places = [*range(start, start + shared), *range(begin, len(ids))]
            last[index] = places[-1]
            trained += [
                (places[position - 1], label, sequence.row, sequence.column + position - 1)
                for position, label in enumerate(sequence.labels)
                if label != IGNORED and position > 0
            ]
        trees.append(PrefixTree(start, start + shared, tuple(ends)))
    sources, targets, rows, columns = torch.tensor(trained, dtype=torch.long, device=device).reshape(-1, 4).unbind(1)
    packed_ids, packed_positions, ends_of = (torch.tensor(each, device=device) for each in (ids, positions, last))
    return PackedBatch(
        packed_ids[None], packed_positions[None], tuple(trees), attention_segments(tuple(trees), device),
        sources, targets, rows, columns, ends_of,
    )  # fmt: skip


def _shared_length(rows: list[list[int]]) -> int:
    """Return the number of tokens all rows begin with; the first and last in order differ where any two do."""
    first, last = min(rows), max(rows)
    return next((position for position, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def prompt_keys(sequences: list[TokenRow]) -> list[Hashable]:
    """Return a key for each sequence by what stands before its first trained token."""
    keys: list[Hashable] = []
    for index, sequence in enumerate(sequences):
        trained = next((position for position, label in enumerate(sequence.labels) if label != IGNORED), 0)
        keys.append(tuple(sequence.tokens[:trained]) or index)
    return keys


def pair_keys(sequences: list[TokenRow]) -> list[Hashable]:
    """Return a key for each sequence of a batch whose second half answers the prompts of the first."""
    count = len(sequences)
    return [index % (count // 2) if count % 2 == 0 else index for index in range(count)]
