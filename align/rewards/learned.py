"""A reward model that shares nothing with the policy: completions reach it as text, in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from align.errors import DataError, shorten
from align.rewards import Opened, Place, reward
from align.rewards.weighted_sum import RewardSettings
from align.schema import Record

if TYPE_CHECKING:
    from align.data.fitting import Fit
    from align.registry import Checkpoint, Registry

Positive = Annotated[int, Field(gt=0)]


@reward(batched=True, opens=True)
def learned(place: Place, model: str, batch_size: Positive = 16) -> Opened:
    """The score of a reward model with a base of its own: an adapter over another one, or a whole classifier.

    Every completion is read as a whole answer, stop token included, under the reward model's own tokenizer and chat
    template. Of a conversation too long for it the oldest turns are cut, and an answer that is too long by itself is
    read as far as it fits. A reward model over the policy's own base costs less as `reward_model`.
    """
    from align.data.fitting import Fit
    from align.models.counting import context_length
    from align.models.heads import load_scorer
    from align.models.scorer import score_sequences

    checkpoint = place.registry.resolve(model)
    loaded = load_scorer(place.registry, checkpoint, place.precision)
    positions = context_length(loaded.base)
    fit = Fit(positions or _ANY_LENGTH, "truncate_left", spare_thoughts=True)
    place.say(
        f"{checkpoint.reference}: scores completions as text, {batch_size} at a time, with the tokenizer and chat "
        f"template it was trained with; its base {loaded.base.reference} is loaded beside the policy's"
    )

    def judge(records: Sequence[Record], completions: Sequence[str]) -> list[float]:
        pairs = zip(records, completions, strict=True)
        sequences = [_tokens(record, text, loaded.tokenizer, fit) for record, text in pairs]
        return score_sequences(loaded, sequences, batch_size).tolist()

    return Opened(judge, checkpoint)


_ANY_LENGTH = 1 << 30
"""for a model that does not say how many positions it holds"""


def reward_models(registry: Registry, reference: str | None) -> tuple[Checkpoint | None, list[RewardSettings]]:
    """What `reward_model` means: an adapter for the policy's base, or the reward that is a whole model of its own."""
    found = registry.resolve(reference) if reference else None
    if found is None or found.is_adapter:
        return found, []
    return None, [RewardSettings(name="learned", args={"model": found.reference})]


def _tokens(record: Record, completion: str, tokenizer: Any, fit: Fit) -> list[int]:
    from align.data.render_answers import unpaired_rows

    answered = replace(record, completion=[{"role": "assistant", "content": completion}])
    found = unpaired_rows([answered], tokenizer, fit)
    if not found.rows:
        found = unpaired_rows([answered], tokenizer, replace(fit, max_length=_ANY_LENGTH))
    if not found.rows:
        raise DataError(
            f"reward learned: cannot read the completion {shorten(completion)} of {record.where}: "
            f"{next(iter(found.dropped))}; take another reward model or row"
        )
    (row,) = found.rows
    return [*row["prompt_ids"], *row["completion_ids"]][: fit.max_length]
