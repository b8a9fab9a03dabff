"""VLA-Adapter as a policy of LeRobot. Importing this package registers it under the name `vla_adapter`.

LeRobot imports it by itself: its commands import every installed distribution whose name begins with
`lerobot_policy_`.
"""

from importlib.metadata import version

from packaging.version import Version


OLDEST, TOO_NEW = Version("0.6.1"), Version("0.7")


def check_version(installed: str) -> None:
    """Refuse releases of LeRobot that this plugin was not tested with: their contract with policies differs.

    Raises:
        ImportError: the message has the release and those that fit.
    """
    if not OLDEST <= Version(installed) < TOO_NEW:
        raise ImportError(
            f"lerobot_policy_vla_adapter fits LeRobot {OLDEST} and later, before {TOO_NEW}; lerobot {installed} is "
            f"installed. Install one that fits: pip install 'lerobot>={OLDEST},<{TOO_NEW}'."
        )


check_version(version("lerobot"))

from .configuration_vla_adapter import VLAAdapterConfig  # noqa: E402
from .modeling_vla_adapter import VLAAdapterPolicy  # noqa: E402
from .processor_vla_adapter import make_vla_adapter_pre_post_processors  # noqa: E402


__all__ = ["VLAAdapterConfig", "VLAAdapterPolicy", "make_vla_adapter_pre_post_processors"]
