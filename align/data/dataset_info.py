"""LLaMA-Factory's `dataset_info.json`: its entries as settings of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import DataError, nearest

FILE_NAME = "dataset_info.json"
_COLUMNS = {"query": "input", "response": "output", "kto_tag": "label"}
_TAGS = {f"{name}_tag": name for name in ("role", "content", "system", "user", "assistant")}
_TAGS |= {"observation_tag": "tool", "function_tag": "tool_call"}
_OPTIONS = {"subset": "subset", "split": "split", "num_samples": "limit"}
_MEDIA = ("images", "videos", "audios")


def read_entry_of(path: Path, source: str, name: str | None) -> dict[str, Any]:
    """Return the settings of one entry; DataError when there is no such file or entry, or it cannot be used."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no regular file; name the file itself")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read as JSON ({error}); check the path") from None
    if name is None or name not in entries:
        problem = f"no entry {name!r}" if name else "no entry is named"
        raise DataError(f"{path.name}: {problem}; write {source}:entry=NAME;{nearest(name or '', entries)}")
    entry, where = entries[name], f"{path.name} entry {name}"
    columns = {key: column for key, column in (entry.get("columns") or {}).items() if column}
    if media := [key for key in _MEDIA if key in columns]:
        raise DataError(f"{where}: it holds {', '.join(media)}; only text can be trained on here")
    format_name = {"sharegpt": "sharegpt", "openai": "messages"}.get(entry.get("formatting", "alpaca"), "alpaca")
    if format_name == "alpaca" and set(columns) == {"prompt"}:
        format_name, columns = "text", {"text": columns["prompt"]}
    match entry:
        case {"script_url": _}:
            raise DataError(f"{where}: it is loaded by a script, which is not run; give the data as a file")
        case {"file_name": name}:
            source = str(name)
        case {"hf_hub_url": name}:
            source = f"hf://{name}"
        case _:
            raise DataError(f"{where}: neither file_name nor hf_hub_url; give the data as a file")
    settings: dict[str, Any] = {"source": source, "format": format_name}
    settings["columns"] = {_COLUMNS.get(key, key): column for key, column in columns.items()}
    settings["tags"] = {_TAGS[key]: tag for key, tag in (entry.get("tags") or {}).items() if key in _TAGS}
    return settings | {ours: entry[theirs] for theirs, ours in _OPTIONS.items() if entry.get(theirs)}
