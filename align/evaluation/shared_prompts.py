"""Log-probs of many continuations of each prompt: every prompt is read once, several prompts in one pass.

Where the model takes packed rows nothing is padded. Other models continue a cache of left-padded prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from align.engine.adapter_groups import adapters_active, unwrap_peft
from align.errors import IntegrityError
from align.evaluation.scorers import Likelihood
from align.models.adapters import LoadedBase

if TYPE_CHECKING:
    from align.models.decoding import Decoder
    from align.models.prefixes import PackedBatch

Continuation = tuple[Sequence[int], Sequence[int]]
"""token ids of a prompt, and of what follows it"""

MAX_LOGITS = 1 << 27
"""elements of one pass: half a gigabyte in fp32, of which a divergence needs a few at once"""
_MAX_ROWS = 64
"""continuations of one pass over a cache"""
_MAX_CACHED = 1 << 14
"""tokens of prompts whose keys and values are held, once for every continuation"""
_MAX_PACKED = 1 << 12
"""tokens of a packed row, prompts and continuations together"""


def shared_prompt_logprobs(loaded: LoadedBase, adapter: str, rows: Sequence[Continuation]) -> list[Likelihood]:
    """Return the log-prob of each continuation; none at all for a model that cannot go on twice from a prompt."""
    from align.models.packed import accepts_packed_rows, plain_head

    model = unwrap_peft(loaded.model)
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]), tuple(rows[index][0]), index))
    longest = max(len(before) + len(after) for before, after in rows)
    decoder = None
    if plain_head(model) is not None and accepts_packed_rows(model, longest):
        batches = _packed_batches(model, rows, order)
    elif decoder := _decoder(model):
        batches = _cached_batches(model, rows, order)
    else:
        return []
    results: dict[int, Likelihood] = {}
    for indices in batches:
        batch = [rows[index] for index in indices]
        with adapters_active(loaded.model, (), adapter):
            found = _read_cached(decoder, loaded, batch) if decoder else _read_packed(model, batch)
        results |= dict(zip(indices, found, strict=True))
    return [results[index] for index in range(len(rows))]


def _decoder(model: Any) -> Decoder | None:
    """Return what continues a cache by several tokens at once; None for a model that cannot."""
    from align.models.decoding import Decoder

    try:
        decoder = Decoder(model)
    except IntegrityError:
        return None
    return decoder if decoder.can_prefill_in_chunks else None


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _packed_batches(model: Any, rows: Sequence[Continuation], order: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of `order`, those of one prompt together, while a packed row stays within its bounds."""
    most = min(_MAX_PACKED, MAX_LOGITS // _vocabulary(model))
    batch: list[int] = []
    size, before = 0, None
    for index in order:
        prompt, after = rows[index]
        added = len(after) + (len(prompt) if prompt != before else 0)
        if batch and size + added > most:
            yield batch
            batch, size, added = [], 0, len(prompt) + len(after)
        batch.append(index)
        size, before = size + added, prompt
    if batch:
        yield batch


def _pack_continuations(rows: Sequence[Continuation], device: Any) -> PackedBatch:
    """Lay out prompts and continuations; `rows` and `columns` of the batch say whose token a target is, and which one.

    The last token of a continuation is predicted and never read.
    """
    from align.models.prefixes import IGNORED, TokenRow, pack

    sequences = [
        TokenRow([*before, *after[:-1]], [IGNORED] * len(before) + list(after), row, 1 - len(before))
        for row, (before, after) in enumerate(rows)
    ]
    return pack(sequences, [tuple(before) for before, _ in rows], device)


def _read_packed(model: Any, rows: Sequence[Continuation]) -> list[Likelihood]:
    """Return the log-probs of continuations in one pass over one row of tokens."""
    import torch

    from align.models.packed import backbone_inputs

    packed = _pack_continuations(rows, model.device)
    with torch.no_grad():
        hidden = model.base_model(**backbone_inputs(packed)).last_hidden_state[0]
        sources, owners = packed.sources.unique(return_inverse=True)  # first tokens follow one state
        logprobs = model.get_output_embeddings()(hidden[sources]).float().log_softmax(-1)
        values = logprobs[owners, packed.targets]
    sums = values.new_zeros(len(rows)).index_add_(0, packed.rows, values).tolist()
    return [Likelihood(value, len(after)) for value, (_, after) in zip(sums, rows, strict=True)]


def _cached_batches(model: Any, rows: Sequence[Continuation], order: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of `order`, longest prompts last, in batches within the three bounds above."""
    vocabulary = _vocabulary(model)
    batch: list[int] = []
    for index in order:
        before, _ = rows[index]
        longest = max(len(rows[one][1]) for one in (*batch, index))
        size = len(batch) + 1
        if batch and (size > _MAX_ROWS or size * longest * vocabulary > MAX_LOGITS or size * len(before) > _MAX_CACHED):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _read_cached(decoder: Decoder, loaded: LoadedBase, rows: Sequence[Continuation]) -> list[Likelihood]:
    """Return the log-probs of a batch of continuations: one pass over the different prompts, one over what follows."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from align.models.decoding import CachedRows, pad_left

    device = loaded.model.device
    prompts = {tuple(before): None for before, _ in rows}
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    owners = torch.tensor([numbers[tuple(before)] for before, _ in rows], device=device)
    ids, mask = pad_left(list(prompts), loaded.tokenizer.pad_token_id, device)
    after = pad_sequence([torch.tensor(list(tokens)) for _, tokens in rows], batch_first=True).to(device)  # (B, N)
    counts = torch.tensor([len(tokens) for _, tokens in rows], device=device)
    real = torch.arange(after.shape[1], device=device) < counts[:, None]
    with torch.no_grad():
        cached = CachedRows(mask)
        logits = decoder.prefill(cached, ids, 0, ids.shape[1])[owners]  # (B, 1, V): of the first token
        if after.shape[1] > 1:
            cached.select(owners)
            cached.mask = torch.cat([cached.mask, real[:, :-1].to(mask.dtype)], dim=1)
            whole = torch.cat([ids[owners], after[:, :-1]], dim=1)
            later = decoder.prefill(cached, whole, ids.shape[1], whole.shape[1], after.shape[1] - 1)
            logits = torch.cat([logits, later], dim=1)
        logprobs = logits.float().log_softmax(-1).gather(-1, after[..., None])[..., 0]
    sums = (logprobs * real).sum(dim=1).tolist()
    return [Likelihood(value, len(tokens)) for value, (_, tokens) in zip(sums, rows, strict=True)]
