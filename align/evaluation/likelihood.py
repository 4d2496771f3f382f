"""How likely a model finds given text: continuations of prompts, demonstrations, documents, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import DataError
from align.evaluation.forward import Marked, batches, next_logprobs, sums_by_row
from align.evaluation.scorers import Likelihood
from align.schema import Messages, Record

if TYPE_CHECKING:
    from align.models.adapters import Resident

Pair = tuple[Messages | str, str]


def continuation_logprobs(resident: Resident, adapter: str, pairs: Sequence[Pair]) -> list[Likelihood]:
    """The log-probability of each continuation after its prompt: a conversation that waits for an answer, or text.

    After a conversation the continuation is encoded alone, as an answer is in training. After text it is encoded with
    it, and white space that ends the text goes to the continuation (as lm-evaluation-harness does). Raises DataError
    for a pair longer than the model's window and for a continuation of no tokens.
    """
    rows = [_encode(resident, prompt, text) for prompt, text in pairs]
    return marked_logprobs(resident, adapter, rows)


def marked_logprobs(resident: Resident, adapter: str, rows: Sequence[Marked]) -> list[Likelihood]:
    """The sum of the log-probabilities of the marked tokens of each row, in nats, and how many these are."""
    import torch

    found = [Likelihood(0.0, 0)] * len(rows)
    with torch.no_grad():
        for batch in batches(resident, rows):
            logprobs = next_logprobs(resident, adapter, batch)
            following = batch.ids.roll(-1, dims=1)[batch.mask]
            sums = sums_by_row(batch, logprobs.gather(-1, following[:, None]).squeeze(-1))
            for place, value, count in zip(batch.places, sums, batch.mask.sum(dim=1).tolist(), strict=True):
                found[place] = Likelihood(value, count)
    return found


def _encode(resident: Resident, prompt: Messages | str, continuation: str) -> Marked:
    from align.data.render import render_chat
    from align.engine.local import context_window

    tokenizer = resident.tokenizer
    if isinstance(prompt, str):
        before, after = _split_text(tokenizer, prompt, continuation)
    else:
        before = render_chat(prompt, tokenizer)
        after = tokenizer.encode(continuation, add_special_tokens=False)
    window = context_window(resident.model)
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


def demonstration_marks(resident: Resident, records: Sequence[Record], max_length: int) -> dict[int, Marked]:
    """The tokens of demonstrations with their trained ones marked, by the record's place; what does not fit is left out.

    A document (`text`) has all its tokens marked but the first of each window.
    """
    from align.data.fitting import Fit
    from align.data.render import demonstration_rows, document_rows

    found: dict[int, Marked] = {}
    for place, record in enumerate(records):
        if record.text is not None:
            rows = document_rows([record], resident.tokenizer, Fit(max_length)).rows
            found |= {place: (row["input_ids"], [1] * len(row["input_ids"])) for row in rows}
        elif record.completion:
            rows = demonstration_rows([record], resident.tokenizer, Fit(max_length)).rows
            found |= {place: (row["input_ids"], row["completion_mask"]) for row in rows}
    return found


def windows(row: Marked, size: int) -> list[Marked]:
    """A long row in pieces of at most `size` tokens, each without a look at the one before."""
    ids, marks = row
    return [(ids[start : start + size], marks[start : start + size]) for start in range(0, len(ids), size)]


def held_out(resident: Resident, adapter: str, records: Sequence[Record], max_length: int) -> tuple[np.ndarray, ...]:
    """Nats and tokens of each record's demonstration or document, each (N,); zeros for a record without one."""
    marks = demonstration_marks(resident, records, max_length)
    pieces = [(place, piece) for place, row in marks.items() for piece in windows(row, max_length) if len(piece[0]) > 1]
    nats, tokens = np.zeros(len(records)), np.zeros(len(records))
    likelihoods = marked_logprobs(resident, adapter, [piece for _, piece in pieces])
    for (place, _), found in zip(pieces, likelihoods, strict=True):
        nats[place] -= found.logprob
        tokens[place] += found.tokens
    return nats, tokens
