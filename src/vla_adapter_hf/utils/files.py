"""Writing files: whole or not at all, and one process per folder."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error.

    Readers see the old file or the new one, never a part of it. The temporary path has the same name in a hidden
    folder next to `path`: libraries choose a format by the suffix, and what a killed process leaves is found by no
    search for files. What is created there gets the user's usual permissions. The block may also create a folder,
    which then takes the place of an empty folder or of none.

    Yields:
        `Path`: the temporary path. Nothing is there yet.
    """
    path = Path(path)
    hidden = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with readable_disk_errors(path):
            hidden.mkdir(parents=True)
            yield hidden / path.name
            (hidden / path.name).replace(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def readable_disk_errors(path: str | os.PathLike) -> Iterator[None]:
    """Name the file and the remedy where the disk is full while the block writes.

    Raises:
        OSError: the disk or the user's quota is full. `errno` is that of the original error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        full = OSError(f"the disk is full: {os.fspath(path)} was not written. Free some space and run this again.")
        full.errno = error.errno
        raise full from error


def visible_files(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """The sorted files of a folder that match `pattern`, without hidden ones: killed processes leave those behind."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file through [`atomic_path`]."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file through [`atomic_path`]."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file through [`atomic_path`]."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextmanager
def exclusive_folder(folder: str | os.PathLike, argument: str = "output") -> Iterator[None]:
    """Create a folder and keep other processes from writing to it while the block runs.

    Args:
        folder (`str` or `Path`): the folder. Its lock file is `.lock`.
        argument (`str`): how the error message calls the folder.

    Raises:
        ValueError: another process has the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process is writing to {argument}={str(folder)!r}; wait for it, or choose another {argument}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def record_settings(path: str | os.PathLike, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Write a run's settings as JSON, or compare them with those of the run that began in that folder.

    Returns:
        `dict`: for every setting that differs, its value in the file and its value here. Empty if the run may go on.
    """
    settings = json.loads(json.dumps(dict(settings)))  # tuples come back from JSON as lists
    path = Path(path)
    if not path.exists():
        write_json(path, settings)
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    pairs = {name: (written.get(name), settings.get(name)) for name in {**written, **settings}}
    return {name: (before, now) for name, (before, now) in pairs.items() if before != now}
