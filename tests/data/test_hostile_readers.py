"""Every reader of a file that lies about itself or is none: one line, the right code, in seconds, in bounded memory."""

from __future__ import annotations

import gzip
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 3 << 30
SECONDS = 60
ROW = {"prompt": "question", "completion": "answer"}


def attempt(*words):
    """Run a command in a process of its own, with a bound on its memory and its time."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    return done.returncode, done.stderr


def parquet(folder):
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROW] * 100), path)
    return path


def lying_footer_length(folder):
    path = parquet(folder)
    data = bytearray(path.read_bytes())
    data[-8:-4] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(data)
    return path


def broken_footer(folder):
    path = parquet(folder)
    data = bytearray(path.read_bytes())
    size = struct.unpack("<I", data[-8:-4])[0]
    for place in range(len(data) - 8 - size, len(data) - 8, 7):
        data[place] ^= 0xFF
    path.write_bytes(data)
    return path


def broken_pages(folder):
    path = parquet(folder)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    return path


def arrow(folder):
    path = folder / "a.arrow"
    table = pa.Table.from_pylist([ROW] * 100)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def lying_metadata_length(folder):
    path = arrow(folder)
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 0x7FFFFFF0)
    path.write_bytes(data)
    return path


def offsets_that_lead_outside(folder):
    path = arrow(folder)
    data = path.read_bytes()
    offsets = struct.pack("<8i", *range(0, 64, 8))  # of the column of 8 characters a row
    assert offsets in data
    path.write_bytes(data.replace(offsets, struct.pack("<8i", 0, *[0x7FFFFF00] * 7), 1))
    return path


def truncated_arrow(folder):
    path = arrow(folder)
    path.write_bytes(path.read_bytes()[:500])
    return path


def gzip_bomb(folder):
    path = folder / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=9) as stream:
        for _ in range(400):
            stream.write(b" " * (1 << 20))
    return path


def gzip_bomb_of_lines(folder):
    path = folder / "a.csv.gz"
    with gzip.open(path, "wb", compresslevel=9) as stream:
        stream.write(b"prompt,completion\n")
        for _ in range(400):
            stream.write(b"\n" * (1 << 20))
    return path


def zip_bomb(folder):
    path = folder / "a.json.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.json", "w") as stream:
        stream.write(b'["')
        for _ in range(400):
            stream.write(b"a" * (1 << 20))
    return path


def zstd_bomb(folder):
    path = folder / "a.txt.zst"
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        for _ in range(400):
            stream.write(b"a" * (1 << 20))
    return path


def deep_json(folder):
    path = folder / "a.json"
    path.write_text("[" * 1_000_000)
    return path


def deep_json_line(folder):
    path = folder / "a.jsonl"
    path.write_text('{"prompt": ' + "[" * 500_000 + "]" * 500_000 + "}\n")
    return path


def deep_cell(folder):
    path = folder / "a.csv"
    path.write_text('messages\n"' + "[" * 500_000 + "]" * 500_000 + '"\n')
    return path


def blank_lines(folder):
    path = folder / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (300 << 20), 1))
    return path


def yaml_of(name, text):
    def write(folder):
        path = folder / "a.yaml"
        path.write_text(text)
        return path

    write.__name__ = f"yaml_of_{name}"
    return write


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)) + "data: *a39\n"
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))


def fifo(folder):
    os.mkfifo(folder / "a.jsonl")
    return folder / "a.jsonl"


def only_what_is_no_file(folder):
    os.mkfifo(folder / "a.jsonl")
    os.mkfifo(folder / "README.md")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    return folder


def broken_link(folder):
    (folder / "a.jsonl").symlink_to(folder / "gone")
    return folder / "a.jsonl"


def fifo_as_arrow(folder):
    os.mkfifo(folder / "a.arrow")
    return folder / "a.arrow"


def fifo_in_a_saved_dataset(folder):
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    os.mkfifo(folder / "a.arrow")
    return folder


def fifo_as_parquet(folder):
    os.mkfifo(folder / "a.parquet")
    return folder / "a.parquet"


def fifo_as_yaml(folder):
    os.mkfifo(folder / "a.yaml")
    return folder / "a.yaml"


def device(folder):
    (folder / "a.jsonl").symlink_to("/dev/zero")
    return folder / "a.jsonl"


def unix_socket(folder):
    os.chdir(folder)  # the path of a socket may be short only
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("a.jsonl")
    os.chdir(ROOT)
    return folder / "a.jsonl"


def loop_of_links(folder):
    (folder / "a.jsonl").symlink_to(folder / "b.jsonl")
    (folder / "b.jsonl").symlink_to(folder / "a.jsonl")
    return folder / "a.jsonl"


HOSTILE = [
    lying_footer_length,
    broken_footer,
    broken_pages,
    lying_metadata_length,
    offsets_that_lead_outside,
    truncated_arrow,
    gzip_bomb,
    gzip_bomb_of_lines,
    blank_lines,
    zip_bomb,
    zstd_bomb,
    deep_json,
    deep_json_line,
    deep_cell,
    yaml_of("doubling_aliases", LAUGHS),
    yaml_of("doubling_merges", MERGES),
    yaml_of("itself", "data: &a [*a]"),
    yaml_of("depth", "data: " + "[" * 100_000),
    fifo,
    only_what_is_no_file,
    broken_link,
    fifo_in_a_saved_dataset,
    fifo_as_arrow,
    fifo_as_parquet,
    fifo_as_yaml,
    device,
    unix_socket,
    loop_of_links,
]
QUICK = (offsets_that_lead_outside, deep_json_line, fifo, only_what_is_no_file)


@pytest.mark.parametrize(
    "make",
    [pytest.param(make, marks=() if make in QUICK else pytest.mark.slow, id=make.__name__) for make in HOSTILE],
)
def test_hostile_data_ends_with_one_line_in_bounded_time_and_memory(tmp_path, make):
    code, said = attempt("align.data", "stats", make(tmp_path))

    assert code == 3 or (code == 2 and "yaml" in make.__name__), said  # YAML may be settings, which are usage
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert len(said) < 3000


def member(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("models/m/v0001/config.json", tarfile.SYMTYPE, "/etc/passwd"),
        member("models/m/v0001/config.json", tarfile.LNKTYPE, "../../../etc/passwd"),
        member("models/m/v0001/config.json", tarfile.CHRTYPE),
        member("models/m/v0001/config.json", tarfile.BLKTYPE),
        member("models/m/v0001/config.json", tarfile.FIFOTYPE),
        member("../outside.json", tarfile.REGTYPE),
        member("/outside.json", tarfile.REGTYPE),
    ],
)
def test_members_of_an_archive_that_are_no_plain_files_are_refused(tmp_path, info):
    from align.errors import IntegrityError
    from align.registry import open_registry
    from align.registry.archive import import_file

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)

    with pytest.raises(IntegrityError, match="only what export wrote is taken in"):
        import_file(open_registry(tmp_path / "registry"), tmp_path / "a.tar")

    assert not (tmp_path / "outside.json").exists()


def tar_that_is_a_fifo(folder):
    os.mkfifo(folder / "a.tar")


def tar_of_a_lying_size(folder):
    info = tarfile.TarInfo("align_export.json")
    info.size = 1 << 50
    (folder / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)


def tar_of_a_lying_header(folder):
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    (folder / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 10240)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tar_that_is_a_fifo, tar_of_a_lying_size, tar_of_a_lying_header])
def test_hostile_archives_end_with_one_line(tmp_path, make):
    make(tmp_path)

    code, said = attempt("align.registry", "import", tmp_path / "a.tar", "--registry", tmp_path / "registry")

    assert code in (2, 4), said
    assert said.startswith("error: ")
    assert "Traceback" not in said


def test_what_is_no_file_in_a_folder_is_left_out_and_named(tmp_path):
    from align.data.load import load_records

    (tmp_path / "good.jsonl").write_text(json.dumps(ROW) + "\n")
    os.mkfifo(tmp_path / "README.md")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    (tmp_path / "broken.parquet").symlink_to("gone")

    found = load_records(str(tmp_path))

    assert found.rows == 1
    assert any("left out 'broken.parquet, pipe.jsonl, zero.csv': a pipe" in note for note in found.notes), found.notes


def test_the_aliases_of_a_settings_file_may_add_a_hundred_thousand_values_and_no_more():
    from align.errors import UsageError
    from align.strict_yaml import load_yaml

    long = "a: &a [" + "x, " * 999 + "x]\nb: ["
    assert len(load_yaml(long + "*a, " * 90 + "1]", "f")["b"]) == 91

    with pytest.raises(UsageError, match="f: its aliases"):
        load_yaml(long + "*a, " * 200 + "1]", "f")
