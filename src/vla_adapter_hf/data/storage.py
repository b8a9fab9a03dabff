"""The cache directory, and a dataset's local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download


_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cache_directory(cache_dir: str | os.PathLike | None = None) -> Path:
    """Folder for statistics and indices: `cache_dir`, else $VLA_ADAPTER_CACHE, else `vla-adapter-hf` in $HF_HOME."""
    chosen = cache_dir or os.environ.get("VLA_ADAPTER_CACHE") or Path(constants.HF_HOME) / "vla-adapter-hf"
    return Path(chosen).expanduser()


def dataset_folder(
    path_or_repo_id: str | os.PathLike,
    revision: str | None = None,
    allow_patterns: Sequence[str] | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """A dataset's local folder. Of a Hub dataset repository, files that match `allow_patterns` are fetched.

    Raises:
        ValueError: neither a folder that exists nor the form of a repository id.
    """
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir():
        return folder
    if not isinstance(path_or_repo_id, str) or not _REPO_ID.fullmatch(path_or_repo_id):
        raise ValueError(
            f"dataset {str(path_or_repo_id)!r} is neither a folder that exists nor a Hub repository id such as "
            "'me/pick-and-place'"
        )
    return Path(
        snapshot_download(
            path_or_repo_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=list(allow_patterns) if allow_patterns is not None else None,
            cache_dir=cache_dir,
        )
    )
