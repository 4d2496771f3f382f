"""Reasoning in what models write: where it ends and the answer begins, in tokens and in text.

A model that reasons writes its thought before its answer, between marks that its chat template knows: `<think>`,
Mistral's `[THINK]`, the channels of gpt-oss and Gemma, and so on. The first mark may stand in the generation prompt,
and marks may be special tokens that decoding leaves out. `mark_thoughts` gives the text of some tokens with every
thought between `<think>` and `</think>`, so that everything that reads answers as text needs `split_thought` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

OPEN, CLOSE = "<think>", "</think>"

_MARKS = (
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
"""what opens and closes a thought in public chat templates; those of the tokenizer's own template are read from it"""
_NEXT_CHANNEL = "<|end|><|start|>assistant"
"""what gpt-oss writes between its channels"""
_TAIL = 64
"""tokens at the end of a prompt that may open a thought"""
_ASK, _THOUGHT, _ANSWER = "question", "a3thought9", "a3answer9"


class Thought(NamedTuple):
    """A text in two parts."""

    reasoning: str | None
    """None where there is none"""
    answer: str
    """empty where the text ends inside its reasoning"""
    finished: bool = True
    """whether the text comes to its answer"""


class _Marks(NamedTuple):
    """What a tokenizer's chat template writes around a thought."""

    pairs: tuple[tuple[str, str], ...]
    header: str
    """what stands before an answer without a thought, such as the name of a channel"""
    kept: frozenset[int]
    """ids of special tokens that are marks, which decoding would leave out"""


def split_thought(text: str) -> Thought:
    """Split a text into reasoning and answer; a text that ends inside its reasoning has no answer.

    A mark that is only mentioned is text: a thought begins where the text does, later ones at the beginning of a line.
    """
    return _split(text, _MARKS)


def answer_of(text: str) -> str:
    """Return what a text says once its reasoning is over; an unfinished thought says nothing."""
    return split_thought(text).answer


def is_unfinished(text: str) -> bool:
    """Whether a text ends inside its reasoning."""
    return not split_thought(text).finished


def mark_thoughts(tokenizer: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """Return the text of tokens that go on from a prompt, a thought that it opens or they hold in `<think>` marks.

    Special tokens are left out, as everywhere. Text without a thought is what `tokenizer.decode` makes of it.
    """
    plain = str(tokenizer.decode(ids, skip_special_tokens=True))
    marks = _marks_of(tokenizer, _template_of(tokenizer))
    tail = str(tokenizer.decode(prompt_ids[-_TAIL:], skip_special_tokens=False)).rstrip()
    opened = next((begin for begin, _ in marks.pairs if tail.endswith(begin)), "")
    text = _decode(tokenizer, ids, marks.kept) if marks.kept else plain
    if marks.header and text.lstrip().startswith(marks.header):
        return text.lstrip()[len(marks.header) :]
    found = _split(opened + text, marks.pairs)
    if found.reasoning is None:
        return plain
    thought = f"{OPEN}\n{found.reasoning}"
    return f"{thought}\n{CLOSE}\n\n{found.answer}" if found.finished else thought


def _split(text: str, marks: Iterable[tuple[str, str]]) -> Thought:
    begun = text.lstrip()
    for begin, end in marks:
        if begun.startswith(begin):
            reasoning, closed, rest = begun[len(begin) :].partition(end)
            if not closed:
                return Thought(reasoning.strip(), "", finished=False)
            return Thought(reasoning.removesuffix(_NEXT_CHANNEL).strip(), _without_more(rest.strip(), begin, end))
    for _, end in marks:
        # A mark that was not opened closes what the prompt opened, unless a sentence only mentions it.
        if closing := re.search(rf"(?m)^[ \t]*{re.escape(end)}|{re.escape(end)}(?=\n|\w)", text):
            return Thought(text[: closing.start()].strip(), text[closing.end() :].strip())
    return Thought(None, text)


def _without_more(answer: str, begin: str, end: str) -> str:
    """An answer without the thoughts between its parts."""
    kept, place = "", 0
    for opening in re.finditer(rf"(?m)^[ \t]*{re.escape(begin)}", answer):
        if opening.start() >= place:
            closing = answer.find(end, opening.end())
            if closing < 0:
                break
            kept += answer[place : opening.start()]
            place = closing + len(end)
            place += len(answer[place:]) - len(answer[place:].lstrip())
    return kept + answer[place:]


def _decode(tokenizer: Any, ids: Sequence[int], kept: frozenset[int]) -> str:
    """The text of tokens without special ones but those that are kept."""
    pieces: list[str] = []
    plain: list[int] = []
    for token in ids:
        if token in kept:
            pieces += [tokenizer.decode(plain, skip_special_tokens=True), tokenizer.convert_ids_to_tokens(token)]
            plain = []
        else:
            plain.append(token)
    return "".join([*pieces, tokenizer.decode(plain, skip_special_tokens=True)])


def _template_of(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else ""


@lru_cache(maxsize=8)
def _marks_of(tokenizer: Any, template: str) -> _Marks:
    own, header = _derive(tokenizer) if template else (None, "")
    pairs = (own, *_MARKS) if own is not None and own not in _MARKS else _MARKS
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    channels = _NEXT_CHANNEL if "<|channel|>" in special.values() else ""
    known = "".join([header, channels, *(part for pair in pairs for part in pair)])
    return _Marks(pairs, header, frozenset(token for token, text in special.items() if text.strip() and text in known))


def _derive(tokenizer: Any) -> tuple[tuple[str, str] | None, str]:
    """The marks that a template writes around a thought, and what it writes before an answer without one.

    A template that writes no reasoning, or takes no such conversation, has none of its own.
    """
    turn = {"role": "assistant", "content": _ANSWER}
    thought = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT)
    asked = [{"role": "user", "content": _ASK}]
    try:
        prompt = _render(tokenizer, asked, add_generation_prompt=True)
        plain, whole = (_render(tokenizer, [*asked, answer]) for answer in (turn, turn | thought))
    except Exception:  # chat templates raise what they like; without them there are the known marks
        return None, ""
    header = plain[len(prompt) : plain.find(_ANSWER)].strip() if plain.startswith(prompt) else ""
    begins, ends = whole.find(_THOUGHT), whole.find(_ANSWER)
    if not 0 <= begins < ends:
        return None, header
    opening = whole[len(prompt) : begins].strip() if whole.startswith(prompt) else ""
    closing = whole[begins + len(_THOUGHT) : ends].strip()
    if not opening or not closing:
        return None, "" if closing and closing in header else header
    return _known_pair(opening, closing), "" if opening in header else header


def _known_pair(opening: str, closing: str) -> tuple[str, str]:
    """The public marks that these are, where a template writes more around them."""
    known = (pair for pair in _MARKS if opening.endswith(pair[0]) and closing.endswith(pair[1]))
    return next(known, (opening, closing))


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
