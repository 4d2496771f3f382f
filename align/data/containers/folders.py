"""The files of a folder that are read: those of one split, `train` unless another is asked for.

Splits are told by README.md where it lists them (as on the Hugging Face hub), else by the names of files and folders.
Rows of another split are never read unasked, and what is left out is told in a note.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from align.config import load_yaml
from align.errors import DataError, UsageError, nearest

ALL = "all"
"""The name that asks for every split."""
_README = "README.md"
_LONGEST_README = 1 << 20
_KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
_SHARD = re.compile(r"(.+?)[-_.]\d{3,}-of-\d{3,}")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENDINGS = re.compile(r"(?<=[a-z]{3})(set|sets|data|split|file)$")


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """The part of a folder that is asked for, and the folder's name in messages."""

    name: str
    split: str | None = None
    subset: str | None = None


def choose_files(folder: Path, files: Sequence[Path], wanted: SplitRequest, notes: list[str]) -> list[Path]:
    """Return the files of the wanted split; DataError when none can be chosen without asking."""
    listed = _read_listing(folder, files, wanted, notes)
    if listed is not None:
        return choose_split(listed, (), wanted, notes)
    files = _within_subset(folder, files, wanted)
    splits: dict[str, list[Path]] = {}
    unmarked: list[Path] = []
    for file in files:
        split = split_of(file.relative_to(folder))
        (splits.setdefault(split, []) if split else unmarked).append(file)
    return choose_split(splits, unmarked, wanted, notes)


def choose_split(
    splits: Mapping[str, list[Path]], unmarked: Sequence[Path], wanted: SplitRequest, notes: list[str]
) -> list[Path]:
    """Return what the wanted split holds; `unmarked` are files of no split, which are taken where no split is train."""
    if not splits and wanted.split in (None, ALL):
        return list(unmarked)
    if wanted.split == ALL:
        return [*unmarked, *(file for files in splits.values() for file in files)]
    split = _asked_split(splits, wanted) if wanted.split else _default_split(splits, unmarked, wanted)
    chosen = list(unmarked) if split is None else splits[split]
    others = [name for name in splits if name != split]
    if others or (unmarked and split is not None):
        taken = "the files of no split" if split is None else f"the split {split}"
        beside = [f"{len(unmarked)} files of no split"] if unmarked and split is not None else []
        notes.append(
            f"{wanted.name}: read {taken}; left out {', '.join([*others, *beside])} "
            f"(:split=NAME takes another, :split={ALL} takes everything)"
        )
    return chosen


def _asked_split(splits: Mapping[str, list[Path]], wanted: SplitRequest) -> str:
    asked = wanted.split or ""
    if asked in splits:
        return asked
    alike = [name for name in splits if kind_of_split(name) == kind_of_split(asked) is not None]
    if len(alike) == 1:
        return alike[0]
    known = ", ".join(splits) or "none"
    raise DataError(f"{wanted.name}: no split {asked!r}; it has {known};{nearest(asked, splits)}")


def _default_split(splits: Mapping[str, list[Path]], unmarked: Sequence[Path], wanted: SplitRequest) -> str | None:
    if "train" in splits:
        return "train"
    training = [name for name in splits if kind_of_split(name) == "train"]
    if len(training) == 1:
        return training[0]
    if not training and unmarked:
        return None
    if len(splits) == 1 and kind_of_split(name := next(iter(splits))) is None:
        return name
    found = "only" if not training else "several splits to train on:"
    raise DataError(
        f"{wanted.name}: holds {found} {', '.join(splits)}; say which, such as "
        f"data={wanted.name}:split={next(iter(splits))} (:split={ALL} takes everything)"
    )


def kind_of_split(name: str) -> str | None:
    """Return train, validation or test for the name of a split, a file or a folder; None when it says none of them.

    A name of several, such as `train_and_test`, is that of a held-out one.
    """
    words = [_ENDINGS.sub("", word.lower()) for word in _WORDS.findall(name)]
    joined = {first + second for first, second in pairwise(words)} & {"heldout", "holdout"}
    if joined:
        return "test"
    return _held_out_first([_KIND_OF[word] for word in words if word in _KIND_OF])


def split_of(path: Path) -> str | None:
    """Return the split that a path inside a folder names; where its parts disagree, the one that is held out."""
    *folders, file = path.parts
    kind = _held_out_first([kind for part in (file, *reversed(folders)) if (kind := kind_of_split(part))])
    if kind is None:
        return None
    shard = _SHARD.match(file)
    return shard.group(1) if shard and kind_of_split(shard.group(1)) == kind else kind


def _held_out_first(kinds: list[str]) -> str | None:
    return next((kind for kind in kinds if kind != "train"), "train" if kinds else None)


def _within_subset(folder: Path, files: Sequence[Path], wanted: SplitRequest) -> Sequence[Path]:
    if wanted.subset is None:
        return files
    inside = [file for file in files if file.relative_to(folder).parts[0] == wanted.subset]
    if not inside:
        parts = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
        raise DataError(f"{wanted.name}: no subset {wanted.subset!r};{nearest(wanted.subset, parts) or ' it has none'}")
    return inside


