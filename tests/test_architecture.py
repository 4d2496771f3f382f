"""The rooms, the arrows between them and the size of things; a walk over the source, which is not run.

The checker is a set of pure functions over {module: source}; the second half of this file feeds it bad sources and
expects it to object.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from align import __main__ as commands

ROOT = Path(__file__).resolve().parents[1]
Sources = dict[str, str]

FLOOR = {
    f"align.{name}"
    for name in (
        "errors", "schema", "config", "command_line", "network", "statistics", "strict_yaml",
        "tuners", "peft_config", "waiting",
    )
} | {"align"}  # fmt: skip
PACKAGES = {
    "data", "registry", "world", "models", "training", "rewards", "rl", "engine", "arena", "server", "evaluation",
}  # fmt: skip
STAGES = {f"align.{name}" for name in commands.STAGES}
DOORS = {f"align.{name}" for name in ("__main__", *commands.TOOLS) if name not in PACKAGES} | {
    "align.quickstart_steps", "align.quickstart_real",  # parts of the quickstart, which knows every stage
}  # fmt: skip

# Which rooms a room may know, besides itself. Every arrow of the design, and no other.
_LOW = {"floor"}
_MODELS = _LOW | {"data", "registry", "world"}
_MACHINES = _MODELS | {"models"}
_STAGES = _MACHINES | {"training", "rewards", "rl", "engine"}
MAY_KNOW = {
    "floor": _LOW,
    "data": _LOW,
    "registry": _LOW,
    "world": _LOW,
    "models": _MODELS,
    "training": _MACHINES,
    "rewards": _MACHINES,
    "rl": _MACHINES | {"rewards"},
    "engine": _MACHINES,
    "stage": _STAGES | {"evaluation"},
    "arena": _STAGES,
    "server": _STAGES,
    "evaluation": _STAGES,
    "door": {*PACKAGES, "floor", "stage", "door"},
}

HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "gradio", "pyarrow", "matplotlib"}
WEIGHT_CALLS = {"from_pretrained", "load_file", "safe_open"}
FORBIDDEN_FILES = {"utils", "common", "helpers", "base", "manager", "core", "misc"}
MOST_LINES_IN_A_FILE = 400
MOST_LINES_IN_A_FUNCTION = 60


def room_of(module: str) -> str | None:
    """The room a module of align belongs to; None when the design has no place for it."""
    if module in FLOOR:
        return "floor"
    if module in STAGES:
        return "stage"
    if module in DOORS or module.endswith(".__main__"):
        return "door"
    package = module.split(".")[1]
    return package if package in PACKAGES else None


def in_package(module: str, package: str) -> bool:
    """Whether a module is a package or something inside it."""
    return module == package or module.startswith(package + ".")


def imports(module: str, tree: ast.AST, sources: Sources) -> Iterator[tuple[int, str]]:
    """Every (line, module) imported anywhere in a tree, also by name through importlib."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom():
                origin = _absolute(module, node, sources)
                for alias in node.names:
                    inner = f"{origin}.{alias.name}"
                    yield node.lineno, inner if inner in sources else origin
            case ast.Call(args=[ast.Constant(value=str() as name), *_]) if _called(node) in (
                "import_module",
                "__import__",
            ):
                yield node.lineno, name


def _absolute(module: str, node: ast.ImportFrom, sources: Sources) -> str:
    if not node.level:
        return node.module or ""
    is_package = any(other.startswith(module + ".") for other in sources)
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def serves_http(module: str) -> bool:
    """Whether a module may open a port: the server, and the two parts of the page that do (decision 5)."""
    return in_package(module, "align.server") or module in ("align.arena.app", "align.arena.web")


def arrows(module: str, tree: ast.AST, sources: Sources) -> Iterator[str]:
    """Imports that go against the arrows, and libraries outside the room they are kept in."""
    room = room_of(module)
    if room is None:
        yield f"{module}: no room of the design; add it to the table with a reason, or put it into a room"
        return
    for line, name in imports(module, tree, sources):
        library = name.partition(".")[0]
        if library == "align":
            other = room_of(name)
            inside = name == module or (other == room and room != "stage")
            if other != "floor" and not inside and other not in MAY_KNOW[room]:
                yield f"{module}:{line} imports {name}: {room} may not know {other}"
        elif library in ("fastapi", "uvicorn", "starlette") and not serves_http(module):
            yield f"{module}:{line} imports {library}, which is kept in align.server"
        elif library == "safetensors" and not in_package(module, "align.models"):
            yield f"{module}:{line} imports safetensors; weights are loaded and saved in align.models"


