"""Let OpenMP's threads sleep while they wait for each other. To be imported before torch.

By default they spin. Where other programs want the cores, that makes a prediction a hundred times slower, see
docs/speed.md. OpenMP reads the setting once, when torch is imported, so a program that imported torch before is left
as it is. So is one whose user has chosen either variable.
"""

import os
import sys


# What this module has set. The user has not.
ADDED: dict[str, str] = {}

if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    ADDED.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"})
    os.environ.update(ADDED)


def users_environment() -> dict[str, str]:
    """The environment for programs that are not ours: without what this module has set."""
    return {name: value for name, value in os.environ.items() if ADDED.get(name) != value}
