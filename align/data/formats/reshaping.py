"""Rows of another shape turned into plain rows: several examples in one row, or one conversation in several rows.

A plain row has the columns `prompt`, then `completion` (and perhaps `label`) or `chosen` and `rejected`, and perhaps
`answer`, `tools` and `id`; `answers.read_plain` makes a record of it. What cannot be an example by its nature,
such as a question without an answer, is a RowSkipped in the row's place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from align.data.formats.row_layout import Row, RowLayout
from align.data.formats.turns import kind_of, require_type
from align.data.row_errors import RawRow, RowError, RowSkipped
from align.errors import DataError, shorten
from align.schema import Message, Messages, assistant, user

PlainRow = Row | RowSkipped

MESSAGE_COLUMNS = {
    "conversation": (
        *("conversation_id", "conv_id", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id"),
        *("conversationId", "dialogueId", "dialogue", "conversation", "session", "thread"),
    ),
    "role": ("role", "from", "speaker", "sender", "author", "author_role", "authorRole"),
    "content": ("content", "text", "message", "value", "utterance", "body"),
    "order": (
        *("turn_index", "turn_id", "turn_number", "turnNumber", "turn", "message_index"),
        *("index", "position", "order", "seq", "step"),
    ),
}
"""Columns of tables with one message a row."""
_MESSAGE_KEYS = ("tool_calls", "name", "tool_call_id")
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
    common = {"prompt": layout.text(row, "prompt", "empty prompt")}
    if (reference := layout.optional_text(row, "answer")) is not None:
        common["answer"] = reference
    if layout.view == "prompt":
        yield common
        return
    solutions: list[tuple[str, str, bool]] = []
    for model, value in row.items():
        if isinstance(value, dict) and "is_correct" in value:
            text = _text(value.get("solution"), f"{model}.solution")
            place, remedy = f"{model}.is_correct", "write true or false"
            good = require_type(value["is_correct"], bool, place, "bad label", "neither true nor false", remedy)
            solutions.append((str(model), text, good))
    if layout.view != "preference":
        for model, text, good in solutions:
            yield common | {"completion": text, "label": good, "model": model}
        return
    right, wrong = ([text for _, text, good in solutions if good is wanted] for wanted in (True, False))
    pairs = [(good, bad) for good, bad in itertools.product(right, wrong) if good.strip() != bad.strip()]
    if not pairs:
        yield RowSkipped("no pair of a right and a wrong solution")
    yield from (common | {"chosen": good, "rejected": bad} for good, bad in pairs)


def split_ranked(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """Ranked answers: a tree of replies (OASST), or a prompt with answers and their ranks; rank 0 or 1 is the best.

    Every better answer is paired with every worse one; for demonstrations the best of each set is taken alone.
    """
    prompt = row.get("prompt")
    sets = _tree_sets(prompt) if isinstance(prompt, dict) else iter([_answer_set(row, layout)])
    empty = True
    for context, ranked in sets:
        ordered = sorted(ranked, key=lambda one: one[0])
        if layout.view in ("demonstration", "prompt", "text") and ordered:
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
"""a prompt, and its answers with their ranks"""


def _answer_set(row: Row, layout: RowLayout) -> Ranked:
    _, prompt = layout.need(row, "prompt")
    answers = require_type(row.get("answers"), list, "answers", "no answers", "not a list", "write [{answer, rank}]")
    ranked = []
    for index, answer in enumerate(answers):
        entry = _mapping(answer, f"answers[{index}]")
        rank, text = entry.get("rank"), entry.get("answer", entry.get("text"))
        if not isinstance(rank, (int, float)) or isinstance(rank, bool) or not isinstance(text, str):
            raise RowError("bad rank", f"answers[{index}]", "has no text with a number as rank", "write {answer, rank}")
        ranked.append((float(rank), text))
    return prompt, ranked


def _tree_sets(root: dict[str, Any]) -> Iterator[Ranked]:
    """Yield every set of sibling answers of a tree of replies, with the turns before them."""
    waiting: list[tuple[dict[str, Any], Messages]] = [(root, [])]  # no recursion, since trees may be deep
    while waiting:
        node, before = waiting.pop()
        context = [*before, _reply(node)]
        remedy = "write a list of replies"
        replies = require_type(node.get("replies") or [], list, "replies", "bad tree", "not a list", remedy)
        replies = [_mapping(reply, "replies") for reply in replies]
        if context[-1]["role"] == "user":
            yield (
                context,
                [
                    (float(rank), _reply(reply)["content"])
                    for reply in replies
                    if isinstance(rank := reply.get("rank"), (int, float)) and _reply(reply)["role"] == "assistant"
                ],
            )
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
        context = _text(entry.get("context", entry.get("context_text")), "context")
        questions = entry.get("qas", [entry])
        require_type(questions, list, "qas", "no questions", "not a list", "write a list of questions")
        for index, question in enumerate(questions):
            yield _question(_mapping(question, f"qas[{index}]"), context)


def _question(entry: dict[str, Any], context: str) -> PlainRow:
    question = _text(entry.get("question", entry.get("query_text")), "question")
    answers = _answers(entry.get("answers"))
    if not answers:
        return RowSkipped("question without an answer")
    if not question.strip():
        return RowSkipped("empty question")
    plain: Row = {"prompt": f"{context}\n\n{question}", "completion": answers[0], "answer": answers[0]}
    plain |= {"answers": answers} if len(answers) > 1 else {}
    identifier = entry.get("id", entry.get("query_id"))
    return plain if identifier is None else plain | {"id": str(identifier)}


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
    has_list = "choices" in row
    letters = [] if has_list else list(itertools.takewhile(lambda letter: row.get(letter) is not None, _LETTERS))
    choices, labels = _choices([row[letter] for letter in letters] or row.get("choices"))
    right = _right_one(row.get("answer", row.get("answerKey")), choices, labels)
    listed = "\n".join(f"({label}) {choice}" for label, choice in zip(labels, choices, strict=True))
    used = {"choices", "answer", "answerKey", layout.column(row, "prompt"), *letters}
    yield {
        **{key: value for key, value in row.items() if key not in used},
        "labels": labels,
        "prompt": f"{question}\n{listed}",
        "completion": f"({labels[right]}) {choices[right]}",
        "answer": f"({labels[right]})",
    }


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """Return the texts of the choices and their labels."""
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


def rename_preferred(row: Row, _layout: RowLayout) -> Iterator[PlainRow]:
    """Rename the columns of OpenAI's preference files: input with messages, preferred and non-preferred output."""
    given = _mapping(row.get("input"), "input")
    columns = ("input", "preferred_output", "non_preferred_output")
    for column in columns[1:]:
        if column not in row:
            raise RowError("missing column", column, f"no such column (columns: {', '.join(map(str, row))})", "add it")
    rest = {key: value for key, value in row.items() if key not in columns}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    pair = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    yield {**rest, **tools, "prompt": given.get("messages"), **pair}


