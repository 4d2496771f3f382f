"""JSON and JSON-lines, row by row, from files of any size, and YAML, which is held in memory and so bounded.

Keys written twice are noticed.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import orjson

from align.data.containers.data_files import LONGEST_LINE, DataFile
from align.data.formats import recognise
from align.data.row_errors import RawRow, RowError
from align.errors import DataError, UsageError, shorten
from align.strict_yaml import load_yaml

_SPACE = re.compile(r"[ \t\r\n]*")
_OTHER_SPELLINGS = re.compile(rb'"[ \t\r\n]+:|\\u0022').search
"""A key before a space, or a quote that is written as an escape."""
_ROW_LISTS = ("data", "examples", "rows", "train")
_CONVERSATION_LISTS = ("conversations", "dialogues", "dialogs")
_LONGEST_YAML = 64 << 20
"""Characters of a YAML file."""
_LONGEST_LITERAL = 12
"""An error this near to the end of what was read may vanish once more is read."""
_LONGEST_EXPONENT = 3
"""A number this near to the end may go on: what may follow the part that is read is at most `e-`."""
_TOO_DEEP = RowError("nested too deeply", "row", "is nested too deeply to be read", "flatten it or remove the row")


def read_json(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.json` file: a list, an object that holds one, or lines of JSON after all."""
    start = _read_start(file)
    if start.startswith(b"{") and not _starts_with_line(start):
        return _object_rows(file)
    if file.rows_at and start:
        raise UsageError(f"{file.name}: rows_at means nothing here, the file is a list of rows; take it out")
    if start.startswith(b"[") and not _starts_with_line(start):
        return _array_rows(file)
    if start:
        file.note("named .json but holds JSON-lines; it was read as such")
    return _line_rows(file)


def read_json_lines(file: DataFile) -> Iterator[RawRow]:
    """Return the rows of a `.jsonl` file: one a line, or a list after all."""
    start = _read_start(file)
    if start.startswith(b"[") and not _starts_with_line(start):
        file.note("named as JSON-lines but holds a JSON array; it was read as such")
        return _array_rows(file)
    return _line_rows(file)


