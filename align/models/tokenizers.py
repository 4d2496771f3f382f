"""A checkpoint's tokenizer with the pad token and chat template every stage relies on, and the tokens that end answers.

`generation_config.json` often lists tokens that neither the tokenizer nor the template knows as an end: GLM-4 begins
the user's next turn with one. Without them a model answers, and then writes what the user says next.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rendering.chat_template import stop_token_ids
from align.data.rendering.template_notices import FOLD
from align.errors import IntegrityError
from align.models.quiet_libraries import quiet_libraries
from align.registry import Checkpoint
from align.registry.fingerprints import digest_json, template_digest

if TYPE_CHECKING:
    from align.models.adapters import LoadedBase

# For tokenizers that bring no template: roles as plain words, every turn closed by the tokenizer's own EOS.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)

_CHOICES: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()

_SPARE = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_ZERO_BYTE = ("<0x00>", "\u0100")
"""as sentencepiece and byte-level tokenizers write it"""

_STOP_FILES = ("generation_config.json", "config.json")
"""where a base says what ends a text; as in transformers, the second counts where the first says nothing"""
_MOST_TOLD = 8


def load_tokenizer(checkpoint: Checkpoint, print_line: Callable[[str], None] | None = None) -> Any:
    """Load the checkpoint's tokenizer, with a pad token and a chat template in any case; choices are printed."""
    tokenizer = _read(checkpoint.location, checkpoint.revision)
    if tokenizer.eos_token_id is None:
        raise IntegrityError(
            f"{checkpoint.reference}: its tokenizer has no EOS token, so no model could learn to stop; "
            "set eos_token in tokenizer_config.json"
        )
    chosen = _CHOICES.setdefault(tokenizer, {})
    notices = []
    if tokenizer.pad_token_id is None:
        # A special token that never ends a turn, so that padding is no stop; EOS when there is none.
        vocabulary = tokenizer.get_vocab().keys() - {tokenizer.eos_token}
        spare = (name for name in (*_SPARE, tokenizer.unk_token) if name in vocabulary)
        tokenizer.pad_token = chosen["pad_token"] = str(next(spare, tokenizer.eos_token))
        notices.append(f"no pad token; {tokenizer.pad_token!r} is used")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
        chosen["chat_template"] = "turns as 'Role: text', each ended by EOS"
        notices.append("no chat template; turns are written as 'Role: text' and end with EOS")
    if print_line is not None:
        for notice in notices:
            print_line(f"{checkpoint.reference}: {notice}")
    return tokenizer


def describe_special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Return the EOS and pad token, and under `chosen` what was chosen here because the tokenizer did not say."""
    chosen = dict(_CHOICES.get(tokenizer, {}))
    return {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "chosen": chosen}


def fold_like(checkpoint: Checkpoint, tokenizer: Any) -> None:
    """Fold system turns as a checkpoint does whose template is this tokenizer's but for that.

    Where there is no system turn, both write the same; so the base can be read beside what was trained on it.
    """
    trained = (checkpoint.manifest or {}).get("template_digest")
    folded = f"{FOLD}{tokenizer.chat_template}"
    if trained == template_digest(folded):
        tokenizer.chat_template = folded


def check_template(checkpoint: Checkpoint, tokenizer: Any, whose: str) -> None:
    """Raise IntegrityError, with both digests, when a checkpoint was trained with another chat template than this."""
    trained = (checkpoint.manifest or {}).get("template_digest")
    ours = template_digest(tokenizer.chat_template)
    if trained not in (None, ours):
        raise IntegrityError(
            f"{checkpoint.reference}: trained with the chat template {trained}, {whose} has {ours}; it would read "
            "text written in a way it never saw; use models of one template together, or train it again from this one"
        )


def check_tokenizer_size(tokenizer: Any, rows: int | None, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Raise IntegrityError when a tokenizer has more tokens than its base has embeddings (None: not known)."""
    if rows is not None and len(tokenizer) > rows:
        raise IntegrityError(
            f"{checkpoint.reference}: its tokenizer has {len(tokenizer)} tokens, the base {base.reference} only "
            f"{rows} embeddings; use the tokenizer the base was made with"
        )


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Any, base: Checkpoint) -> None:
    """Raise IntegrityError when an adapter's tokenizer gives other ids to its base's tokens; more may be added."""
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(base).get_vocab()
    if any(ours.get(token) != index for token, index in theirs.items()):
        raise IntegrityError(
            f"{checkpoint.reference}: its tokenizer has the vocabulary {digest_json(ours)}, that of its base "
            f"{base.reference} is {digest_json(theirs)}; it would read other words than it was trained on; put back "
            "the tokenizer it was trained with"
        )


