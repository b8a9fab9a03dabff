"""How long `vla-adapter check` takes on a large LeRobot set with videos, and how much memory.

    python benchmarks/check.py [--episodes 1000] [--keep FOLDER]

The four episodes of the test fixture are copied, frames unchanged (AV1, 128x128, two cameras), into a v3.0 dataset
with 100 episodes in each MP4 file. States and actions of every copy get a little noise of their own, so that the
episodes are no duplicates. Seconds are of the clock; the peak is that of the process, of which about 0.5 GiB are
PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vla_adapter_hf.doctor.check import check


FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "demos" / "lerobot_v30_video"
CAMERAS = ("observation.images.image", "observation.images.wrist_image")
FPS = 10
COPIES = 25  # of the fixture in each file


def repeat_video(source: Path, target: Path, times: int, frames: int) -> None:
    """The packets of a video, several times one after the other."""
    target.parent.mkdir(parents=True)
    with av.open(str(target), "w") as output:
        stream = None
        for copy in range(times):
            with av.open(str(source)) as video:
                given = video.streams.video[0]
                stream = stream or output.add_stream_from_template(given, opaque=True)
                ticks = round(1 / (FPS * given.time_base))
                for packet in video.demux(given):
                    if packet.dts is None:
                        continue
                    packet.pts += copy * frames * ticks
                    packet.dts += copy * frames * ticks
                    packet.stream = stream
                    output.mux(packet)


def write_dataset(folder: Path, episodes: int) -> None:
    """The fixture's episodes again and again."""
    rows = pq.read_table(next((FIXTURE / "data").rglob("*.parquet")))
    listed = pq.read_table(next((FIXTURE / "meta" / "episodes").rglob("*.parquet"))).to_pylist()
    files = -(-episodes // (COPIES * len(listed)))
    for camera in CAMERAS:
        first = folder / "videos" / camera / "chunk-000" / "file-000.mp4"
        repeat_video(FIXTURE / "videos" / camera / "chunk-000" / "file-000.mp4", first, COPIES, len(rows))
        for number in range(1, files):
            shutil.copy(first, first.with_name(f"file-{number:03d}.mp4"))
    rng = np.random.default_rng(0)
    (folder / "data" / "chunk-000").mkdir(parents=True)
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    described, index = [], 0
    for number in range(files):
        tables = []
        for copy in range(COPIES):
            for entry in listed:
                table = rows.slice(entry["dataset_from_index"], entry["length"])
                tables.append(_renumbered(table, len(described), index, rng))
                begin = copy * len(rows) / FPS
                places = {}
                for camera in CAMERAS:
                    places |= {f"videos/{camera}/chunk_index": 0, f"videos/{camera}/file_index": number}
                    for end in ("from_timestamp", "to_timestamp"):
                        places[f"videos/{camera}/{end}"] = begin + entry[f"videos/{camera}/{end}"]
                described.append(
                    {"episode_index": len(described), "tasks": entry["tasks"], "length": entry["length"],
                     "data/chunk_index": 0, "data/file_index": number, "dataset_from_index": index,
                     "dataset_to_index": index + entry["length"], "meta/episodes/chunk_index": 0,
                     "meta/episodes/file_index": 0, **places}
                )  # fmt: skip
                index += entry["length"]
        pq.write_table(pa.concat_tables(tables), folder / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    pq.write_table(pa.Table.from_pylist(described), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    shutil.copy(FIXTURE / "meta" / "tasks.parquet", folder / "meta")
    info = json.loads((FIXTURE / "meta" / "info.json").read_text())
    info |= {"total_episodes": len(described), "total_frames": index, "splits": {"train": f"0:{len(described)}"}}
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def _renumbered(table: pa.Table, episode: int, index: int, rng: np.random.Generator) -> pa.Table:
    """Rows of an episode under another number, their states and actions with a little noise."""
    for name in ("observation.state", "action"):
        values = np.stack(table.column(name).to_numpy())
        values = values + rng.normal(0, 1e-4, values.shape) * (np.abs(values) < 1)  # a full command stays full
        place = table.schema.get_field_index(name)
        kind = table.schema.field(place)
        table = table.set_column(place, kind, pa.array(list(values.astype(np.float32)), kind.type))
    for name, values in (("episode_index", np.full(len(table), episode)), ("index", index + np.arange(len(table)))):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(place), pa.array(values, pa.int64()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="folder of the dataset, written if it is not there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary) / "data"
        if not folder.is_dir():
            write_dataset(folder, arguments.episodes)
        began, busy = time.perf_counter(), time.process_time()
        report = check(folder, Path(temporary) / "check", report_progress=lambda line: print(line, flush=True))
        seconds, processor = time.perf_counter() - began, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = report.facts["recording"]
    print(
        f"{facts['episodes']} episodes, {facts['steps']} steps: {seconds:.0f} s, {processor:.0f} s of processor time,"
    )
    print(f"peak {peak:.2f} GiB; findings: {', '.join(finding.name for finding in report.findings) or 'none'}")


if __name__ == "__main__":
    main()