def gradio_leaks(sources: Sources) -> Iterator[str]:
    """Gradio outside align.arena.app and its parts: the modules beside it that only it, or another part, imports."""
    known = {module: list(imports(module, ast.parse(source), sources)) for module, source in sources.items()}
    users = {module for module, names in known.items() if any(in_package(name, "gradio") for _, name in names)}
    parts = users - {"align.arena.app"}
    for module in sorted(parts):
        if not in_package(module, "align.arena"):
            yield f"{module} imports gradio, which is kept in align.arena.app and its parts"
    for module in sorted(set(sources) - users):
        for line, name in known[module]:
            if name in parts:
                yield f"{module}:{line} imports {name}, a part of align.arena.app; it is for the page alone"


def habits(module: str, tree: ast.AST) -> Iterator[str]:
    """Weights loaded in the wrong place, inherited trainers, prints and bare excepts."""
    for node in ast.walk(tree):
        match node:
            case ast.Call() if _called(node) in WEIGHT_CALLS and not in_package(module, "align.models"):
                yield f"{module}:{node.lineno} calls {_called(node)}; weights are loaded in align.models"
            case ast.Call(func=ast.Name(id="print")):
                yield f"{module}:{node.lineno} calls print; use align.config.write"
            case ast.ExceptHandler(type=None):
                yield f"{module}:{node.lineno} has a bare except; name what is expected"
            case ast.ClassDef(bases=bases):
                for base in map(ast.unparse, bases):
                    if base.partition("[")[0].endswith("Trainer"):
                        yield f"{module}:{node.lineno} inherits {base}; call trainers, do not subclass them"


def sizes(module: str, source: str, tree: ast.AST) -> Iterator[str]:
    """Files and functions that are too long, and file names that say nothing."""
    if module.rpartition(".")[2] in FORBIDDEN_FILES:
        yield f"{module}: a name that says nothing; call the file after what it does"
    if (lines := len(source.splitlines())) > MOST_LINES_IN_A_FILE:
        yield f"{module}: {lines} lines, {MOST_LINES_IN_A_FILE} at most; split it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MOST_LINES_IN_A_FUNCTION:
                most = MOST_LINES_IN_A_FUNCTION
                yield f"{module}:{node.lineno} {node.name}: {length} lines, {most} at most; split it"


def names(sources: Sources) -> Iterator[str]:
    """Classes and files that share their name with one of another module."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, source in sorted(sources.items()):
        if not any(other.startswith(module + ".") for other in sources):  # a package has no name of a file
            homes[f"file {module.rpartition('.')[2]}.py"].append(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                homes[f"class {node.name}"].append(module)
    for name, modules in homes.items():
        if len(modules) > 1 and name != "file __main__.py":
            yield f"{name} is in {', '.join(modules)}; call each after what it holds"


def heavy_at_start(sources: Sources) -> Iterator[str]:
    """Heavy libraries that are imported before a command has read its first argument.

    The floor, data, registry, world, stages and doors must start light, and so must everything they import at module
    level. A module that is only ever imported inside functions may import what it likes.
    """
    roots = {"floor", "data", "registry", "world", "stage", "door"}
    waiting = [(module, module) for module in sources if room_of(module) in roots or module == "align.training.stage"]
    seen = set()
    while waiting:
        module, because = waiting.pop()
        if module in seen or module not in sources:
            continue
        seen.add(module)
        for line, name in _at_start(module, ast.parse(sources[module]), sources):
            if name.partition(".")[0] in HEAVY:
                yield f"{module}:{line} imports {name} at module level, reached from {because}; import it later"
            parts = name.split(".")
            waiting += [(".".join(parts[:count]), because) for count in range(1, len(parts) + 1)]


def rings(sources: Sources) -> Iterator[str]:
    """Modules of one room that import each other in a ring, deferred imports included, imports for types excepted."""
    edges = {module: set(_imports_at_run_time(module, source, sources)) for module, source in sources.items()}
    inside = {
        module: {name for name in names if name != module and room_of(name) == room_of(module)}
        for module, names in edges.items()
    }
    seen: set[str] = set()
    for module in sorted(inside):
        ring = {other for other in _reachable(module, inside) if module in _reachable(other, inside)}
        if ring and module not in seen:
            seen |= ring
            yield f"{room_of(module)}: {', '.join(sorted(ring))} import each other; move what they share into one"


def _imports_at_run_time(module: str, source: str, sources: Sources) -> Iterator[str]:
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for _, name in imports(module, node, sources) if name in sources)
        waiting += ast.iter_child_nodes(node)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """The modules that `start` imports, directly or through others; itself only when it is in a ring."""
    reached: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += edges[module]
    return reached


def _at_start(module: str, tree: ast.Module, sources: Sources) -> Iterator[tuple[int, str]]:
    """The imports that run when a module is imported: not those in functions, nor those for the type checker."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(module, node, sources)
        else:
            waiting += ast.iter_child_nodes(node)


