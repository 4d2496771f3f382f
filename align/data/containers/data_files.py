"""Files as streams of UTF-8: compression, encodings, and files that change while they are read."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from align.errors import DataError, UsageError, shorten

BLOCK = 1 << 20
"""How many bytes are read at a time."""
MOST_UNPACKED = 256 << 20
"""Bytes up to which a packed file may grow as much as it likes."""
MOST_GROWTH = 200
"""A larger packed file that grows by more than this factor holds nothing to learn from; text grows by 3 to 20."""
LONGEST_LINE = 256 << 20
"""A line longer than this is no row that could be trained on; it is refused before it fills the memory."""

_GZIP, _ZSTD, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PACKED = (".gz", ".zst", ".zip")
"""Endings that say how a file is packed; what it is packed with is told from its first bytes."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the dataset YAML wants a file read."""

    encoding: str = "auto"
    header: tuple[str, ...] = ()
    quoting: str = "auto"
    rows_at: str | None = None
    split: str | None = None
    """of a folder: the split to read"""
    subset: str | None = None
    """of a folder: the subset its README.md describes"""
    appended: bool = False
    """lines are only ever added to the file, maybe now; one that was torn at its end is left out"""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file, the name messages call it by, and where remarks about it go."""

    path: Path
    name: str
    notes: list[str]
    reading: ReadOptions = field(default_factory=ReadOptions)

    def note(self, text: str) -> None:
        """Remember a decision that was taken about this file; one taken twice counts once."""
        note = f"{self.name}: {text}"
        if note not in self.notes:
            self.notes.append(note)

    @property
    def suffix(self) -> str:
        """The ending that says what the file holds, in lower case and without that of its packing."""
        suffixes = [suffix for suffix in map(str.lower, self.path.suffixes) if suffix not in PACKED]
        return suffixes[-1] if suffixes else ""

    def blocks(self) -> Iterator[bytes]:
        """The content in UTF-8 without a BOM, block by block; whether it really is UTF-8 is not looked at here.

        Raises DataError when it cannot be read or unpacked, or is not what it was when it was opened.
        """
        with nullcontext() if self.reading.appended else self.unchanged(), _opened(self) as stream:
            blocks = _pieces(stream, self)
            if self.reading.encoding == "auto":
                yield from _without_bom(blocks, self)
            else:
                yield from _recoded(blocks, self)

    def lines(self, end: bytes = b"") -> Iterator[tuple[int, list[bytes]]]:
        """Runs of lines, each run with the number of its first one; only a line feed ends a line.

        `end` takes the place of the line feeds.
        """
        held: list[bytes] = []  # the beginning of a line, joined once: a long line comes in many blocks
        number = 1
        for block in self.blocks():
            lines: list[bytes] = []
            if b"\n" in block:
                lines = b"".join([*held, block]).split(b"\n")
                held = [lines.pop()]
            else:
                held.append(block)
            if sum(map(len, held)) > LONGEST_LINE:
                raise DataError(
                    f"{self.name}:{number + len(lines)}: a line of more than {LONGEST_LINE >> 20} MiB; "
                    "is it text of another kind? Give one row a line"
                )
            if lines:
                yield number, [line + end for line in lines] if end else lines
                number += len(lines)
        rest = b"".join(held)
        if rest and self.reading.appended and not _is_json(rest):
            self.note(f"line {number} is torn off at the end of the file; it was left out")
        elif rest:
            yield number, [rest]

    def decoded_lines(self) -> Iterator[str]:
        """The lines as text, with their line feed where they have one."""
        for first, lines in self.lines(end=b"\n"):
            for number, line in enumerate(lines, first):
                yield self.decode(line, number)

    def text(self) -> str:
        """The whole content as text."""
        return "".join(self.decoded_lines())

    def decode(self, line: bytes, number: int) -> str:
        """One line as text; DataError names the byte that is none."""
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            skipped = len(codecs.BOM_UTF8) if number == 1 and self._has_bom() else 0
            self.not_text("UTF-8", number, skipped + error.start + 1, line[error.start])

    def _has_bom(self) -> bool:
        with _opened(self) as stream:
            return stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8

    def not_text(self, encoding: str, line: int, place: int, byte: int) -> NoReturn:
        """Raise the error about a byte that the encoding does not have."""
        raise DataError(
            f"{self.name}:{line}:{place}: not {encoding} (byte 0x{byte:02x}); say which encoding it has, such as "
            f"data={self.path.name}:encoding=gb18030 (or `encoding: gb18030` in a dataset YAML), or convert the file, "
            "for example with `iconv -f GB18030 -t UTF-8`"
        )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse the file when it is another one at the end of the block than at its start."""
        before = _state(self)
        yield
        if _state(self) != before:
            raise DataError(f"{self.name}: changed while it was read; read it again when nothing writes to it any more")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _state(file: DataFile) -> tuple[int, int, int]:
    try:
        found = os.stat(file.path)
    except OSError as error:
        _unreadable(file, error)
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{file.name}: is no regular file but a pipe or device; save what it gives to a file")
    return found.st_size, found.st_mtime_ns, found.st_ino


