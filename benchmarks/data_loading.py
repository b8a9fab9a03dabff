"""How fast demonstrations load: samples per second for each format, with and without augmentation.

    python benchmarks/data_loading.py [--samples 300] [--repeats 3]
    python benchmarks/data_loading.py --workers 1 2 4 [--samples 2048] [--repeats 3]

Four episodes of the test fixtures are scaled up to two 256x256 cameras and written in each format to a temporary
folder. "plain" is decoding alone, "resized" adds the exact Lanczos-3 resize to 224x224, "augmented" the training
augmentation. Random access draws samples in random order, streams take them as they come. The best of the repeats is
shown.

By default everything runs in this process and seconds are processor time, which other work on the machine disturbs
less: that is what one worker with a core of its own does, without handing samples over. `--workers` measures whole
loaders with so many worker processes in elapsed time, which needs as many idle cores. Its samples are augmented and
collated into batches of 64, normalised and tokenised, as in training. Next to them stands how many cores feed a GPU
that takes a step of 64 samples in 0.5 s, by the processor time of all processes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import cycle, islice
from pathlib import Path

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from vla_adapter_hf import VLAAdapterConfig, VLAAdapterProcessor
from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.checkpoints.open import open_checkpoint
from vla_adapter_hf.data import (
    ImageAugmentation,
    ImageResize,
    VLAAdapterDataset,
    VLAAdapterStreamingDataset,
)
from vla_adapter_hf.data.lerobot.video import import_torchcodec
from vla_adapter_hf.processing.image_preparation_vla_adapter import crop_and_resize, resize_lanczos3, to_float01
from vla_adapter_hf.training.collator import VLAAdapterDataCollator
from vla_adapter_hf.utils import frames
from vla_adapter_hf.utils.frames import decode_frame


TESTS = Path(__file__).parents[1] / "tests"
sys.path.append(str(TESTS))
from tfrecord_writer import encode_example, write_records  # noqa: E402


FIXTURE = TESTS / "fixtures" / "demos" / "lerobot_v30_video"
CAMERAS = ("image", "wrist_image")
SIZE = 256
FPS = 10
BATCH = 64
GPU_SAMPLES = BATCH / 0.5  # per second: a step of 64 in half a second, at the published size
PNG_DECODER = "Pillow" if frames.pyspng is None else "pyspng"


def recorded_episodes() -> list[dict]:
    """The fixture's episodes: 256x256 frames per camera, states, actions, instruction."""
    source = VLAAdapterDataset.from_lerobot(FIXTURE, robot="libero", pad_chunks=True)
    episodes: dict[int, dict] = {}
    for index in range(len(source)):
        sample = source[index]
        episode = episodes.setdefault(
            sample["episode_index"],
            {"text": sample["text"], "states": [], "actions": [], "frames": {camera: [] for camera in CAMERAS}},
        )
        episode["states"].append(sample["state"])
        episode["actions"].append(sample["actions"][0])
        for camera, image in zip(CAMERAS, sample["images"], strict=True):
            scaled = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            episode["frames"][camera].append(np.array(scaled))
    return list(episodes.values())


def encoded(image: np.ndarray, kind: str) -> bytes:
    """A frame as PNG, or as JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def number_columns(episodes: list[dict]) -> dict[str, pa.Array]:
    """State, action and index columns of all episodes."""
    lengths = [len(episode["states"]) for episode in episodes]
    states = np.concatenate([episode["states"] for episode in episodes]).astype(np.float32)
    actions = np.concatenate([episode["actions"] for episode in episodes]).astype(np.float32)
    return {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(states.reshape(-1)), states.shape[1]),
        "action": pa.FixedSizeListArray.from_arrays(pa.array(actions.reshape(-1)), actions.shape[1]),
        "episode_index": pa.array(np.repeat(np.arange(len(episodes)), lengths)),
        "frame_index": pa.array(np.concatenate([np.arange(length) for length in lengths])),
        "task_index": pa.array(np.repeat(np.arange(len(episodes)), lengths)),
    }


def image_column(episodes: list[dict], camera: str, kind: str) -> pa.Array:
    """A camera's frames as the struct of bytes and path that `datasets` and LeRobot store."""
    data = [encoded(image, kind) for episode in episodes for image in episode["frames"][camera]]
    paths = pa.nulls(len(data), pa.string())
    return pa.StructArray.from_arrays([pa.array(data, pa.binary()), paths], names=["bytes", "path"])


