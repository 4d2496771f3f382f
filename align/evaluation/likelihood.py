"""Log-likelihoods of given text by any adapter, and KL divergence between adapters on given completions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from align.data.rendering.conversation_rows import demonstration_rows, render_chat
from align.data.rendering.fit_length import LengthLimit
from align.data.rendering.render_view import document_rows
from align.engine.adapter_groups import adapters_active, context_window
from align.errors import DataError
from align.evaluation.scorers import Likelihood
from align.evaluation.shared_prompts import MAX_LOGITS, Continuation, shared_prompt_logprobs
from align.models.adapters import LoadedBase
from align.schema import Messages, Record

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[Messages | str, str]
MarkedRow = tuple[Sequence[int], Sequence[int]]
"""token ids, and 1 for each scored token; the first is never scored"""

_MAX_ROWS = 64


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded rows; `mask` is True where the NEXT token is scored."""

    indices: list[int]
    """of the rows in the list given"""
    ids: Tensor
    attention: Tensor
    mask: Tensor

    def next_logprobs(self, loaded: LoadedBase, adapter: str) -> Tensor:
        """Return next-token log-probs (tokens, V) at the marked positions, row by row.

        One adapter per pass: DoRA and some architectures cannot be mixed in a batch, and it would gain nothing here.
        """
        marked = self.mask.any(dim=0).nonzero()
        first = int(marked[0]) if len(marked) else self.mask.shape[1] - 1
        keep = self.ids.shape[1] - first
        with adapters_active(loaded.model, (), adapter):
            logits = loaded.model(input_ids=self.ids, attention_mask=self.attention, logits_to_keep=keep).logits
        return logits[self.mask[:, first:]].float().log_softmax(-1)

    def sums_by_row(self, per_token: Tensor) -> list[float]:
        """Return values of the marked tokens (tokens,) summed by row."""
        owners = self.mask.nonzero()[:, 0]
        return per_token.new_zeros(len(self.mask)).index_add_(0, owners, per_token).tolist()


def batch_by_length(loaded: LoadedBase, rows: Sequence[MarkedRow]) -> Iterator[PaddedBatch]:
    """Yield batches of rows of like length, longest first, within half a gigabyte of logits."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    device, pad = loaded.model.device, loaded.tokenizer.pad_token_id
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]), reverse=True)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    while order:
        size = max(1, min(_MAX_ROWS, MAX_LOGITS // (vocabulary * len(rows[order[0]][0]))))
        indices, order = order[:size], order[size:]
        ids = [torch.tensor(list(rows[index][0])) for index in indices]
        marks = [torch.tensor([*rows[index][1][1:], 0], dtype=torch.bool) for index in indices]
        yield PaddedBatch(
            indices,
            pad_sequence(ids, batch_first=True, padding_value=pad).to(device),
            pad_sequence([torch.ones_like(one) for one in ids], batch_first=True).to(device),
            pad_sequence(marks, batch_first=True).to(device),
        )


def continuation_logprobs(loaded: LoadedBase, adapter: str, pairs: Sequence[Pair]) -> list[Likelihood]:
    """Return the log-prob of each continuation after its prompt, a conversation or text.

    After a conversation the continuation is encoded alone, as an answer is in training. After text both are encoded
    together, and trailing white space of the text goes to the continuation (as in lm-evaluation-harness). Raises
    DataError for a pair longer than the model's window and for a continuation of no tokens.
    """
    tokenizer, window, rows = loaded.tokenizer, context_window(loaded.model), []
    for prompt, continuation in pairs:
        if isinstance(prompt, str):
            before = tokenizer.encode(prompt.rstrip())
            after = tokenizer.encode(prompt + continuation)[len(before) :]
        else:
            before = render_chat(prompt, tokenizer)
            after = tokenizer.encode(continuation, add_special_tokens=False)
        if not after:
            raise DataError(f"continuation {continuation!r}: it has no tokens; give text that the tokenizer can write")
        if not before:
            raise DataError("an empty prompt: nothing comes before the continuation; give a prompt")
        if window is not None and len(before) + len(after) > window:
            raise DataError(
                f"a prompt of {len(before)} and a continuation of {len(after)} tokens: the model takes {window}; "
                "leave that record out or use a model with a longer window"
            )
        rows.append((before, after))
    return _logprobs_after(loaded, adapter, rows)


def _logprobs_after(loaded: LoadedBase, adapter: str, rows: Sequence[Continuation]) -> list[Likelihood]:
    """Return the log-prob of each continuation; a prompt that several continue is read once for a batch of them."""
    asked = Counter(tuple(before) for before, _ in rows)
    shared = [index for index, (before, _) in enumerate(rows) if asked[tuple(before)] > 1]
    read = shared_prompt_logprobs(loaded, adapter, [rows[index] for index in shared]) if shared else []
    results = dict(zip(shared, read, strict=False))
    alone = [index for index in range(len(rows)) if index not in results]
    marked = [([*before, *after], [0] * len(before) + [1] * len(after)) for before, after in (rows[i] for i in alone)]
    results |= dict(zip(alone, marked_logprobs(loaded, adapter, marked), strict=True))
    return [results[index] for index in range(len(rows))]


def marked_logprobs(loaded: LoadedBase, adapter: str, rows: Sequence[MarkedRow]) -> list[Likelihood]:
    """Return the summed log-prob of each row's marked tokens in nats, and their number."""
    import torch

    results = [Likelihood(0.0, 0)] * len(rows)
    with torch.no_grad():
        for batch in batch_by_length(loaded, rows):
            following = batch.ids.roll(-1, dims=1)[batch.mask]
            logprobs = batch.next_logprobs(loaded, adapter).gather(-1, following[:, None]).squeeze(-1)
            counts = batch.mask.sum(dim=1).tolist()
            for index, value, count in zip(batch.indices, batch.sums_by_row(logprobs), counts, strict=True):
                results[index] = Likelihood(value, count)
    return results


