"""Readers of preference pairs: chosen and rejected, two answers and a verdict, or the votes of the comparison page."""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter

from align.data.formats.row_layout import Row, RowLayout, whole_number_text
from align.data.formats.turns import SHAREGPT_TAGS, read_context, read_turns, same_answers, split_pair, with_system
from align.data.row_errors import RowError, RowSkipped
from align.errors import shorten
from align.schema import Messages, Record

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPELLINGS = {
    "a": ("a", "1", "a>b", "a>>b", "b<a", "b<<a", "[[a]]", "[[a>b]]", "[[a>>b]]", "model_a", "output_1"),
    "b": ("b", "2", "b>a", "b>>a", "a<b", "a<<b", "[[b]]", "[[b>a]]", "[[b>>a]]", "model_b", "output_2"),
    "tie": ("tie", "0", "a=b", "b=a", "a~=b", "[[c]]", "[[a=b]]", "tie (bothbad)", "tie (both bad)", "both_bad"),
}
_VERDICT_OF = {spelling: verdict for verdict, spellings in _SPELLINGS.items() for spelling in spellings}
# What a model wrote cannot be corrected by the user, so such a vote is left out and counted.
_UNUSABLE = {"empty completion": "vote: empty answer", "not text": "vote: an answer holds what is no text"}


def read_preference(row: Row, layout: RowLayout) -> list[Record]:
    """Read TRL's preference: an explicit prompt, or two whole conversations that share their first turns."""
    column = layout.column(row, "prompt")
    if column is None and "prompt" in layout.columns:
        layout.need(row, "prompt")
    context = read_context(row[column], column, layout.tags) if column else []
    return pair_over(row, layout, with_system(context, layout.optional_text(row, "system")))


def pair_over(row: Row, layout: RowLayout, context: Messages) -> list[Record]:
    """Return the pair over a prompt; answers that repeat the prompt (or come without one) are cut where they part."""
    good, bad = (layout.answer(row, part) for part in ("chosen", "rejected"))
    if not context or good[0]["role"] != "assistant" or bad[0]["role"] != "assistant":
        given = [turn for turn in context if turn["role"] != "system"]
        context, good, bad = split_pair(good, bad)
        if given and given != [turn for turn in context if turn["role"] != "system"][: len(given)]:
            remedy = "correct the prompt"
            raise RowError("prompts differ", "prompt", "is not what chosen and rejected begin with", remedy)
    return [Record(prompt=context, chosen=good, rejected=bad)]


def read_hh(row: Row, layout: RowLayout) -> list[Record]:
    """Read two whole transcripts in which every turn starts with a blank line and `Human:` or `Assistant:`."""
    sides = [_read_transcript(layout.text(row, part, "empty completion"), part) for part in ("chosen", "rejected")]
    prompt, good, bad = split_pair(*sides)
    return [Record(prompt=prompt, chosen=good, rejected=bad)]


def _read_transcript(text: str, field: str) -> Messages:
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        problem = f"does not start with a Human: turn but with {shorten(text[:40])}"
        raise RowError("not a transcript", field, problem, "use format: preference, or correct the row")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    turns = [{"from": "human" if who == "Human" else "gpt", "value": content.strip()} for who, content in pairs]
    return read_turns(turns, field, SHAREGPT_TAGS)


def read_judged(row: Row, layout: RowLayout) -> list[Record]:
    """Read two answers and a verdict; several verdict columns are judges who vote, and no majority is a tie.

    The answers may be whole conversations, which then must begin with the same turns.
    """
    answers = {side: layout.answer(row, side) for side in ("a", "b")}
    whole = any(turns[0]["role"] != "assistant" for turns in answers.values())
    if whole and not layout.column(row, "prompt"):
        context, answers["a"], answers["b"] = split_pair(answers["a"], answers["b"])
    else:
        column, value = layout.need(row, "prompt")
        extra = layout.optional_text(row, "input") if layout.column(row, "input") != column else None
        if extra and isinstance(value, str):
            value = f"{value}\n{extra}" if value.strip() else extra
        context = read_context(value, column, layout.tags)
    context = with_system(context, layout.optional_text(row, "system"))
    named = layout.columns.get("label")
    columns = named if isinstance(named, list) else [layout.need(row, "label")[0]]
    verdicts = Counter(_read_verdict(row.get(column), column, layout) for column in columns)
    winner, count = verdicts.most_common(1)[0]
    return _pair_by_verdict(context, answers, winner if count * 2 > len(columns) else "tie", layout)