def write_metadata(folder: Path, episodes: list[dict], dtype: str) -> None:
    """`meta/` of a v2.1 dataset."""
    features = {
        "observation.state": {"dtype": "float32", "shape": [8]},
        "action": {"dtype": "float32", "shape": [7]},
        **{f"observation.images.{camera}": {"dtype": dtype, "shape": [SIZE, SIZE, 3]} for camera in CAMERAS},
        **{name: {"dtype": "int64", "shape": [1]} for name in ("episode_index", "frame_index", "task_index")},
    }
    info = {
        "codebase_version": "v2.1",
        "fps": FPS,
        "chunks_size": 1000,
        "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    with open(folder / "meta" / "tasks.jsonl", "w") as tasks, open(folder / "meta" / "episodes.jsonl", "w") as lines:
        for index, episode in enumerate(episodes):
            tasks.write(json.dumps({"task_index": index, "task": episode["text"]}) + "\n")
            length = len(episode["states"])
            lines.write(json.dumps({"episode_index": index, "tasks": [episode["text"]], "length": length}) + "\n")


def write_lerobot(folder: Path, episodes: list[dict], kind: str) -> Path:
    """A v2.1 dataset with frames as PNG or JPEG in parquet, or as AV1 in MP4."""
    write_metadata(folder, episodes, "video" if kind == "MP4" else "image")
    table = pa.table(number_columns(episodes))
    if kind != "MP4":
        for camera in CAMERAS:
            table = table.append_column(f"observation.images.{camera}", image_column(episodes, camera, kind))
    start = 0
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for index, episode in enumerate(episodes):
        length = len(episode["states"])
        path = folder / "data" / "chunk-000" / f"episode_{index:06d}.parquet"
        pq.write_table(table.slice(start, length), path)
        start += length
        for camera in CAMERAS if kind == "MP4" else ():
            video = folder / "videos" / "chunk-000" / f"observation.images.{camera}" / f"episode_{index:06d}.mp4"
            write_video(video, episode["frames"][camera])
    return folder


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """AV1 with a key frame every other frame, LeRobot's setting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=Fraction(FPS), options={"g": "2", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_rlds(folder: Path, episodes: list[dict]) -> Path:
    """TFRecord with JPEG frames, as the published models' data."""
    folder.mkdir()
    records = [
        encode_example(
            {
                **{
                    f"steps/observation/{camera}": [encoded(image, "JPEG") for image in episode["frames"][camera]]
                    for camera in CAMERAS
                },
                "steps/observation/state": np.concatenate(episode["states"]),
                "steps/action": np.concatenate(episode["actions"]),
                "steps/language_instruction": [episode["text"].encode()] * len(episode["states"]),
            }
        )
        for episode in episodes
    ]
    write_records(folder / "bench-train.tfrecord-00000-of-00001", records)
    return folder


def plain_dataset(folder: Path, episodes: list[dict]) -> datasets.Dataset:
    """A `datasets.Dataset` with PNG frames, memory-mapped from disk."""
    columns = number_columns(episodes)
    for camera in CAMERAS:
        columns[camera] = image_column(episodes, camera, "PNG")
    texts = [episode["text"] for episode in episodes for _ in episode["states"]]
    rows = datasets.Dataset(pa.table({**columns, "task": texts}))
    for camera in CAMERAS:
        rows = rows.cast_column(camera, datasets.Image())
    rows.save_to_disk(folder)
    return datasets.load_from_disk(folder)


def samples_per_second(dataset: torch.utils.data.Dataset, samples: int, repeats: int) -> float:
    """Best of several runs in this process, each after a few samples that do not count."""
    best = 0.0
    for repeat in range(repeats + 1):
        count = samples if repeat else 20  # the first run warms up
        if isinstance(dataset, VLAAdapterStreamingDataset):
            items: Iterator = cycle(dataset)
        else:
            order = np.random.default_rng(repeat).integers(0, len(dataset), count).tolist()
            items = (dataset[index] for index in order)
        first = next(items)
        assert len(first["images"]) == 2
        begin = time.process_time()
        taken = sum(1 for _ in islice(items, count - 1))
        if repeat:
            best = max(best, taken / (time.process_time() - begin))
    return best


def loader_speed(
    dataset: torch.utils.data.Dataset, collate: Callable, samples: int, repeats: int, workers: int
) -> tuple[float, float]:
    """Samples per second of a loader with workers, and processor seconds of all processes per sample; best of runs.

    Both include starting the workers.
    """
    best, least = 0.0, float("inf")
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).integers(0, len(dataset), samples // BATCH * BATCH).tolist()
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=BATCH, sampler=order, num_workers=workers, collate_fn=collate
        )
        before, begin = os.times(), time.perf_counter()
        for _ in loader:
            pass
        best = max(best, len(order) / (time.perf_counter() - begin))
        # The workers have ended by now, so their processor time is among the children's.
        least = min(least, (sum(os.times()[:4]) - sum(before[:4])) / len(order))
    return best, least


