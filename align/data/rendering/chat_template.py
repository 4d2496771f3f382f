"""A tokenizer's chat template: writing conversations with it, and what two probe conversations show of it.

Templates differ in the names and types they read (reasoning, tool calls, content parts) and in what ends a turn. All
of it is measured once a template, by writing short conversations of made-up words.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from align.data.rendering.template_process import apply_template
from align.errors import DataError, shorten
from align.schema import Message, Messages

_QUESTIONS, _ANSWERS = ("qkzvq", "qkwvq"), ("zkqjz", "zkqwz")
_TEMPLATE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""the names under which chat templates read the reasoning of a turn"""

Settings = Mapping[str, Any] | None
"""further variables of a chat template"""


class RowDropped(Exception):
    """A row gives no tokens; its text is the reason under which it is counted."""


class TemplateRefusal(RowDropped):
    """The chat template does not take this conversation."""


@dataclass(slots=True)
class ChatTemplate:
    """The chat template of one tokenizer, measured; made by `measured_template`."""

    tokenizer: Any
    source: str
    controls: re.Pattern[str] | None
    generation_prompt: str = ""
    regular: bool = False
    """the generation prompt stands exactly once before every assistant turn"""
    closes_every_turn: bool = False
    """a stop token follows every assistant turn, not only the last"""
    stop_ids: list[int] = field(default_factory=list)
    """EOS first, then the end-of-turn token"""
    end_of_turn: int | None = None
    """the first control token after the last assistant turn"""
    headers: tuple[str, ...] = ()
    """the text before an answer that generation and training share, for the last turn and for earlier ones"""
    reasoning_key: str = REASONING_KEYS[0]
    """the name under which it reads reasoning; empty when it reads `<think>...</think>` in the content"""
    text_arguments: bool = False
    """it takes the arguments of a tool call as JSON text, not as an object"""
    content_parts: bool = False
    """it takes content as a list of parts"""
    no_empty_content: bool = False
    """it takes a turn of tool calls without content, not with an empty one"""
    writes_tools: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """whether tool definitions are written out, by the roles of a conversation"""

    def write(self, messages: Messages, tools: Any = None, *, generate: bool = False, settings: Settings = None) -> str:
        """Return the template's text for these messages; TemplateRefusal when it does not take them.

        `settings` are further variables of the template, such as enable_thinking.
        """
        from jinja2 import TemplateError

        turns = [self._adapt_turn(turn) for turn in messages]
        options = {"tools": tools, "add_generation_prompt": generate, **(settings or {})}
        try:
            return apply_template(self.tokenizer, turns, **options)
        except (TemplateError, TypeError) as error:  # templates add strings to whatever a tool call holds
            raise TemplateRefusal(f"refused by the chat template: {shorten(str(error), 80)}") from None

    def try_write(self, messages: Messages, tools: Any = None, **options: Any) -> str | None:
        """Return the text as `write` does, and None when the template does not take these messages."""
        try:
            return self.write(messages, tools, **options)
        except TemplateRefusal:
            return None

    def _adapt_turn(self, turn: Message) -> dict[str, Any]:
        """Return a turn under the names and types that the template reads."""
        adapted: dict[str, Any] = {key: turn[key] for key in _TEMPLATE_KEYS if key in turn}  # type: ignore[literal-required]
        reasoning = turn.get("reasoning_content")
        if reasoning and self.reasoning_key:
            adapted[self.reasoning_key] = reasoning
        elif reasoning:
            adapted["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"
        if self.text_arguments and "tool_calls" in turn:
            adapted["tool_calls"] = [_with_text_arguments(call) for call in turn["tool_calls"]]
        if self.no_empty_content and "tool_calls" in turn and not turn["content"]:
            del adapted["content"]
        elif self.content_parts:
            adapted["content"] = [{"type": "text", "text": adapted["content"]}]
        return adapted

    def _measure(self) -> None:
        """Fill in everything that is learned by writing probe conversations."""
        probe: Messages = []
        for question, answer in zip(_QUESTIONS, _ANSWERS, strict=True):
            probe += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if not _holds_probe(self.try_write(probe)):
            self.content_parts = True  # as models that also see images take it
            self.content_parts = _holds_probe(self.try_write(probe))
        try:
            whole, opened = self.write(probe), self.write(probe[:3], generate=True)
            closed = self.write(probe[:3])
        except TemplateRefusal as error:
            raise DataError(f"chat template: a plain conversation is {error}; correct the template") from None
        if not _holds_probe(whole):
            raise DataError("chat template: it does not write out what user and assistant say; correct the template")
        self._measure_names()
        prompt = opened[len(closed) :] if opened.startswith(closed) else ""
        if prompt:
            starts = [before for before in (closed, self.write(probe[:1])) if whole.startswith(before)]
            self.headers = tuple(shared_start(whole[len(before) :], prompt) for before in starts)
        after = self._control_ids(whole[whole.rindex(_ANSWERS[1]) + len(_ANSWERS[1]) :])[:1]
        if after:
            self.end_of_turn = after[0]
            self.stop_ids += [token for token in after if token not in self.stop_ids]
        between = whole[whole.index(_ANSWERS[0]) + len(_ANSWERS[0]) : whole.index(_QUESTIONS[1])]
        self.closes_every_turn = any(token in self.stop_ids for token in self._control_ids(between)[:1])
        self.generation_prompt = prompt
        self.regular = bool(prompt) and whole.count(prompt) == 2 and all(prompt + text in whole for text in _ANSWERS)

    def _measure_names(self) -> None:
        """Learn under which name the template reads reasoning, and how it takes a tool call."""
        answer, thought = _ANSWERS
        question: Message = {"role": "user", "content": _QUESTIONS[0]}
        turn: Message = {"role": "assistant", "content": answer, "reasoning_content": thought}
        inline = ("",) if "<think>" in self.source else ()
        for key in (*REASONING_KEYS, *inline, REASONING_KEYS[0]):
            self.reasoning_key = key
            if thought in (self.try_write([question, turn]) or ""):
                break
        function = {"name": _QUESTIONS[1], "arguments": {answer: thought}}
        call: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        if self.try_write([question, call]) is None:
            self.text_arguments = True
            self.text_arguments = self.try_write([question, call]) is not None
        call["reasoning_content"] = thought
        if self.try_write([question, call]) is None:
            self.no_empty_content = True
            self.no_empty_content = self.try_write([question, call]) is not None

    def _control_ids(self, text: str) -> list[int]:
        names = self.controls.findall(text) if self.controls else []
        return [self.tokenizer.convert_tokens_to_ids(name) for name in names]


_MEASURED: weakref.WeakKeyDictionary[Any, ChatTemplate] = weakref.WeakKeyDictionary()


def measured_template(tokenizer: Any) -> ChatTemplate:
    """Return the measured template of a tokenizer; measured once, and again when the template is replaced.

    Raises DataError for a template that does not write out a plain conversation.
    """
    template = _MEASURED.get(tokenizer)
    if template is None or template.source != tokenizer.chat_template:
        template = ChatTemplate(tokenizer, tokenizer.chat_template, control_pattern(tokenizer))
        if tokenizer.eos_token_id is not None:
            template.stop_ids.append(tokenizer.eos_token_id)
        if template.source is not None:
            template._measure()
        _MEASURED[tokenizer] = template
    return template


def require_template(tokenizer: Any, *, stop: bool = False) -> ChatTemplate:
    """Return the measured template of a tokenizer.

    Raises DataError when it has none or, with `stop`, when no control token follows an assistant turn.
    """
    if tokenizer.chat_template is None:
        raise DataError("tokenizer: it has no chat template, which says how a conversation is written; set one")
    template = measured_template(tokenizer)
    if stop and template.end_of_turn is None:
        raise DataError(
            "chat template: no control token follows an assistant turn, so a model could not learn to stop; "
            "use a template that ends assistant turns with the EOS token"
        )
    return template


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: EOS, then the chat template's end-of-turn token."""
    return list(measured_template(tokenizer).stop_ids)


def shared_start(first: str, second: str) -> str:
    """Return the text with which both begin."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in same)]


def _holds_probe(text: str | None) -> bool:
    return text is not None and all(word in text for word in (*_QUESTIONS, *_ANSWERS))


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of every string the tokenizer encodes as a control token; None when there is none."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def unused_characters(text: str, count: int) -> list[str]:
    """Return characters of the private use area that are not in a text."""
    return list(itertools.islice((char for char in map(chr, range(0xE000, 0xF900)) if char not in text), count))


def split_controls(value: Any, controls: re.Pattern[str] | None) -> tuple[Any, str | None]:
    """Return JSON-like data in which no control string is whole, and the separator in them (None without any).

    Roles are left as they are: the template compares them.
    """
    if controls is None or not any(controls.search(text) for text in _texts(value)):
        return value, None
    separator = unused_characters("".join(_texts(value)), 1)[0]
    return _split(value, controls, separator), separator


def _split(value: Any, controls: re.Pattern[str], separator: str) -> Any:
    if isinstance(value, str):
        while controls.search(value):
            value = controls.sub(lambda match: match.group()[0] + separator + match.group()[1:], value)
        return value
    if isinstance(value, dict):
        return {key: _split(item, controls, separator) if key != "role" else item for key, item in value.items()}
    return [_split(item, controls, separator) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
