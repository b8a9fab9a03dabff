"""Make the policy that ships with this package, from nothing: record, pretrain, train, correct, evaluate, pack.

Run by `make policy`:

    python examples/libero_object/make_policy.py [--output outputs/libero_object] [--variants pro original one_camera]

Needs the simulator (`pip install -e '.[libero,plot]'`, docs/evaluation.md). Every step can be interrupted: run the
same command again and it goes on. What was drawn is decided by the seeds below.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from textwrap import fill

import torch
import yaml
from pretrain import pretrain
from transformers import AutoModel, AutoProcessor

from vla_adapter_hf import VLAAdapterConfig
from vla_adapter_hf.checkpoints.backbones import load_tokenizer
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.model_card import fill_model_card
from vla_adapter_hf.checkpoints.saving import verify, write_checkpoint
from vla_adapter_hf.cli.train import parse_arguments
from vla_adapter_hf.init.untrained import cut_down_tokenizer, init_from_config
from vla_adapter_hf.recording.demonstrate import demonstrate
from vla_adapter_hf.recording.scenes import record_scenes
from vla_adapter_hf.recording.settings import RecordingSettings, SceneSettings
from vla_adapter_hf.simulation.evaluate import evaluate
from vla_adapter_hf.simulation.settings import EvaluationSettings
from vla_adapter_hf.training.checkpoints import last_finished_checkpoint
from vla_adapter_hf.training.train import train


HERE = Path(__file__).parent
SUITE = "libero_object"

# 1. Record. Initial states 40 to 49 stay unseen, and the evaluation draws its placements from another stream.
EPISODES = {"official": 10, "jitter": 20, "shuffle": 20, "both": 60}  # per task, at most
SETTINGS = RecordingSettings(render_every=5, retargeted=0.5, disturbed=0.35, alternatives=5, seed=0)

# 2. Pretrain, on single frames of other scenes.
SCENES = 300  # per task

# 3. Train: first the policy alone, because its first gradients would undo the pretraining; then everything; then on
# whole episodes only, because the alternatives contain the way to an object but never the way to the basket.
TRAININGS = {
    "first": {"preset": "frozen", "max_steps": 500, "learning_rate": 1e-3},
    "all": {},  # as in train.yaml
    "whole": {"max_steps": 1500, "learning_rate": 3e-4, "warmup_steps": 50, "episodes": "done"},
}
# Then, three times, the policy drives in further episodes, and learns what the expert would have done there.
DRIVEN_EPISODES = {"official": 8, "jitter": 8, "shuffle": 8, "both": 12}  # per task, each time
DRIVER_SHARE = 0.7
CORRECTIONS = {
    "corrected": {
        "max_steps": 2500,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "episodes": "done",
    },
    "again": {"max_steps": 5000, "learning_rate": 3e-4, "episodes": "done"},
    "trained": {"max_steps": 2500, "learning_rate": 2.5e-4, "warmup_steps": 50, "episodes": "done"},
}
# The other variants learn from the same episodes, also those that the Pro variant drove, in fewer steps.
SHORT_TRAININGS = {
    "first": TRAININGS["first"],
    "trained": {"max_steps": 4000, "episodes": "done"},
}
VARIANTS = {
    "pro": {"fields": {"policy_variant": "pro"}, "arguments": {}},
    "original": {"fields": {"policy_variant": "original"}, "arguments": {}},
    "one_camera": {
        "fields": {"policy_variant": "pro", "cameras": ["image"]},
        "arguments": {"cameras": ["observation.images.image"]},
    },
}

# 4. Evaluate, ten episodes of each task.
TESTS = {
    "official": {"placement": "official", "episodes": range(40, 50)},
    "jitter": {"placement": "jitter", "episodes": range(40, 50)},
    "shuffle": {"placement": "shuffle", "episodes": range(40, 50)},
    "both": {"placement": "both", "episodes": range(40, 50)},
    "jitter_black": {"placement": "jitter", "episodes": range(40, 50), "black_images": True},
    "shuffle_black": {"placement": "shuffle", "episodes": range(40, 50), "black_images": True},
    "shuffle_other": {"placement": "shuffle", "episodes": range(40, 50), "instruction": "other"},
}
SHORT_TESTS = {
    "official": TESTS["official"],
    "both": TESTS["both"],
    "shuffle_black": TESTS["shuffle_black"] | {"episodes": range(40, 45)},
}
TITLES = {
    "official": "official states, held out",
    "jitter": "objects moved by up to ±5 cm",
    "shuffle": "objects in each other's places",
    "both": "objects in each other's places, then moved",
    "jitter_black": "moved objects, black images",
    "shuffle_black": "swapped objects, black images",
    "shuffle_other": "swapped objects, another one asked for: success on the one asked for",
}
SEED = 7  # of the placements; recording draws from another stream, whatever the seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/libero_object"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--processes", type=int, default=2, help="simulators side by side, about 2 GB each")
    parser.add_argument("--minutes", type=float, help="stop each recording after this time and train on what there is")
    parser.add_argument(
        "--embed", action="store_true", help="put all results, and the Pro variant itself, into this repository"
    )
    arguments = parser.parse_args()

    dataset, scenes = arguments.output / SUITE, arguments.output / "scenes"
    recording = {"workers": arguments.processes, "minutes": arguments.minutes}
    # A training that has begun keeps its demonstrations.
    if not (arguments.output / "pro" / next(iter(TRAININGS))).exists():
        demonstrate(dataset, replace(SETTINGS, **EPISODES, **recording))
    # So does the pretraining.
    if not (arguments.output / "pro" / "start").exists() and not (arguments.output / "pro" / "pretrained").exists():
        record_scenes(scenes, SceneSettings(SCENES, **recording))
    for name in ("pro", *(name for name in arguments.variants if name != "pro")):
        folder = arguments.output / name
        make_start(name, scenes, arguments.output)
        if name not in arguments.variants:
            continue
        if name == "pro":
            checkpoint = train_variant(name, dataset, folder, TRAININGS, folder / "start")
            for training, changes in CORRECTIONS.items():
                if not (folder / training).exists():
                    driver = {"driver": str(checkpoint), "driver_share": DRIVER_SHARE}
                    demonstrate(dataset, replace(SETTINGS, **DRIVEN_EPISODES, **recording, **driver))
                checkpoint = train_variant(name, dataset, folder, {training: changes}, checkpoint)
        else:
            train_variant(name, dataset, folder, SHORT_TRAININGS, folder / "start")
        round_off(name, folder)
        tests = TESTS if name == "pro" else SHORT_TESTS
        scores = {test: score(folder, test, options, arguments.processes) for test, options in tests.items()}
        pack(name, folder, scores)
        if arguments.embed:
            keep_results(folder / "packed", HERE / "results" / name)
        if name == "pro" and arguments.embed:
            with embedded_folder() as embedded:
                embed(folder / "packed", embedded / "checkpoint")


def make_start(name: str, scenes: Path, output: Path) -> None:
    """Write what a variant's training starts from: pretrained weights, or the Pro variant's with a new policy."""
    start = output / name / "start"
    if start.exists():
        return
    fields = json.loads((HERE / "policy.json").read_text(encoding="utf-8")) | VARIANTS[name]["fields"]
    config = VLAAdapterConfig(**fields)
    instructions = (HERE / "instructions.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = load_tokenizer(str(files("vla_adapter_hf").joinpath("embedded", "tokenizer")))
    tokenizer = cut_down_tokenizer(tokenizer, instructions, config.text_config.vocab_size, config.prompt_style)
    model, processor = init_from_config(config, tokenizer, seed=0)
    if name == "pro":
        names = [
            line.removeprefix("pick up the ").removesuffix(" and place it in the basket") for line in instructions
        ]
        settings = {"bf16": True, "use_cpu": True, "seed": 0}
        pretrain(model, processor, scenes, names, output / name / "pretrained", settings)
        summary = "Taught to see and to read in simulated scenes (examples/libero_object/pretrain.py), not to act."
    else:
        taught = AutoModel.from_pretrained(output / "pro" / "start").state_dict()
        taught = {key: value for key, value in taught.items() if not key.startswith("policy.")}
        missing, unexpected = model.load_state_dict(taught, strict=False)
        if unexpected or not all(key.startswith("policy.") for key in missing):
            raise ValueError(f"{name} differs from pro in more than its policy: {missing}, {unexpected}.")
        summary = "The Pro variant's start with a policy of its own."
    write_checkpoint(
        start, model, processor, fill_model_card(config, f"{name}, start", summary, results="Not evaluated.")
    )


def train_variant(name: str, dataset: Path, folder: Path, trainings: dict[str, dict], checkpoint: Path) -> Path:
    """Train one of `VARIANTS`, or resume it, and return the folder of the last training."""
    for training, changes in trainings.items():
        trained = folder / training
        settings = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))
        settings |= changes | VARIANTS[name]["arguments"]
        settings |= {"checkpoint": str(checkpoint), "dataset": [str(dataset)], "output_dir": str(trained)}
        checkpoint = trained
        if settings.get("episodes") == "done":
            settings["episodes"] = done_episodes(dataset)
        written = folder / f"{training}.yaml"
        if (trained / "metrics.json").exists():
            # There may be more demonstrations by now.
            was = {
                **yaml.safe_load(written.read_text(encoding="utf-8")),
                "resume_from_checkpoint": None,
                "episodes": None,
            }
            if was != {**settings, "resume_from_checkpoint": None, "episodes": None}:
                raise ValueError(
                    f"{trained} was trained with other settings, those of {written}; remove both to train again."
                )
            continue
        if last_finished_checkpoint(trained) is not None:
            settings["resume_from_checkpoint"] = True
        written.write_text(yaml.safe_dump(settings), encoding="utf-8")
        train(*parse_arguments([str(written)]))
    return checkpoint


def done_episodes(dataset: Path) -> list[int]:
    """The episodes that were played to their end, without the alternatives, whose keys end in an object's name."""
    lines = (dataset / "meta" / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    return [episode["episode_index"] for episode in recorded if episode["key"].endswith(episode["placement"])]


def shipped(folder: Path) -> Path:
    """The folder of a variant as it ships; results name the policy after it."""
    return folder / f"{SUITE}_{folder.name}"


def round_off(name: str, folder: Path) -> None:
    """The trained model as it ships, in bfloat16. This is what is evaluated."""
    model = AutoModel.from_pretrained(folder / "trained", dtype=torch.bfloat16)
    processor = AutoProcessor.from_pretrained(folder / "trained")
    rounded = shipped(folder)
    if rounded.exists():
        verify(rounded, model, processor)  # they are these weights, not those of an earlier training
        return
    card = fill_model_card(model.config, name, "Trained by `make policy`.", results="Not evaluated yet.")
    write_checkpoint(rounded, model, processor, card)


def score(folder: Path, test: str, options: dict, processes: int) -> dict:
    """Evaluate a trained variant in one test, or resume that."""
    output = folder / "evaluation" / test
    print(f"{folder.name}: {TITLES[test]}")
    settings = EvaluationSettings(seed=SEED, processes=processes, **options)
    return evaluate(str(shipped(folder)), SUITE, output, settings)


def pack(name: str, folder: Path, scores: dict[str, dict]) -> None:
    """Put together the evaluated model, a card with its scores, and the evaluation's files, ready to publish."""
    packed = folder / "packed"
    shutil.rmtree(packed, ignore_errors=True)
    shutil.copytree(shipped(folder), packed / "checkpoint")
    table = score_table(scores)
    model = AutoModel.from_pretrained(packed / "checkpoint")
    trainings = [*TRAININGS, *CORRECTIONS] if name == "pro" else SHORT_TRAININGS
    states = [last_finished_checkpoint(folder / training) / "trainer_state.json" for training in trainings]
    steps = sum(json.loads(state.read_text(encoding="utf-8"))["global_step"] for state in states)
    batch_size = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))["per_device_train_batch_size"]
    driven = ", some of them while a policy drove and the expert said what it should do" if name == "pro" else ""
    card = fill_model_card(
        model.config,
        title=f"A small VLA-Adapter for libero_object ({name})",
        summary=fill(
            f"{model.num_parameters() / 1e6:.1f} million parameters, all random at first. It learnt to see and to "
            f"read on frames of simulated scenes, and to act by {steps} steps of {batch_size} on demonstrations that "
            f"this package's scripted expert recorded in the LIBERO simulator{driven}, all on a CPU. Redo it with "
            "`make policy`; its parts are in `examples/libero_object/`. It knows ten objects, one floor and one "
            "robot, and no real camera.",
            width=119,
        ),
        results=table,
        instruction="pick up the milk and place it in the basket",
    )
    (packed / "checkpoint" / "README.md").write_text(card, encoding="utf-8")
    (packed / "scores.md").write_text(table, encoding="utf-8")
    for test in scores:
        shutil.copytree(folder / "evaluation" / test, packed / test, ignore=shutil.ignore_patterns(".*"))
    print(table)