def print_whole_loaders(formats: dict[str, Callable], numbers: list[int], samples: int, repeats: int) -> None:
    """The table of `--workers`. Streams are left out: they do not draw at random."""
    with embedded_folder() as folder:
        tokenizer = open_checkpoint(folder / "checkpoint").load_processor().tokenizer
    print(f"{len(os.sched_getaffinity(0))} cores, batches of {BATCH}\n")
    heads = [f"{number} worker{'s' if number > 1 else ''}, samples/s" for number in numbers]
    print(f"| | {' | '.join(heads)} | cores for {GPU_SAMPLES:.0f} samples/s |")
    print("|---|" + "---:|" * (len(numbers) + 1))
    config = VLAAdapterConfig()  # of the published size
    for label, make in formats.items():
        dataset = make(ImageAugmentation.from_model_config(config))
        if isinstance(dataset, VLAAdapterStreamingDataset):
            continue
        config.norm_stats = dataset.norm_stats
        collate = VLAAdapterDataCollator(VLAAdapterProcessor.from_model_config(config, tokenizer), config)
        measured = [loader_speed(dataset, collate, samples, repeats, number) for number in numbers]
        cells = [f"{speed:.0f}" for speed, _ in measured]
        cores = GPU_SAMPLES * min(seconds for _, seconds in measured)
        print(f"| {label} | {' | '.join(cells)} | {cores:.1f} |", flush=True)


