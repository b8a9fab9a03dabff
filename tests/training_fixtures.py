"""Short trainings on recorded demonstrations, on the CPU, as several test files run them."""

import json
from pathlib import Path

import data_fixtures
import model_fixtures

from vla_adapter_hf import VLAAdapterProcessor
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.training.checkpoints import last_finished_checkpoint
from vla_adapter_hf.training.train import train


DEMOS = data_fixtures.DEMOS / "lerobot_v30_image"
CHUNK = 4
# Fine-tuning on the CPU, one process, nothing but what a test is about.
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "logging_steps": 1}


def write_start(folder: Path, processor) -> Path:
    """A small checkpoint in our own layout to start from: 28-pixel images, two layers everywhere."""
    model = model_fixtures.tiny_model(norm_stats=None, policy_rope_dtype="float32")
    model.save_pretrained(folder)
    VLAAdapterProcessor.from_model_config(model.config, processor.tokenizer).save_pretrained(folder)
    return folder


def command(start, output, *more) -> list[str]:
    """Words of `vla-adapter train` for a short training on recorded demonstrations."""
    words = {
        "checkpoint": start,
        "dataset": DEMOS,
        "robot": "libero",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "lora_rank": 4,
        "picture_episodes": 1,
    }
    words |= {"cameras": ["image", "wrist_image"]}
    given = [word for name, value in words.items() if f"--{name}" not in more for word in _option(name, value)]
    return [*given, *map(str, more)]


def _option(name: str, value) -> list[str]:
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def run_training(start, output, *more) -> dict[str, float]:
    """Train with the words of `command`, in this process."""
    return train(*parse_arguments(command(start, output, *more)), report_progress=lambda line: None)


def losses(output: Path) -> list[float]:
    """The loss of every step, as the last finished checkpoint has it."""
    history = json.loads((last_finished_checkpoint(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
