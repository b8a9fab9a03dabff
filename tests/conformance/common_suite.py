"""transformers' own common tests for the installed release, made importable outside its repository.

The mixins are not part of the installed package but of its source distribution, which is fetched with pip into
`.cache/` and kept there. What they import from elsewhere in the repository is stubbed (`STUBS`).
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from filelock import FileLock


CACHE = Path(__file__).parents[2] / ".cache"
PACKAGE = "transformers_common_tests"

# Modules of transformers' repository that its source distribution lacks, and what the mixins want of them. The tests
# of exporting and of text generation are mixins of their own; `url_to_local_path` finds test files in a local cache.
STUBS = {
    f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
    "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
}


def load(name: str) -> ModuleType:
    """The module `tests/{name}.py` of transformers' repository. Without it, the calling test module is skipped.

    In CI (the environment variable `CI`) it fails instead: a run that leaves the common tests out must not be green.
    """
    CACHE.mkdir(exist_ok=True)
    try:
        with FileLock(CACHE / ".lock"):  # each worker of pytest-xdist comes here
            folder = fetch()
    except RuntimeError as error:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            raise
        pytest.skip(str(error), allow_module_level=True)
    if PACKAGE not in sys.modules:
        sys.path.append(str(folder.parent))
        for module_name, contents in STUBS.items():
            _add_stub(module_name, contents)
    return importlib.import_module(f"{PACKAGE}.{name}")


def fetch() -> Path:
    """The folder with the common tests of the installed release, from the cache or else from the package index.

    Raises:
        RuntimeError: when they cannot be had.
    """
    release = f"transformers-{transformers.__version__}"
    folder = CACHE / release / PACKAGE
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
        command += ["--retries=1", "--timeout=15", f"--dest={scratch}", release.replace("-", "==")]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
            raise RuntimeError(
                f"the common tests of {release} are not in {folder.relative_to(CACHE.parent)} and its source "
                f"distribution cannot be fetched; pip said: {said[-1]}"
            )
        unpacked = Path(scratch) / "unpacked"
        with tarfile.open(archives[0]) as archive:
            wanted = [member for member in archive.getmembers() if member.name.startswith(f"{release}/tests/")]
            archive.extractall(unpacked, members=wanted, filter="data")
        (unpacked / release / "tests" / "__init__.py").touch()
        # Renamed into place, so that a run that was interrupted leaves nothing half unpacked.
        (unpacked / release / "tests").rename(folder)
    return folder


def _add_stub(name: str, contents: dict) -> None:
    stub = ModuleType(name)
    vars(stub).update(contents)
    sys.modules[name] = stub
    parent = name.rpartition(".")[0]
    if parent.startswith(f"{PACKAGE}."):
        sys.modules.setdefault(parent, ModuleType(parent))
