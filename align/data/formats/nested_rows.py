"""Rows that hold several examples, or one in a shape of its own, turned into plain rows.

A plain row has the columns `prompt`, then `completion` (and perhaps `label`) or `chosen` and `rejected`, and perhaps
`answer`, `tools` and `id`; `single_answers.read_plain` makes a record of it. What cannot be an example by its nature,
such as a question without an answer, is a RowSkipped in the row's place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from align.data.formats.row_layout import Row, RowLayout
from align.data.formats.turns import kind_of
from align.data.row_errors import RowError, RowSkipped
from align.schema import Message, Messages, assistant, user

PlainRow = Row | RowSkipped

_ONE_EACH = ("demonstration", "prompt", "text")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def split_instances(row: Row, _layout: RowLayout) -> Iterator[PlainRow]:
    """Self-instruct: an instruction with a list of instances, each with its own input and output."""
    instances = row.get("instances")
    if not isinstance(instances, list):
        yield row
        return
    rest = {key: value for key, value in row.items() if key != "instances"}
    if not instances:
        yield RowSkipped("no instances")
    for index, instance in enumerate(instances):
        yield rest | _mapping(instance, f"instances[{index}]")


def split_solutions(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """Solutions of one question, each right or wrong: labelled answers, or every right one against every wrong one."""
    prompt = layout.text(row, "prompt", "empty prompt")
    reference = layout.optional_text(row, "answer")
    common = {"prompt": prompt} | ({} if reference is None else {"answer": reference})
    if layout.view == "prompt":
        yield common
        return
    solutions = list(_solutions(row))
    if layout.view == "preference":
        right, wrong = ([text for _, text, good in solutions if good is wanted] for wanted in (True, False))
        pairs = [(good, bad) for good, bad in itertools.product(right, wrong) if good.strip() != bad.strip()]
        if not pairs:
            yield RowSkipped("no pair of a right and a wrong solution")
        yield from (common | {"chosen": good, "rejected": bad} for good, bad in pairs)
        return
    for model, text, good in solutions:
        yield common | {"completion": text, "label": good, "model": model}


def _solutions(row: Row) -> Iterator[tuple[str, str, bool]]:
    for column, value in row.items():
        if not isinstance(value, dict) or "is_correct" not in value:
            continue
        text, good = value.get("solution"), value["is_correct"]
        if not isinstance(text, str):
            raise RowError("not text", f"{column}.solution", f"is {kind_of(text)}, not text", "write it as a string")
        if not isinstance(good, bool):
            problem = f"is {kind_of(good)}, neither true nor false"
            raise RowError("bad label", f"{column}.is_correct", problem, "write true or false")
        yield str(column), text, good


def split_ranked(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """Ranked answers: a tree of replies (OASST), or a prompt with answers and their ranks; rank 0 or 1 is the best.

    Every better answer is paired with every worse one; for demonstrations the best of each set is taken alone.
    """
    prompt = row.get("prompt")
    sets = _tree_sets(prompt, []) if isinstance(prompt, dict) else iter([_answer_set(row, layout)])
    empty = True
    for context, ranked in sets:
        ordered = sorted(ranked, key=lambda one: one[0])
        if layout.view in _ONE_EACH and ordered:
            empty = False
            yield {"prompt": context, "completion": ordered[0][1]}
            continue
        for (better, good), (worse, bad) in itertools.combinations(ordered, 2):
            if better < worse:
                empty = False
                yield {"prompt": context, "chosen": good, "rejected": bad}
    if empty:
        yield RowSkipped("no answers of different rank")


Ranked = tuple[Any, list[tuple[float, str]]]


def _answer_set(row: Row, layout: RowLayout) -> Ranked:
    _, prompt = layout.need(row, "prompt")
    answers = row.get("answers")
    if not isinstance(answers, list):
        raise RowError("no answers", "answers", f"is {kind_of(answers)}, not a list", "write [{answer, rank}]")
    ranked = []
    for index, answer in enumerate(answers):
        entry = _mapping(answer, f"answers[{index}]")
        rank, text = entry.get("rank"), entry.get("answer", entry.get("text"))
        if not isinstance(rank, (int, float)) or isinstance(rank, bool) or not isinstance(text, str):
            raise RowError("bad rank", f"answers[{index}]", "has no text with a number as rank", "write {answer, rank}")
        ranked.append((float(rank), text))
    return prompt, ranked


def _tree_sets(node: dict[str, Any], before: Messages) -> Iterator[Ranked]:
    """Yield every set of sibling answers of a tree of replies, with the turns before them."""
    waiting = [(node, before)]  # no recursion, since trees may be deep
    while waiting:
        node, before = waiting.pop()
        context = [*before, _reply(node)]
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise RowError("bad tree", "replies", f"is {kind_of(replies)}, not a list", "write a list of replies")
        replies = [_mapping(reply, "replies") for reply in replies]
        if context[-1]["role"] == "user":
            ranked = [
                (float(rank), _reply(reply)["content"])
                for reply in replies
                if isinstance(rank := reply.get("rank"), (int, float)) and _reply(reply)["role"] == "assistant"
            ]
            yield context, ranked
        waiting += [(reply, context) for reply in reversed(replies)]


def _reply(node: dict[str, Any]) -> Message:
    role, text = node.get("role"), node.get("text")
    if role not in ("prompter", "user", "assistant") or not isinstance(text, str):
        raise RowError("bad tree", "replies", "has a reply without role or text", "write {role, text, replies}")
    return assistant(text) if role == "assistant" else user(text)


def split_questions(row: Row, _layout: RowLayout) -> Iterator[PlainRow]:
    """Questions about a text (SQuAD, CMRC): one row a question, its first answer the reference of all `answers`."""
    paragraphs = row.get("paragraphs")
    for number, paragraph in enumerate(paragraphs if isinstance(paragraphs, list) else [row]):
        entry = _mapping(paragraph, f"paragraphs[{number}]")
        context = entry.get("context", entry.get("context_text"))
        if not isinstance(context, str):
            raise RowError("not text", "context", f"is {kind_of(context)}, not text", "write it as a string")
        questions = entry.get("qas", [entry])
        if not isinstance(questions, list):
            raise RowError("no questions", "qas", f"is {kind_of(questions)}, not a list", "write a list of questions")
        for index, question in enumerate(questions):
            yield _question(_mapping(question, f"qas[{index}]"), context)


def _question(entry: dict[str, Any], context: str) -> PlainRow:
    question = entry.get("question", entry.get("query_text"))
    if not isinstance(question, str):
        raise RowError("not text", "question", f"is {kind_of(question)}, not text", "write it as a string")
    answers = _answers(entry.get("answers"))
    if not answers:
        return RowSkipped("question without an answer")
    identifier = entry.get("id", entry.get("query_id"))
    plain: Row = {"prompt": f"{context}\n\n{question}", "completion": answers[0], "answer": answers[0]}
    plain |= {"answers": answers} if len(answers) > 1 else {}
    plain |= {} if identifier is None else {"id": str(identifier)}
    return plain if question.strip() else RowSkipped("empty question")


def _answers(answers: Any) -> list[str]:
    """Return the different answers of [{text, answer_start}] or {text: [...], answer_start: [...]}.

    The list is empty unless the first answer, which becomes the completion, is a text.
    """
    if isinstance(answers, dict):
        answers = answers.get("text")
    answers = answers if isinstance(answers, list) else [answers]
    texts = [answer.get("text") if isinstance(answer, dict) else answer for answer in answers]
    good = [text for text in texts if isinstance(text, str) and text.strip()]
    return list(dict.fromkeys(good)) if good and good[0] == texts[0] else []


def split_choice(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """A question with choices, of which one is right: named by its letter, its number from 0, or its text.

    The choices are a list, or columns A, B and so on (C-Eval); `meta.labels` are the letters.
    """
    question = layout.text(row, "prompt", "empty prompt")
    letters = _letter_columns(row)
    choices, labels = _choices([row[letter] for letter in letters] if letters else row.get("choices"))
    right = _right_one(row.get("answer", row.get("answerKey")), choices, labels)
    listed = "\n".join(f"({label}) {choice}" for label, choice in zip(labels, choices, strict=True))
    answer = f"({labels[right]})"
    used = {"choices", "answer", "answerKey", layout.column(row, "prompt"), *letters}
    yield {
        **{key: value for key, value in row.items() if key not in used},
        "labels": labels,
        "prompt": f"{question}\n{listed}",
        "completion": f"{answer} {choices[right]}",
        "answer": answer,
    }


def _letter_columns(row: Row) -> list[str]:
    """Return the columns A, B and so on in which a row without a list of choices has them."""
    if "choices" in row:
        return []
    return list(itertools.takewhile(lambda letter: row.get(letter) is not None, _LETTERS))


def _choices(value: Any) -> tuple[list[str], list[str]]:
    labels: Any = None
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
        raise RowError("bad choices", "choices", f"is {kind_of(value)}, not a list of texts", "write a list of texts")
    if not isinstance(labels, list) or len(labels) != len(value):
        labels = list(_LETTERS[: len(value)])
    if len(labels) != len(value):
        raise RowError("bad choices", "choices", f"has {len(value)} texts", f"give at most {len(_LETTERS)}")
    return value, [str(label) for label in labels]


def _right_one(answer: Any, choices: list[str], labels: list[str]) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    for spellings in (labels, choices):
        if answer in spellings:
            return spellings.index(answer)
    if isinstance(answer, str) and answer.isdecimal() and int(answer) < len(choices):  # a number as tables hold it
        return int(answer)
    remedy = f"write one of {', '.join(labels)}, its number from 0, or its text"
    raise RowError("bad label", "answer", f"is {kind_of(answer)}, none of the choices", remedy)


def join_preferred(row: Row, _layout: RowLayout) -> Iterator[PlainRow]:
    """Rename the columns of OpenAI's preference files: input with messages, preferred and non-preferred output."""
    given = _mapping(row.get("input"), "input")
    columns = ("input", "preferred_output", "non_preferred_output")
    for column in columns[1:]:
        if column not in row:
            raise RowError("missing column", column, f"no such column (columns: {', '.join(map(str, row))})", "add it")
    rest = {key: value for key, value in row.items() if key not in columns}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    yield {
        **rest,
        **tools,
        "prompt": given.get("messages"),
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
    }


def _mapping(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("not an object", field, f"is {kind_of(value)}, not an object", "write {key: value}")
    return value