def marked_tokens(loaded: LoadedBase, record: Record, max_length: int) -> MarkedRow | None:
    """Return a demonstration with its trained tokens marked, or a document with all; None if it does not fit."""
    if record.text is None and not record.completion:
        return None
    render = demonstration_rows if record.text is None else document_rows
    rows = render([record], loaded.tokenizer, LengthLimit(max_length)).rows
    if not rows:
        return None
    ids = rows[0]["input_ids"]
    return ids, rows[0].get("completion_mask", [1] * len(ids))


def held_out_nats(
    loaded: LoadedBase, adapter: str, records: Sequence[Record], max_length: int
) -> tuple[np.ndarray, ...]:
    """Return nats and tokens of each record's demonstration or document, each (N,); zeros without one.

    A long document is taken in pieces, each without context of the one before.
    """
    marked = [(index, marked_tokens(loaded, record, max_length)) for index, record in enumerate(records)]
    pieces = [
        (index, (row[0][start : start + max_length], row[1][start : start + max_length]))
        for index, row in marked
        if row is not None
        for start in range(0, len(row[0]) - 1, max_length)  # a piece of one token has nothing to score
    ]
    nats, tokens = np.zeros(len(records)), np.zeros(len(records))
    likelihoods = marked_logprobs(loaded, adapter, [piece for _, piece in pieces])
    for (index, _), results in zip(pieces, likelihoods, strict=True):
        nats[index] -= results.logprob
        tokens[index] += results.tokens
    return nats, tokens


def completion_kls(
    loaded: LoadedBase, model: str, references: Sequence[str], rows: Sequence[MarkedRow]
) -> list[list[float]]:
    """Return KL(model || reference) summed along each row's marked tokens in nats, for each reference.

    The full KL of the two next-token distributions is taken at every marked token of rendered demonstrations. On
    completions that `model` sampled at temperature 1 its expectation is the sequence KL, with less variance than
    log-ratios of the sampled tokens; on greedy completions it is the KL along the most likely path.
    """
    import torch

    divergences = [[0.0] * len(rows) for _ in references]
    with torch.no_grad():
        for batch in batch_by_length(loaded, rows):
            ours = batch.next_logprobs(loaded, model)
            for reference, values in zip(references, divergences, strict=True):
                theirs = batch.next_logprobs(loaded, reference)
                sums = batch.sums_by_row((ours.exp() * (ours - theirs)).sum(-1))
                for index, value in zip(batch.indices, sums, strict=True):
                    values[index] = value
    return divergences
