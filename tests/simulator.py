"""Whether the LIBERO simulator can be used here, for the tests with the mark `simulator`."""

import os

import pytest

from vla_adapter_hf.simulation.libero.install import import_libero


def need_simulator() -> None:
    """Skips the calling test, with the reason, where the simulator cannot be imported.

    With the environment variable `REQUIRE_SIMULATOR`, which CI sets once it has installed the simulator, the test
    fails
    instead: a run that leaves the simulator out must not be green then.
    """
    try:
        import_libero()
    except ImportError as error:
        if os.environ.get("REQUIRE_SIMULATOR", "").lower() not in ("", "0", "false"):
            raise
        pytest.skip(str(error))
