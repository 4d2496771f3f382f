"""Text and YAML files, which are held in memory, and bounded for that reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from align.data.containers.data_files import DataFile
from align.data.containers.json_files import rows_of_object
from align.data.row_errors import RawRow
from align.errors import DataError, UsageError, shorten
from align.strict_yaml import load_yaml

LONGEST_YAML = 64 << 20
"""Characters of a YAML file."""
LONGEST_TEXT = 16 << 20
"""A text file of more characters than this is cut at line ends, so that memory holds a part of it."""


def read_text_file(file: DataFile) -> Iterator[RawRow]:
    """Yield a text file as one text, or as several when it is too long for one."""
    lines: list[str] = []
    size, start = 0, 1
    for number, line in enumerate(file.decoded_lines(), start=1):
        line = line.replace("\r\n", "\n")
        if size + len(line) > LONGEST_TEXT and lines:
            file.note(f"a long text; it was cut at line ends into texts of at most {LONGEST_TEXT >> 20}M characters")
            yield RawRow(file.name, start, {"text": "".join(lines)})
            lines, size, start = [], 0, number
        lines.append(line)
        size += len(line)
    if lines:
        yield RawRow(file.name, start, {"text": "".join(lines)})


def read_yaml_file(file: DataFile) -> Iterator[RawRow]:
    """Yield the rows of a YAML file: a list, or an object that holds one."""
    try:
        whole = load_yaml(_read_bounded(file), file.name)
    except UsageError as error:
        raise DataError(str(error)) from None
    except RecursionError:
        raise DataError(f"{file.name}: nested too deeply to be read; flatten it") from None
    whole = _with_text_keys(whole, file, set())
    if isinstance(whole, dict):
        yield from rows_of_object(whole, file)
    elif isinstance(whole, list):
        file.note("a YAML list; rows are numbered in place of lines")
        yield from (RawRow(file.name, number, value) for number, value in enumerate(whole, start=1))
    elif whole is not None:
        raise DataError(f"{file.name}: holds {shorten(whole)}, not rows; give a list of rows")


def _read_bounded(file: DataFile) -> str:
    lines: list[str] = []
    size = 0
    for line in file.decoded_lines():
        lines.append(line)
        size += len(line)
        if size > LONGEST_YAML:
            raise DataError(
                f"{file.name}: a YAML file of more than {LONGEST_YAML >> 20}M characters; convert it to JSON"
            )
    return "".join(lines)


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
