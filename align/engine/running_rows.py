"""A row from submission to its last event: its prompt in tokens, its rules, and what it has said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.reasoning import mark_thoughts
from align.engine.prompt_text import locate_prompt, prompt_text
from align.engine.protocol import Fault, FinishReason, Row, RowDelta, RowDone, RowFailure, RowPrompt, Sampling
from align.engine.sampling import RowSampler
from align.engine.text_buffer import TextBuffer, TextChunk
from align.engine.token_logprobs import PromptScores, make_token
from align.engine.token_rules import NO_RULES, LiveRules
from align.errors import AlignError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from align.engine.stream import Stream


@dataclass
class RowState:
    """A row that waits or is being written. It sends its last event exactly once."""

    stream: Stream
    index: int
    row: Row
    sampling: Sampling
    adapter: str = ""
    adapter_group: str = ""
    rules: LiveRules = field(default_factory=lambda: LiveRules(NO_RULES, frozenset()))
    submitted: float = field(default_factory=time.perf_counter)
    prompt_ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def cancelled(self) -> bool:
        """Whether the reader asked this row to stop."""
        return self.stream.is_cancelled(self.index)

    def done(
        self,
        reason: FinishReason,
        text: str = "",
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        first_token_seconds: float = 0.0,
        marked: str | None = None,
    ) -> None:
        """End the row well."""
        seconds = time.perf_counter() - self.submitted
        facts = (prompt_tokens, completion_tokens, first_token_seconds, seconds)
        self._end(RowDone(self.index, text, reason, *facts, marked))

    def fail(self, message: str, fault: Fault = "engine") -> None:
        """End the row with an error, unless it has ended already."""
        if not self.ended:
            self._end(RowFailure(self.index, message, fault))

    def _end(self, event: RowDone | RowFailure) -> None:
        self.ended = True
        self.stream.put(event)


class RunningRow:
    """A row on its way through the model."""

    def __init__(self, state: RowState, limit: int, tokenizer: Any) -> None:
        self.state = state
        self.prompt_ids = state.prompt_ids
        self.limit = limit
        self.started = time.perf_counter()
        self.sampler = RowSampler(state.sampling, state.row.seed, state.prompt_ids, state.rules)
        self._tokenizer = tokenizer
        # What goes on with a text keeps the space before its first word.
        is_raw_prompt = state.row.is_raw_prompt or state.row.chat.continue_final
        before = state.prompt_ids if is_raw_prompt else ()
        self._buffer = TextBuffer(tokenizer, state.sampling.stop, before, state.rules.rules)
        self._first_token = 0.0
        asked = state.row.prompt_logprobs
        self.scores = None if asked is None else PromptScores(asked)
        self._ids: list[int] = []

    @property
    def columns(self) -> int:
        """How many tokens of it the model holds: prompt and answer, without the newest."""
        return len(self.prompt_ids) + max(self._buffer.count - 1, 0)

    @property
    def most_columns(self) -> int:
        """How many tokens prompt and answer have together at most."""
        return len(self.prompt_ids) + self.limit

    def send_prompt(self) -> None:
        """Tell the reader what was read, when asked for it."""
        row, text = self.state.row, ""
        if self.scores is not None:
            tokens = self.scores.tokens(self.prompt_ids, self._tokenizer)
            text, tokens = locate_prompt(tokens, row.text, self._tokenizer)
            self.state.stream.put(RowPrompt(self.state.index, text, tuple(tokens)))
        elif row.echo:
            self.state.stream.put(RowPrompt(self.state.index, prompt_text(row.text, self.prompt_ids, self._tokenizer)))

    def take(self, token: int, logits: Tensor) -> None:
        """Add one token of this row, drawn from logits (V,), and tell the reader what it now says."""
        if self.limit < 1:
            self.finish("length")
            return
        self._first_token = self._first_token or time.perf_counter()
        self.sampler.took(token)
        ends = token in self.state.rules.stops
        if ends and not self.state.rules.rules.include_stop:
            self.finish("stop")
            return
        self._ids.append(token)
        asked = self.state.row.logprobs
        token_info = None if asked is None else make_token(token, logits, asked, self._tokenizer)
        self._put(self._buffer.push(token, token_info))
        if ends or self._buffer.stopped or self.state.rules.complete:
            self.finish("stop")
        elif self._buffer.count >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the row well, showing what was held back."""
        self._put(self._buffer.close())
        self.state.done(
            "stop" if self._buffer.stopped else reason,
            text=self._buffer.text,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self._buffer.count,
            first_token_seconds=self._first_token - self.state.submitted if self._first_token else 0.0,
            # A stop string cuts the text within its tokens.
            marked=None if self._buffer.stopped else mark_thoughts(self._tokenizer, self.prompt_ids, self._ids),
        )

    def _put(self, piece: TextChunk) -> None:
        if piece.text or piece.tokens:
            self.state.stream.put(RowDelta(self.state.index, *piece))


def start_row(state: RowState, tokenizer: Any, window: int | None) -> RunningRow | None:
    """A row with its prompt encoded; one that cannot be written ends with an error and is None."""
    found = state.prompt_ids or encode_or_message(state.row, tokenizer)
    if isinstance(found, str):
        state.fail(found, "prompt")
        return None
    state.prompt_ids = found
    size, longest = len(found), state.sampling.max_new_tokens
    limit = longest if window is None else min(longest, window - size)
    if state.row.prompt_only and limit >= 0:
        limit = 0
    elif limit < 1:
        fail_too_long(state, size, window)
        return None
    return RunningRow(state, limit, tokenizer)


def fail_too_long(state: RowState, size: int, window: int | None) -> None:
    """End a row whose prompt leaves no room for an answer."""
    about = f"the conversation has {size} tokens, the model takes {window}; shorten it or start a new one"
    state.fail(f"{state.row.model}: {about}", "too_long")


def encode_or_message(row: Row, tokenizer: Any) -> list[int] | str:
    """The ids a row continues, or why there are none."""
    try:
        return encode_row(row, tokenizer)
    except AlignError as error:
        return str(error)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tokenizer raises, the other rows go on
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return f"{row.model}: the conversation does not render ({what}); change its turns"


def encode_row(row: Row, tokenizer: Any) -> list[int]:
    """The ids a row continues: of its conversation, or of its text as it stands.

    Raises DataError when the conversation does not fit the chat template, or there is nothing to continue.
    """
    from align.data.render import render_chat

    if row.ids is not None:
        return check_ids(row, len(tokenizer))
    if row.text is None:
        chat = row.chat
        return render_chat(
            row.messages, tokenizer, list(chat.tools) or None,
            template_kwargs=chat.template_kwargs, continue_final=chat.continue_final,
        )  # fmt: skip
    # A text that was rendered elsewhere begins with its own BOS.
    begun = tokenizer.bos_token is not None and row.text.startswith(tokenizer.bos_token)
    ids = list(tokenizer.encode(row.text, add_special_tokens=not begun))
    if not ids:
        raise DataError(f"{row.model}: the prompt has no tokens; give a text to continue")
    return ids


def check_ids(row: Row, size: int) -> list[int]:
    """The ids of a row, all of them of a vocabulary of some size; raises DataError otherwise."""
    ids = list(row.ids or ())
    if not ids:
        raise DataError(f"{row.model}: the prompt has no tokens; give some to continue")
    strange = next((token for token in ids if not 0 <= token < size), None)
    if strange is not None:
        raise DataError(f"{row.model}: token {strange} is none of its {size}; encode the prompt with its own tokenizer")
    return ids
