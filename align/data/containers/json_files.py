"""JSON and JSON-lines, row by row, from files of any size; keys written twice are noticed."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

import orjson

from align.data.containers.data_files import LONGEST_LINE, DataFile
from align.data.formats.detection import recognise
from align.data.row_errors import RowError
from align.errors import DataError, UsageError, shorten

_SPACE = re.compile(r"[ \t\r\n]*")
_KEY_THEN_SPACE = re.compile(rb'"[ \t\r\n]+:').search
_ROW_LISTS = ("data", "examples", "rows", "train")
_TALK_LISTS = ("conversations", "dialogues", "dialogs")
_PARTIAL = 12
"""A broken place this near to the end of what was read may be sound once more is read: no literal is longer."""
_OF_NUMBER = 3
"""A number this near to the end may go on: what may follow the part that is read is at most `e-`."""
_TOO_DEEP = RowError("nested too deeply", "row", "is nested too deeply to be read", "flatten it or remove the row")


class RawRow(NamedTuple):
    """A row as its file holds it; `value` is a RowError when the file holds no readable row there."""

    source: str
    line: int
    value: Any


def read_json(file: DataFile) -> Iterator[RawRow]:
    """The rows of a `.json` file: a list, an object that holds one, or lines of JSON after all."""
    start = _first_bytes(file)
    if start.startswith(b"{") and not _is_lines(start):
        return _object_rows(file)
    if file.reading.rows_at and start:
        raise UsageError(f"{file.name}: rows_at means nothing here, the file is a list of rows; take it out")
    if start.startswith(b"[") and not _is_list_of_lines(start):
        return _array_rows(file)
    if start:
        file.note("named .json but holds JSON-lines; it was read as such")
    return _line_rows(file)


def read_json_lines(file: DataFile) -> Iterator[RawRow]:
    """The rows of a `.jsonl` file: one a line, or a list after all."""
    start = _first_bytes(file)
    if start.startswith(b"[") and not _is_list_of_lines(start):
        file.note("named as JSON-lines but holds a JSON array; it was read as such")
        return _array_rows(file)
    return _line_rows(file)


def rows_of_object(whole: dict[str, Any], file: DataFile) -> Iterator[RawRow]:
    """The rows inside one object, numbered in place of lines: under a key, by key, or the object itself."""
    if file.reading.rows_at:
        yield from _numbered(file, _dig(whole, file))
    elif (key := rows_key(whole)) is not None:
        others = [other for other in whole if other != key and isinstance(whole[other], list)]
        beside = f" (beside {', '.join(others[:5])}; say `rows_at:` in a dataset YAML for another)" if others else ""
        file.note(f"the rows are the list under {key!r}, numbered in place of lines{beside}")
        yield from _numbered(file, whole[key])
    elif recognise(whole):
        file.note("holds one object, which is one row")
        yield RawRow(file.name, 1, whole)
    elif whole and all(isinstance(value, dict) for value in whole.values()):
        file.note("the rows are the objects under each key; the key became their id")
        yield from _numbered(file, [{"id": key} | value for key, value in whole.items()])
    else:
        raise DataError(
            f"{file.name}: holds one object with {shorten(list(whole))}, not rows; give a list of rows, "
            "or name the key that holds them, `rows_at: KEY`, in a dataset YAML"
        )


def rows_key(whole: dict[str, Any]) -> str | None:
    """The key under which an object usually holds a list of rows, if it has one."""
    known = next((key for key in _ROW_LISTS if isinstance(whole.get(key), list)), None)
    if known is not None:
        return known
    # A list of lists of turns holds conversations; a list of turns is one conversation, and so one row.
    return next((key for key in _TALK_LISTS if isinstance(held := whole.get(key), list) and _holds_lists(held)), None)


def _holds_lists(rows: list[Any]) -> bool:
    """Whether the items of a list are conversations, or rows that hold one, and not the turns of one."""
    if rows and all(isinstance(row, dict) for row in rows):
        return not any(key in row for row in rows for key in ("role", "from", "speaker")) and bool(recognise(rows[0]))
    return bool(rows) and isinstance(rows[0], list)


def _dig(whole: Any, file: DataFile) -> Iterator[Any]:
    """The rows at a dotted path; lists on the way are walked through."""
    held = [whole]
    for key in (file.reading.rows_at or "").split("."):
        inside = [item[key] for item in held if isinstance(item, dict) and key in item]
        held = [one for item in inside for one in (item if isinstance(item, list) else [item])]
    if not held:
        raise DataError(
            f"{file.name}: nothing is at rows_at: {file.reading.rows_at}; its keys are {shorten(list(whole))}"
        )
    file.note(f"the rows are those at {file.reading.rows_at!r}, numbered in place of lines")
    return iter(held)


def _numbered(file: DataFile, values: Any) -> Iterator[RawRow]:
    for number, value in enumerate(values, start=1):
        yield RawRow(file.name, number, _sound_row(value))


class StrictParser:
    """JSON, noticing keys written twice: such an object is read as the RowError that says so."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._sound = True

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        self._sound = False
        return RowError("key written twice", key or repr(key), "written twice", "keep one")

    def row(self, value: Any) -> Any:
        """A decoded row, or what is wrong inside it; it is looked into only once a key was seen twice."""
        return value if self._sound else _sound_row(value)


