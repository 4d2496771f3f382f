"""Datasets on the Hugging Face hub, cached or fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from align.data.containers import read_path
from align.data.containers.arrow_files import repair_of_columns
from align.data.dataset_config import HUB, HubDataset
from align.data.row_errors import RawRow
from align.errors import DataError, shorten


def read_hub(config: HubDataset) -> Iterator[RawRow]:
    """Yield the rows of a hub dataset, or of one file in it (`owner/name/path`)."""
    name = config.source.removeprefix(HUB)
    if name.count("/") > 1:
        yield from read_path(_fetch_file(name, config.revision), config.source, [])
        return
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config.subset, split=config.split or "train", revision=config.revision)
    except (OSError, ValueError) as error:
        remedy = "check name, subset and split, and the network unless it is in the local cache"
        raise DataError(f"{config.source}: the dataset cannot be read ({_reason(error)}); {remedy}") from None
    repair = repair_of_columns(rows.features.arrow_schema, json_text=False)
    for number, row in enumerate(rows, start=1):
        yield RawRow(config.source, number, repair(row) if repair else row)


def _fetch_file(name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    owner, repository, path = name.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", path, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        remedy = "check its name and the revision, and the network unless it is in the local cache"
        raise DataError(f"{HUB}{name}: the file cannot be fetched ({_reason(error)}); {remedy}") from None


def _reason(error: Exception) -> str:
    return shorten((str(error).strip().splitlines() or [type(error).__name__])[0], 120)
