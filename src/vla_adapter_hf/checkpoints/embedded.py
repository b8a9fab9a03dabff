"""The checkpoint that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path


@contextmanager
def embedded_folder() -> Iterator[Path]:
    """The folder that ships with the package.

    Yields:
        `Path`: a folder with `checkpoint/`, `tokenizer/`, and `episode/`, a recorded LIBERO episode.
    """
    with as_file(files("vla_adapter_hf").joinpath("embedded")) as folder:
        yield folder


@contextmanager
def named_source(source: str) -> Iterator[str]:
    """The folder of the checkpoint that ships with the package for `embedded`; other names and paths as they are.

    The folder may be a temporary copy that exists only inside the block.
    """
    if source != "embedded" or Path(source).exists():
        yield source
        return
    with embedded_folder() as folder:
        yield str(folder / "checkpoint")
