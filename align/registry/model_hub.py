"""The model hub: repositories in the local cache, and uploading a version."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import IntegrityError, MachineError, UsageError

if TYPE_CHECKING:
    from align.registry.checkpoint import Checkpoint


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """Return the folder of a hub repository in the local cache; None when it was never downloaded. Uses no network."""
    # huggingface_hub's folders in its order; importing it would make `show` slow.
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = Path(hub or f"{home}/hub").expanduser() / f"models--{repository.replace('/', '--')}"
    wanted = revision or "main"
    ref = folder / "refs" / wanted
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() and ".." not in Path(wanted).parts else None


def cached_adapter(repository: str, revision: str | None) -> Path | None:
    """Return the cached folder of a hub repository that holds an adapter and no model of its own."""
    snapshot = cached_snapshot(repository, revision)
    is_adapter = snapshot and (snapshot / "adapter_config.json").is_file() and not (snapshot / "config.json").is_file()
    return snapshot if is_adapter else None


def push_checkpoint(checkpoint: Checkpoint, repository: str, *, public: bool = False) -> str:
    """Upload a checkpoint's folder to a hub repository, made private when it is new; return its address.

    Raises UsageError without a token, MachineError when the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if repository.count("/") != 1:
        raise UsageError(f"push to {repository}: no hub repository; write org/name")
    if checkpoint.is_hub:
        raise UsageError(f"push {checkpoint.reference}: it is on the hub already; push a registered version")
    token = get_token()
    if not token:
        raise UsageError(
            f"push {checkpoint.reference} to {repository}: no access token was found; set HF_TOKEN to a token that may"
            " write, or log in with: hf auth login"
        )
    if problems := checkpoint.problems(hashes=True):
        raise IntegrityError(f"push {checkpoint.reference}: {problems[0]}; only a whole version is sent")
    hub = HfApi(token=token)
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        sent = hub.upload_folder(
            repo_id=repository,
            folder_path=checkpoint.location,
            commit_message=f"{checkpoint.reference} {checkpoint.digest or ''}".strip(),
        )
    except HFValidationError as error:
        raise UsageError(f"push to {repository}: {str(error).splitlines()[0]}; write org/name") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise MachineError(
            f"push {checkpoint.reference} to {repository}: {str(error).splitlines()[0]}; check the network, the token's"
            " rights and HF_HUB_OFFLINE"
        ) from None
    return str(sent.commit_url)
