"""Log-likelihoods of given text by any adapter, and KL divergence between adapters on given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import DataError
from align.evaluation.forward import MarkedRow, batch_by_length, next_logprobs, sums_by_row
from align.evaluation.scorers import Likelihood
from align.schema import Messages, Record

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase

Pair = tuple[Messages | str, str]


def continuation_logprobs(loaded: LoadedBase, adapter: str, pairs: Sequence[Pair]) -> list[Likelihood]:
    """Return the log-prob of each continuation after its prompt, a conversation or text.

    After a conversation the continuation is encoded alone, as an answer is in training. After text both are encoded
    together, and trailing white space of the text goes to the continuation (as in lm-evaluation-harness). Raises
    DataError for a pair longer than the model's window and for a continuation of no tokens.
    """
    rows = [_encode(loaded, prompt, text) for prompt, text in pairs]
    return marked_logprobs(loaded, adapter, rows)


def marked_logprobs(loaded: LoadedBase, adapter: str, rows: Sequence[MarkedRow]) -> list[Likelihood]:
    """Return the summed log-prob of each row's marked tokens in nats, and their number."""
    import torch

    results = [Likelihood(0.0, 0)] * len(rows)
    with torch.no_grad():
        for batch in batch_by_length(loaded, rows):
            logprobs = next_logprobs(loaded, adapter, batch)
            following = batch.ids.roll(-1, dims=1)[batch.mask]
            sums = sums_by_row(batch, logprobs.gather(-1, following[:, None]).squeeze(-1))
            for index, value, count in zip(batch.indices, sums, batch.mask.sum(dim=1).tolist(), strict=True):
                results[index] = Likelihood(value, count)
    return results


def _encode(loaded: LoadedBase, prompt: Messages | str, continuation: str) -> MarkedRow:
    from align.data.rendering.conversation_rows import render_chat
    from align.engine.local import context_window

    tokenizer = loaded.tokenizer
    if isinstance(prompt, str):
        before, after = _split_text(tokenizer, prompt, continuation)
    else:
        before = render_chat(prompt, tokenizer)
        after = tokenizer.encode(continuation, add_special_tokens=False)
    window = context_window(loaded.model)
    if not after:
        raise DataError(f"continuation {continuation!r}: it has no tokens; give text that the tokenizer can write")
    if not before:
        raise DataError("an empty prompt: nothing comes before the continuation; give a prompt")
    if window is not None and len(before) + len(after) > window:
        raise DataError(
            f"a prompt of {len(before)} and a continuation of {len(after)} tokens: the model takes {window}; "
            "leave that record out or use a model with a longer window"
        )
    return [*before, *after], [0] * len(before) + [1] * len(after)


def _split_text(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    bare = prompt.rstrip()
    continuation = prompt[len(bare) :] + continuation
    before = tokenizer.encode(bare)
    return before, tokenizer.encode(bare + continuation)[len(before) :]


def marked_tokens(loaded: LoadedBase, record: Record, max_length: int) -> MarkedRow | None:
    """Return a demonstration with its trained tokens marked, or a document with all; None if it does not fit."""
    from align.data.rendering.conversation_rows import demonstration_rows
    from align.data.rendering.document_rows import document_rows
    from align.data.rendering.fit_length import LengthLimit

    fit = LengthLimit(max_length)
    if record.text is not None:
        rows = document_rows([record], loaded.tokenizer, fit).rows
        return (rows[0]["input_ids"], [1] * len(rows[0]["input_ids"])) if rows else None
    if not record.completion:
        return None
    rows = demonstration_rows([record], loaded.tokenizer, fit).rows
    return (rows[0]["input_ids"], rows[0]["completion_mask"]) if rows else None


def windows(row: MarkedRow, size: int) -> list[MarkedRow]:
    """Return a long row in pieces of at most `size` tokens, each without context of the one before."""
    ids, marks = row
    return [(ids[start : start + size], marks[start : start + size]) for start in range(0, len(ids), size)]


def held_out_nats(
    loaded: LoadedBase, adapter: str, records: Sequence[Record], max_length: int
) -> tuple[np.ndarray, ...]:
    """Return nats and tokens of each record's demonstration or document, each (N,); zeros without one."""
    marks = [marked_tokens(loaded, record, max_length) for record in records]
    pieces = [
        (index, piece)
        for index, row in enumerate(marks)
        if row is not None
        for piece in windows(row, max_length)
        if len(piece[0]) > 1
    ]
    nats, tokens = np.zeros(len(records)), np.zeros(len(records))
    likelihoods = marked_logprobs(loaded, adapter, [piece for _, piece in pieces])
    for (index, _), results in zip(pieces, likelihoods, strict=True):
        nats[index] -= results.logprob
        tokens[index] += results.tokens
    return nats, tokens


def completion_kls(
    loaded: LoadedBase, model: str, references: Sequence[str], rows: list[dict[str, Any]]
) -> list[list[float]]:
    """Return KL(model || reference) summed along each row's completion in nats, for each reference.

    The full KL of the two next-token distributions is taken at every completion token of rendered demonstrations. On
    completions that `model` sampled at temperature 1 its expectation is the sequence KL, with less variance than
    log-ratios of the sampled tokens; on greedy completions it is the KL along the most likely path.
    """
    import torch

    divergences = [[0.0] * len(rows) for _ in references]
    marked = [(row["input_ids"], row["completion_mask"]) for row in rows]
    with torch.no_grad():
        for batch in batch_by_length(loaded, marked):
            ours = next_logprobs(loaded, model, batch)
            for reference, values in zip(references, divergences, strict=True):
                theirs = next_logprobs(loaded, reference, batch)
                sums = sums_by_row(batch, (ours.exp() * (ours - theirs)).sum(-1))
                for index, value in zip(batch.indices, sums, strict=True):
                    values[index] = value
    return divergences
