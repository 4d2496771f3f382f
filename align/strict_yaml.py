"""YAML files and values, parsed strictly: a key written twice, an endless alias or a merge of several is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from align.errors import UsageError, nearest


class _StrictLoader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                mark = key_node.start_mark
                raise UsageError(f"{mark.name}:{mark.line + 1} {key}: written twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # Each merge of several mappings may double what the one before it held.
        merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if any(isinstance(value, yaml.SequenceNode) and len(value.value) > 1 for value in merged):
            mark = node.start_mark
            raise UsageError(f"{mark.name}:{mark.line + 1} <<: merges several mappings; write their keys out")
        super().flatten_mapping(node)


_MOST_VALUES = 100_000
"""Values that the aliases of a YAML file may add to those it writes."""


def _refuse_unfolding(value: Any, origin: str) -> None:
    """Raise UsageError for aliases that unfold to far more values than the file holds, or without end."""
    sizes: dict[int, int] = {}
    added = 0

    def size(part: Any) -> int:
        nonlocal added
        if not isinstance(part, (dict, list)):
            return 1
        if id(part) not in sizes:
            sizes[id(part)] = _MOST_VALUES + 1  # stands for itself while it is inside itself
            sizes[id(part)] = 1 + sum(map(size, part.values() if isinstance(part, dict) else part))
            return sizes[id(part)]
        added += sizes[id(part)]
        if added > _MOST_VALUES:
            raise UsageError(f"{origin}: its aliases (*name) unfold to a great many values; write them out")
        return sizes[id(part)]

    size(value)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_yaml(text: str, origin: str) -> Any:
    """Parse YAML strictly; `origin` names it in messages."""
    try:
        loader = _StrictLoader(text)  # fails at a control character
        loader.name = origin
        value = loader.get_single_data()
        _refuse_unfolding(value, origin)
        return value
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{origin}:{line} not valid YAML: {error.problem}; correct it") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}; correct it") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        beside = [file.name for file in path.parent.glob("[!.]*.y*ml")] if path.parent.is_dir() else []
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        hint = nearest(path.name, beside) or " check the path"
        raise UsageError(f"{path}: cannot be read ({reason});{hint}") from None
    values = load_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(f"{path}: holds {type(values).__name__}, not a mapping of settings; write `key: value` lines")
    return values
