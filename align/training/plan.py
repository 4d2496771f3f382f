"""What a run would do, without loading a weight: rows, tokens, steps and trainable parameters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from align.config import StageConfig, write
from align.data import load_records
from align.data.render import Rendered, render_demonstrations, render_preferences, render_prompts, render_texts
from align.models.adapters import tokenizer_home
from align.models.counting import count_trainable
from align.models.tokenizers import load_tokenizer
from align.schema import Record, View
from align.training.preflight import preflight

if TYPE_CHECKING:
    from align.registry import Registry
    from align.training.stage import Stage

_RENDERERS = {
    "demonstration": render_demonstrations,
    "preference": render_preferences,
    "prompt": render_prompts,
    "text": render_texts,
}


def print_plan(stage: Stage, config: StageConfig, registry: Registry) -> None:
    """Check model and data as a run would and print the plan."""
    parent = preflight(stage, config, registry)["model"]
    base = registry.resolve_base(parent) if parent.is_adapter else parent
    found = load_records(config.data, view=stage.view, on_bad_row=config.on_bad_row, roots={"registry": registry.root})
    tokenizer = load_tokenizer(tokenizer_home(parent, base), write)
    rendered = render_view(stage.view, found.records, tokenizer, config.max_length)
    batch = config.rows_per_step
    steps = math.ceil(math.ceil(len(rendered.rows) / batch) * config.num_train_epochs)
    trainable, total = count_trainable(parent, base, config.lora)
    lines = {
        "start": f"{parent.reference} (base {base.reference})",
        "data": f"{found.name}: {len(found.records)} rows, dropped {dict(found.dropped) | dict(rendered.dropped)}",
        "tokens": f"{rendered.tokens} an epoch, {rendered.trained_tokens} of them trained",
        "steps": f"{steps if config.max_steps < 0 else config.max_steps} of {batch} rows",
        "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.2%})",
    }
    for key, text in lines.items():
        write(f"{key:<10} {text}")


def render_view(view: View, records: list[Record], tokenizer: Any, max_length: int) -> Rendered:
    """Render records as the stages with this view do."""
    return _RENDERERS[view](records, tokenizer, max_length)
