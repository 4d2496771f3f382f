"""The files of a folder that are read: those of one split, `train` unless another is asked for.

README.md lists the splits (as on the Hugging Face hub), or else they are read from the names of files and
folders. Rows of another split are read only when asked for; a note lists what is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from align.data.containers.data_files import DataFile
from align.errors import DataError, UsageError, nearest
from align.strict_yaml import load_yaml

ALL = "all"
"""The name that asks for every split."""
SAVED = ("state.json", "dataset_dict.json")
"""Files that `datasets.save_to_disk` writes beside a Dataset and a DatasetDict."""
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", *SAVED)
"""Files that describe a dataset beside its data."""
_README = "README.md"
_MAX_README_CHARACTERS = 1 << 20
_KINDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words}
_SHARD = re.compile(r"(.+?)[-_.]\d{3,}-of-\d{3,}")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENDINGS = re.compile(r"(?<=[a-z]{3})(set|sets|data|split|file)$")


def choose_files(folder: DataFile, files: list[Path]) -> list[Path]:
    """Return the files of the wanted split; DataError when none can be chosen without asking."""
    paths = {file.relative_to(folder.path): file for file in files}
    listed = _read_listing(folder, {path.as_posix(): file for path, file in paths.items()})
    if listed is not None:
        return choose_split(listed, (), folder)
    if (subset := folder.subset) is not None:
        folders = sorted({path.parts[0] for path in paths if len(path.parts) > 1})
        paths = {path: file for path, file in paths.items() if path.parts[0] == subset}
        if not paths:
            raise DataError(f"{folder.name}: no subset {subset!r};{nearest(subset, folders) or ' it has none'}")
    splits: dict[str, list[Path]] = {}
    unmarked: list[Path] = []
    for path, file in paths.items():
        split = split_of(path)
        (splits.setdefault(split, []) if split else unmarked).append(file)
    return choose_split(splits, unmarked, folder)


def choose_split(splits: Mapping[str, list[Path]], unmarked: Sequence[Path], folder: DataFile) -> list[Path]:
    """Return what the wanted split holds; `unmarked` are files of no split, which are taken where no split is train."""
    wanted = folder.split
    if wanted == ALL or not (splits or wanted):
        return [*unmarked, *(file for files in splits.values() for file in files)]
    split = _find_split(splits, unmarked, folder)
    others = [name for name in splits if name != split]
    if split is not None and unmarked:
        others.append(f"{len(unmarked)} files of no split")
    if others:
        taken = "the files of no split" if split is None else f"the split {split}"
        folder.note(
            f"read {taken}; left out {', '.join(others)} (:split=NAME takes another, :split={ALL} takes everything)"
        )
    return list(unmarked) if split is None else splits[split]


def _find_split(splits: Mapping[str, list[Path]], unmarked: Sequence[Path], folder: DataFile) -> str | None:
    """Return the split that is asked for or else that to train on; None for the files of no split."""
    wanted, first = folder.split or "train", next(iter(splits), "")
    alike = [name for name in splits if kind_of_split(name) == kind_of_split(wanted) is not None]
    if wanted in splits or len(alike) == 1:
        return wanted if wanted in splits else alike[0]
    if folder.split:
        there = ", ".join(splits) or "none"
        raise DataError(f"{folder.name}: no split {wanted!r}; it has {there};{nearest(wanted, splits)}")
    if unmarked and not alike:
        return None
    if len(splits) == 1 and kind_of_split(first) is None:
        return first
    raise DataError(
        f"{folder.name}: holds {'several splits to train on:' if alike else 'only'} {', '.join(splits)}; name one, "
        f"such as data={folder.name}:split={first} (:split={ALL} takes everything)"
    )


def kind_of_split(name: str) -> str | None:
    """Return train, validation or test for the name of a split, a file or a folder; None when it names none of them.

    A name of several, such as `train_and_test`, is that of a held-out one.
    """
    words = [_ENDINGS.sub("", word.lower()) for word in _WORDS.findall(name)]
    if {first + second for first, second in pairwise(words)} & {"heldout", "holdout"}:
        return "test"
    return _prefer_held_out([_KIND_OF[word] for word in words if word in _KIND_OF])


def split_of(path: Path) -> str | None:
    """Return the split that a path inside a folder names; where its parts disagree, the one that is held out."""
    kind = _prefer_held_out([kind for part in reversed(path.parts) if (kind := kind_of_split(part))])
    shard = _SHARD.match(path.name)
    return shard.group(1) if kind and shard and kind_of_split(shard.group(1)) == kind else kind


def _prefer_held_out(kinds: list[str]) -> str | None:
    return next((kind for kind in kinds if kind != "train"), "train" if kinds else None)


def _read_listing(folder: DataFile, paths: Mapping[str, Path]) -> dict[str, list[Path]] | None:
    """Return the files of each split as README.md lists them; None when it lists none."""
    configs = _read_configs(folder)
    if not configs:
        return None
    config = _choose_config(configs, folder)
    if len(configs) > 1:
        others = ", ".join(str(other.get("config_name")) for other in configs if other is not config)
        folder.note(f"read the subset {config.get('config_name')}; left out {others} (:subset=NAME)")
    listed: dict[str, list[Path]] = {}
    for split, patterns in _data_files(config, folder).items():
        matching = [file for path, file in paths.items() if any(_matches(path, pattern) for pattern in patterns)]
        if matching:
            listed[split] = matching
        elif split in (folder.split or "train", "train"):
            raise DataError(
                f"{folder.name}: {_README} lists {', '.join(patterns)} for the split {split}, and no such data file "
                "is there; fetch it, or name the file to read"
            )
    return listed


def _read_configs(folder: DataFile) -> list[dict[str, Any]]:
    readme = folder.path / _README
    if not readme.is_file():
        return []
    with readme.open(encoding="utf-8", errors="replace") as stream:
        head = stream.read(_MAX_README_CHARACTERS).removeprefix("\ufeff")
    header = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---", head, re.DOTALL)
    try:
        description = load_yaml(header.group(1), f"{folder.name}/{_README}") if header else None
    except UsageError as error:
        folder.notes.append(f"{error}; the splits are taken from the names of the files")
        return []
    configs = description.get("configs") if isinstance(description, dict) else None
    listed = configs if isinstance(configs, list) else []
    return [config for config in listed if isinstance(config, dict) and config.get("data_files")]


def _choose_config(configs: list[dict[str, Any]], folder: DataFile) -> dict[str, Any]:
    names = [str(config.get("config_name", "default")) for config in configs]
    if (subset := folder.subset) is not None and subset not in names:
        raise DataError(f"{folder.name}: no subset {subset!r};{nearest(subset, names)}")
    if (name := subset or "default") in names:
        return configs[names.index(name)]
    chosen = [config for config in configs if len(configs) == 1 or config.get("default") is True]
    if len(chosen) == 1:
        return chosen[0]
    raise DataError(
        f"{folder.name}: has the subsets {', '.join(names)}; name one, such as data={folder.name}:subset={names[0]}"
    )


def _data_files(config: Mapping[str, Any], folder: DataFile) -> dict[str, list[str]]:
    """Return the patterns of each split of a README's `data_files`, in any of the forms the hub knows."""
    listed = config["data_files"]
    if isinstance(listed, dict):
        entries = list(listed.items())
    else:
        parts = [one if isinstance(one, dict) else {"path": one} for one in _as_list(listed)]
        entries = [(part.get("split", "train"), part.get("path")) for part in parts]
    within = str(config.get("data_dir") or "").strip("/")
    patterns: dict[str, list[str]] = {}
    for split, paths in entries:
        for path in _as_list(paths):
            pattern = f"{within}/{path}" if within else path
            if (
                not isinstance(pattern, str)
                or "://" in pattern
                or ".." in PurePosixPath(pattern).parts
                or pattern[:1] == "/"
            ):
                raise DataError(
                    f"{folder.name}: {_README} lists {pattern!r}, which is no file of the folder; name the file to read"
                )
            patterns.setdefault(str(split), []).append(pattern.removeprefix("./"))
    return patterns


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(path: str, pattern: str) -> bool:
    """Return whether a pattern matches a path; `*` stays inside a folder, `**` does not, and a folder means all."""
    patterns = [part for part in pattern.split("/") if part]
    if patterns and not any(sign in patterns[-1] for sign in "*?[."):
        patterns.append("**")
    stars = {index for index, part in enumerate(patterns) if part == "**"}

    def skip_stars(used: set[int]) -> set[int]:
        for index in sorted(stars):
            used |= {index + 1} if index in used else set()
        return used

    used = skip_stars({0})  # numbers of patterns that the parts so far may use up
    for part in path.split("/"):
        steps = {index + 1 for index in used - stars if index < len(patterns) and fnmatchcase(part, patterns[index])}
        used = skip_stars(steps | (used & stars))
    return bool(patterns) and len(patterns) in used
