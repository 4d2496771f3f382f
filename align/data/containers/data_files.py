"""Files as streams of UTF-8: compression, encodings, and files that change while they are read."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any, NoReturn

from align.errors import DataError, UsageError, shorten

BLOCK = 1 << 20
"""Bytes read at a time."""
MAX_UNPACKED = 256 << 20
"""Bytes up to which a packed file may grow as much as it likes."""
MAX_GROWTH = 200
"""A larger packed file that grows by more than this factor holds nothing to learn from; text grows by 3 to 20."""
LONGEST_LINE = 256 << 20
"""A line longer than this is no row that could be trained on; it is refused before it fills the memory."""
PACKED = (".gz", ".zst", ".zip")
"""Endings of packed files; the first bytes decide which packing it is."""
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "zip": b"PK\x03\x04"}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file or a folder of them, the name messages call it by, the notes about it, and how a dataset wants it read."""

    path: Path
    name: str
    notes: list[str] = field(default_factory=list)
    encoding: str = "auto"
    header: list[str] = field(default_factory=list)
    quoting: str = "auto"
    rows_at: str | None = None
    split: str | None = None
    """of a folder: the split to read"""
    subset: str | None = None
    """of a folder: the subset its README.md describes"""
    appended: bool = False
    """lines are only ever added to the file, maybe now; one that was torn at its end is left out"""

    def note(self, text: str) -> None:
        """Note a decision that was taken about this file, once."""
        note = f"{self.name}: {text}"
        if note not in self.notes:
            self.notes.append(note)

    def blocks(self) -> Iterator[bytes]:
        """Yield the content in UTF-8 without a BOM; whether it really is UTF-8 is not checked here.

        Raises DataError when it cannot be read or unpacked, or is not what it was when it was opened.
        """
        with nullcontext() if self.appended else self.unchanged(), _open_unpacked(self) as stream:
            blocks = _read_blocks(stream, self)
            yield from _without_bom(blocks, self) if self.encoding == "auto" else _recode(blocks, self)

    def lines(self, end: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
        """Yield runs of lines, each with the number of its first one; only a line feed ends a line.

        `end` takes the place of the line feeds.
        """
        rest: list[bytes] = []  # the beginning of a line, joined once: a long line comes in many blocks
        number = 1
        for block in self.blocks():
            lines: list[bytes] = []
            if b"\n" in block:
                lines = b"".join([*rest, block]).split(b"\n")
                rest = [lines.pop()]
            else:
                rest.append(block)
            if sum(map(len, rest)) > LONGEST_LINE:
                raise DataError(
                    f"{self.name}:{number + len(lines)}: a line of more than {LONGEST_LINE >> 20} MiB; "
                    "is it text of another kind? Give one row a line"
                )
            if lines:
                yield number, [line + end for line in lines] if end else lines
                number += len(lines)
        last = b"".join(rest)
        if last and self.appended:
            try:
                json.loads(last)
            except ValueError:
                self.note(f"line {number} is torn off at the end of the file; it was left out")
                return
        if last:
            yield number, [last]

    def decoded_lines(self) -> Iterator[str]:
        """Yield the lines as text, with their line feed where they have one."""
        for first, lines in self.lines(end=b"\n"):
            for number, line in enumerate(lines, first):
                yield self.decode(line, number)

    def decode(self, line: bytes, number: int) -> str:
        """Return one line as text; DataError names the byte that is none."""
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            with _open_unpacked(self) as stream:  # a BOM was taken off the first line
                has_bom = number == 1 and stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
            skipped = len(codecs.BOM_UTF8) * has_bom
            self.refuse_byte("UTF-8", number, skipped + error.start + 1, line[error.start])

    def refuse_byte(self, encoding: str, line: int, column: int, byte: int) -> NoReturn:
        """Raise the error about a byte that the encoding does not have."""
        raise DataError(
            f"{self.name}:{line}:{column}: not {encoding} (byte 0x{byte:02x}); name its encoding, such as "
            f"data={self.path.name}:encoding=gb18030 (or `encoding: gb18030` in a dataset YAML), or convert the file, "
            "for example with `iconv -f GB18030 -t UTF-8`"
        )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse the file when it is another one at the end of the block than at its start."""
        before = _identity(self)
        yield
        if _identity(self) != before:
            raise DataError(f"{self.name}: changed while it was read; read it again when nothing writes to it any more")


def suffix_of(path: Path) -> str:
    """Return the ending for what a file holds, in lower case and without that of its packing."""
    return next((suffix for suffix in map(str.lower, reversed(path.suffixes)) if suffix not in PACKED), "")


def _identity(file: DataFile) -> tuple[int, int, int]:
    try:
        status = os.stat(file.path)
    except OSError as error:
        _refuse_unreadable(file, error)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file.name}: is no regular file but a pipe or device; save what it gives to a file")
    return status.st_size, status.st_mtime_ns, status.st_ino


def _refuse_unreadable(file: DataFile, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise DataError(f"{file.name}: cannot be read ({reason}); check the path and its permissions") from None


@contextmanager
def _open_unpacked(file: DataFile) -> Iterator[IO[bytes]]:
    try:
        raw = file.path.open("rb")
    except OSError as error:
        _refuse_unreadable(file, error)
    with raw:
        start = raw.read(4)
        raw.seek(0)
        packing = next((name for name, magic in _MAGIC.items() if start.startswith(magic)), None)
        if packing and not set(PACKED) & set(map(str.lower, file.path.suffixes)):
            file.note(f"is packed ({packing}) although its name has no such ending; it was unpacked")
        match packing:
            case "gzip":
                yield gzip.GzipFile(fileobj=raw)  # type: ignore[misc]
            case "zstd":
                import pyarrow

                yield pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")
            case "zip":
                yield _unzip(raw, file)
            case _:
                yield raw


def _unzip(raw: IO[bytes], file: DataFile) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(raw)
        members = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
        if len(members) != 1:
            raise DataError(f"{file.name}: a zip file of {len(members)} files; unpack it and name the file or folder")
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{file.name}: the zip data cannot be read ({error}); unpack it by hand") from None


def _read_blocks(stream: IO[bytes], file: DataFile) -> Iterator[bytes]:
    size = 0
    while True:
        try:
            block = stream.read(BLOCK)
        except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as error:
            kind = "zip" if isinstance(error, zipfile.BadZipFile) else "gzip"
            raise DataError(f"{file.name}: the {kind} data is damaged or cut off; fetch the file again") from None
        except OSError as error:
            if error.errno is None:  # what pyarrow raises about the data, rather than the system about the file
                raise DataError(
                    f"{file.name}: the zstd data is damaged or cut off ({shorten(str(error))}); fetch the file again"
                ) from None
            _refuse_unreadable(file, error)
        if not block:
            return
        size += len(block)
        if size > MAX_UNPACKED and size > MAX_GROWTH * file.path.stat().st_size:
            raise DataError(
                f"{file.name}: unpacks to more than {MAX_GROWTH} times its size, as no text does; unpack it by hand "
                "if it is meant so"
            )
        yield block


def _without_bom(blocks: Iterator[bytes], file: DataFile) -> Iterator[bytes]:
    first = next(blocks, b"")
    if first.startswith(_UTF16):
        raise DataError(f"{file.name}: is UTF-16, not UTF-8; give data={file.path.name}:encoding=utf-16")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from blocks


def _recode(blocks: Iterator[bytes], file: DataFile) -> Iterator[bytes]:
    """Yield blocks of another encoding as UTF-8; DataError names line and column of a byte that is not in it."""
    encoding = file.encoding
    try:
        b"a".decode(encoding, "replace")  # refuses codecs that are not of text, such as hex
        decoder: Any = codecs.getincrementaldecoder(encoding)("strict")
    except LookupError:
        raise UsageError(
            f"encoding: {encoding!r} is not known; write one such as utf-8, gb18030, utf-16 or latin-1"
        ) from None
    line, column, rest = 1, 0, b""
    for block in chain(blocks, [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            good = error.object[: error.start]
            error_column = error.start - good.rfind(b"\n") if b"\n" in good else column + error.start + 1
            file.refuse_byte(encoding, line + good.count(b"\n"), error_column, error.object[error.start])
        whole = rest + block
        rest = bytes(decoder.getstate()[0])  # a character that the block's end cuts in two
        done = whole[: len(whole) - len(rest)]
        line += done.count(b"\n")
        column = len(done) - done.rfind(b"\n") - 1 if b"\n" in done else column + len(done)
        yield text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")
