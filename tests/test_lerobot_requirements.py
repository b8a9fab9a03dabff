"""`pip install vla-adapter-hf lerobot` has a solution: our ranges of versions and LeRobot's have versions in common.

`make test-lerobot` installs both for real, on Python 3.12.
"""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


ROOT = Path(__file__).resolve().parents[1]
# What LeRobot 0.6.1 and its extras for datasets, training, transformers and PEFT require of packages that we require
# too, from its metadata.
LEROBOT = {
    "accelerate": ">=1.14.0,<2.0.0",
    "av": ">=15.0.0,<16.0.0",
    "datasets": ">=4.8.0,<5.0.0",
    "huggingface-hub": ">=1.6.0,<2.0.0",
    "numpy": ">=2.0.0,<2.3.0",
    "peft": ">=0.18.0,<1.0.0",
    "pillow": ">=10.0.0,<13.0.0",
    "pyarrow": ">=21.0.0,<30.0.0",
    "safetensors": ">=0.4.3,<1.0.0",
    "torch": ">=2.7,<2.12.0",
    "tqdm": ">=4.66.0,<5.0.0",
    "transformers": ">=5.4.0,<5.6.0",
}
# Releases that pip chose for both on Python 3.12, in November 2026.
CHOSEN = {
    "accelerate": "1.15.0",
    "av": "15.1.0",
    "datasets": "4.8.5",
    "huggingface-hub": "1.33.0",
    "numpy": "2.2.6",
    "peft": "0.21.2",
    "pillow": "12.3.0",
    "pyarrow": "26.0.1",
    "safetensors": "0.8.0",
    "torch": "2.11.0",
    "tqdm": "4.70.1",
    "transformers": "5.5.4",
}


def settings(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(path, encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


@pytest.fixture(scope="module")
def ours() -> dict[str, Requirement]:
    """What the package and its extras `lora` and `video` require."""
    parser = settings(ROOT / "setup.cfg")
    extras = parser["options.extras_require"]
    return requirements("\n".join([parser["options"]["install_requires"], extras["lora"], extras["video"]]))


@pytest.mark.parametrize("name", LEROBOT)
def test_a_release_fits_both(name, ours):
    assert CHOSEN[name] in SpecifierSet(LEROBOT[name])
    assert CHOSEN[name] in ours[name].specifier, f"setup.cfg excludes the {name} that LeRobot takes: {ours[name]}"


def test_python_3_12_fits_both():
    package = settings(ROOT / "setup.cfg")["options"]["python_requires"]
    plugin = settings(ROOT / "lerobot_policy_vla_adapter/setup.cfg")["options"]["python_requires"]
    assert all("3.12.0" in SpecifierSet(range_) for range_ in (package, plugin))


def test_the_plugin_has_the_name_that_lerobot_looks_for_and_requires_releases_that_it_accepts():
    parser = settings(ROOT / "lerobot_policy_vla_adapter/setup.cfg")
    assert parser["metadata"]["name"] == parser["options"]["packages"] == "lerobot_policy_vla_adapter"
    required = requirements(parser["options"]["install_requires"])
    assert "vla-adapter-hf" in required
    for release, fits in {"0.6.0": False, "0.6.1": True, "0.6.5": True, "0.7.0": False}.items():
        assert (release in required["lerobot"].specifier) == fits