def _sound_row(value: Any) -> Any:
    return _inner_error(value) or value


def _inner_error(value: Any) -> RowError | None:
    """The first object with a key written twice anywhere in a value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, RowError):
            return part
        if isinstance(part, (dict, list)):
            waiting += reversed(list(part.values()) if isinstance(part, dict) else part)
    return None


def _first_bytes(file: DataFile) -> bytes:
    """What a file starts with, without space before it."""
    for block in file.blocks():
        if start := block.lstrip(b" \t\r\n"):
            return start
    return b""


def _is_lines(start: bytes) -> bool:
    """Whether the first line is an object of its own (also a broken one), with other rows after it."""
    line, newline, rest = start.partition(b"\n")
    closed = line.rstrip().endswith(b"}")
    return closed and bool(newline) and bool(rest.strip()) and rest.lstrip()[:1] not in (b",", b"}", b"]")


def _is_list_of_lines(start: bytes) -> bool:
    """Whether the first line is a list of its own, with another list after it."""
    line, newline, rest = start.partition(b"\n")
    return line.rstrip().endswith(b"]") and bool(newline) and rest.lstrip().startswith(b"[")


def _line_rows(file: DataFile) -> Iterator[RawRow]:
    name = file.name
    for first, lines in file.lines():
        for number, line in enumerate(lines, first):
            try:
                value = orjson.loads(line)
                # A key written twice leaves fewer keys than the line writes. Text may look like a key as well, which
                # only sends the line to the slower parser; keys before a space are no match and do the same.
                if line.count(b'":') == _count_keys(value) and not _KEY_THEN_SPACE(line):
                    yield RawRow(name, number, value)
                    continue
            except ValueError:
                if not line.strip():
                    continue
            except RecursionError:
                yield RawRow(name, number, _TOO_DEEP)
                continue
            yield RawRow(name, number, _parse_slowly(file.decode(line, number)))


def _count_keys(value: Any) -> int:
    """How many keys all objects inside a value have; two levels at a time, which halves the time it takes."""
    if type(value) is dict:
        count, parts = len(value), value.values()
    elif type(value) is list:
        count, parts = 0, value  # type: ignore[assignment]
    else:
        return 0
    for part in parts:
        if type(part) is dict:
            count += len(part)
            for inner in part.values():
                if type(inner) is dict or type(inner) is list:
                    count += _count_keys(inner)
        elif type(part) is list:
            count += _count_keys(part)
    return count


def _parse_slowly(line: str) -> Any:
    parser = StrictParser()
    try:
        return parser.row(parser.decode(line))
    except RecursionError:
        return _TOO_DEEP
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON at character {error.colno} ({shorten(line.strip(), 40)})"
        remedy = "mend or remove the line"
        if _is_cut_off(error):
            problem += ", where it is cut off"
            remedy = "fetch the file again, or remove the line"
        return RowError("invalid JSON", "row", problem, remedy)
    except ValueError as error:  # a number of thousands of digits
        return RowError("invalid JSON", "row", f"cannot be read ({shorten(str(error))})", "mend or remove the line")


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")


class _Text:
    """The part of a JSON text that is being looked at; more of it is read when a value is cut off at its end."""

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self.parser = StrictParser()
        self._pieces = _texts(file)
        self.text, self.place, self.ended = "", 0, False
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The line of the place."""
        self._line += self.text.count("\n", self._counted, self.place)
        self._counted = self.place
        return self._line

    def peek(self) -> str:
        """The next character that is no space, without taking it; nothing at the end."""
        while True:
            self.place = _SPACE.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text) or not self._more():
                return self.text[self.place : self.place + 1]

    def take(self, wanted: str) -> bool:
        """Go past the next character if it is the wanted one."""
        found = self.peek() == wanted
        self.place += found
        return found

    def value(self) -> Any:
        """The value at the place, and go past it."""
        self.peek()
        while True:
            try:
                value, end = self.parser.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self.text) - _PARTIAL or error.msg.startswith("Unterminated string")
                if cut_off and self._more():
                    continue
                line = self.line + self.text.count("\n", self.place, error.pos)
                raise broken(self.file, line, error.msg) from None
            except RecursionError:
                raise broken(self.file, self.line, "it is nested too deeply") from None
            if end > len(self.text) - _OF_NUMBER and isinstance(value, (int, float)) and self._more():
                continue
            self.place = end
            return self.parser.row(value)

    def _more(self) -> bool:
        """Read at least as much again as is held, so that a long value is not parsed again and again."""
        held, line = self.text[self.place :], self.line
        if len(held) > LONGEST_LINE:
            raise broken(self.file, line, f"a value of more than {LONGEST_LINE >> 20}M characters")
        fresh = []
        size = 0
        while size <= len(held):
            piece = next(self._pieces, None)
            if piece is None:
                break
            fresh.append(piece)
            size += len(piece)
        if not size:
            return False
        self.text, self.place = held + "".join(fresh), 0
        self._line, self._counted = line, 0
        return True


