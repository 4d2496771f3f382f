"""A row from submission to its last event: its prompt in tokens, its rules, and what it has said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from align.data.reasoning import mark_thoughts
from align.engine.prompt_text import place_prompt, prompt_text
from align.engine.protocol import Fault, FinishReason, Row, RowDelta, RowDone, RowError, RowPrompt, Sampling
from align.engine.sampling import RowSampler
from align.engine.scores import PromptScores, describe
from align.engine.speech import Piece, Speech
from align.engine.token_rules import NO_RULES, LiveRules
from align.errors import AlignError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from align.engine.stream import Stream


@dataclass
class LiveRow:
    """A row that waits or is being written. It sends its last event exactly once."""

    stream: Stream
    index: int
    row: Row
    sampling: Sampling
    adapter: str = ""
    lane: str = ""
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
            self._end(RowError(self.index, message, fault))

    def _end(self, event: RowDone | RowError) -> None:
        self.ended = True
        self.stream.put(event)


class Writing:
    """A row on its way through the model."""

    def __init__(self, live: LiveRow, limit: int, tokenizer: Any) -> None:
        self.live = live
        self.prompt_ids = live.prompt_ids
        self.limit = limit
        self.started = time.perf_counter()
        self.sampler = RowSampler(live.sampling, live.row.seed, live.prompt_ids, live.rules)
        self._tokenizer = tokenizer
        # What goes on with a text keeps the space before its first word.
        goes_on = live.row.goes_on or live.row.chat.continue_final
        before = live.prompt_ids if goes_on else ()
        self._speech = Speech(tokenizer, live.sampling.stop, before, live.rules.rules)
        self._first_token = 0.0
        asked = live.row.prompt_logprobs
        self.scores = None if asked is None else PromptScores(asked)
        self._ids: list[int] = []

    @property
    def columns(self) -> int:
        """How many tokens of it the model holds: prompt and answer, without the newest."""
        return len(self.prompt_ids) + max(self._speech.count - 1, 0)

    @property
    def most_columns(self) -> int:
        """How many tokens prompt and answer have together at most."""
        return len(self.prompt_ids) + self.limit

    def tell_prompt(self) -> None:
        """Tell the reader what was read, when asked for it."""
        row, text = self.live.row, ""
        if self.scores is not None:
            tokens = self.scores.tokens(self.prompt_ids, self._tokenizer)
            text, tokens = place_prompt(tokens, row.text, self._tokenizer)
            self.live.stream.put(RowPrompt(self.live.index, text, tuple(tokens)))
        elif row.echo:
            self.live.stream.put(RowPrompt(self.live.index, prompt_text(row.text, self.prompt_ids, self._tokenizer)))

    def take(self, token: int, logits: Tensor) -> None:
        """Add one token of this row, drawn from logits (V,), and tell the reader what it now says."""
        if self.limit < 1:
            self.finish("length")
            return
        self._first_token = self._first_token or time.perf_counter()
        self.sampler.took(token)
        ends = token in self.live.rules.stops
        if ends and not self.live.rules.rules.include_stop:
            self.finish("stop")
            return
        self._ids.append(token)
        asked = self.live.row.logprobs
        told = None if asked is None else describe(token, logits, asked, self._tokenizer)
        self._put(self._speech.push(token, told))
        if ends or self._speech.stopped or self.live.rules.complete:
            self.finish("stop")
        elif self._speech.count >= self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the row well, showing what was held back."""
        self._put(self._speech.close())
        self.live.done(
            "stop" if self._speech.stopped else reason,
            text=self._speech.text,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self._speech.count,
            first_token_seconds=self._first_token - self.live.submitted if self._first_token else 0.0,
            # A stop string cuts the text within its tokens.
            marked=None if self._speech.stopped else mark_thoughts(self._tokenizer, self.prompt_ids, self._ids),
        )

    def _put(self, piece: Piece) -> None:
        if piece.text or piece.tokens:
            self.live.stream.put(RowDelta(self.live.index, *piece))


def prepare(live: LiveRow, tokenizer: Any, window: int | None) -> Writing | None:
    """A row with its prompt encoded; one that cannot be written ends with an error and is None."""
    found = live.prompt_ids or encode_or_fail(live.row, tokenizer)
    if isinstance(found, str):
        live.fail(found, "prompt")
        return None
    live.prompt_ids = found
    size, longest = len(found), live.sampling.max_new_tokens
    limit = longest if window is None else min(longest, window - size)
    if live.row.reads_only and limit >= 0:
        limit = 0
    elif limit < 1:
        fail_too_long(live, size, window)
        return None
    return Writing(live, limit, tokenizer)


def fail_too_long(live: LiveRow, size: int, window: int | None) -> None:
    """End a row whose prompt leaves no room for an answer."""
    about = f"the conversation has {size} tokens, the model takes {window}; shorten it or start a new one"
    live.fail(f"{live.row.model}: {about}", "too_long")


def encode_or_fail(row: Row, tokenizer: Any) -> list[int] | str:
    """The ids a row continues, or why there are none."""
    try:
        return encode(row, tokenizer)
    except AlignError as error:
        return str(error)
    except MemoryError:
        raise
    except Exception as error:  # whatever a tokenizer raises, the other rows go on
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return f"{row.model}: the conversation does not render ({what}); change its turns"


def encode(row: Row, tokenizer: Any) -> list[int]:
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