def embed(packed: Path, checkpoint: Path) -> None:
    """Replace the checkpoint that ships by a packed one."""
    with replacing(checkpoint) as partial:
        # Without the code and the names of its classes, which the package has.
        shutil.copytree(packed / "checkpoint", partial, ignore=shutil.ignore_patterns("*.py"))
        for path in partial.glob("*.json"):
            content = json.loads(path.read_text(encoding="utf-8"), object_hook=_without_code)
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "model.safetensors").chmod(0o644)  # safetensors writes for its owner only


def keep_results(packed: Path, results: Path) -> None:
    """Replace the results in this repository by those of a packed policy."""
    with replacing(results) as partial:
        shutil.copytree(packed, partial, ignore=shutil.ignore_patterns("checkpoint"))


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that replaces `folder` once it is filled."""
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _without_code(entries: dict) -> dict:
    return {name: value for name, value in entries.items() if name != "auto_map"}


def score_table(scores: dict[str, dict]) -> str:
    """Success rates as Markdown, with 95 % intervals."""
    lines = ["| test | episodes | success, % (95 % interval) |", "|---|---:|---:|"]
    for test, summary in scores.items():
        low, high = summary["interval_95"]
        rate = f"{100 * summary['success_rate']:.0f} ({100 * low:.1f}–{100 * high:.1f})"
        lines.append(f"| {TITLES[test]} | {summary['episodes']} | {rate} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
