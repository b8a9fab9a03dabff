"""Where the files of a checkpoint are: in a folder, or in one commit of a repository on the Hub."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Bytes per range request. The header of a published `model.safetensors` fills one of them.
BLOCK_SIZE = 2**17


class FolderFiles:
    """The files of a folder.

    Its `title` is what messages about missing files call it.

    Args:
        folder (`Path`): the folder.
        source (`str`): what the user calls it.
        commit (`str`, *optional*): the commit that the folder is a copy of.
    """

    def __init__(self, folder: Path, source: str, commit: str | None = None):
        self.folder, self.source, self.commit = folder, source, commit
        self.title = source if commit is None else f"{source} (its copy in the cache)"

    @cached_property
    def names(self) -> list[str]:
        """Names of files and folders, in order."""
        return sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []

    def subfolder(self, name: str) -> FolderFiles:
        """The files of a folder inside this one."""
        return FolderFiles(self.folder / name, self.source, self.commit)

    def open(self, name: str) -> BinaryIO:
        """A file, opened for reading at any position."""
        return open(self.path(name), "rb")

    def path(self, name: str) -> Path:
        """The path of a file on this machine."""
        return self.folder / name

    def paths(self, names: list[str]) -> list[Path]:
        """The paths of several files on this machine."""
        return [self.path(name) for name in names]

    @property
    def address(self) -> tuple[str, dict[str, Any]]:
        """First argument and keyword arguments with which a `from_pretrained` of transformers reads these files."""
        return str(self.folder), {}


class HubFiles:
    """The files of a folder in a Hub repository. They are downloaded when their path is asked for.

    Args:
        source (`str`): the Hub id.
        revision (`str`, *optional*): a commit, so that all files belong together.
        subfolder (`str`): the folder inside the repository.
        hub: `token`, `cache_dir` and `force_download`, as in `hf_hub_download`.
    """

    def __init__(self, source: str, revision: str | None, subfolder: str = "", **hub: Any):
        self.source, self.title, self.commit, self.hub = source, source, revision, hub
        self.prefix = f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""

    @cached_property
    def names(self) -> list[str]:
        """Names of files and folders, in order."""
        api = HfApi(token=self.hub.get("token"))
        entries = api.list_repo_tree(self.source, self.prefix.rstrip("/") or None, revision=self.commit)
        try:
            return sorted(entry.path.removeprefix(self.prefix) for entry in entries)
        except EntryNotFoundError:  # there is no such folder
            return []

    def subfolder(self, name: str) -> HubFiles:
        """The files of a folder inside this one."""
        return HubFiles(self.source, self.commit, self.prefix + name, **self.hub)

    def open(self, name: str) -> BinaryIO:
        """A file, opened for reading at any position. If it is not in the cache, only what is read is fetched."""
        cached = try_to_load_from_cache(
            self.source, self.prefix + name, cache_dir=self.hub.get("cache_dir"), revision=self.commit
        )
        if isinstance(cached, str):
            return open(cached, "rb")
        remote = f"{self.source}@{self.commit}" if self.commit else self.source
        return HfFileSystem(token=self.hub.get("token")).open(
            f"{remote}/{self.prefix}{name}", block_size=BLOCK_SIZE, cache_type="blockcache"
        )

    def path(self, name: str) -> Path:
        """The path of a file on this machine; it is downloaded if need be."""
        return Path(hf_hub_download(self.source, self.prefix + name, revision=self.commit, **self.hub))

    def paths(self, names: list[str]) -> list[Path]:
        """The paths of several files on this machine; they are downloaded together."""
        patterns = [self.prefix + name for name in names]
        folder = snapshot_download(self.source, revision=self.commit, allow_patterns=patterns, **self.hub)
        return [Path(folder, pattern) for pattern in patterns]

    @property
    def address(self) -> tuple[str, dict[str, Any]]:
        """First argument and keyword arguments with which a `from_pretrained` of transformers reads these files."""
        return self.source, {"revision": self.commit, "subfolder": self.prefix.rstrip("/"), **self.hub}


def open_files(source: str | Path, *, argument: str = "checkpoint", **hub: Any) -> FolderFiles | HubFiles:
    """The files of a folder, or of the one commit of a Hub repository that `revision` means now.

    Offline, or when the Hub cannot be reached, the cache is read.

    Args:
        source (`str` or `Path`): a folder or a Hub id. The repository must have a `config.json`.
        argument (`str`): what messages call it.
        hub: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only` and `force_download`.

    Raises:
        ValueError: for a subfolder that leads elsewhere, or a repository without `config.json`.
        FileNotFoundError: when there is no such folder or repository.
    """
    source = check_source(source, argument)
    hub = {name: value for name, value in hub.items() if value is not None and name != "proxies"}
    revision, subfolder = hub.pop("revision", None), hub.pop("subfolder", "")
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise ValueError(f"subfolder must be a folder inside {source}, got {subfolder!r}.")
    if Path(source).is_dir():
        return FolderFiles(Path(source, subfolder), source)
    # This request tells the commit, and notes in the cache which one the revision means.
    name = f"{subfolder.strip('/')}/config.json" if subfolder.strip("/") else "config.json"
    try:
        config = Path(hf_hub_download(source, name, revision=revision, **hub))
    except (HFValidationError, OSError) as error:
        raise _explained(error, source, revision, argument) from error
    folder = config.parents[len(Path(subfolder).parts)]
    if not hub.pop("local_files_only", False):
        files = HubFiles(source, folder.name, subfolder, **hub)
        try:
            files.names  # noqa: B018
            return files
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise _explained(error, source, revision, argument) from error
        except Exception as error:  # no connection; its class depends on the HTTP library
            logger.info(f"{source}: the Hub cannot be reached ({error}); reading the cache.")
    return FolderFiles(config.parent, source, folder.name)


def check_source(source: str | Path, argument: str = "checkpoint") -> str:
    """Refuse a path that is not there. A name that can be a Hub id passes.

    Raises:
        TypeError: for something other than a name or path.
        FileNotFoundError: the message suggests folders of similar names.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"{argument} must be a folder or a Hub id, got {source!r}.")
    text = str(source)
    if text.startswith("~"):
        text = str(Path(text).expanduser())
    if Path(text).is_file():
        raise ValueError(f"{argument} {source} is a file; give the folder that it is in.")
    can_be_hub_id = isinstance(source, str) and text.count("/") == 1 and not text.startswith((".", "/"))
    if not Path(text).is_dir() and (not can_be_hub_id or text.endswith("/") or "\\" in text):
        raise FileNotFoundError(f"{argument} {source}: this folder does not exist.{_near_names(text)}")
    return text


def _near_names(path: str) -> str:
    parent = Path(path).parent
    if not parent.is_dir():
        return f" Neither does {parent}."
    folders = {entry.name.lower(): entry for entry in sorted(parent.iterdir()) if entry.is_dir()}
    near = [str(folders[name]) for name in get_close_matches(Path(path).name.lower(), folders, n=3)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _explained(error: Exception, source: str, revision: str | None, argument: str) -> Exception:
    """What a failed request means for the user."""
    hint = _near_names(source) if Path(source).parent.is_dir() else ""
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{argument} {source} has no revision {revision or 'main'!r} on the Hub.")
    if isinstance(error, GatedRepoError):
        return FileNotFoundError(f"{argument} {source}: access to this Hub repository must be requested on its page.")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return FileNotFoundError(
            f"{argument} {source}: there is neither such a folder nor such a repository on the Hub.{hint} If the "
            "repository is private, log in with `hf auth login` or give a token."
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return FileNotFoundError(
            f"{argument} {source}: this folder does not exist.{hint} As a Hub id it is not in the cache, and the Hub "
            "cannot be reached."
        )
    if isinstance(error, EntryNotFoundError):
        return ValueError(f"{source} has no config.json.")
    return error