def _unreadable(file: DataFile, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise DataError(f"{file.name}: cannot be read ({reason}); check the path and its permissions") from None


@contextmanager
def _opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The unpacked content."""
    try:
        raw = file.path.open("rb")
    except OSError as error:
        _unreadable(file, error)
    with raw:
        start = raw.read(4)
        raw.seek(0)
        unpack = next((unpack for magic, unpack in _UNPACKERS.items() if start.startswith(magic)), None)
        stream = unpack(raw, file) if unpack else raw
        if unpack and not any(suffix in PACKED for suffix in map(str.lower, file.path.suffixes)):
            file.note(f"is packed ({_NAMES[unpack]}) although its name does not say so; it was unpacked")
        yield stream


def _gunzip(raw: IO[bytes], _file: DataFile) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _unzstd(raw: IO[bytes], _file: DataFile) -> IO[bytes]:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), "zstd")


def _unzip(raw: IO[bytes], file: DataFile) -> IO[bytes]:
    import zipfile

    try:
        archive = zipfile.ZipFile(raw)
        members = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX")]
        if len(members) != 1:
            raise DataError(f"{file.name}: a zip file of {len(members)} files; unpack it and name the file or folder")
        return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{file.name}: the zip data cannot be read ({error}); unpack it by hand") from None


_UNPACKERS = {_GZIP: _gunzip, _ZSTD: _unzstd, _ZIP: _unzip}
_NAMES = {_gunzip: "gzip", _unzstd: "zstd", _unzip: "zip"}


def _pieces(stream: IO[bytes], file: DataFile) -> Iterator[bytes]:
    import zipfile

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
            _unreadable(file, error)
        if not block:
            return
        size += len(block)
        if size > MOST_UNPACKED and size > MOST_GROWTH * file.path.stat().st_size:
            raise DataError(
                f"{file.name}: unpacks to more than {MOST_GROWTH} times its size, as no text does; unpack it by hand "
                "if it is meant so"
            )
        yield block


def _without_bom(blocks: Iterator[bytes], file: DataFile) -> Iterator[bytes]:
    first = next(blocks, b"")
    if first.startswith(_UTF16):
        raise DataError(f"{file.name}: is UTF-16, not UTF-8; say data={file.path.name}:encoding=utf-16")
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from blocks


def _recoded(blocks: Iterator[bytes], file: DataFile) -> Iterator[bytes]:
    """Blocks of another encoding as UTF-8; DataError names line and byte of what is not in it."""
    encoding = file.reading.encoding
    decoder = _decoder(encoding)
    line, column, held = 1, 0, b""
    for block in _with_end(blocks):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            good = error.object[: error.start]
            place = error.start - good.rfind(b"\n") if b"\n" in good else column + error.start + 1
            file.not_text(encoding, line + good.count(b"\n"), place, error.object[error.start])
        whole = held + block
        held = bytes(decoder.getstate()[0])  # a character that the block's end cuts in two
        done = whole[: len(whole) - len(held)]
        line += done.count(b"\n")
        column = len(done) - done.rfind(b"\n") - 1 if b"\n" in done else column + len(done)
        yield text.removeprefix("\ufeff").encode("utf-8", "surrogatepass")


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _decoder(encoding: str) -> Any:
    try:
        b"a".decode(encoding, "replace")  # refuses codecs that are not of text, such as hex
        return codecs.getincrementaldecoder(encoding)("strict")
    except LookupError:
        raise UsageError(
            f"encoding: {encoding!r} is not known; write one such as utf-8, gb18030, utf-16 or latin-1"
        ) from None
