"""Packing: several demonstrations in one row, each attending to itself only, so that no computation goes to padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

_FIRST, _OTHER, _SECOND = (5, 6, 7, 8, 9, 10), (10, 5, 9, 6, 8, 7), (11, 12, 13, 14)
_EXACT, _ROUNDED = 1e-5, 2e-2
"""relative differences that are rounding, in float32 and in bfloat16"""

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""layers that see nothing of another sequence but through a mask; any other kind carries a state along"""


def pack_rows(rows: Dataset, max_length: int) -> Dataset:
    """Return demonstrations joined into rows of at most `max_length` tokens, by best fit; none is cut.

    Adds `seq_lengths`, the tokens of each demonstration in a row.
    """
    from datasets import disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    return pack_dataset(rows, max_length, strategy="bfd")


def packed_collator(tokenizer: Any) -> Any:
    """Return TRL's collator that joins a batch into one row without padding; positions restart in each sequence."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id, padding_free=True)


def prove_packing(model: Any, tokenizer: Any) -> None:
    """Raise UsageError when a sequence packed behind another sees it, or does not start at the first position.

    Its logits must not change with what stands before it, and must be those it has alone.
    """
    import torch

    collate = packed_collator(tokenizer)
    sequences: list[list[tuple[int, ...]]] = [[_FIRST, _SECOND], [_OTHER, _SECOND], [_SECOND]]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            behind, behind_other, alone = (
                _last_logits(model, collate, [list(ids) for ids in packed]) for packed in sequences
            )
    except Exception as error:  # what a model raises that cannot keep packed sequences apart is up to its kernels
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(
            f"packing: {model.config.model_type} does not take packed rows on this machine ({why}); give packing=false"
        ) from None
    finally:
        model.train(was_training)
    scale = alone.abs().max()
    leak, shift = (behind - behind_other).abs().max() / scale, (behind - alone).abs().max() / scale
    rounding = _EXACT if alone.dtype == torch.float32 else _ROUNDED
    # A state fades: what is left of it may be small and is no rounding.
    if leak > (_EXACT if carries_state(model) else rounding) or shift > max(rounding, 100 * _EXACT):
        raise UsageError(
            f"packing: in this model ({model.config.model_type}) a packed sequence is not what it is alone (its "
            f"logits change by {float(max(leak, shift)):.1e} of their size); give packing=false"
        )


def carries_state(model: Any) -> bool:
    """Return whether a layer carries a state from token to token: a convolution, a recurrence, linear attention."""
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    names = {type(module).__name__ for module in model.modules()}
    words = ("Conv1d", "Mamba", "Rwkv", "Recurrent", "LSTM", "DeltaNet")
    return bool(kinds - _ATTENTION) or any(word in name for name in names for word in words)


def _last_logits(model: Any, collate: Any, sequences: list[list[int]]) -> Any:
    """Return the logits of the last of some packed sequences."""
    batch = collate([{"input_ids": ids, "labels": ids} for ids in sequences])
    del batch["labels"]
    batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items()}
    return model(**batch, use_cache=False).logits[0, -len(sequences[-1]) :]
