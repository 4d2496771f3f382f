"""A tokenizer's chat template, measured: where each assistant turn starts in the rendered text, and what ends it.

Arbitrary templates carry no marks of what the assistant says, so this module finds it from the outside: by the
generation prompt, which stands before every assistant turn of an ordinary template, or by rendering prefixes and
marked copies of the conversation where a template is not ordinary. What cannot be located is an error, never a guess.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from align.data.confined_templates import apply_template
from align.data.marks import content_spans, mark_places, start_of, unused
from align.errors import DataError, shorten
from align.schema import Message, Messages

_ASKED, _ANSWERED = ("qkzvq", "qkwvq"), ("zkqjz", "zkqwz")
_TEMPLATE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""the names under which chat templates ask for the reasoning of a turn"""


class TemplateRefusal(Exception):
    """The chat template does not take this conversation; the text says why."""


@dataclass(slots=True)
class Span:
    """An assistant turn in a rendered text: where it starts and, where a stop token does not tell, where it ends."""

    turn: int
    start: int
    end: int | None = None
    prompted: bool = True
    """what stands before it is the prompt that generation would give there, as far as is known"""


@dataclass(slots=True)
class Rendering:
    """A conversation as its template writes it. `seam` (if any) stands inside control strings that users wrote."""

    text: str
    spans: list[Span]
    seam: str | None


@dataclass(frozen=True, slots=True)
class _Talk:
    """What was rendered to the text in which turns are looked for."""

    messages: Messages
    tools: Any
    generate: bool
    settings: Mapping[str, Any] | None
    known: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    """once looked for, where the contents of its assistant turns stand"""


