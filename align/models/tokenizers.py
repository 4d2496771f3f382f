"""Loading a checkpoint's tokenizer with the pad token, stop token and chat template every stage relies on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import IntegrityError
from align.models.quiet_libraries import quiet_libraries
from align.registry import Checkpoint
from align.registry.fingerprints import digest_json, template_digest

# For tokenizers that bring no template: roles as plain words, every turn closed by the tokenizer's own EOS.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)

_CHOICES: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()

_SPARE = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
_ZERO_BYTE = ("<0x00>", "\u0100")
"""as sentencepiece and byte-level tokenizers write it"""


def load_tokenizer(checkpoint: Checkpoint, print_line: Callable[[str], None] | None = None) -> Any:
    """Load the checkpoint's tokenizer, with a pad token and a chat template in any case; choices are printed.

    Raises IntegrityError when there is no tokenizer, or no EOS token to stop on.
    """
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
    from align.data.rendering.template_notices import FOLD

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
    """Raise IntegrityError, with both digests, when an adapter's tokenizer gives other ids than its base's own.

    Tokens may have been added; those that the base knows must have kept their ids.
    """
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
