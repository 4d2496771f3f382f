"""Text of a conversation that a chat template leaves out: each part of it is looked for in what was rendered.

Templates drop what they do not know without a word: tool calls, tool results, reasoning, whatever stands before
`</think>`. The callers decide whether the row is refused or only reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any

from align.data.rendering.chat_template import ChatTemplate, TemplateRefusal
from align.data.rendering.turn_spans import RenderedText
from align.schema import Message, Messages

TEXT = "the chat template leaves out text of the conversation"
TOOLS = "the chat template leaves out the tool definitions"
CALLS = "the chat template leaves out tool calls"
RESULTS = "the chat template leaves out tool results"
REASONING = "the chat template leaves out the reasoning of the answer"
BEFORE_CLOSE = "the chat template takes what stands before </think> in the answer for reasoning"
REASONING_REASONS = frozenset({REASONING, BEFORE_CLOSE})
"""what templates leave out of earlier turns by design"""


class SearchableText:
    """Rendered text in which words are found whatever became of the white space and quotes around them."""

    def __init__(self, text: str, roundtrip: Callable[[str], str] | None = None) -> None:
        """Take the text and, where the tokenizer does not keep every character, what it makes of words."""
        self.text, self._roundtrip = text, roundtrip

    @cached_property
    def squeezed(self) -> str:
        """The text without white space."""
        return _squeeze(self.text)

    def holds(self, words: str) -> bool:
        """Return whether the words stand in the text."""
        return words in self.text or any(form in self.squeezed for form in self._forms(words))

    def without(self, words: str) -> SearchableText | None:
        """Return the text without the last occurrence of the words, or None where they are not in it."""
        text, form = self.text, words.strip()
        if not form:
            return self
        if form not in text:
            text = self.squeezed
            form = next((form for form in self._forms(words) if form in text), "")
            if not form:
                return None
        before, _, after = text.rpartition(form)
        return SearchableText(f"{before}\n{after}", self._roundtrip)

    def _forms(self, words: str) -> Iterator[str]:
        """Yield the words as templates write them: spaced in another way, or inside a JSON string."""
        yield _squeeze(words)
        yield _squeeze(json.dumps(words.strip(), ensure_ascii=False)[1:-1])
        yield _squeeze(json.dumps(words.strip())[1:-1])
        if self._roundtrip is not None:
            yield _squeeze(self._roundtrip(words.strip()))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def decode_text(ids: list[int], tokenizer: Any) -> SearchableText:
    """Return trained tokens as text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # a third of the time of transformers' decode

    def decode(tokens: list[int]) -> str:
        if fast is not None:
            return str(fast.decode(tokens, skip_special_tokens=False))
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return SearchableText(decode(ids), lambda words: decode(tokenizer.encode(words, add_special_tokens=False)))


def find_lost_in_turn(turn: Message, written: SearchableText) -> str | None:
    """Return the reason why an assistant turn is not whole in what was written of it; None when it is."""
    lost = None
    thought, closed, answer = turn["content"].rpartition("</think>")
    opened = thought.lstrip().startswith("<think>")
    rest = written.without(turn["content"])
    # Without its opening, a mere mention of the mark must not be laid out as reasoning either; white space shows it.
    if rest is None or (closed and not opened and turn["content"].strip() not in written.text):
        rest = written.without(answer) if closed else None
        if rest is None:
            return TEXT
        if not opened or not rest.holds(thought.strip().removeprefix("<think>")):
            lost = REASONING if opened else BEFORE_CLOSE
    if not all(rest.holds(words) for call in turn.get("tool_calls", ()) for words in _words(call.get("function"))):
        return CALLS
    if not rest.holds(turn.get("reasoning_content", "")):
        lost = REASONING
    return lost


def find_lost_in_context(messages: Messages, rendered: RenderedText, trained: Collection[int] = ()) -> Iterator[str]:
    """Yield the reason for every turn that is not whole in the rendered text, without the trained assistant turns."""
    text, separator = rendered.text, rendered.separator

    def search(start: int, end: int) -> SearchableText:
        part = text[start:end]
        return SearchableText(part.replace(separator, "") if separator else part)

    starts = {span.turn: span.start for span in rendered.spans}
    ends = dict(zip(starts, [*list(starts.values())[1:], len(text)], strict=True))
    position, end = 0, next(iter(starts.values()), len(text))
    for number, turn in enumerate(messages):
        if number in starts:
            position, end = starts[number], ends[number]
        words = turn["content"].strip()
        if turn["role"] == "assistant":
            if number not in trained and (lost := find_lost_in_turn(turn, search(position, end))):
                yield lost
        else:
            since, until = (0, len(text)) if turn["role"] == "system" else (position, end)
            if text.find(words, since, until) < 0 and not _holds_content(search(since, until), turn["content"]):
                yield RESULTS if turn["role"] == "tool" else TEXT
        start = text.find(words, position, end)
        position = start + len(words) if start >= 0 else position


def check_context(
    template: ChatTemplate, messages: Messages, tools: Any, rendered: RenderedText, trained: Collection[int] = ()
) -> bool:
    """Return whether the reasoning of a turn that is not trained is left out, as templates do by design.

    Raises TemplateRefusal when anything else of the context is.
    """
    lost = set(find_lost_in_context(messages, rendered, trained))
    if tools and not _has_tools(template, messages, tools, rendered.text):
        lost.add(TOOLS)
    if lost - REASONING_REASONS:
        lost |= set(find_lost_in_context(messages, rendered))  # lost calls explain more than lost results
        raise TemplateRefusal(next(reason for reason in (CALLS, TOOLS, RESULTS, TEXT) if reason in lost))
    return bool(lost)


def _holds_content(written: SearchableText, content: str) -> bool:
    """Return whether a content stands in a text, or the keys and values of a content that is JSON."""
    if written.holds(content):
        return True
    try:
        words = list(_words(json.loads(content)))
    except ValueError:
        return False
    return bool(words) and all(map(written.holds, words))


def _has_tools(template: ChatTemplate, messages: Messages, tools: Any, text: str) -> bool:
    """Return whether a text holds the names of the tools, and they change what the template writes.

    The latter is remembered by how a conversation begins and ends.
    """
    if not all(str((tool.get("function") or tool).get("name", "")) in text for tool in tools):
        return False
    roles = (*(turn["role"] for turn in messages[:2]), messages[-1]["role"])
    if roles not in template.writes_tools:
        without, with_tools = template.try_write(messages), template.try_write(messages, tools)
        if without is None or with_tools is None:
            return True  # what it does not take without tools it takes with them
        template.writes_tools[roles] = without != with_tools
    return template.writes_tools[roles]


def _words(value: Any) -> Iterator[str]:
    """Yield the keys and texts of a JSON value, without the outer names of a call."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and "arguments" in value:
            value = {value["name"]: value["arguments"]}
        for key, item in value.items():
            yield str(key)
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        yield str(value)