def read_yaml_file(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a YAML file: a list, or an object that holds one."""
    text = ""
    for line in file.decoded_lines():
        text += line
        if len(text) > _LONGEST_YAML:
            size = f"more than {_LONGEST_YAML >> 20}M characters"
            raise DataError(f"{file.name}: a YAML file of {size}; convert it to JSON")
    try:
        whole = _with_text_keys(load_yaml(text, file.name), file, set())
    except UsageError as error:
        raise DataError(str(error)) from None
    except RecursionError:
        raise DataError(f"{file.name}: nested too deeply to be read; flatten it") from None
    if isinstance(whole, dict):
        yield from _rows_of_object(whole, file)
    elif isinstance(whole, list):
        file.note("a YAML list; rows are numbered in place of lines")
        yield from _number_rows(file, whole)
    elif whole is not None:
        raise DataError(f"{file.name}: holds {shorten(whole)}, not rows; give a list of rows")


def _with_text_keys(value: Any, file: DataFile, seen: set[int]) -> Any:
    """Return a YAML value with text as keys, as JSON has them; one repeated by an alias could unfold without end."""
    if not isinstance(value, (dict, list)):
        return value
    if id(value) in seen:
        raise DataError(f"{file.name}: repeats a value by an alias (*name); write it out")
    seen.add(id(value))
    if isinstance(value, list):
        return [_with_text_keys(item, file, seen) for item in value]
    return {str(key): _with_text_keys(item, file, seen) for key, item in value.items()}


def _rows_of_object(whole: dict[str, Any], file: DataFile) -> Iterator[RawRow]:
    """Yield the rows inside one object, numbered in place of lines: under a key, by key, or the object itself."""
    if file.rows_at:
        yield from _number_rows(file, _values_at(file.rows_at, whole, file))
    elif (key := find_rows_key(whole)) is not None:
        others = [other for other in whole if other != key and isinstance(whole[other], list)]
        beside = f" (beside {', '.join(others[:5])}; write `rows_at:` in a dataset YAML for another)" if others else ""
        file.note(f"the rows are the list under {key!r}, numbered in place of lines{beside}")
        yield from _number_rows(file, whole[key])
    elif recognise(whole):
        file.note("holds one object, which is one row")
        yield RawRow(file.name, 1, whole)
    elif whole and all(isinstance(value, dict) for value in whole.values()):
        file.note("the rows are the objects under each key; the key became their id")
        yield from _number_rows(file, [{"id": key} | value for key, value in whole.items()])
    else:
        raise DataError(
            f"{file.name}: holds one object with {shorten(list(whole))}, not rows; give a list of rows, "
            "or name the key that holds them, `rows_at: KEY`, in a dataset YAML"
        )


def find_rows_key(whole: dict[str, Any]) -> str | None:
    """Return the key under which an object usually holds a list of rows, if it has one."""
    lists = {key: value for key, value in whole.items() if isinstance(value, list)}
    key = next((key for key in _ROW_LISTS if key in lists), None)
    return key or next((key for key in _CONVERSATION_LISTS if _holds_rows(lists.get(key, []))), None)


def _holds_rows(values: list[Any]) -> bool:
    """Return whether a list holds conversations, or rows with one, and not the turns of one conversation."""
    if values and all(isinstance(value, dict) for value in values):
        has_turns = any(key in value for value in values for key in ("role", "from", "speaker"))
        return not has_turns and bool(recognise(values[0]))
    return bool(values) and isinstance(values[0], list)


def _values_at(path: str, whole: dict[str, Any], file: DataFile) -> list[Any]:
    """Return the values at a dotted path; lists on the way are walked through."""
    values: list[Any] = [whole]
    for key in path.split("."):
        inside = [item[key] for item in values if isinstance(item, dict) and key in item]
        values = [one for item in inside for one in (item if isinstance(item, list) else [item])]
    if not values:
        raise DataError(f"{file.name}: nothing is at rows_at: {path}; its keys are {shorten(list(whole))}")
    file.note(f"the rows are those at {path!r}, numbered in place of lines")
    return values


def _number_rows(file: DataFile, values: Iterable[Any]) -> Iterator[RawRow]:
    for number, value in enumerate(values, start=1):
        yield RawRow(file.name, number, value)


class StrictParser:
    """A JSON parser that notices keys written twice: such an object is read as a RowError."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object)
        self.decode, self.raw_decode = decoder.decode, decoder.raw_decode
        self._is_sound = True

    def _object(self, pairs: list[tuple[str, Any]]) -> Any:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        self._is_sound = False
        return RowError("key written twice", key or repr(key), "written twice", "keep one")

    def checked(self, value: Any) -> Any:
        """Return a decoded value, or the error inside it; it is searched only once a key was seen twice."""
        return value if self._is_sound else _find_error(value) or value


def _find_error(value: Any) -> RowError | None:
    """Return the first object with a key written twice anywhere in a value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, RowError):
            return part
        if isinstance(part, (dict, list)):
            waiting += reversed(list(part.values()) if isinstance(part, dict) else part)
    return None


def _read_start(file: DataFile) -> bytes:
    """Return the first block of a file, without space before it."""
    return next((start for block in file.blocks() if (start := block.lstrip(b" \t\r\n"))), b"")


def _starts_with_line(start: bytes) -> bool:
    """Return whether the first line is an object or a list of its own (also a broken one), with another after it."""
    line, _, rest = start.partition(b"\n")
    line, rest = line.rstrip(), rest.lstrip()
    if start.startswith(b"{"):
        return line.endswith(b"}") and bool(rest) and rest[:1] not in (b",", b"}", b"]")
    return line.endswith(b"]") and rest.startswith(b"[")


def _line_rows(file: DataFile) -> Iterator[RawRow]:
    name = file.name
    for first, lines in file.lines():
        for number, line in enumerate(lines, first):
            try:
                value = orjson.loads(line)
                # A key written twice leaves fewer keys in the value than in the line. What else makes the counts differ
                # only sends the line to the slower parser; so do the spellings that the counts would miss.
                if line.count(b'":') == orjson.dumps(value).count(b'":') and not _OTHER_SPELLINGS(line):
                    yield RawRow(name, number, value)
                    continue
            except (ValueError, TypeError):  # no JSON, or too deep to be written again
                if not line.strip():
                    continue
            except RecursionError:
                yield RawRow(name, number, _TOO_DEEP)
                continue
            yield RawRow(name, number, _parse_slowly(file.decode(line, number)))


def _parse_slowly(line: str) -> Any:
    parser = StrictParser()
    try:
        return parser.checked(parser.decode(line))
    except RecursionError:
        return _TOO_DEEP
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON at character {error.colno} ({shorten(line.strip(), 40)})"
        if error.pos < len(error.doc.rstrip()) and not error.msg.startswith("Unterminated string"):
            return RowError("invalid JSON", "row", problem, "correct or remove the line")
        remedy = "fetch the file again, or remove the line"
        return RowError("invalid JSON", "row", f"{problem}, where it is cut off", remedy)
    except ValueError as error:  # a number of thousands of digits
        return RowError("invalid JSON", "row", f"cannot be read ({shorten(str(error))})", "correct or remove the line")


class _JsonReader:
    """A reader of one JSON value after another, of which only the text of the value in hand is in memory.

    When a value is cut off at the end of the text, more is read and it is parsed again.
    """

    def __init__(self, file: DataFile) -> None:
        self.file = file
        self._parser = StrictParser()
        self._pieces = codecs.iterdecode(file.blocks(), "utf-8")
        self._text, self._position = "", 0
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """Return the line of the position."""
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def peek(self) -> str:
        """Return the next character that is no space, without taking it; nothing at the end."""
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # type: ignore[union-attr]
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def take(self, wanted: str) -> bool:
        """Go past the next character if it is the wanted one, and return whether it was."""
        is_next = self.peek() == wanted
        self._position += is_next
        return is_next

    def value(self) -> Any:
        """Return the value at the position, and go past it."""
        self.peek()
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._text) - _LONGEST_LITERAL
                if (near_end or error.msg.startswith("Unterminated string")) and self._read_more():
                    continue
                raise self.error(error.msg, self.line + self._text.count("\n", self._position, error.pos)) from None
            except RecursionError:
                raise self.error("it is nested too deeply") from None
            if end > len(self._text) - _LONGEST_EXPONENT and isinstance(value, (int, float)) and self._read_more():
                continue
            self._position = end
            return self._parser.checked(value)

    def error(self, reason: str, line: int | None = None) -> DataError:
        """Return the error about a file that is no JSON from some line on."""
        where = f"{self.file.name}:{line or self.line}"
        return DataError(f"{where} not valid JSON: {reason}; correct the file or fetch it again (it may be cut off)")

    def _read_more(self) -> bool:
        """Read at least as much again as is held, so that a long value is not parsed again and again."""
        rest, line = self._text[self._position :], self.line
        if len(rest) > LONGEST_LINE:
            raise self.error(f"a value of more than {LONGEST_LINE >> 20}M characters")
        text = rest
        try:
            while len(text) <= 2 * len(rest) and (piece := next(self._pieces, None)) is not None:
                text += piece
        except UnicodeDecodeError:
            deque(self.file.decoded_lines(), maxlen=0)  # raises the error with the place in the file
        if text == rest:
            return False
        self._text, self._position = text, 0
        self._line, self._counted = line, 0
        return True


def _array_rows(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a file that is one list, by the line they start on; of a list on one line by their number."""
    reader = _JsonReader(file)
    reader.take("[")
    items = _items(reader)
    head = list(islice(items, 2))
    if len(head) == 2 and head[0].line == head[1].line:
        file.note("a JSON array on one line; rows are numbered in place of lines")
        yield from (row._replace(line=number) for number, row in enumerate(chain(head, items), start=1))
    else:
        yield from chain(head, items)
    if reader.peek():
        raise reader.error("more follows after the closing ]")


def _items(reader: _JsonReader) -> Iterator[RawRow]:
    """Yield the items of the list whose [ was taken, up to its ], with the lines they start on."""
    while not reader.take("]"):
        line, value = reader.line, reader.value()
        yield RawRow(reader.file.name, line, value)
        if not reader.take(",") and reader.peek() != "]":
            raise reader.error("no , or ] after a row")


def _object_rows(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a file that is one object; a list under a usual key is streamed, all else is held whole."""
    reader = _JsonReader(file)
    reader.take("{")
    values: dict[str, Any] = {}
    streamed: str | None = None
    while not reader.take("}"):
        line, key = reader.line, reader.value()
        if not isinstance(key, str) or not reader.take(":"):
            raise reader.error("no key and : in an object", line)
        if key in values or key == streamed:
            raise DataError(f"{file.name} {key or repr(key)}: written twice; keep one")
        if streamed is None and not file.rows_at and key in _ROW_LISTS and reader.take("["):
            streamed = key
            file.note(f"the rows are the list under {key!r}, numbered in place of lines")
            yield from (row._replace(line=number) for number, row in enumerate(_items(reader), start=1))
        else:
            value = reader.value()
            values[key] = value if streamed is None else None
        if not reader.take(",") and reader.peek() != "}":
            raise reader.error("no , or } after a value")
    if reader.peek():
        raise reader.error("more follows after the closing }; JSON-lines are named .jsonl")
    if streamed is None:
        if error := _find_error(values):
            raise DataError(f"{file.name} {error.field}: {error.problem}; {error.remedy}")
        yield from _rows_of_object(values, file)
    elif splits := [key for key in values if key in ("valid", "validation", "dev", "test")]:
        file.note(
            f"the splits {', '.join(splits)} were left out; write `rows_at: {splits[0]}` in a dataset YAML for one"
        )
