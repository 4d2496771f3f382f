"""How the source reads, in figures: sizes, repetition, options, names and words.

    python benchmarks/house.py [CHECKOUT] [--names]

Reads the source of a checkout (by default this one) without running it; `--names` lists the names behind the counts.
The figures of `docs/decisions/0023-how-the-source-reads.md` are from here.
"""

from __future__ import annotations

import argparse
import ast
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

STAGES = ("pretrain", "sft", "reward", "dpo", "kto", "grpo", "ppo")
_NOT_A_NAME = {"__init__.py", "__main__.py"}
_QUESTION = re.compile(r"(What|Whether|How)\b")


def read_modules(root: Path) -> dict[Path, ast.Module]:
    """Return the parsed modules of `align/` by path."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((root / "align").rglob("*.py"))}


def functions(modules: dict[Path, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for tree in modules.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def quantiles(lengths: list[int]) -> str:
    """Return median, 90th percentile and maximum as text."""
    ordered = sorted(lengths)
    return f"{statistics.median(ordered):.0f} / {ordered[int(len(ordered) * 0.9)]} / {ordered[-1]}"


def shared_lines(root: Path) -> float:
    """Return the share of a stage's code lines that stand in another stage file too.

    Counted without blank lines, comments and lines of a bracket or keyword alone.
    """
    lines = {stage: _code_lines(root / "align" / f"{stage}.py") for stage in STAGES}
    total = sum(map(len, lines.values()))
    shared = 0
    for stage, own in lines.items():
        others = set().union(*(set(lines[other]) for other in STAGES if other != stage))
        shared += sum(line in others for line in own)
    return shared / total


def _code_lines(path: Path) -> list[str]:
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in stripped if len(line) > 8 and not line.startswith("#")]


def doubled_classes(modules: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """Return the class names that several modules define, with the modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(str(path))
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


def doubled_files(modules: dict[Path, ast.Module]) -> dict[str, list[str]]:
    """Return the file names that stand in several packages, with their paths."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in modules:
        if path.name not in _NOT_A_NAME:
            found[path.name].append(str(path))
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


def docstrings(modules: dict[Path, ast.Module]) -> list[str]:
    """Return every docstring of a module, class or function."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def questions(modules: dict[Path, ast.Module]) -> list[str]:
    """Return the docstrings that begin with What, Whether or How, except of predicates (`is_`, `has_`)."""
    return [text for text in docstrings(modules) if _QUESTION.match(text)]


def count_options(root: Path, stage: str) -> tuple[int, int]:
    """Return how many settings a stage's `--help` lists, and how many it takes with those of its groups."""
    script = (
        f"import importlib; from align.config import group_of\n"
        f"config = importlib.import_module('align.{stage}').STAGE.config\n"
        "def count(model):\n"
        "    return sum(count(g) if (g := group_of(f.annotation)) else 1 for f in model.model_fields.values())\n"
        "print(len(config.model_fields), count(config))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    own, all_of_them = map(int, done.stdout.split())
    return own, all_of_them


_TRACE = """
import ast, inspect, json, sys, tempfile
from pathlib import Path
from align.data import load_records
path = Path(tempfile.mkdtemp()) / "rows.jsonl"
path.write_text(json.dumps({"prompt": "two and two?", "completion": "four"}) + chr(10))
load_records(str(path), view="demonstration")
called = set()
sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
load_records(str(path), view="demonstration")
sys.setprofile(None)
data = str(Path(sys.modules["align.data"].__file__).parent)
ours = {code for code in called if code.co_filename.startswith(data)}
starts = {(code.co_filename, code.co_firstlineno) for code in ours}
switches = 0
for name in {code.co_filename for code in ours}:
    for node in ast.walk(ast.parse(Path(name).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            if (name, first) in starts:
                switches += sum(isinstance(part, (ast.If, ast.IfExp, ast.Match)) for part in ast.walk(node))
print(len({code.co_filename for code in ours}), switches)
"""


def trace_row(root: Path) -> tuple[int, int]:
    """Return through how many files of `align/data` a JSONL row passes to its record, and their branches.

    Counted are the if, conditional expressions and match statements of the functions that were called.
    """
    done = subprocess.run([sys.executable, "-c", _TRACE], cwd=root, capture_output=True, text=True, check=True)
    files, switches = map(int, done.stdout.split())
    return files, switches


def measure(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (what, figure) for a checkout."""
    modules = read_modules(root)
    nodes = list(functions(modules))
    files = [len(path.read_text(encoding="utf-8").splitlines()) for path in modules]
    texts = docstrings(modules)
    yield "function lines median / p90 / max", quantiles([(n.end_lineno or n.lineno) - n.lineno + 1 for n in nodes])
    yield "file lines median / p90 / max", quantiles(files)
    yield "lines shared by sibling stages", f"{shared_lines(root):.0%}"
    for stage in STAGES:
        own, nested = count_options(root, stage)
        yield f"options of {stage} (with those of its groups)", f"{own} ({nested})"
    yield (
        "class names / file names that exist twice",
        f"{len(doubled_classes(modules))} / {len(doubled_files(modules))}",
    )
    yield "docstrings beginning with What, Whether, How", f"{len(questions(modules))} of {len(texts)}"
    yield "files / branches from data=FILE to a Record", " / ".join(map(str, trace_row(root)))
    yield "words of the README", f"{len((root / 'README.md').read_text(encoding='utf-8').split()):,}"
    yield "modules / lines of align/", f"{len(files)} / {sum(files):,}"


def main() -> None:
    """Print the figures as a table, and with --names the names that exist twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--names", action="store_true", help="list the names that exist twice")
    asked = parser.parse_args()
    for what, figure in measure(asked.checkout):
        print(f"| {what} | {figure} |")
    if asked.names:
        modules = read_modules(asked.checkout)
        for name, places in (doubled_classes(modules) | doubled_files(modules)).items():
            print(name, *places)


if __name__ == "__main__":
    main()
