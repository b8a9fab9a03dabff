"""How LeRobot finds the plugin, and which releases of LeRobot it fits."""

import re
import subprocess
import sys
from importlib.metadata import metadata, requires, version

import plugin_environment
import pytest
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_policy_config
from lerobot.utils.import_utils import register_third_party_plugins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_lerobot_requirements import CHOSEN, LEROBOT

import lerobot_policy_vla_adapter
from lerobot_policy_vla_adapter import VLAAdapterConfig, VLAAdapterPolicy


def test_lerobot_finds_the_plugin_by_its_distributions_name():
    program = (
        "from lerobot.utils.import_utils import register_third_party_plugins as register; register(); "
        "from lerobot.configs import PreTrainedConfig; print(PreTrainedConfig.get_known_choices()['vla_adapter'])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "configuration_vla_adapter.VLAAdapterConfig" in found.stdout


def test_the_factory_finds_the_policy_and_its_configuration():
    register_third_party_plugins()
    assert PreTrainedConfig.get_choice_class("vla_adapter") is VLAAdapterConfig
    assert get_policy_class("vla_adapter") is VLAAdapterPolicy
    assert make_policy_config("vla_adapter", device="cpu").type == "vla_adapter"


@pytest.mark.parametrize("release", ["0.4.4", "0.6.0", "0.7.0.dev0", "0.7.0rc1", "0.7.0", "1.0.0"])
def test_other_releases_of_lerobot_are_refused_in_a_sentence(release):
    with pytest.raises(ImportError, match=rf"lerobot {release} is installed. Install one that fits: pip install"):
        lerobot_policy_vla_adapter.check_version(release)


def test_the_installed_release_and_its_patches_fit():
    for release in (version("lerobot"), "0.6.1", "0.6.2rc1", "0.6.9"):
        lerobot_policy_vla_adapter.check_version(release)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lora-paper"}, "policy.preset must be one of lora, frozen, full"),
        ({"dtype": "float16"}, "policy.dtype must be float32 or bfloat16"),
        ({"robot": "toaster"}, "robot='toaster' is not known"),
        ({"robot": "bridge"}, "rebuilds actions from whole episodes.*vla-adapter train"),
        ({"n_obs_steps": 2}, "n_obs_steps must be 1"),
        ({"blend": 0.0}, "policy.blend must be above 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VLAAdapterConfig(device="cpu", **options)


def test_without_a_checkpoint_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="give --policy.pretrained_path"):
        VLAAdapterPolicy(VLAAdapterConfig(device="cpu"))


@pytest.mark.parametrize("name", LEROBOT)
def test_the_table_of_lerobots_requirements_is_what_the_installed_release_requires(name):
    """The tests of vla-adapter-hf compare that table with our own ranges, without LeRobot."""
    lines = map(Requirement, requires("lerobot"))
    found = [line for line in lines if canonicalize_name(line.name) == name and _applies_here(line)]
    assert found, f"LeRobot does not require {name}"
    for line in found:
        assert str(line.specifier) == str(Requirement(name + LEROBOT[name]).specifier)
        assert CHOSEN[name] in line.specifier


def _applies_here(line: Requirement) -> bool:
    """Whether the line applies on this system, with the right extra or with none."""
    extras = re.findall(r'extra == "([^"]+)"', str(line.marker))
    return line.marker is None or any(line.marker.evaluate({"extra": extra}) for extra in [*extras, ""])


@pytest.mark.parametrize("page", ["docs/lerobot.md", "lerobot_policy_vla_adapter/README.md"])
def test_the_documentation_installs_extras_that_lerobot_has(page):
    text = (plugin_environment.ROOT / page).read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"lerobot\[([\w,-]+)\]", text) for extra in group.split(",")}
    assert named >= {"training", "core_scripts", "feetech"}
    assert {canonicalize_name(extra) for extra in named} <= set(
        map(canonicalize_name, metadata("lerobot").get_all("Provides-Extra"))
    )
