"""The data of a run: read once, checked, tokenised, handed to the trainer and recorded in the manifest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config import StageConfig
from align.data import RecordSet, load_records
from align.data.record_sets import refuse_leak
from align.data.rendering.template_notices import fold_when_asked, notice_lines
from align.data.token_cache import TokenisedDataset
from align.data.tokenise import TokenPlan, tokenise
from align.errors import DataError, UsageError
from align.training.ranks import Ranks

if TYPE_CHECKING:
    from datasets import Dataset

    from align.registry import Registry
    from align.training.stage import Stage


class TokenisedSplits(NamedTuple):
    """The rows to train on and those held out, in the columns that the stage's trainer reads."""

    train: Dataset
    held_out: Dataset | None = None

    def map(self, change: Callable[[Dataset], Dataset]) -> TokenisedSplits:
        """Return both with a change applied."""
        return TokenisedSplits(change(self.train), change(self.held_out) if self.held_out is not None else None)


class TrainingData:
    """The `data` and `eval_data` of a run, each read when it is first asked for; made by `Run` and by the plan.

    `notify` is called with each line about what was read, dropped and cut.
    """

    def __init__(
        self, stage: Stage, config: StageConfig, registry: Registry, ranks: Ranks, notify: Callable[[str], None]
    ) -> None:
        self._stage, self._config, self._registry, self._ranks = stage, config, registry, ranks
        self._notify = notify
        self.entries: list[dict[str, Any]] = []
        """name, digest, rows and dropped rows of each dataset that was read, for the manifest"""

    @cached_property
    def train(self) -> RecordSet:
        """The records to train on; raises DataError when no row is left."""
        return self._read(self._config.data_specs)

    @cached_property
    def held_out(self) -> RecordSet | None:
        """The records of `eval_data`, if any; raises DataError when they share rows with the training data."""
        train = self.train
        if not self._config.eval_specs:
            return None
        records = self._read(self._config.eval_specs)
        refuse_leak(train, records)
        return records

    def read(self) -> None:
        """Read all of it now, so that its errors come before heavy libraries are imported and weights loaded."""
        _ = self.train, self.held_out

    def tokenise(self, tokenizer: Any) -> TokenisedSplits:
        """Return the rows under a tokenizer, from the registry's cache when they were tokenised before."""
        for line in fold_when_asked(tokenizer, self._config.on_refused):
            self._notify(line)
        read = [part for part in (self.train, self.held_out) if part is not None]
        pairs = zip(read, self.entries, strict=True)
        return TokenisedSplits(*(self._tokenise_split(part, entry, tokenizer) for part, entry in pairs))

    def tokenise_records(self, records: RecordSet, tokenizer: Any, cache: Path) -> TokenisedDataset:
        """Return the rows of some records; rank 0 writes them into the cache, then the other ranks read them there.

        Where the ranks share no disk they find nothing, and each tokenises on its own.
        """
        stage, config = self._stage, self._config
        plan = TokenPlan(stage.view, config.token_length, config.on_long, stage.columns, config.on_refused)
        processes = getattr(config, "dataset_num_proc", None)
        return self._ranks.rank_zero_first(lambda: tokenise(records, tokenizer, plan, cache=cache, processes=processes))

    def fingerprint(self) -> dict[str, str]:
        """Return the digest of each dataset that was read."""
        return {f"data[{i}]": f"{entry['name']} {entry['digest']}" for i, entry in enumerate(self.entries)}

    def _read(self, specs: list[str]) -> RecordSet:
        roots = {"registry": self._registry.root}
        records = load_records(specs, view=self._stage.view, on_bad_row=self._config.on_bad_row, roots=roots)
        for note in records.notes:
            self._notify(note)
        if not records.records:
            raise DataError(f"{records.name}: 0 rows left to train on, dropped {records.dropped}; check the file")
        self.entries.append(records.describe())
        return records

    def _tokenise_split(self, records: RecordSet, entry: dict[str, Any], tokenizer: Any) -> Dataset:
        """Tokenise, record what was dropped in the manifest entry, and print it."""
        tokens = self.tokenise_records(records, tokenizer, self._registry.cache_dir / "tokens")
        entry |= {
            "dropped": entry["dropped"] | tokens.dropped, "noted": tokens.noted, "trained_rows": len(tokens.rows),
        }  # fmt: skip
        share = tokens.trained_tokens / max(tokens.tokens, 1)
        trained = f", {share:.0%} of them trained" if share else ""
        before = " (tokenised before)" if tokens.reused else ""
        lines = [f"{records.name}: {len(tokens.rows)} rows, {tokens.tokens} tokens{trained}{before}"]
        if tokens.shortened:
            lines.append(f"  shortened {tokens.shortened}: oldest turns left out to fit max_length")
        lines += [f"  dropped {count}: {reason}" for reason, count in tokens.dropped.items()]
        lines += [f"  {line}" for line in notice_lines(tokens, len(tokens.rows), tokenizer)]
        for line in lines:
            self._notify(line)
        return tokens.rows


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
