"""Reasoning in what models write: where it ends and the answer begins, in tokens and in text.

A reasoning model writes its reasoning before its answer, between marks that its chat template knows: `<think>`,
Mistral's `[THINK]`, the channels of gpt-oss and Gemma, and so on. The first mark may stand in the generation prompt,
and marks may be special tokens that decoding leaves out. `mark_reasoning` gives the text of tokens with reasoning
between `<think>` and `</think>`, so that everything that reads answers as text needs `split_reasoning` alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

OPEN, CLOSE = "<think>", "</think>"

_PUBLIC_MARKS = (
    (OPEN, CLOSE),
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""marks around reasoning in public chat templates; those of the tokenizer's own template are read from it"""
_NEXT_CHANNEL = "<|end|><|start|>assistant"
"""what gpt-oss writes between its channels"""
_TAIL_TOKENS = 64
"""tokens at the end of a prompt that may open reasoning"""
_QUESTION, _REASONING, _ANSWER = "question", "a3thought9", "a3answer9"


class SplitText(NamedTuple):
    """A text split into reasoning (None where there is none) and answer, which it may not come to."""

    reasoning: str | None
    answer: str
    finished: bool = True


class _Marks(NamedTuple):
    """The marks around reasoning, the text before an answer without it, and the ids of special tokens among them."""

    pairs: tuple[tuple[str, str], ...]
    header: str
    special_ids: frozenset[int]


def split_reasoning(text: str) -> SplitText:
    """Split a text into reasoning and answer; a text that ends inside its reasoning has no answer.

    A mark that is only mentioned is text: reasoning begins where the text does, or later at the beginning of a line.
    """
    return _split(text, _PUBLIC_MARKS)


def strip_reasoning(text: str) -> str:
    """Return the answer of a text, without its reasoning; empty for unfinished reasoning."""
    return split_reasoning(text).answer


def is_unfinished(text: str) -> bool:
    """Return whether a text ends inside its reasoning."""
    return not split_reasoning(text).finished


def mark_reasoning(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of a prompt's continuation, with reasoning that either opens in `<think>` marks.

    Special tokens are left out, as everywhere. Text without reasoning is what `tokenizer.decode` makes of it.
    """
    plain = str(tokenizer.decode(ids, skip_special_tokens=True))
    template = getattr(tokenizer, "chat_template", None)
    marks = _find_marks(tokenizer, template if isinstance(template, str) else "")
    tail = str(tokenizer.decode(prompt_ids[-_TAIL_TOKENS:], skip_special_tokens=False)).rstrip()
    opened = next((begin for begin, _ in marks.pairs if tail.endswith(begin)), "")
    text = _decode_keeping(tokenizer, ids, marks.special_ids) if marks.special_ids else plain
    if marks.header and text.lstrip().startswith(marks.header):
        return text.lstrip()[len(marks.header) :]
    split = _split(opened + text, marks.pairs)
    if split.reasoning is None:
        return plain
    reasoning = f"{OPEN}\n{split.reasoning}"
    return f"{reasoning}\n{CLOSE}\n\n{split.answer}" if split.finished else reasoning


def _split(text: str, marks: Iterable[tuple[str, str]]) -> SplitText:
    stripped = text.lstrip()
    for begin, end in marks:
        if stripped.startswith(begin):
            reasoning, closed, rest = stripped[len(begin) :].partition(end)
            if not closed:
                return SplitText(reasoning.strip(), "", finished=False)
            answer = rest.strip()
            end_of_marks = len(answer) - len(answer.rpartition(end)[2].lstrip())  # what opens behind it is never closed
            later = rf"(?ms)^[ \t]*{re.escape(begin)}.*?{re.escape(end)}\s*"
            answer = re.sub(later, "", answer[:end_of_marks]) + answer[end_of_marks:]
            return SplitText(reasoning.removesuffix(_NEXT_CHANNEL).strip(), answer)
    for _, end in marks:
        # A mark that was not opened closes what the prompt opened, unless a sentence only mentions it.
        if closing := re.search(rf"(?m)^[ \t]*{re.escape(end)}|{re.escape(end)}(?=\n|\w)", text):
            return SplitText(text[: closing.start()].strip(), text[closing.end() :].strip())
    return SplitText(None, text)


def _decode_keeping(tokenizer: Any, ids: Sequence[int], kept: frozenset[int]) -> str:
    """Return the text of tokens without special ones, except those to keep."""
    return "".join(
        "".join(map(tokenizer.convert_ids_to_tokens, run))
        if is_kept
        else tokenizer.decode(list(run), skip_special_tokens=True)
        for is_kept, run in itertools.groupby(ids, kept.__contains__)
    )


@lru_cache(maxsize=8)
def _find_marks(tokenizer: Any, template: str) -> _Marks:
    own, header = _measure_marks(tokenizer) if template else (None, "")
    pairs = (own, *_PUBLIC_MARKS) if own is not None and own not in _PUBLIC_MARKS else _PUBLIC_MARKS
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    channels = _NEXT_CHANNEL if "<|channel|>" in special.values() else ""
    marks = "".join([header, channels, *(mark for pair in pairs for mark in pair)])
    return _Marks(pairs, header, frozenset(token for token, text in special.items() if text.strip() and text in marks))


def _measure_marks(tokenizer: Any) -> tuple[tuple[str, str] | None, str]:
    """Return the marks that a template writes around reasoning, and its text before an answer without reasoning.

    A template that writes no reasoning, or takes no such conversation, has none of its own.
    """
    turn = {"role": "assistant", "content": _ANSWER}
    reasoning = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)
    question = {"role": "user", "content": _QUESTION}
    try:
        prompt = _write(tokenizer, [question], add_generation_prompt=True)
        plain, whole = (_write(tokenizer, [question, answer]) for answer in (turn, turn | reasoning))
    except Exception:  # chat templates raise what they like; without them there are the public marks
        return None, ""
    header = plain[len(prompt) : plain.find(_ANSWER)].strip() if plain.startswith(prompt) else ""
    begins, ends = whole.find(_REASONING), whole.find(_ANSWER)
    if not 0 <= begins < ends:
        return None, header
    opening = whole[len(prompt) : begins].strip() if whole.startswith(prompt) else ""
    closing = whole[begins + len(_REASONING) : ends].strip()
    if not opening or not closing:
        return None, "" if closing and closing in header else header
    # A template may write more around the public marks.
    public = (pair for pair in _PUBLIC_MARKS if opening.endswith(pair[0]) and closing.endswith(pair[1]))
    return next(public, (opening, closing)), "" if opening in header else header


def _write(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
