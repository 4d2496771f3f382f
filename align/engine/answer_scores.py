"""Scores of an answer that is already written: its token shift, and its reward-model score."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from align.engine.adapter_groups import BASE, MIXED, ModelFacts, adapters_active, context_window, unwrap_peft
from align.engine.detokenizer import Detokenizer
from align.engine.protocol import ShiftedToken
from align.engine.token_logprobs import top_alternatives
from align.errors import UsageError
from align.schema import Messages, Record

if TYPE_CHECKING:
    from torch import Tensor

    from align.models.adapters import LoadedBase

_ALTERNATIVES = 5
_REWARD = "__reward__"


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