def choose_pad_token(tokenizer: Any, reference: str, print_line: Callable[[str], None]) -> None:
    """Give a tokenizer that pads with EOS another pad token, one that never ends a text.

    transformers scores a text at its last token that is not padding: padded with EOS that would be the token before the
    end. The zero byte is taken where nothing better is spare; it is only ever written under a mask.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    spare = (name for name in (*_SPARE, tokenizer.unk_token, *_ZERO_BYTE) if name in vocabulary)
    ordinary = (name for name in reversed(list(vocabulary)) if name not in tokenizer.all_special_tokens)
    never_last = (name for names in (spare, ordinary) for name in names if name != tokenizer.eos_token)
    tokenizer.pad_token = next(never_last)
    _CHOICES.setdefault(tokenizer, {})["pad_token"] = tokenizer.pad_token
    print_line(f"{reference}: its pad token is its EOS token, which is scored; {tokenizer.pad_token!r} pads instead")


def _read(location: str, revision: str | None) -> Any:
    quiet_libraries()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    except Exception as error:  # whatever files that are not what they seem make the libraries raise
        if Path(location).is_dir():
            names = sorted(path.name for path in Path(location).iterdir())[:8]
            found, remedy = f"it holds {', '.join(names) or 'nothing'}", "save the tokenizer beside the weights"
        else:
            found = next(filter(None, str(error).splitlines()), type(error).__name__).rstrip(".")
            remedy = "check the name and the network (HF_HUB_OFFLINE=1 asks only for what was downloaded before)"
        raise IntegrityError(f"{location}: no tokenizer could be read; {found}; {remedy}") from None


@dataclass(frozen=True)
class StopTokens:
    """The ids of all tokens that end an answer, and a line on each thing about them that a user may not expect."""

    ids: list[int]
    notes: list[str] = field(default_factory=list)


def find_stop_tokens(loaded: LoadedBase) -> StopTokens:
    """Return the union of the stop tokens of tokenizer, chat template and the base's generation_config.json.

    Ids that are no whole numbers or that the tokenizer lacks are left out, with a note.
    """
    stops = stop_token_ids(loaded.tokenizer)
    file, listed, problem = read_listed_stops(loaded.base)
    notes = [problem] if problem else []
    valid = [token for token in listed if type(token) is int and 0 <= token < len(loaded.tokenizer)]
    if wrong := [token for token in listed if token not in valid]:
        names = ", ".join(map(repr, wrong))
        notes.append(f"{file} names {names} as the end of a text, which is no token here; it ends no answer")
    texts_of = {token: repr(loaded.tokenizer.decode([token])) for token in dict.fromkeys(valid) if token not in stops}
    added = list(texts_of)
    if len(valid) == len(added) == 1 and _is_leftover(loaded, added[0]):
        notes.append(
            f"{file} ends texts with token {added[0]} {texts_of[added[0]]}, the default of this architecture and an "
            "ordinary token here; it ends no answer"
        )
        added = []
    if added:
        texts = ", ".join(f"{texts_of[token]} ({token})" for token in added[:_MOST_TOLD])
        texts += f" and {len(added) - _MOST_TOLD} more" if len(added) > _MOST_TOLD else ""
        notes.append(f"answers also end at {texts}, as its {file} says")
    return StopTokens([*stops, *added], [f"{loaded.base.reference}: {note}" for note in notes])


def find_stop_ids(loaded: LoadedBase, print_line: Callable[[str], None]) -> list[int]:
    """Return the ids of `find_stop_tokens`; its notes are printed by `print_line`."""
    stops = find_stop_tokens(loaded)
    for note in stops.notes:
        print_line(note)
    return stops.ids


def read_listed_stops(base: Checkpoint) -> tuple[str, list[Any], str | None]:
    """Return the file that says where a base's texts end, what it lists, and what was wrong with a file."""
    problem = None
    for name in _STOP_FILES:
        try:
            written = _read_json(base, name)
        except (OSError, ValueError) as error:
            what = str(error).splitlines()[0][:100]
            problem = problem or f"{name} cannot be read ({what}); the tokens that it lists end no answer"
            continue
        value = written.get("eos_token_id", (written.get("text_config") or {}).get("eos_token_id"))
        if value is not None:
            return name, value if isinstance(value, list) else [value], problem
    return _STOP_FILES[0], [], problem


def _read_json(base: Checkpoint, name: str) -> dict[str, Any]:
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