def _read_listing(
    folder: Path, files: Sequence[Path], wanted: SplitRequest, notes: list[str]
) -> dict[str, list[Path]] | None:
    """The files of each split as README.md lists them; None when it lists none."""
    configs = _configs(folder, wanted, notes)
    if not configs:
        return None
    config = _chosen_config(configs, wanted)
    if len(configs) > 1:
        others = ", ".join(str(other.get("config_name")) for other in configs if other is not config)
        notes.append(f"{wanted.name}: read the subset {config.get('config_name')}; left out {others} (:subset=NAME)")
    held = {file.relative_to(folder).as_posix(): file for file in files}
    listed: dict[str, list[Path]] = {}
    for split, patterns in _data_files(config, wanted).items():
        found = [file for path, file in held.items() if any(_matches(path, pattern) for pattern in patterns)]
        if not found and split in (wanted.split or "train", "train"):
            raise DataError(
                f"{wanted.name}: {_README} lists {', '.join(patterns)} for the split {split}, and no such data file "
                "is there; fetch it, or name the file to read"
            )
        if found:
            listed[split] = found
    return listed


def _configs(folder: Path, wanted: SplitRequest, notes: list[str]) -> list[dict[str, Any]]:
    readme = folder / _README
    if not readme.is_file():
        return []
    with readme.open(encoding="utf-8", errors="replace") as stream:
        head = stream.read(_LONGEST_README).removeprefix("\ufeff")
    found = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---", head, re.DOTALL)
    try:
        told = load_yaml(found.group(1), f"{wanted.name}/{_README}") if found else None
    except UsageError as error:
        notes.append(f"{error}; splits were told by the names of the files")
        return []
    configs = told.get("configs") if isinstance(told, dict) else None
    listing = configs if isinstance(configs, list) else []
    return [config for config in listing if isinstance(config, dict) and config.get("data_files")]


def _chosen_config(configs: list[dict[str, Any]], wanted: SplitRequest) -> dict[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    if wanted.subset is not None:
        if wanted.subset not in names:
            raise DataError(f"{wanted.name}: no subset {wanted.subset!r};{nearest(wanted.subset, names)}")
        return configs[names.index(wanted.subset)]
    if len(configs) == 1:
        return configs[0]
    if "default" in names:
        return configs[names.index("default")]
    marked = [config for config in configs if config.get("default") is True]
    if len(marked) == 1:
        return marked[0]
    raise DataError(
        f"{wanted.name}: has the subsets {', '.join(names)}; say which, such as data={wanted.name}:subset={names[0]}"
    )


def _data_files(config: Mapping[str, Any], wanted: SplitRequest) -> dict[str, list[str]]:
    """The patterns of each split of a README's `data_files`, in any of the forms the hub knows."""
    held = config["data_files"]
    if isinstance(held, dict):
        entries = list(held.items())
    else:
        listed = held if isinstance(held, list) else [held]
        entries = [
            (each.get("split", "train"), each.get("path")) if isinstance(each, dict) else ("train", each)
            for each in listed
        ]
    within = str(config.get("data_dir") or "").strip("/")
    found: dict[str, list[str]] = {}
    for split, paths in entries:
        for path in paths if isinstance(paths, list) else [paths]:
            found.setdefault(str(split), []).append(_checked_pattern(f"{within}/{path}" if within else path, wanted))
    return found


def _checked_pattern(pattern: Any, wanted: SplitRequest) -> str:
    if not isinstance(pattern, str) or "://" in pattern or ".." in PurePosixPath(pattern).parts or pattern[:1] == "/":
        raise DataError(
            f"{wanted.name}: {_README} lists {pattern!r}, which is no file of the folder; name the file to read"
        )
    return pattern.removeprefix("./")


def _matches(path: str, pattern: str) -> bool:
    """Whether a path is one that a pattern means; `*` stays inside a folder, `**` does not, and a folder means all."""
    return _parts_match(path.split("/"), [part for part in pattern.split("/") if part])


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    reached = {0}  # how many patterns may be used up by the parts that were looked at
    for part in parts:
        reached = {after for used in _past_stars(reached, patterns) for after in _step(part, used, patterns)}
    # A pattern that ends at a folder means the files in it.
    return bool(patterns) and len(patterns) in _past_stars(reached, patterns)


def _past_stars(reached: Iterable[int], patterns: list[str]) -> set[int]:
    found = set()
    for used in reached:
        found.add(used)
        while used < len(patterns) and patterns[used] == "**":
            used += 1
            found.add(used)
    return found


def _step(part: str, used: int, patterns: list[str]) -> Iterable[int]:
    if used == len(patterns):
        return (used,) if patterns and not any(sign in patterns[-1] for sign in "*?[.") else ()
    if patterns[used] == "**":
        return (used,)
    return (used + 1,) if fnmatchcase(part, patterns[used]) else ()
