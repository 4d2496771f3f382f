"""Tokenised rows as the columns the trainers read, so that they tokenise nothing themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from align.data.rendering.fold_system import fold_when_asked
from align.data.rendering.template_notices import notice_lines
from align.data.tokenise import tokenise

if TYPE_CHECKING:
    from datasets import Dataset

    from align.data import RecordSet
    from align.data.token_cache import TokenisedDataset
    from align.training.run import Run


def token_sets(
    run: Run, train: RecordSet, held_out: RecordSet | None, tokenizer: Any
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those held out, in the columns that the stage asks for.

    They come from the registry's cache when they were tokenised before; what was dropped goes into the manifest.
    """
    for line in fold_when_asked(tokenizer, run.config.on_refused):
        run.say(line)
    first = _token_set(run, train, tokenizer)
    return first, _token_set(run, held_out, tokenizer) if held_out is not None else None


def stand_in() -> Dataset:
    """One row of plain text for a trainer that insists on tokenising what it is constructed with.

    Its prompt is empty, so that no tokenizer can merge it with the answer and warn about it.
    """
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "", "chosen": "b", "rejected": "c"}])


def mismatched(rows: Dataset, batch_size: int, seed: int) -> Dataset:
    """Answers with a verdict, shuffled, each beside the answer to another prompt of its batch as `KL_completion_ids`.

    The KL of a batch is estimated on prompts whose answers were passed on by one, so the rows must be read in order.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    answers = rows.shuffle(seed=seed).flatten_indices()
    ids = answers["completion_ids"]
    starts = range(0, len(ids), batch_size)
    passed_on = [
        ids[start - 1 if place == start and start + 1 >= len(ids) else place - 1 if place > start else stop - 1]
        for start, stop in ((start, min(start + batch_size, len(ids))) for start in starts)
        for place in range(start, stop)
    ]
    return answers.add_column("KL_completion_ids", passed_on)


def _token_set(run: Run, records: RecordSet, tokenizer: Any) -> Dataset:
    plan = run.stage.token_plan(run.config)
    processes = getattr(run.config, "dataset_num_proc", None)

    cache = run.registry.cache_dir / "tokens"

    def tokens() -> TokenisedDataset:
        return tokenise(records, tokenizer, plan, cache=cache, processes=processes)

    # Rank 0 writes, then the others read. Where they share no disk they find nothing, and each writes it on its own.
    written: list[TokenisedDataset] = []
    run.ranks.share(lambda: written.append(tokens()))
    found = written[0] if written else tokens()
    run.count_dropped(records, found)
    for line in notice_lines(found, len(found.rows), tokenizer):
        run.say(f"  {line}")
    return found.rows
