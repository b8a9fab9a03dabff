"""VLA-Adapter as a policy of LeRobot. Importing this package registers it under the name `vla_adapter`.

LeRobot imports it by itself: its commands import every installed distribution whose name begins with
`lerobot_policy_`.
"""

from importlib.metadata import version

from packaging.specifiers import SpecifierSet


FITS = ">=0.6.1,<0.7"


def check_version(installed: str) -> None:
    """Refuse releases of LeRobot whose contract with policies may differ.

    Raises:
        ImportError: the message has the release and those that fit.
    """
    # By PEP 440 `<0.7` leaves out 0.7.0rc1 too; pre-releases of patches are let through.
    if not SpecifierSet(FITS).contains(installed, prereleases=True):
        raise ImportError(
            f"lerobot_policy_vla_adapter fits LeRobot {FITS}; lerobot {installed} is installed. Install one that "
            f"fits: pip install 'lerobot{FITS}'."
        )


check_version(version("lerobot"))

from .configuration_vla_adapter import VLAAdapterConfig  # noqa: E402
from .modeling_vla_adapter import VLAAdapterPolicy  # noqa: E402
from .processor_vla_adapter import make_vla_adapter_pre_post_processors  # noqa: E402


__all__ = ["VLAAdapterConfig", "VLAAdapterPolicy", "make_vla_adapter_pre_post_processors"]