def violations(sources: Sources) -> list[str]:
    """Everything that is wrong with a set of modules, one line each."""
    found: list[str] = []
    for module, source in sorted(sources.items()):
        tree = ast.parse(source)
        found += arrows(module, tree, sources)
        found += habits(module, tree)
        found += sizes(module, source, tree)
    return [*found, *gradio_leaks(sources), *names(sources), *heavy_at_start(sources)]


def read_sources() -> Sources:
    """The modules of align by name."""
    found = {}
    for path in sorted((ROOT / "align").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def test_rooms_arrows_sizes_and_habits_hold():
    sources = read_sources()

    assert len(sources) > 20
    found = violations(sources)
    assert not found, "\n".join(found)


def test_no_module_imports_one_of_its_room_that_imports_it():
    found = list(rings(read_sources()))

    assert not found, "\n".join(found)


def test_every_stage_and_door_starts_without_heavy_libraries():
    entries = [module for module in read_sources() if room_of(module) in ("stage", "door")]
    script = (
        f"import sys, importlib\nfor name in {entries!r}: importlib.import_module(name)\n"
        f"sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300)

    assert (done.returncode, done.stderr) == (0, "")


BAD = [
    ({"align.dpo": "import align.sft", "align.sft": ""}, "stage may not know stage"),
    ({"align.dpo": "def f():\n    from align import sft", "align.sft": ""}, "imports align.sft: stage may not"),
    ({"align.data.load": "from align.registry import open_registry"}, "data may not know registry"),
    ({"align.registry.x": "from ..data import load", "align.data": ""}, "registry may not know data"),
    ({"align.world.x": "from align.data import load"}, "world may not know data"),
    ({"align.models.x": "if TYPE_CHECKING:\n    from align.rl import maths"}, "models may not know rl"),
    ({"align.rl.x": "import importlib\nimportlib.import_module('align.training.run')"}, "rl may not know training"),
    ({"align.rewards.x": "from align.rl import maths"}, "rewards may not know rl"),
    ({"align.engine.x": "from align.arena import app"}, "engine may not know arena"),
    ({"align.arena.x": "from align import compare", "align.compare": ""}, "arena may not know door"),
    ({"align.errors": "from align.data import load"}, "floor may not know data"),
    ({"align.arena.x": "def f():\n    import fastapi"}, "fastapi, which is kept in align.server"),
    ({"align.arena.x": "def f():\n    from starlette.responses import Response"}, "starlette, which is kept"),
    ({"align.compare": "def f():\n    import gradio as gr"}, "gradio, which is kept in align.arena.app"),
    (
        {"align.arena.battles": "from align.arena.panes import x", "align.arena.panes": "import gradio"},
        "the page alone",
    ),
    ({"align.novelty": ""}, "no room of the design"),
    ({"align.novelty.part": ""}, "no room of the design"),
    ({"align.rl.x": "def f():\n    from safetensors.torch import load_file"}, "imports safetensors"),
    ({"align.rl.x": "def f(m):\n    return m.AutoModel.from_pretrained('x')"}, "calls from_pretrained"),
    ({"align.rl.x": "def f():\n    return load_file('x')"}, "calls load_file"),
    ({"align.training.x": "class Ours(trl.DPOTrainer): pass"}, "inherits trl.DPOTrainer"),
    ({"align.training.x": "class Ours(Generic[T], Trainer): pass"}, "inherits Trainer"),
    ({"align.data.x": "import torch"}, "imports torch at module level"),
    (
        {"align.data.x": "try:\n    from torch import nn\nexcept ImportError:\n    nn = None"},
        "imports torch at module level",
    ),
    ({"align.ppo": "from align.rl.loss import x", "align.rl.loss": "import torch"}, "reached from align.ppo"),
    (
        {"align.ppo": "from align.rl.a import x", "align.rl": "import torch", "align.rl.a": ""},
        "align.rl:1 imports torch",
    ),
    ({"align.training.stage": "from align.models import load", "align.models": "import peft"}, "imports peft"),
    ({"align.data.__main__": "import pyarrow.parquet"}, "imports pyarrow.parquet"),
    ({"align.models.utils": ""}, "a name that says nothing"),
    ({"align.models.x": "x = 1\n" * 401}, "401 lines"),
    ({"align.models.x": "def long():\n" + "    x = 1\n" * 60}, "long: 61 lines"),
    ({"align.models.x": "def f():\n    print(1)"}, "calls print"),
    ({"align.models.x": "try:\n    x = 1\nexcept:\n    pass"}, "bare except"),
    (
        {"align.rl.a": "class Rollout: pass", "align.engine.b": "class Rollout: pass"},
        "class Rollout is in align.engine.b",
    ),
    ({"align.rl.cache": "", "align.engine.cache": ""}, "file cache.py is in align.engine.cache, align.rl.cache"),
]

GOOD = {
    "align.errors": "import sys",
    "align.data": "from align.errors import AlignError\nfrom .load import rows",
    "align.data.load": "def rows():\n    import pyarrow",
    "align.data.__main__": "from align.models import tokenizers",
    "align.models": "",
    "align.models.tokenizers": "if TYPE_CHECKING:\n    import torch\ndef f():\n    X.from_pretrained(1)",
    "align.rl.maths": "import torch",
    "align.ppo": "from align.training.stage import Stage\ndef ppo():\n    from align.rl import maths",
    "align.training.stage": "from align.data import load",
    "align.quickstart": "from align.ppo import STAGE",
    "align.arena.app": "import gradio\nfrom align.arena.panes import pane",
    "align.arena.panes": "import gradio",
    "align.compare": "def f():\n    from align.arena import app",
    "align.server.http": "import fastapi",
    "align.training.own": "class TrainerSettings(Settings): pass",
}


@pytest.mark.parametrize(("sources", "message"), BAD)
def test_the_checker_catches(sources, message):
    found = violations(sources)

    assert any(message in violation for violation in found), found


def test_the_checker_accepts_what_the_design_allows():
    assert violations(GOOD) == []


RINGS = [
    ({"align.rl.a": "import align.rl.b", "align.rl.b": "import align.rl.a"}, "rl: align.rl.a, align.rl.b import each"),
    (
        {"align.rl.a": "from align.rl import b", "align.rl.b": "def f():\n    from align.rl.a import x"},
        "rl: align.rl.a, align.rl.b import each other",
    ),
    (
        {"align.rl.a": "from .b import x", "align.rl.b": "from .c import x", "align.rl.c": "from .a import x"},
        "rl: align.rl.a, align.rl.b, align.rl.c import each other",
    ),
    ({"align.rl": "from align.rl.a import x", "align.rl.a": "from align.rl import y"}, "rl: align.rl, align.rl.a"),
    ({"align.errors": "import align.config", "align.config": "from align.errors import x"}, "floor: align.config"),
]

NO_RINGS = {
    "align.rl": "from align.rl.a import x",
    "align.rl.a": "from align.rl.b import x",
    "align.rl.b": "if TYPE_CHECKING:\n    from align.rl.a import x\nfrom align.models import y",
    "align.models": "def f():\n    import align.rl",
}


@pytest.mark.parametrize(("sources", "message"), RINGS)
def test_the_checker_finds_a_ring(sources, message):
    found = list(rings(sources))

    assert len(found) == 1
    assert message in found[0]


def test_the_checker_takes_no_import_for_types_for_a_ring():
    assert list(rings(NO_RINGS)) == []
