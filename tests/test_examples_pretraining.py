"""What examples/libero_object teaches a new model before it acts, on painted scenes: seeing and reading are learnt."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vla_adapter_hf import VLAAdapterConfig
from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.init.untrained import cut_down_tokenizer, init_from_config


ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "libero_object"
COLOURS = {"milk": (250, 30, 30), "butter": (30, 250, 30), "orange juice": (40, 40, 250)}
SIZE, SQUARE = 56, 12

sys.path.insert(0, str(EXAMPLE))
import pretrain  # noqa: E402


def paint_scenes(folder: Path, scenes: int) -> None:
    """Every object is a square of its own colour somewhere in the frames of both cameras."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(scenes):
        names = list(generator.permutation(list(COLOURS))[:2])
        frames = np.full((2, SIZE, SIZE, 3), 128, np.uint8)
        places = np.empty((2, 2, 2))
        for index, name in enumerate(names):
            for camera in (0, 1):
                left, top = generator.integers(0, SIZE - SQUARE, 2)
                frames[camera, top : top + SQUARE, left : left + SQUARE] = COLOURS[name]
                places[index, camera] = (left + SQUARE / 2) / SIZE, (top + SQUARE / 2) / SIZE
        images = []
        for frame in frames:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, "PNG")
            images.append(buffer.getvalue())
        rows.append(
            {
                "image": images[0],
                "wrist_image": images[1],
                "objects": [f"{name.replace(' ', '_')}_1" for name in names],
                "places": places.tolist(),
            }
        )
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "0000-00.parquet")


@pytest.fixture(scope="module")
def small_model():
    fields = json.loads((EXAMPLE / "policy.json").read_text(encoding="utf-8"))
    for part in ("dinov2_config", "siglip_config"):
        fields[part] |= {"hidden_size": 32, "image_size": SIZE, "num_hidden_layers": 2}
    fields["siglip_config"]["intermediate_size"] = 64
    fields["text_config"] |= {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    fields |= {"policy_num_layers": 3, "policy_num_heads": 2, "num_action_queries": 4}
    config = VLAAdapterConfig(**fields)
    tokenizer = load_tokenizer(str(ROOT / "src" / "vla_adapter_hf" / "embedded" / "tokenizer"))
    instructions = (EXAMPLE / "instructions.txt").read_text(encoding="utf-8").splitlines()
    return init_from_config(config, cut_down_tokenizer(tokenizer, instructions, 400, "in_out"))


def losses(folder: Path, name: str = "loss") -> list[float]:
    (last,) = folder.glob("checkpoint-*")
    history = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [float(entry[name]) for entry in history if name in entry]


def test_a_place_is_shared_by_the_patches_round_it():
    places = torch.tensor([[0.5, 0.5], [0.125, 0.9], [1.2, 0.5], [float("nan"), 0.5]])[None, :, None].expand(
        -1, -1, 2, -1
    )
    targets = pretrain.patch_targets(places, 4)
    assert targets.shape == (1, 4, 2, 17)
    torch.testing.assert_close(targets.sum(-1), torch.ones(1, 4, 2))
    middle = targets[0, 0, 0, :16].reshape(4, 4)
    torch.testing.assert_close(middle[1:3, 1:3], torch.full((2, 2), 0.25))
    assert targets[0, 1, 0, 12] > 0.85  # in the lowest row of the third person's frames
    assert targets[0, 1, 1, 16] == 1  # and under the hand in the wrist's
    assert (targets[0, 2:, :, 16] == 1).all()  # outside, or behind the camera


def test_both_stages_learn_and_go_on_where_they_were_stopped(tmp_path, small_model):
    model, processor = small_model
    paint_scenes(tmp_path / "scenes", 48)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"use_cpu": True, "per_device_train_batch_size": 16, "logging_steps": 10, "disable_tqdm": True}

    def run(steps: int) -> None:
        pretrain.pretrain(
            model,
            processor,
            tmp_path / "scenes",
            list(COLOURS),
            tmp_path / "out",
            {**settings, "max_steps": steps},
        )

    run(60)
    seen, read = losses(tmp_path / "out" / "see"), losses(tmp_path / "out" / "read")
    assert seen[-1] < 0.75 * seen[0] and read[-1] < 0.9 * read[0]
    changed = {
        name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"dinov2", "siglip", "vision_projector", "language_model", "action_queries"} <= changed
    taught = {name: value.clone() for name, value in model.state_dict().items()}

    model.load_state_dict(before)
    run(60)  # nothing is left to do: the last checkpoints are read, and that is the model again
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, taught[name])
