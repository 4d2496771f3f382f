"""Readers of judged answers: two answers and a verdict, from files or from the comparison page."""

from __future__ import annotations

import json
import zlib
from collections import Counter

from align.data.formats.row_layout import Row, RowLayout, spelled_whole
from align.data.formats.turns import read_context, same_answers, split_pair, with_system
from align.data.row_errors import RowError, RowSkipped
from align.errors import shorten
from align.schema import Messages, Record


def read_pairs(row: Row, layout: RowLayout) -> list[Record]:
    """Two answers and a verdict; several verdict columns are judges who vote, and no majority is a tie.

    The answers may be whole conversations, which then must begin with the same turns.
    """
    answers = {side: layout.answer(row, side) for side in ("a", "b")}
    if layout.column(row, "prompt"):
        context = _read_question(row, layout)
    elif any(turns[0]["role"] != "assistant" for turns in answers.values()):
        context, answers["a"], answers["b"] = split_pair(answers["a"], answers["b"])
    else:
        layout.need(row, "prompt")
    context = with_system(context, layout.optional_text(row, "system"))
    return _judged(context, answers, _verdict(row, layout), layout)


# What a model wrote is nobody's to mend, so such a vote is left out and counted.
_UNUSABLE = {"empty completion": "vote: empty answer", "not text": "vote: an answer holds what is no text"}


def read_votes(row: Row, layout: RowLayout) -> list[Record]:
    """The comparison page's votes; one without an answer to learn from is left out, never an error.

    Where answers are taken one by one the better one is good and the other bad, both are bad after "both bad", and
    both are good after a tie that is not left out: there is another button for two bad answers.
    """
    context = layout.context(row, "prompt")
    choice = layout.text(row, "label", None)
    if choice not in ("a", "b", "tie", "bad"):
        raise RowError("bad label", "choice", f"is {shorten(choice)}", "write a, b, tie or bad")
    alone = layout.view == "unpaired"
    if choice == "bad" and not (alone and layout.both_bad == "unpaired"):
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
    if alone:
        return _labelled(context, {side: answers[side] for side in _told_here(row, choice)}, choice, layout)
    return _judged(context, answers, choice, layout)


def _labelled(context: Messages, answers: dict[str, Messages], choice: str, layout: RowLayout) -> list[Record]:
    if choice == "tie" and layout.ties == "drop":
        raise RowSkipped("tie")
    if choice == "tie" and layout.ties == "half":
        side = "ab"[_coin(context, *answers.values())]
        answers = {side: answers[side]} if side in answers else {}
    if not answers:
        raise RowSkipped("tie: the other answer was kept")
    return [Record(prompt=context, completion=turns, label=choice in (side, "tie")) for side, turns in answers.items()]


def _told_here(row: Row, choice: str) -> list[str]:
    """The sides whose answer no earlier row of the same vote holds: a vote on four answers is several rows."""
    places = row.get("sides")
    if not isinstance(places, dict) or not all(isinstance(places.get(side), int) for side in ("a", "b")):
        return ["a", "b"]
    if choice in ("a", "b"):
        other = "b" if choice == "a" else "a"
        first = places[other] == (1 if places[choice] == 0 else 0)
        return [side for side in ("a", "b") if side == other or first]
    return [side for side, here in (("a", places["b"] == 1), ("b", places["a"] == 0)) if here]


def _read_question(row: Row, layout: RowLayout) -> Messages:
    column, value = layout.need(row, "prompt")
    extra = layout.optional_text(row, "input") if layout.column(row, "input") != column else None
    if extra and isinstance(value, str):
        value = f"{value}\n{extra}" if value.strip() else extra
    return read_context(value, column, layout.tags)


def _judged(context: Messages, answers: dict[str, Messages], verdict: str, layout: RowLayout) -> list[Record]:
    first = Record(prompt=context, chosen=answers["a"], rejected=answers["b"])
    second = Record(prompt=context, chosen=answers["b"], rejected=answers["a"])
    if verdict != "tie":
        return [first if verdict == "a" else second]
    if layout.ties == "drop":
        raise RowSkipped("tie")
    if layout.ties == "half":
        return [(first, second)[_coin(context, answers["a"], answers["b"])]]
    return [first, second]


def _coin(*turns: Messages) -> int:
    """0 or 1, as likely as each other, and always the same for the same content."""
    return zlib.crc32(json.dumps(turns, sort_keys=True).encode()) & 1


_SPELLED = {
    "a": ("a", "1", "a>b", "a>>b", "b<a", "b<<a", "[[a]]", "[[a>b]]", "[[a>>b]]", "model_a", "output_1"),
    "b": ("b", "2", "b>a", "b>>a", "a<b", "a<<b", "[[b]]", "[[b>a]]", "[[b>>a]]", "model_b", "output_2"),
    "tie": ("tie", "0", "a=b", "b=a", "a~=b", "[[c]]", "[[a=b]]", "tie (bothbad)", "tie (both bad)", "both_bad"),
}
VERDICT_OF = {spelling: verdict for verdict, spellings in _SPELLED.items() for spelling in spellings}
"""What the usual spellings of a verdict mean, in lower case, without a label map."""


def _verdict(row: Row, layout: RowLayout) -> str:
    named = layout.columns.get("label")
    columns = named if isinstance(named, list) else [layout.need(row, "label")[0]]
    verdicts = Counter(_one_verdict(row.get(column), column, layout) for column in columns)
    winner, count = verdicts.most_common(1)[0]
    return winner if count * 2 > len(columns) else "tie"


def _one_verdict(value: object, column: str, layout: RowLayout) -> str:
    known = layout.label_map or VERDICT_OF
    if (
        isinstance(value, float) and not value.is_integer() and 1 < value < 2 and not layout.label_map
    ):  # a preference between 1 and 2
        return "tie" if value == 1.5 else "a" if value < 1.5 else "b"
    verdict = known.get(str(value), known.get(spelled_whole(value)))
    if not isinstance(verdict, str):
        problem = f"is {shorten(value)}, which label_map does not know"
        raise RowError("bad label", column, problem, f"known: {', '.join(known)}; add it to label_map")
    return verdict