def _texts(file: DataFile) -> Iterator[str]:
    """The content as text, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    try:
        for block in file.blocks():
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        # The place in the file is found by reading its lines once more.
        for number, lines in file.lines():
            for offset, line in enumerate(lines):
                file.decode(line, number + offset)


def broken(file: DataFile, line: int, reason: str) -> DataError:
    """The error about a file that is no JSON from some line on."""
    return DataError(
        f"{file.name}:{line} not valid JSON: {reason}; mend the file or fetch it again (it may be cut off)"
    )


def _array_rows(file: DataFile) -> Iterator[RawRow]:
    """The rows of a file that is one list, by the line they start on; of a list on one line by their number."""
    text = _Text(file)
    text.take("[")
    items = _items(text)
    head = list(islice(items, 2))
    if len(head) == 2 and head[0].line == head[1].line:
        file.note("a JSON array on one line; rows are numbered in place of lines")
        yield from (row._replace(line=number) for number, row in enumerate(chain(head, items), start=1))
    else:
        yield from chain(head, items)
    if text.peek():
        raise broken(file, text.line, "more follows after the closing ]")


def _items(text: _Text) -> Iterator[RawRow]:
    """The items of the list whose [ was taken, up to its ], with the lines they start on."""
    while not text.take("]"):
        line, value = text.line, text.value()
        yield RawRow(text.file.name, line, value)
        if not text.take(",") and text.peek() != "]":
            raise broken(text.file, text.line, "no , or ] after a row")


def _object_rows(file: DataFile) -> Iterator[RawRow]:
    """The rows of a file that is one object; a list under a usual key is read item by item, all else is held whole."""
    text = _Text(file)
    text.take("{")
    held: dict[str, Any] = {}
    streamed: str | None = None
    while not text.take("}"):
        line, key = text.line, text.value()
        if not isinstance(key, str) or not text.take(":"):
            raise broken(file, line, "no key and : in an object")
        if key in held or key == streamed:
            raise DataError(f"{file.name} {key or repr(key)}: written twice; keep one")
        if streamed is None and not file.reading.rows_at and key in _ROW_LISTS and text.take("["):
            streamed = key
            file.note(f"the rows are the list under {key!r}, numbered in place of lines")
            yield from (row._replace(line=number) for number, row in enumerate(_items(text), start=1))
        else:
            value = text.value()
            held[key] = value if streamed is None else None
        if not text.take(",") and text.peek() != "}":
            raise broken(file, text.line, "no , or } after a value")
    if text.peek():
        raise broken(file, text.line, "more follows after the closing }; JSON-lines are named .jsonl")
    if streamed is None:
        yield from _inside(held, file)
    elif splits := [key for key in held if key in ("valid", "validation", "dev", "test")]:
        file.note(f"the splits {', '.join(splits)} were left out; say `rows_at: {splits[0]}` in a dataset YAML for one")


def _inside(held: dict[str, Any], file: DataFile) -> Iterator[RawRow]:
    error = _inner_error(held)
    if error is not None:
        raise DataError(f"{file.name} {error.field}: {error.problem}; {error.remedy}")
    yield from rows_of_object(held, file)