def _read_verdict(value: object, column: str, layout: RowLayout) -> str:
    if isinstance(value, float) and 1 < value < 2 and not layout.label_map:  # a preference between answers 1 and 2
        return "tie" if value == 1.5 else "a" if value < 1.5 else "b"
    meanings = layout.label_map or _VERDICT_OF
    verdict = meanings.get(str(value), meanings.get(whole_number_text(value)))
    if not isinstance(verdict, str):
        remedy = f"known: {', '.join(meanings)}; add it to label_map"
        raise RowError("bad label", column, f"is {shorten(value)}, which label_map does not know", remedy)
    return verdict


def _pair_by_verdict(context: Messages, answers: dict[str, Messages], verdict: str, layout: RowLayout) -> list[Record]:
    orders = (("a", "b"), ("b", "a"))
    pairs = [Record(prompt=context, chosen=answers[good], rejected=answers[bad]) for good, bad in orders]
    if verdict != "tie":
        return pairs[:1] if verdict == "a" else pairs[1:]
    if layout.ties == "drop":
        raise RowSkipped("tie")
    return [pairs[_coin(context, answers["a"], answers["b"])]] if layout.ties == "half" else pairs


def _coin(*turns: Messages) -> int:
    """Return 0 or 1, as likely as each other, and always the same for the same content."""
    return zlib.crc32(json.dumps(turns, sort_keys=True).encode()) & 1


def read_votes(row: Row, layout: RowLayout) -> list[Record]:
    """Read a vote of the comparison page; one without an answer to learn from is left out, never an error.

    In the view `unpaired` the better answer is good and the other bad, both are bad after "both bad", and both are
    good after a tie that is not left out: there is another button for two bad answers.
    """
    context = layout.context(row, "prompt")
    choice = layout.text(row, "label", None)
    if choice not in ("a", "b", "tie", "bad"):
        raise RowError("bad label", "choice", f"is {shorten(choice)}", "write a, b, tie or bad")
    unpaired = layout.view == "unpaired"
    if choice == "bad" and not (unpaired and layout.both_bad == "unpaired"):
        raise RowSkipped("vote: both bad")
    review = row.get("review")
    if isinstance(review, dict) and review.get("again"):
        raise RowSkipped("vote: decided before by this voter")
    if row.get("truncated") and layout.truncated == "drop":
        raise RowSkipped("vote: an answer was stopped early (truncated=keep takes them)")
    try:
        answers = {side: layout.answer(row, side) for side in ("a", "b")}
    except RowError as error:
        if error.reason not in _UNUSABLE:
            raise
        raise RowSkipped(_UNUSABLE[error.reason]) from None
    if same_answers(answers["a"], answers["b"]):
        raise RowSkipped("vote: equal answers")
    # After its first answer each side went on with its own history: there is no context both share to learn a pair in.
    if any(turn["role"] != "assistant" for turns in answers.values() for turn in turns):
        raise RowSkipped("vote: several turns")
    if unpaired:
        return _label_answers(context, {side: answers[side] for side in _new_sides(row, choice)}, choice, layout)
    return _pair_by_verdict(context, answers, choice, layout)


def _label_answers(context: Messages, answers: dict[str, Messages], choice: str, layout: RowLayout) -> list[Record]:
    if choice == "tie" and layout.ties == "drop":
        raise RowSkipped("tie")
    if choice == "tie" and layout.ties == "half":
        side = "ab"[_coin(context, *answers.values())]
        answers = {side: answers[side]} if side in answers else {}
    if not answers:
        raise RowSkipped("tie: the other answer was kept")
    return [Record(prompt=context, completion=turns, label=choice in (side, "tie")) for side, turns in answers.items()]


def _new_sides(row: Row, choice: str) -> list[str]:
    """Return the sides whose answer no earlier row of the same vote holds: a vote on four answers is several rows."""
    panes = row.get("sides")
    if not isinstance(panes, dict) or not all(isinstance(panes.get(side), int) for side in ("a", "b")):
        return ["a", "b"]
    if choice in ("a", "b"):
        other = "b" if choice == "a" else "a"
        first = panes[other] == (1 if panes[choice] == 0 else 0)
        return [side for side in ("a", "b") if side == other or first]
    return [side for side, new in (("a", panes["b"] == 1), ("b", panes["a"] == 0)) if new]
