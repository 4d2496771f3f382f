"""A row from submission to its last event: its prompt in tokens, its rules, and the text generated so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.reasoning import mark_reasoning
from align.engine.detokenizer import TextBuffer, TextChunk
from align.engine.protocol import Fault, FinishReason, Row, RowDelta, RowDone, RowFailure, RowPrompt, Sampling, Token
from align.engine.sampling import ActiveRules, RowSampler
from align.engine.token_scores import PromptScores, locate_prompt, make_token, prompt_text
from align.errors import AlignError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from align.engine.adapter_groups import ModelFacts
    from align.engine.stream import Stream


@dataclass
class RowState:
    """A row that waits or runs. It sends its last event exactly once."""

    stream: Stream
    index: int
    row: Row
    sampling: Sampling
    fact: ModelFacts
    rules: ActiveRules
    submitted: float = field(default_factory=time.perf_counter)
    prompt_ids: list[int] = field(default_factory=list)
    ended: bool = False
    before_end: Callable[[], object] = lambda: None
    """called before the last event: whoever reads it may use the model"""

    @property
    def cancelled(self) -> bool:
        """Return whether the reader asked this row to stop."""
        return self.stream.is_cancelled(self.index)

    def cancel(self) -> None:
        """End a row that was cancelled before it ran."""
        self.end(RowDone(self.index, "", "cancelled", 0, 0, 0.0, time.perf_counter() - self.submitted))

    def fail(self, message: str, fault: Fault = "engine") -> None:
        """End the row with an error, unless it has ended already."""
        if not self.ended:
            self.end(RowFailure(self.index, message, fault))

    def take_prompt(self, ids: list[int], window: int | None) -> bool:
        """Set the prompt's tokens; a row that they leave no room for a completion ends with an error."""
        self.prompt_ids = ids
        if window is None or len(ids) < window + self.row.prompt_only:
            return True
        about = f"the conversation has {len(ids)} tokens, the model takes {window}; shorten it or start a new one"
        self.fail(f"{self.row.model}: {about}", "too_long")
        return False

    def end(self, event: RowDone | RowFailure) -> None:
        """Send the last event."""
        self.ended = True
        self.before_end()
        self.stream.put(event)


class RunningRow:
    """A row on the model."""

    def __init__(self, state: RowState, limit: int, tokenizer: Any) -> None:
        self.state = state
        self.prompt_ids = state.prompt_ids
        self.started = time.perf_counter()
        self.sampler = RowSampler(state.sampling, state.row.seed, state.prompt_ids, state.rules)
        scored = state.row.prompt_logprobs
        self.scores = None if scored is None else PromptScores(scored, self.prompt_ids[0], tokenizer)
        self._limit, self._tokenizer = limit, tokenizer
        # A text that is continued keeps the space before its first new word.
        continues = state.row.is_raw_prompt or state.row.chat.continue_final
        self._buffer = TextBuffer(
            tokenizer, state.sampling.stop, state.prompt_ids if continues else (), state.rules.rules
        )
        self._first_token = 0.0
        self._ids: list[int] = []

    @property
    def columns(self) -> int:
        """The number of tokens in the cache: prompt and completion, without the newest."""
        return len(self.prompt_ids) + max(self._buffer.count - 1, 0)

    @property
    def most_columns(self) -> int:
        """The most tokens of prompt and completion together."""
        return len(self.prompt_ids) + self._limit

    def send_prompt(self) -> None:
        """Send the prompt to the reader, for rows with `echo` or `prompt_logprobs`."""
        row = self.state.row
        if self.state.ended or not (row.echo or self.scores is not None):
            return
        if self.scores is None:
            text, tokens = prompt_text(row.text, self.prompt_ids, self._tokenizer), list[Token]()
        else:
            text, tokens = locate_prompt(self.scores.tokens, row.text, self._tokenizer)
        self.state.stream.put(RowPrompt(self.state.index, text, tuple(tokens)))

    def take(self, token: int, logits: Tensor) -> None:
        """Add a token sampled from logits (V,), and send the text that is now certain."""
        if self._limit < 1:
            self.finish("length")
            return
        self._first_token = self._first_token or time.perf_counter()
        self.sampler.took(token)
        rules = self.state.rules
        ends = token in rules.stops
        if ends and not rules.rules.include_stop:
            self.finish("stop")
            return
        self._ids.append(token)
        alternatives = self.state.row.logprobs
        scored = None if alternatives is None else make_token(token, logits, alternatives, self._tokenizer)
        self._put(self._buffer.push(token, scored))
        if ends or self._buffer.stopped or rules.complete:
            self.finish("stop")
        elif self._buffer.count >= self._limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the row, sending what was held back."""
        self._put(self._buffer.close())
        stopped, submitted = self._buffer.stopped, self.state.submitted
        # A stop string cuts the text within its tokens.
        marked = None if stopped else mark_reasoning(self._tokenizer, self.prompt_ids, self._ids)
        done = RowDone(
            self.state.index, self._buffer.text, "stop" if stopped else reason, marked=marked,
            prompt_tokens=len(self.prompt_ids), completion_tokens=self._buffer.count,
            first_token_seconds=self._first_token - submitted if self._first_token else 0.0,
            seconds=time.perf_counter() - submitted,
        )  # fmt: skip
        self.state.end(done)

    def _put(self, chunk: TextChunk) -> None:
        if chunk.text or chunk.tokens:
            self.state.stream.put(RowDelta(self.state.index, *chunk))


def start_row(state: RowState, tokenizer: Any, window: int | None) -> RunningRow | None:
    """Return a row with its prompt encoded; one that cannot run ends with an error and is None."""
    ids = state.prompt_ids or encode_or_message(state.row, tokenizer)
    if isinstance(ids, str):
        state.fail(ids, "prompt")
        return None
    if not state.take_prompt(ids, window):
        return None
    longest = 0 if state.row.prompt_only else state.sampling.max_new_tokens
    return RunningRow(state, longest if window is None else min(longest, window - len(ids)), tokenizer)


def encode_or_message(row: Row, tokenizer: Any) -> list[int] | str:
    """Return the ids of a row's prompt, or the message why it cannot be encoded."""
    try:
        return _encode_prompt(row, tokenizer)
    except AlignError as error:
        return str(error)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tokenizer raises, the other rows go on
        return f"{row.model}: the conversation does not render ({describe_error(error)}); change its turns"


def describe_error(error: BaseException) -> str:
    """Return an unforeseen error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _encode_prompt(row: Row, tokenizer: Any) -> list[int]:
    """Return the ids of a row's conversation or raw prompt; raises DataError where it gives none."""
    from align.data.rendering.conversation_rows import render_chat

    if not row.is_raw_prompt:
        chat = row.chat
        return render_chat(
            row.messages, tokenizer, list(chat.tools) or None,
            template_kwargs=chat.template_kwargs, continue_final=chat.continue_final,
        )  # fmt: skip
    if row.text is None:
        ids, size = list(row.ids or ()), len(tokenizer)
        if outside := [token for token in ids if not 0 <= token < size]:
            about = f"token {outside[0]} is none of its {size}; encode the prompt with its own tokenizer"
            raise DataError(f"{row.model}: {about}")
    else:
        # A text that was rendered elsewhere begins with its own BOS.
        has_bos = tokenizer.bos_token is not None and row.text.startswith(tokenizer.bos_token)
        ids = list(tokenizer.encode(row.text, add_special_tokens=not has_bos))
    if not ids:
        what = "some" if row.text is None else "a text"
        raise DataError(f"{row.model}: the prompt has no tokens; give {what} to continue")
    return ids