@dataclass(slots=True)
class ChatFormat:
    """What is known of one tokenizer's template."""

    tokenizer: Any
    template: str
    controls: re.Pattern[str] | None
    generation_prompt: str = ""
    regular: bool = False
    """the generation prompt stands exactly once before every assistant turn"""
    closes_every_turn: bool = False
    stop_ids: list[int] = field(default_factory=list)
    """EOS first, then the end-of-turn token"""
    end_of_turn: int | None = None
    """the first control token after the last assistant turn"""
    headers: tuple[str, ...] = ()
    """what both the prompt of generation and a whole text have before an answer, as the last turn and as another"""
    reasoning_key: str = REASONING_KEYS[0]
    """the name under which it asks for reasoning; empty where that stands in the content, in <think> and </think>"""
    text_arguments: bool = False
    """the arguments of a tool call are JSON text to this template, not an object"""
    content_parts: bool = False
    """content is a list of parts to this template"""
    no_empty_content: bool = False
    """a turn of tool calls must have no content, not an empty one"""
    writes_tools: dict[tuple[str, ...], bool] = field(default_factory=dict)
    """by the roles of a conversation, whether tool definitions are written out"""

    def write(
        self,
        messages: Messages,
        tools: Any = None,
        *,
        generate: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> str:
        """The template's text for these messages; TemplateRefusal when it will not have them.

        `settings` are further variables of the template, such as enable_thinking.
        """
        from jinja2 import TemplateError

        plain = [self._as_asked(turn) for turn in messages]
        try:
            text = apply_template(
                self.tokenizer, plain, tools=tools, add_generation_prompt=generate, **(settings or {})
            )
        except (TemplateError, TypeError) as error:  # templates add strings to whatever a tool call holds
            raise TemplateRefusal(f"refused by the chat template: {shorten(str(error), 80)}") from None
        return text

    def _as_asked(self, turn: Message) -> dict[str, Any]:
        """A turn under the names that the template reads."""
        plain: dict[str, Any] = {key: turn[key] for key in _TEMPLATE_KEYS if key in turn}  # type: ignore[literal-required]
        reasoning = turn.get("reasoning_content")
        if reasoning and self.reasoning_key:
            plain[self.reasoning_key] = reasoning
        elif reasoning:
            plain["content"] = f"<think>\n{reasoning}\n</think>\n\n{turn['content']}"
        if self.text_arguments and "tool_calls" in turn:
            plain["tool_calls"] = [_with_text_arguments(call) for call in turn["tool_calls"]]
        if self.no_empty_content and "tool_calls" in turn and not turn["content"]:
            del plain["content"]
        elif self.content_parts:
            plain["content"] = [{"type": "text", "text": plain["content"]}]
        return plain

    def locate(
        self,
        messages: Messages,
        tools: Any = None,
        *,
        generate: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """Render a conversation and find its assistant turns. With `generate` the open turn at the end is one too."""
        messages, tools, seam = self._disarm(messages, tools)
        talk = _Talk(messages, tools, generate, settings)
        text = self.write(messages, tools, generate=generate, settings=settings)
        if seam and f"\\u{ord(seam):04x}" in text.lower():
            raise TemplateRefusal("the chat template escapes text in a way that hides control strings")
        turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
        starts = self._fast_starts(text, len(turns) + generate, any("tool_calls" in turn for turn in messages))
        if starts is None:
            spans = [self._slow_start(talk, turn, text) for turn in turns]
        else:
            spans = [Span(turn, start) for turn, start in zip(turns, starts, strict=False)]
        if generate:  # not where the generation prompt ends: a setting may write more behind it
            spans.append(Span(len(messages), len(text)))
        for span in spans[: len(turns)]:
            span.end = self._slow_end(talk, span.turn, text)
        return Rendering(text, spans, seam)

    def locate_open(self, messages: Messages, tools: Any, settings: Mapping[str, Any] | None = None) -> Rendering:
        """Render a conversation up to the last word of its last assistant turn, which is to be continued."""
        found = self.locate(messages, tools, settings=settings)
        safe, safe_tools, _ = self._disarm(messages, tools)
        talk = _Talk(safe, safe_tools, generate=False, settings=settings)
        end = self._content_span(talk, len(messages) - 1, found.text)[1]
        found.spans[-1].end = None
        return Rendering(found.text[:end], found.spans, found.seam)

    def _fast_starts(self, text: str, expected: int, has_calls: bool) -> list[int] | None:
        """Ends of the generation prompt's occurrences, when they can be trusted to be the assistant turns."""
        literal = self.controls is None or not self.controls.search(self.generation_prompt)
        if not self.regular or (literal and has_calls):
            return None
        starts = [match.end() for match in re.finditer(re.escape(self.generation_prompt), text)]
        return starts if len(starts) == expected else None

    def _slow_start(self, talk: _Talk, turn: int, text: str) -> Span:
        known = start_of(turn, talk.messages, self._contents(talk, text), self.generation_prompt, text)
        if known is not None:
            return Span(turn, known[0], prompted=known[1])
        try:
            earlier = talk.messages[:turn]
            before = self.write(earlier, talk.tools, generate=True, settings=talk.settings) if turn else ""
        except TemplateRefusal:
            before = None  # a template may refuse a part of what it takes as a whole
        if before is not None and text.startswith(before):
            return Span(turn, len(before))
        try:
            start = self._content_span(talk, turn, text)[0]
        except TemplateRefusal:
            start = self._header_end(talk, turn, text)
        return Span(turn, start, prompted=not before)

    def _header_end(self, talk: _Talk, turn: int, text: str) -> int:
        """Where a turn starts whose content tells nothing: behind the header that opens every assistant turn."""
        for before in self._prefixes(talk, turn):
            for header in self.headers:
                if text.startswith(before + header):
                    return len(before + header)
        raise TemplateRefusal("the chat template rewrites what the assistant says")

    def _prefixes(self, talk: _Talk, count: int) -> Iterator[str]:
        """The first turns as the template writes them alone, then without reasoning, which it may drop of old turns."""
        kept = talk.messages[:count]
        thoughtless = [cast("Message", {**turn, "reasoning_content": ""}) for turn in kept]
        for messages in (kept, thoughtless):
            yield self.write(messages, talk.tools, settings=talk.settings) if messages else ""

    def _slow_end(self, talk: _Talk, turn: int, text: str) -> int | None:
        """Where a turn ends, only when the first stop token after its start cannot be relied on to say so."""
        if turn == len(talk.messages) - 1:
            return None
        if "tool_calls" in talk.messages[turn]:
            for after in self._prefixes(talk, turn + 1):
                if text.startswith(after):
                    return len(after)
        return None if self.closes_every_turn else self._content_span(talk, turn, text)[1]

    def _content_span(self, talk: _Talk, turn: int, text: str) -> tuple[int, int]:
        """Start and end of a turn's content, by rendering a copy with marks in it that changes nothing else."""
        if turn in (known := self._contents(talk, text)):
            return known[turn]
        messages = talk.messages
        content = messages[turn]["content"]
        if not content:
            raise TemplateRefusal("the chat template rewrites what the assistant says")
        opening, closing = unused(content + text, 2)
        for start, end in mark_places(content):
            marked: Message = {**messages[turn], "content": f"{content[:start]}{opening}{content[start:end]}{closing}"}
            marked["content"] += content[end:]
            changed = [*messages[:turn], marked, *messages[turn + 1 :]]
            copy = self.write(changed, talk.tools, generate=talk.generate, settings=talk.settings)
            if copy.replace(opening, "").replace(closing, "") == text and opening in copy and closing in copy:
                return copy.index(opening), copy.index(closing) - 1
        raise TemplateRefusal("the chat template rewrites what the assistant says")

    def _contents(self, talk: _Talk, text: str) -> dict[int, tuple[int, int]]:
        """Where the contents of all assistant turns stand, as far as one marked copy tells; looked for once."""
        if not talk.known:

            def render(messages: Messages) -> str:
                return self.write(messages, talk.tools, generate=talk.generate, settings=talk.settings)

            try:
                found = content_spans(render, talk.messages, text)
            except TemplateRefusal:
                found = {}
            talk.known.append(found)
        return talk.known[0]

    def _disarm(self, messages: Messages, tools: Any) -> tuple[Messages, Any, str | None]:
        """Put a private-use character into every control string the data holds, so that none is encoded as control."""
        if self.controls is None or not any(self.controls.search(text) for text in _texts([messages, tools])):
            return messages, tools, None
        seam = unused("".join(_texts([messages, tools])), 1)[0]
        return self._split_controls(messages, seam), self._split_controls(tools, seam), seam

    def _split_controls(self, value: Any, seam: str) -> Any:
        if isinstance(value, str):
            return split_controls(value, self.controls, seam)
        if isinstance(value, dict):
            return {key: self._split_controls(item, seam) if key != "role" else item for key, item in value.items()}
        return [self._split_controls(item, seam) for item in value] if isinstance(value, list) else value


_FORMATS: weakref.WeakKeyDictionary[Any, ChatFormat] = weakref.WeakKeyDictionary()


def chat_format(tokenizer: Any) -> ChatFormat:
    """The measured template of a tokenizer; measured once, and again when the template is replaced."""
    known = _FORMATS.get(tokenizer)
    if known is None or known.template != tokenizer.chat_template:
        known = _FORMATS[tokenizer] = _measure(tokenizer)
    return known


def control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """A pattern of every string the tokenizer encodes as a control token."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def split_controls(text: str, controls: re.Pattern[str] | None, seam: str) -> str:
    """The text with `seam` after the first character of every control string in it."""
    while controls is not None and controls.search(text):
        text = controls.sub(lambda match: match.group()[0] + seam + match.group()[1:], text)
    return text


def disarm(text: str, controls: re.Pattern[str] | None) -> tuple[str, str | None]:
    """A text in which no control string is whole, and the seam that stands in them (None when there were none)."""
    if controls is None or not controls.search(text):
        return text, None
    seam = unused(text, 1)[0]
    return split_controls(text, controls, seam), seam


def _measure(tokenizer: Any) -> ChatFormat:
    found = ChatFormat(tokenizer, tokenizer.chat_template, control_pattern(tokenizer))
    if tokenizer.eos_token_id is not None:
        found.stop_ids.append(tokenizer.eos_token_id)
    if found.template is None:
        return found
    probe: Messages = []
    for asked, answered in zip(_ASKED, _ANSWERED, strict=True):
        probe += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    if any(text not in (_try_write(found, probe) or "") for text in (*_ASKED, *_ANSWERED)):
        found.content_parts = True  # as models that also see images take it
        found.content_parts = all(text in (_try_write(found, probe) or "") for text in (*_ASKED, *_ANSWERED))
    try:
        whole, opened = found.write(probe), found.write(probe[:3], generate=True)
        closed = found.write(probe[:3])
    except TemplateRefusal as error:
        raise DataError(f"chat template: a plain conversation is {error}; mend the template") from None
    if any(text not in whole for text in (*_ASKED, *_ANSWERED)):
        raise DataError("chat template: it does not write out what user and assistant say; mend the template")
    _learn_names(found)
    found.generation_prompt = opened[len(closed) :] if opened.startswith(closed) else ""
    if found.generation_prompt:
        starts = [before for before in (closed, found.write(probe[:1])) if whole.startswith(before)]
        found.headers = tuple(shared_start(whole[len(before) :], found.generation_prompt) for before in starts)
    _find_stop(found, whole)
    prompt = found.generation_prompt
    found.regular = bool(prompt) and whole.count(prompt) == 2 and all(prompt + text in whole for text in _ANSWERED)
    return found


def _learn_names(found: ChatFormat) -> None:
    """Learn under which name the template asks for reasoning, and how it takes a tool call."""
    asked, answered, thought = _ASKED[0], *_ANSWERED
    question: Message = {"role": "user", "content": asked}
    turn: Message = {"role": "assistant", "content": answered, "reasoning_content": thought}
    inline = ("",) if "<think>" in found.template else ()
    for key in (*REASONING_KEYS, *inline, REASONING_KEYS[0]):
        found.reasoning_key = key
        if thought in (_try_write(found, [question, turn]) or ""):
            break
    function = {"name": _ASKED[1], "arguments": {answered: thought}}
    call: Message = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    if _try_write(found, [question, call]) is None:
        found.text_arguments = True
        found.text_arguments = _try_write(found, [question, call]) is not None
    call["reasoning_content"] = thought
    if _try_write(found, [question, call]) is None:
        found.no_empty_content = True
        found.no_empty_content = _try_write(found, [question, call]) is not None


def _try_write(found: ChatFormat, messages: Messages) -> str | None:
    try:
        return found.write(messages)
    except TemplateRefusal:
        return None


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _find_stop(found: ChatFormat, whole: str) -> None:
    """Learn which token follows an assistant turn, and whether it follows every one."""
    first = _control_ids(found, whole[whole.rindex(_ANSWERED[1]) + len(_ANSWERED[1]) :])
    if first:
        found.end_of_turn = first[0]
        found.stop_ids += [token for token in first[:1] if token not in found.stop_ids]
    between = whole[whole.index(_ANSWERED[0]) + len(_ANSWERED[0]) : whole.index(_ASKED[1])]
    found.closes_every_turn = any(token in found.stop_ids for token in _control_ids(found, between)[:1])


def _control_ids(found: ChatFormat, text: str) -> list[int]:
    names = found.controls.findall(text) if found.controls else []
    return [found.tokenizer.convert_tokens_to_ids(name) for name in names]


def shared_start(first: str, second: str) -> str:
    """The text with which both begin."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in same)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
