"""Small datasets in which frames, instruction and state each decide one action, and policies trained on them."""

from pathlib import Path

import model_fixtures
import numpy as np

from vla_adapter_hf import VLAAdapterProcessor
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.recording.lerobot_writer import LeRobotLayout, assemble, save_episode
from vla_adapter_hf.training.train import train
from vla_adapter_hf.utils.frames import encode_image


SIDE = 28
INSTRUCTIONS = ("push the red cube up", "push the blue cube down")
LAYOUT = LeRobotLayout(
    cameras=("front", "wrist"),
    image_size=SIDE,
    state_names=("a", "b", "c"),
    action_names=("by_frames", "by_instruction", "by_state"),
    fps=10,
)


def write_dataset(
    folder: Path,
    seed: int = 0,
    episodes: int = 24,
    instructions: tuple[str, ...] = INSTRUCTIONS,
    blind: bool = False,
    short: int | None = None,
) -> Path:
    """A LeRobot dataset.

    One camera is bright at the top, on the side that `by_frames` points to; the other shows noise. `by_instruction`
    follows from the words, and `by_state` from the state.

    Args:
        blind: frames are those of other steps, so that they say nothing.
        short: an episode that has one step only.
    """
    rng = np.random.default_rng(seed)
    steps = 12
    sides = rng.choice([-1.0, 1.0], (episodes, steps))
    shown = rng.permutation(sides.reshape(-1)).reshape(sides.shape) if blind else sides
    for episode in range(episodes):
        text = instructions[episode % len(instructions)]
        states = rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
        words = 1.0 if text == INSTRUCTIONS[0] else -1.0
        actions = np.column_stack([0.8 * sides[episode], np.full(steps, 0.8 * words), states[:, 0]])
        actions += rng.normal(0, 0.02, actions.shape)
        images = {
            camera: [encode_image(_frame(rng, side if camera == "front" else 0.0)) for side in shown[episode]]
            for camera in LAYOUT.cameras
        }
        if episode == short:
            images = {camera: frames[:1] for camera, frames in images.items()}
            states, actions = states[:1], actions[:1]
        save_episode(folder, f"{episode:04d}", LAYOUT, text, images, states, actions.astype(np.float32))
    assemble(folder)
    return folder


def _frame(rng, side: float) -> np.ndarray:
    frame = rng.integers(60, 100, (SIDE, SIDE, 3))
    if side:
        half = slice(SIDE // 2, None) if side > 0 else slice(0, SIDE // 2)
        frame[: SIDE // 2, half] += 110
    return frame.astype(np.uint8)


def write_start(folder: Path, processor) -> Path:
    """A small untrained checkpoint for these datasets."""
    config = model_fixtures.learner_config(
        cameras=["front", "wrist"], action_dim=3, proprio_dim=3, norm_stats=None, chunk_size=2
    )
    model = model_fixtures.tiny_model(config)
    model.save_pretrained(folder)
    VLAAdapterProcessor.from_model_config(config, processor.tokenizer).save_pretrained(folder)
    return folder


def train_policy(start: Path, dataset: Path, output: Path, steps: int = 150, *more) -> Path:
    """A policy trained on a dataset with the command's own code."""
    words = ["--checkpoint", start, "--dataset", dataset, "--cameras", "front", "wrist", "--output_dir", output]
    words += ["--preset", "full", "--augment", "false", "--learning_rate", 1e-3, "--max_steps", steps]
    words += ["--per_device_train_batch_size", 16, "--save_strategy", "no", "--report_to", "none"]
    words += ["--use_cpu", "true", "--disable_tqdm", "true", "--picture_episodes", 1]
    train(*parse_arguments([str(word) for word in [*words, *more]]), report_progress=lambda line: None)
    return output
