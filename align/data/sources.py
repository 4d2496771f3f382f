"""From a dataset to its raw rows: where its source lies, as a path or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from align.data.catalog import Dataset
from align.data.containers import check_path, read_path
from align.data.containers.arrow_files import repair_of_columns
from align.data.containers.data_files import ReadOptions
from align.data.dataset_config import HUB, HubDataset
from align.data.row_errors import RawRow
from align.errors import DataError, shorten


def open_source(dataset: Dataset, roots: Mapping[str, Path], notes: list[str]) -> Iterator[RawRow]:
    """Return the raw rows of a dataset; decisions about its files are appended to `notes`."""
    config = dataset.source_config
    if isinstance(config, HubDataset):
        return _read_hub(config)
    try:
        path = _locate(dataset, roots)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"{dataset.name}: cannot be read ({error.strerror}); check the path") from None
    shown = config.source if path == Path(config.source) else path.name
    options = ReadOptions(
        config.encoding,
        tuple(config.header),
        config.quoting,
        config.rows_at,
        config.split,
        config.subset,
        appended=config.format == "votes",
    )
    return read_path(path, shown, notes, options)


def check_source(dataset: Dataset) -> None:
    """Raise DataError when the file or folder of a dataset is not there; sources with `://` are not looked up."""
    source = dataset.source_config.source
    if "://" not in source:
        check_path(_locate(dataset, {}), source)


def _locate(dataset: Dataset, roots: Mapping[str, Path]) -> Path:
    source = dataset.source_config.source
    scheme, separator, rest = source.partition("://")
    if not separator:
        beside = dataset.folder / source
        return beside if beside.exists() else Path(source).expanduser()
    if scheme not in roots:
        raise DataError(f"{dataset.name}: its source {source} needs a {scheme}; give --{scheme} DIR")
    path = roots[scheme] / rest
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        remedy = "vote on the comparison page first" if dataset.name == "votes" else "run `align quickstart`"
        raise DataError(f"{dataset.name}: nothing is at {source} yet; {remedy}")
    return path


def _read_hub(config: HubDataset) -> Iterator[RawRow]:
    """Yield the rows of a hub dataset, or of one file in it (`owner/name/path`), cached or fetched."""
    name = config.source.removeprefix(HUB)
    if name.count("/") > 1:
        yield from read_path(_fetch_hub_file(name, config.revision), config.source, [])
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config.subset, split=config.split or "train", revision=config.revision)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{config.source}: the dataset cannot be read ({shorten(reason, 120)}); check name, subset and split, "
            "and the network unless it is in the local cache"
        ) from None
    repair = repair_of_columns(rows.features.arrow_schema, json_text=False)
    for number, row in enumerate(rows, start=1):
        yield RawRow(config.source, number, repair(row) if repair else row)


def _fetch_hub_file(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    owner, repository, path = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", path, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{HUB}{name}: the file cannot be fetched ({shorten(reason, 120)}); check its name and the revision, "
            "and the network unless it is in the local cache"
        ) from None
