"""The tokens that end an answer: what tokenizer and chat template name, and what the base's own files add to it.

`generation_config.json` often lists tokens that neither the tokenizer nor the template knows as an end: GLM-4 begins
the user's next turn with one. Without them a model answers, and then writes what the user says next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.registry import Checkpoint

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase

_FILES = ("generation_config.json", "config.json")
"""Where a base says it; as in transformers, the second counts where the first is absent or says nothing."""

_MOST_TOLD = 8


@dataclass(frozen=True)
class StopTokens:
    """The ids of all tokens that end an answer, and a line on each thing about them that a user may not expect."""

    ids: list[int]
    notes: list[str] = field(default_factory=list)


def find_stop_tokens(loaded: LoadedBase) -> StopTokens:
    """Return the union of the stop tokens of tokenizer, chat template and the base's generation_config.json.

    Ids that are no whole numbers or that the tokenizer lacks are left out, with a note.
    """
    from align.data.rendering.conversation_rows import stop_token_ids

    stops = stop_token_ids(loaded.tokenizer)
    file, listed, problem = _listed(loaded.base)
    reference = loaded.base.reference
    notes = [f"{reference}: {problem}"] if problem else []
    size = len(loaded.tokenizer)
    valid = [token for token in listed if type(token) is int and 0 <= token < size]
    if wrong := [token for token in listed if token not in valid]:
        names = ", ".join(map(repr, wrong))
        notes.append(
            f"{reference}: {file} names {names} as the end of a text, which is no token here; it ends no answer"
        )
    texts_of = {token: repr(loaded.tokenizer.decode([token])) for token in dict.fromkeys(valid) if token not in stops}
    added = list(texts_of)
    if len(valid) == len(added) == 1 and _is_leftover(loaded, added[0]):
        notes.append(
            f"{reference}: {file} ends texts with token {added[0]} {texts_of[added[0]]}, the default of this "
            "architecture and an ordinary token here; it ends no answer"
        )
        added = []
    if added:
        texts = ", ".join(f"{texts_of[token]} ({token})" for token in added[:_MOST_TOLD])
        texts += f" and {len(added) - _MOST_TOLD} more" if len(added) > _MOST_TOLD else ""
        notes.append(f"{reference}: answers also end at {texts}, as its {file} says")
    return StopTokens([*stops, *added], notes)


def find_stop_ids(loaded: LoadedBase, print_line: Callable[[str], None]) -> list[int]:
    """Return the ids of `find_stop_tokens`; its notes are printed by `print_line`."""
    stops = find_stop_tokens(loaded)
    for note in stops.notes:
        print_line(note)
    return stops.ids


def read_listed_stops(base: Checkpoint) -> list[Any]:
    """Return what the files beside a base list as the end of a text, as it stands there."""
    return _listed(base)[1]


def _listed(base: Checkpoint) -> tuple[str, list[Any], str | None]:
    """Return the file that says where texts end, what it lists, and what was wrong with a file."""
    problem = None
    for name in _FILES:
        try:
            written = _read(base, name)
        except (OSError, ValueError) as error:
            what = str(error).splitlines()[0][:100]
            problem = problem or f"{name} cannot be read ({what}); the tokens that it lists end no answer"
            continue
        value = written.get("eos_token_id", (written.get("text_config") or {}).get("eos_token_id"))
        if value is not None:
            return name, value if isinstance(value, list) else [value], problem
    return _FILES[0], [], problem


def _read(base: Checkpoint, name: str) -> dict[str, Any]:
    """Read a JSON object beside the weights, empty when there is none; OSError or ValueError for anything else."""
    path: Path | str | None = Path(base.location) / name
    if base.is_hub:
        from transformers.utils import cached_file

        path = cached_file(base.location, name, revision=base.revision, _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).is_file():
        return {}
    written = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise ValueError("not a JSON object")
    return written


def _is_leftover(loaded: LoadedBase, token: int) -> bool:
    """Return whether a lone id is the default of the model's config class and an ordinary token here."""
    config = type(loaded.model.config.get_text_config())
    is_ordinary = token not in loaded.tokenizer.added_tokens_decoder
    return is_ordinary and getattr(config(), "eos_token_id", None) == token
