"""Scores of tokens and answers: log-probabilities of those sampled and of a prompt's, token shift, and rewards."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from align.engine.adapter_groups import BASE, MIXED, ModelFacts, adapters_active, context_window, unwrap_peft
from align.engine.detokenizer import Detokenizer, TextBuffer, spell_token
from align.engine.protocol import Alternative, ShiftedToken, Token, TokenRules
from align.errors import UsageError
from align.schema import Messages, Record

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase

MOST_LOGITS = 1 << 26
"""logits held at once while prompts are scored: a quarter of a gigabyte in fp32"""

_ALTERNATIVES = 5
_REWARD = "__reward__"


def make_token(token: int, logits: Tensor, alternatives: int, tokenizer: Any) -> Token:
    """Return a token with its log-probability under logits (V,), and the likeliest alternatives."""
    logprobs = logits.log_softmax(dim=-1)
    text, raw, _ = spell_token(token, tokenizer)
    return Token(token, text, float(logprobs[token]), top_alternatives(logprobs, alternatives, tokenizer), raw)


def top_alternatives(logprobs: Tensor, count: int, tokenizer: Any) -> tuple[Alternative, ...]:
    """Return the largest of logprobs (V,), largest first."""
    top = logprobs.topk(min(count, logprobs.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(make_alternative(token, logprob, tokenizer) for token, logprob in pairs)


def make_alternative(token: int, logprob: float, tokenizer: Any) -> Alternative:
    """Return a token with its log-probability."""
    text, raw, _ = spell_token(token, tokenizer)
    return Alternative(text, logprob, raw, token)


class PromptScores:
    """The tokens of one prompt with their log-probabilities, collected chunk by chunk; the first has none."""

    def __init__(self, alternatives: int, first: int, tokenizer: Any) -> None:
        self._alternatives, self._tokenizer = alternatives, tokenizer
        self.tokens = [Token(first, spell_token(first, tokenizer).text, None, ())]

    def read(self, logits: Tensor, following: Tensor) -> None:
        """Add logits (N, V) at some positions, given the tokens (N,) that follow them."""
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(-1, following[:, None])
        ranks = (logits > chosen).sum(dim=-1) + 1
        likeliest = logits.topk(min(self._alternatives, logits.shape[-1]), dim=-1)
        columns = (following, (chosen - total)[:, 0], ranks, likeliest.indices, likeliest.values - total)
        for token, logprob, rank, ids, values in zip(*(column.tolist() for column in columns), strict=True):
            pairs = zip(ids, values, strict=True)
            alternatives = tuple(make_alternative(other, value, self._tokenizer) for other, value in pairs)
            self.tokens.append(Token(token, spell_token(token, self._tokenizer).text, logprob, alternatives, rank=rank))


def prompt_text(text: str | None, ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a prompt: as it was given, else its tokens decoded, control tokens by name."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if text is None else text


def locate_prompt(tokens: Sequence[Token], text: str | None, tokenizer: Any) -> tuple[str, list[Token]]:
    """Return the text of a prompt, and its tokens with their offsets in it.

    A token that the tokenizer adds around a text, such as BOS, has no bytes in it.
    """
    if text is None:
        return _decode_prompt(tokens, tokenizer)
    bare = tokenizer.encode(text, add_special_tokens=False)
    ids = [token.id for token in tokens]
    begin = next((start for start in range(len(ids) - len(bare) + 1) if ids[start : start + len(bare)] == bare), 0)
    end = begin + len(bare)
    decoded, located = _decode_prompt(tokens[begin:end], tokenizer)
    if decoded != text:  # a tokenizer that changes letters or spaces
        located = _take_offsets(located, text, tokenizer)
    before = [replace(token, raw=b"", start=0) for token in tokens[:begin]]
    after = [replace(token, raw=b"", start=len(text)) for token in tokens[end:]]
    return text, [*before, *located, *after]


def _decode_prompt(tokens: Sequence[Token], tokenizer: Any) -> tuple[str, list[Token]]:
    buffer = TextBuffer(tokenizer, (), rules=TokenRules(show_special_tokens=True))
    chunks = [*(buffer.push(token.id, token) for token in tokens), buffer.close()]
    return buffer.text, [token for chunk in chunks for token in chunk.tokens]


def _take_offsets(tokens: list[Token], text: str, tokenizer: Any) -> list[Token]:
    """Return tokens at the offsets the tokenizer gives, or within the text where it gives none."""
    if tokenizer.is_fast:
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) == len(tokens):
            return [replace(token, start=start) for token, (start, _) in zip(tokens, spans, strict=True)]
    return [replace(token, start=min(token.start, len(text))) for token in tokens]


def encode_answer(messages: Messages, loaded: LoadedBase) -> tuple[list[int], list[int]]:
    """Return the tokens before the answer that ends a conversation, and of the answer, as training renders them.

    Raises UsageError when it does not, does not fit the chat template, or is longer than the model takes.
    """
    from align.data.rendering.answer_rows import unpaired_rows
    from align.data.rendering.fit_length import LengthLimit

    if not messages or messages[-1]["role"] != "assistant":
        raise UsageError("the conversation does not end with an answer of the assistant; nothing can be said of it")
    window = context_window(loaded.model)
    record = Record(prompt=messages[:-1], completion=messages[-1:])
    rendered = unpaired_rows([record], loaded.tokenizer, LengthLimit(window or 1 << 30, ignore_lost_reasoning=True))
    if not rendered.rows:
        reason = next(iter(rendered.dropped))
        raise UsageError(f"the conversation cannot be read: {reason}; the model takes {window} tokens")
    return rendered.rows[0]["prompt_ids"], rendered.rows[0]["completion_ids"]


def compute_token_shift(
    loaded: LoadedBase, fact: ModelFacts, prompt_ids: list[int], answer_ids: list[int]
) -> list[ShiftedToken]:
    """Compare each token of an answer under a model and its base, from one pass where they can share a batch."""
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
    size = len(answer_ids)
    with torch.inference_mode():
        if fact.adapter_group == MIXED:
            ours, base = _answer_logits(model, ids.repeat(2, 1), size, [fact.adapter, BASE], MIXED)
        else:
            (ours,), (base,) = (_answer_logits(model, ids, size, [name], name) for name in (fact.adapter, BASE))
    # A character of several tokens is in the text of the last one; control tokens have their name.
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    texts = [tokenizer.decode([token]) if token in special else detokenizer.push(token) for token in answer_ids]
    texts[-1] = detokenizer.flush() + texts[-1]
    shifted = []
    for token, text, *logits in zip(answer_ids, texts, ours, base, strict=True):
        ours_here, base_here = (one.float().log_softmax(dim=-1) for one in logits)
        tops = (
            tuple((other.text, other.logprob) for other in top_alternatives(logprobs, _ALTERNATIVES, tokenizer))
            for logprobs in (ours_here, base_here)
        )
        shifted.append(ShiftedToken(text, float(ours_here[token]), float(base_here[token]), *tops))
    return shifted


def _answer_logits(model: Any, ids: Tensor, size: int, adapters: list[str], adapter_group: str) -> Tensor:
    """Return the logits (B, size, V) from which the last tokens of each row of ids (B, T) follow."""
    unwrapped = unwrap_peft(model)
    # The logits of a token stand one position before it; those of the prompt would fill the memory.
    keep = {"logits_to_keep": size + 1} if "logits_to_keep" in inspect.signature(unwrapped.forward).parameters else {}
    with adapters_active(model, adapters, adapter_group):
        logits: Tensor = unwrapped(input_ids=ids, **keep).logits
    return logits[:, -size - 1 : -1]


class RewardScorer:
    """A reward model as one more adapter on the base in memory; it is none of the models that generate."""

    def __init__(self, loaded: LoadedBase, reference: str) -> None:
        """Attach it; raises IntegrityError unless it is a complete reward model over this base and chat template."""
        from align.models.adapters import attach_adapter
        from align.models.heads import load_score_head
        from align.models.tokenizers import check_template
        from align.registry import open_registry

        checkpoint = (loaded.registry or open_registry()).resolve(reference)
        self._head = load_score_head(checkpoint).to(loaded.model.device)
        check_template(checkpoint, loaded.tokenizer, "the models beside it")
        attach_adapter(loaded, checkpoint, _REWARD)
        del loaded.adapters[checkpoint.reference]
        self._loaded = loaded

    def score(self, prompt_ids: list[int], answer_ids: list[int]) -> float:
        """Return the score of a conversation, read at the end token of its answer."""
        import torch

        model = self._loaded.model
        with torch.inference_mode(), adapters_active(model, [_REWARD], _REWARD):
            ids = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
            outputs = unwrap_peft(model).base_model(input_ids=ids)
            return float(self._head(outputs.last_hidden_state[:, -1].to(self._head.weight.dtype)))
