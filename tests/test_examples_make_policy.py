"""examples/libero_object/make_policy.py from the first recording to the packed checkpoint, with a step or two of
everything.
"""

import json
import sys
from pathlib import Path

import pytest
from simulator import need_simulator
from transformers import AutoModel, AutoProcessor


EXAMPLE = Path(__file__).parent.parent / "examples" / "libero_object"


@pytest.mark.slow
@pytest.mark.simulator
def test_the_whole_way_with_a_step_or_two_of_everything(tmp_path, monkeypatch):
    need_simulator()
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_policy
    import pretrain

    def shortened(trainings: dict[str, dict]) -> dict[str, dict]:
        return {name: {**changes, "max_steps": 2, "save_steps": 1} for name, changes in trainings.items()}

    monkeypatch.setattr(make_policy, "EPISODES", {"official": 0, "jitter": 1})
    monkeypatch.setattr(make_policy, "DRIVEN_EPISODES", {"official": 0, "jitter": 1})
    monkeypatch.setattr(make_policy, "DRIVER_SHARE", 0.1)
    monkeypatch.setattr(make_policy, "SCENES", 1)
    for stage in pretrain.STAGES.values():
        monkeypatch.setitem(stage, "max_steps", 2)
    for name in ("TRAININGS", "CORRECTIONS", "SHORT_TRAININGS"):
        monkeypatch.setattr(make_policy, name, shortened(getattr(make_policy, name)))
    black = {"jitter_black": make_policy.TESTS["jitter_black"] | {"episodes": [40]}}
    monkeypatch.setattr(make_policy, "TESTS", black)
    monkeypatch.setattr(make_policy, "SHORT_TESTS", black)
    monkeypatch.setattr(sys, "argv", ["make_policy.py", "--output", str(tmp_path), "--variants", "pro", "one_camera"])
    make_policy.main()

    keys = [path.stem for path in (tmp_path / "libero_object" / ".recording").glob("*-jitter.parquet")]
    assert {key.split("-")[2] for key in keys} == {"jitter", "by_whole", "by_corrected", "by_again"}
    for variant, cameras in (("pro", 2), ("one_camera", 1)):
        packed = tmp_path / variant / "packed"
        lines = (packed / "jitter_black" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 10
        assert "| moved objects, black images | 10 |" in (packed / "scores.md").read_text(encoding="utf-8")
        assert "| moved objects, black images | 10 |" in (packed / "checkpoint" / "README.md").read_text(
            encoding="utf-8"
        )
        assert AutoModel.from_pretrained(packed / "checkpoint").config.num_cameras == cameras

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors") if "packed" not in path.parts}
    make_policy.main()  # all is there
    assert weights == {path: path.stat().st_mtime_ns for path in weights}

    make_policy.embed(tmp_path / "pro" / "packed", tmp_path / "checkpoint")
    AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    assert not list((tmp_path / "checkpoint").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    make_policy.keep_results(tmp_path / "pro" / "packed", tmp_path / "results")
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"scores.md", "jitter_black"}