def milliseconds(work: Callable[[], object], repeats: int = 60) -> float:
    """Shortest time of one call."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def print_where_time_goes(image: np.ndarray) -> None:
    """What one 256x256 frame costs, step by step."""
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    resized = resize_lanczos3(image, (224, 224))
    floats = to_float01(resized)
    box = (0.02, 0.02, 0.02 + np.sqrt(np.float32(0.9)), 0.02 + np.sqrt(np.float32(0.9)))
    augmentation = ImageAugmentation(224)
    whole = milliseconds(lambda: augmentation([resized]))
    crop = milliseconds(lambda: crop_and_resize(floats, box, (224, 224)))
    print(f"\nOne {SIZE}x{SIZE} frame, milliseconds (best of 60):")
    for name, value in (
        (f"decode PNG, {len(png) // 1000} kB ({PNG_DECODER})", milliseconds(lambda: decode_frame(png))),
        (f"decode JPEG, {len(jpeg) // 1000} kB (as TensorFlow)", milliseconds(lambda: decode_frame(jpeg, True))),
        ("resize to 224x224, Lanczos-3", milliseconds(lambda: resize_lanczos3(image, (224, 224)))),
        ("augmentation: crop", crop),
        ("augmentation: colours and the rest", whole - crop),
    ):
        print(f"  {name:44}{value:6.2f}")


def has_torchcodec() -> bool:
    try:
        import_torchcodec()
    except ImportError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, help="samples per run, by default 300, with --workers 2048")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the best counts")
    parser.add_argument("--workers", type=int, nargs="+", help="whole loaders with so many workers each")
    parser.add_argument("--only", help="formats whose name has this in it, such as PNG")
    arguments = parser.parse_args()
    if arguments.samples is None:
        arguments.samples = 2048 if arguments.workers else 300
    if arguments.workers and arguments.samples < 4 * BATCH * max(arguments.workers):
        parser.error(f"--samples must be at least {4 * BATCH * max(arguments.workers)} with so many --workers")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["VLA_ADAPTER_CACHE"] = str(folder / "cache")
        datasets.config.HF_DATASETS_CACHE = folder / "datasets"
        episodes = recorded_episodes()
        print(f"{sum(len(episode['states']) for episode in episodes)} steps, 2 cameras of {SIZE}x{SIZE}")
        paths = {
            "PNG": write_lerobot(folder / "png", episodes, "PNG"),
            "JPEG": write_lerobot(folder / "jpeg", episodes, "JPEG"),
            "MP4": write_lerobot(folder / "mp4", episodes, "MP4"),
            "RLDS": write_rlds(folder / "rlds", episodes),
        }
        rows = plain_dataset(folder / "plain", episodes)
        cameras = list(CAMERAS)
        formats = {
            "LeRobot, PNG in parquet": lambda t: VLAAdapterDataset.from_lerobot(
                paths["PNG"], cameras, image_transform=t
            ),
            "LeRobot, JPEG in parquet": lambda t: VLAAdapterDataset.from_lerobot(
                paths["JPEG"], cameras, image_transform=t
            ),
            "LeRobot, MP4 (AV1)": lambda t: VLAAdapterDataset.from_lerobot(paths["MP4"], cameras, image_transform=t),
            "RLDS, JPEG": lambda t: VLAAdapterDataset.from_rlds(paths["RLDS"], cameras, image_transform=t),
            "datasets.Dataset, PNG": lambda t: VLAAdapterDataset.from_dataset(rows, cameras, image_transform=t),
            "LeRobot stream, PNG": lambda t: VLAAdapterStreamingDataset.from_lerobot(
                paths["PNG"], cameras, image_transform=t
            ),
            "LeRobot stream, MP4 (AV1)": lambda t: VLAAdapterStreamingDataset.from_lerobot(
                paths["MP4"], cameras, image_transform=t
            ),
            "RLDS stream, JPEG": lambda t: VLAAdapterStreamingDataset.from_rlds(
                paths["RLDS"], cameras, image_transform=t
            ),
        }
        if has_torchcodec():
            formats["LeRobot, MP4 (AV1), torchcodec"] = lambda t: VLAAdapterDataset.from_lerobot(
                paths["MP4"], cameras, image_transform=t, video_backend="torchcodec"
            )
        if arguments.only is not None:
            formats = {label: make for label, make in formats.items() if arguments.only in label}
        if arguments.workers:
            print_whole_loaders(formats, arguments.workers, arguments.samples, arguments.repeats)
            return
        transforms = {"plain": None, "resized": ImageResize(224), "augmented": ImageAugmentation(224)}
        print(f"\n{'samples/s per worker':32}" + "".join(f"{column:>11}" for column in transforms))
        for label, make in formats.items():
            values = []
            for transform in transforms.values():
                dataset = make(transform)
                limit = len(list(dataset)) if isinstance(dataset, VLAAdapterStreamingDataset) else arguments.samples
                count = min(arguments.samples, limit)
                values.append(samples_per_second(dataset, count, arguments.repeats))
            print(f"{label:32}" + "".join(f"{value:11.0f}" for value in values), flush=True)
        print_where_time_goes(episodes[0]["frames"]["image"][10])


if __name__ == "__main__":
    main()
