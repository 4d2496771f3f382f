"""A reward model with a base of its own: completions reach it as text, tokenised by its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from align.errors import DataError, shorten
from align.rewards import LoadedReward, RewardContext, reward
from align.rewards.weighted_rewards import RewardSettings
from align.schema import Record

if TYPE_CHECKING:
    from align.data.rendering.fit_length import LengthLimit
    from align.registry import Checkpoint, Registry

Positive = Annotated[int, Field(gt=0)]


@reward(batched=True, loads_model=True)
def learned(context: RewardContext, model: str, batch_size: Positive = 16) -> LoadedReward:
    """The score of a reward model with a base of its own: an adapter over another one, or a whole classifier.

    Every completion is scored as a whole answer, stop token included, with the reward model's own tokenizer and chat
    template. A conversation too long for it loses its oldest turns; an answer too long by itself is cut at the end.
    A reward model over the policy's own base costs less as `reward_model`.
    """
    from align.data.rendering.fit_length import LengthLimit
    from align.models.base_files import context_length
    from align.models.head_scores import score_sequences
    from align.models.heads import load_scorer

    checkpoint = context.registry.resolve(model)
    loaded = load_scorer(context.registry, checkpoint, context.precision)
    positions = context_length(loaded.base)
    fit = LengthLimit(positions or _ANY_LENGTH, "truncate_left", ignore_lost_reasoning=True)
    context.print_line(
        f"{checkpoint.reference}: scores completions as text, {batch_size} at a time, with the tokenizer and chat "
        f"template it was trained with; its base {loaded.base.reference} is loaded beside the policy's"
    )

    def score(records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        pairs = zip(records, completions, strict=True)
        sequences = [_tokens(record, text, loaded.tokenizer, fit) for record, text in pairs]
        return score_sequences(loaded, sequences, batch_size).tolist()

    return LoadedReward(score, checkpoint)


_ANY_LENGTH = 1 << 30
"""tokens, for a model whose config sets no number of positions"""


def resolve_reward_model(registry: Registry, reference: str | None) -> tuple[Checkpoint | None, list[RewardSettings]]:
    """Return the reward model as an adapter for the policy's base, or else the `learned` reward that holds it whole."""
    checkpoint = registry.resolve(reference) if reference else None
    if checkpoint is None or checkpoint.is_adapter:
        return checkpoint, []
    return None, [RewardSettings(name="learned", args={"model": checkpoint.reference})]


def _tokens(record: Record, completion: str, tokenizer: Any, fit: LengthLimit) -> list[int]:
    from align.data.rendering.answer_rows import unpaired_rows

    answered = replace(record, completion=[{"role": "assistant", "content": completion}])
    rendered = unpaired_rows([answered], tokenizer, fit)
    if not rendered.rows:
        rendered = unpaired_rows([answered], tokenizer, replace(fit, max_length=_ANY_LENGTH))
    if not rendered.rows:
        raise DataError(
            f"reward learned: cannot read the completion {shorten(completion)} of {record.where}: "
            f"{next(iter(rendered.dropped))}; take another reward model or row"
        )
    (row,) = rendered.rows
    return [*row["prompt_ids"], *row["completion_ids"]][: fit.max_length]
