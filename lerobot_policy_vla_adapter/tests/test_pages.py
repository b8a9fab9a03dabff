"""LeRobot's own parser takes the commands of the pages."""

import re
import shlex

import plugin_environment
import pytest
from lerobot.configs import parser
from lerobot.configs.eval import EvalPipelineConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.rollout.configs import RolloutConfig
from lerobot.scripts.lerobot_record import RecordConfig

from lerobot_policy_vla_adapter import VLAAdapterConfig
from vla_adapter_hf.checkpoints.lerobot.convert import to_lerobot


CONFIGURATIONS = {
    "lerobot-record": RecordConfig,
    "lerobot-train": TrainPipelineConfig,
    "lerobot-eval": EvalPipelineConfig,
    "lerobot-rollout": RolloutConfig,
}
PAGES = ("docs/lerobot.md", "lerobot_policy_vla_adapter/README.md")


def commands() -> list[str]:
    """Each on one line, without that of a resumed training, which reads what it wrote: see test_training.py."""
    texts = [(plugin_environment.ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    lines = re.findall(r"^lerobot-.*$", "\n".join(texts).replace("\\\n", " "), re.MULTILINE)
    return [line for line in lines if "--config_path" not in line]


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_page_parses(line, command, trained, tmp_path):
    policy = to_lerobot(str(trained), tmp_path / "policy", robot="libero")
    name, *words = shlex.split(re.sub(r"(?<=--policy\.path=)\S+", str(policy), line))

    def parsed(configuration):
        return configuration

    parsed.__annotations__ = {"configuration": CONFIGURATIONS[name]}
    configuration = command(parser.wrap()(parsed), *words)
    if name != "lerobot-record":
        assert isinstance(configuration.policy, VLAAdapterConfig)
    if name in ("lerobot-record", "lerobot-rollout"):
        assert list(configuration.robot.cameras) == ["front", "wrist"]


def test_the_pages_show_every_command_that_takes_the_policy():
    assert {line.split()[0] for line in commands()} == set(CONFIGURATIONS)
