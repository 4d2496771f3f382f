"""What a chat template leaves out of a conversation: the text of the record is looked for in what was rendered.

Templates drop what they do not know without a word: tool calls, tool results, reasoning, whatever stands before
`</think>`. This module finds it; the callers decide whether the row is refused, or only told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any

from align.data.templates import ChatFormat, Rendering, TemplateRefusal
from align.schema import Message, Messages

TEXT = "the chat template leaves out text of the conversation"
TOOLS = "the chat template leaves out the tool definitions"
CALLS = "the chat template leaves out tool calls"
RESULTS = "the chat template leaves out tool results"
REASONING = "the chat template leaves out the reasoning of the answer"
BEFORE_CLOSE = "the chat template takes what stands before </think> in the answer for reasoning"
THOUGHTS = frozenset({REASONING, BEFORE_CLOSE})
"""what templates leave out of earlier turns by design"""

_CLOSE = "</think>"


class Written:
    """Rendered text in which words of a record are found whatever became of white space and quotes around them."""

    def __init__(self, text: str, same: Callable[[str], str] | None = None) -> None:
        """`same` gives words as the tokenizer decodes them, where it does not keep every character."""
        self.text = text
        self._same = same
        self._squeezed: str | None = None

    @property
    def squeezed(self) -> str:
        """The text without white space."""
        if self._squeezed is None:
            self._squeezed = squeeze(self.text)
        return self._squeezed

    def holds(self, words: str) -> bool:
        """Whether the words stand in the text."""
        return words in self.text or any(form in self.squeezed for form in self._forms(words))

    def without(self, words: str) -> Written | None:
        """Return the text without the last place of the words, or None where they are not in it."""
        bare = words.strip()
        if not bare:
            return self
        if bare in self.text:
            before, _, after = self.text.rpartition(bare)
            return Written(f"{before}\n{after}", self._same)
        for form in self._forms(words):
            if form in self.squeezed:
                before, _, after = self.squeezed.rpartition(form)
                return Written(f"{before}\n{after}", self._same)
        return None

    def _forms(self, words: str) -> Iterator[str]:
        """The words as templates write them: spaced in another way, or inside a JSON string."""
        yield squeeze(words)
        yield squeeze(json.dumps(words.strip(), ensure_ascii=False)[1:-1])
        yield squeeze(json.dumps(words.strip())[1:-1])
        if self._same is not None:
            yield squeeze(self._same(words.strip()))


def squeeze(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def decoded(ids: list[int], tokenizer: Any) -> Written:
    """Trained tokens as text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # a third of the time, without transformers' look at the ids

    def decode(tokens: list[int]) -> str:
        if fast is not None:
            return str(fast.decode(tokens, skip_special_tokens=False))
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return Written(decode(ids), lambda words: decode(tokenizer.encode(words, add_special_tokens=False)))


def lost_in_turn(turn: Message, written: Written) -> str | None:
    """Return the reason why an assistant turn is not whole in what was written of it; None when it is."""
    lost = None
    thought, closed, answer = turn["content"].rpartition(_CLOSE)
    opened = thought.lstrip().startswith("<think>")
    rest = written.without(turn["content"])
    # Without its opening, what only mentions the mark is not to be set out as reasoning either, as white space shows.
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


def lost_in_context(messages: Messages, rendering: Rendering, trained: Collection[int] = ()) -> Iterator[str]:
    """Yield the reason for every turn that is not whole in the rendered text, but for the trained assistant turns."""
    text, seam = rendering.text, rendering.seam
    starts = {span.turn: span.start for span in rendering.spans}
    ends = dict(zip(starts, [*list(starts.values())[1:], len(text)], strict=True))
    bounds = iter(sorted(starts))
    coming = next(bounds, len(messages))
    place, end = 0, starts.get(coming, len(text))
    for number, turn in enumerate(messages):
        if number == coming:
            place, end = starts[number], ends[number]
            coming = next(bounds, len(messages))
        if turn["role"] == "assistant":
            if number not in trained:
                segment = text[place:end]
                if lost := lost_in_turn(turn, Written(segment.replace(seam, "") if seam else segment)):
                    yield lost
            words = turn["content"].strip()
        else:
            words = turn["content"].strip()
            since = 0 if turn["role"] == "system" else place
            until = len(text) if turn["role"] == "system" else end
            if text.find(words, since, until) < 0 and not _holds(text[since:until], seam, turn["content"]):
                yield RESULTS if turn["role"] == "tool" else TEXT
        found = text.find(words, place, end)
        place = found + len(words) if found >= 0 else place


def tools_left_out(style: ChatFormat, messages: Messages, tools: Any, text: str) -> bool:
    """Whether the definitions of tools are not written out."""
    if not tools:
        return False
    names = [str((tool.get("function") or tool).get("name", "")) for tool in tools]
    return not all(name in text for name in names) or not _writes_tools(style, messages, tools)


def check_context(
    style: ChatFormat, messages: Messages, tools: Any, rendering: Rendering, trained: Collection[int] = ()
) -> bool:
    """Return whether the reasoning of a turn that is not trained is left out, as templates do by design.

    Raises TemplateRefusal when anything else of the context is.
    """
    lost = set(lost_in_context(messages, rendering, trained))
    if tools_left_out(style, messages, tools, rendering.text):
        lost.add(TOOLS)
    if lost - THOUGHTS:
        lost |= set(lost_in_context(messages, rendering))  # the answers too: lost calls say more than lost results
        raise TemplateRefusal(next(reason for reason in (CALLS, TOOLS, RESULTS, TEXT) if reason in lost))
    return bool(lost)


def _holds(text: str, seam: str | None, words: str) -> bool:
    """Whether words stand in a text, or what JSON text says does when they are that."""
    written = Written(text.replace(seam, "") if seam else text)
    if written.holds(words):
        return True
    try:
        value = json.loads(words)
    except ValueError:
        return False
    said = list(_words(value))
    return bool(said) and all(written.holds(each) for each in said)


def _writes_tools(style: ChatFormat, messages: Messages, tools: Any) -> bool:
    """Whether tools change what is written; remembered by how a conversation begins and ends."""
    kind = (*(turn["role"] for turn in messages[:2]), messages[-1]["role"])
    if kind not in style.writes_tools:
        try:
            style.writes_tools[kind] = style.write(messages) != style.write(messages, tools)
        except TemplateRefusal:
            return True  # what it does not take without tools it takes with them
    return style.writes_tools[kind]


def _words(value: Any) -> Iterator[str]:
    """The keys and texts of a JSON value, but for the outer names of a call."""
    if isinstance(value, dict):
        if isinstance(value.get("name"), str) and "arguments" in value:
            yield value["name"]
            yield from _words(value["arguments"])
            return
        for key, item in value.items():
            yield str(key)
            yield from _words(item)
    elif isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
