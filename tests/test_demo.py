"""`vla-adapter demo`: an episode where the simulator is, a prediction where it is not, and what is said of either."""

import sys

import numpy as np
import pytest
from PIL import Image, ImageSequence
from simulator import need_simulator

from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.demo import OTHER_SUITE_NOTE, UNTRAINED_NOTE, card_results, demo, embedded_results


def test_without_the_simulator_it_predicts_and_says_how_to_get_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in {"libero", *(name for name in sys.modules if name.startswith("libero."))}:
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []
    actions = demo(output=tmp_path / "demo.png", say=said.append)
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "pip install 'vla-adapter-hf[libero]'" in said[-1] and "make demo-loop" in said[-1]
    with pytest.raises(ImportError, match="LIBERO is not installed"):
        demo(output=tmp_path / "demo.png", loop=True, say=said.append)


def test_a_prediction_does_not_pass_for_a_skill(tmp_path):
    """Either the card reports no results, or the recorded observation is of a suite that the policy does not know."""
    pytest.importorskip("matplotlib")
    said: list[str] = []
    demo(output=tmp_path / "demo.png", loop=False, say=said.append)
    expected = OTHER_SUITE_NOTE.split("{")[0] if embedded_results() else UNTRAINED_NOTE
    assert any(line.startswith(expected) for line in said)


def test_results_are_read_from_the_card(tiny_config):
    config = tiny_config()
    assert card_results(fill_model_card(config, "title", "summary")) == ""
    results = "97 of 100 solved\n\n| a | b |"
    assert card_results(fill_model_card(config, "title", "summary", results=results)) == results
    assert card_results("# A card without them\n\n## Limits\n\nMany.\n") == ""


@pytest.mark.simulator
def test_the_embedded_policy_solves_a_rendered_episode(tmp_path):
    need_simulator()
    said: list[str] = []
    output = tmp_path / "new" / "demo.png"
    summary = demo(output=output, say=said.append)
    assert (summary["successes"], summary["episodes"]) == (1, 1) and summary["settings"]["policy"] == "embedded"
    assert summary["timing"]["rendering"] > 0
    ending = [line for line in said if line.startswith("success:")]
    assert ending and "yes" in ending[0]
    with Image.open(output) as sheet, Image.open(output.with_suffix(".gif")) as film:
        frames = 1 + summary["timing"]["steps"] // 4
        assert sum(1 for _ in ImageSequence.Iterator(film)) == frames
        # Both cameras side by side, and a bar below.
        assert film.size == (512, 264)
        assert sheet.size[0] == 5 * 262 + 6


@pytest.mark.simulator
def test_an_episodes_picture_must_be_a_png(tmp_path):
    need_simulator()
    with pytest.raises(ValueError, match="output must end in .png"):
        demo(output=tmp_path / "demo.gif", loop=True)