def split_translation(row: Row, layout: RowLayout) -> Iterator[PlainRow]:
    """Take the texts of one object by language (OPUS, WMT) as columns, of which settings name prompt and completion."""
    texts = _mapping(row.get("translation"), "translation")
    if not {"prompt", "completion"} <= layout.columns.keys():
        asked, answered, *_ = (*map(str, texts), "LANGUAGE", "LANGUAGE")
        problem = f"holds {', '.join(map(str, texts))}, and nothing says which of them is asked"
        remedy = f"add :prompt={asked},completion={answered} behind the file, or columns: in a YAML"
        raise RowError("no direction", "translation", problem, remedy)
    yield {key: value for key, value in row.items() if key != "translation"} | texts


def _mapping(value: Any, field: str) -> dict[str, Any]:
    return require_type(value, dict, field, "not an object", "not an object", "write {key: value}")


def _text(value: Any, field: str) -> str:
    return require_type(value, str, field, "not text", "not text", "write it as a string")


def find_message_columns(row: Row, named: Mapping[str, str | list[str]] | None = None) -> dict[str, str] | None:
    """Return the columns of conversation, role, content and order; None for a row that is no single message."""
    columns: dict[str, str] = {}
    for part, names in MESSAGE_COLUMNS.items():
        given = (named or {}).get(part)
        cells = (name for name in names if isinstance(row.get(name), (str, int, float)) and row[name] != "")
        column = given if isinstance(given, str) else next(cells, None)
        if column is not None:
            columns[part] = column
    is_tree = "parent_id" in row  # messages with several answers to each are no one conversation
    return columns if {"conversation", "role", "content"} <= columns.keys() and not is_tree else None


def join_messages(rows: Iterator[RawRow], name: str, named: Mapping[str, str | list[str]]) -> Iterator[RawRow]:
    """Yield one row for each run of rows with the same conversation id.

    Raises DataError where an id comes back after another: rows are held for one conversation at a time.
    """
    seen: set[int] = set()
    messages: list[RawRow] = []
    columns: dict[str, str] | None = None
    for raw in rows:
        columns = columns or (find_message_columns(raw.value, named) if isinstance(raw.value, dict) else None)
        if columns is None or not isinstance(raw.value, dict) or columns["conversation"] not in raw.value:
            wanted = ", ".join((columns or {}).values()) or "conversation_id, role, content"
            error = RowError("not a message", "row", f"is no message with {wanted}", "fill it in or remove the row")
            yield raw if isinstance(raw.value, RowError) else raw._replace(value=error)
            continue
        key = raw.value[columns["conversation"]]
        if messages and key != messages[0].value[columns["conversation"]]:
            yield _join(messages, columns)
            messages = []
        if not messages:
            if hash(str(key)) in seen:
                raise DataError(
                    f"{name}:{raw.line} {columns['conversation']}: {shorten(key)} comes back after another one; "
                    "sort the rows by conversation and turn"
                )
            seen.add(hash(str(key)))
        messages.append(raw)
    if messages and columns:
        yield _join(messages, columns)


def _join(messages: list[RawRow], columns: dict[str, str]) -> RawRow:
    """Return one row of the messages of a conversation, sorted by the order column where every cell is a number."""
    if order := columns.get("order"):
        with contextlib.suppress(TypeError, ValueError):
            positions = [float(raw.value.get(order)) for raw in messages]
            if len(set(positions)) == len(positions):
                ordered = sorted(zip(positions, messages, strict=True), key=lambda pair: pair[0])
                messages = [raw for _, raw in ordered]
    turns = [
        {"role": raw.value.get(columns["role"]), "content": raw.value.get(columns["content"])}
        | {key: raw.value[key] for key in _MESSAGE_KEYS if raw.value.get(key)}
        for raw in messages
    ]
    first = messages[0].value
    used = {*columns.values(), *_MESSAGE_KEYS, "id", "message_id"}
    shared = {
        key: value
        for key, value in first.items()
        if key not in used and all(raw.value.get(key) == value for raw in messages)
    }
    return messages[0]._replace(value={**shared, "messages": turns, "id": first[columns["conversation"]]})
