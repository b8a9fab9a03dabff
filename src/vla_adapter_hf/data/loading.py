"""A dataset by its path alone: what the command line calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_adapter_hf.data.dataset import VLAAdapterDataset
from vla_adapter_hf.data.opening import OPTIONS, chosen_format, open_reader, random_access, rows_of_folder
from vla_adapter_hf.data.source import DemonstrationSource
from vla_adapter_hf.data.statistics import compute_norm_stats
from vla_adapter_hf.data.streaming import VLAAdapterStreamingDataset
from vla_adapter_hf.robots import RobotPreset
from vla_adapter_hf.utils.files import write_json


def load_demonstrations(
    path: str | os.PathLike, format: str = "auto", streaming: bool = False, **options: Any
) -> VLAAdapterDataset | VLAAdapterStreamingDataset:
    """Open the dataset at `path`, whatever its format.

    Args:
        path: a folder, or the id of a Hub dataset repository (LeRobot, or RLDS with `format="rlds"`).
        format: `"lerobot"`, `"rlds"`, `"dataset"` (a folder written by `datasets`' `save_to_disk`) or `"auto"`.
        streaming: return a `VLAAdapterStreamingDataset`.
        options: arguments of `from_lerobot`, `from_rlds` or `from_dataset`.

    Raises:
        ValueError: a format that is not known or not recognised, and what the reader refuses.
        TypeError: an option that this format does not have.
    """
    kind = chosen_format(path, format)
    dataset_class = VLAAdapterStreamingDataset if streaming else VLAAdapterDataset
    dataset_class.check_options(kind, options, path)
    if kind == "lerobot":
        return dataset_class.from_lerobot(path, **options)
    if kind == "rlds":
        return dataset_class.from_rlds(path, **options)
    rows = rows_of_folder(path)
    options.setdefault("unnorm_key", Path(path).name)
    return dataset_class.from_dataset(rows.to_iterable_dataset() if streaming else rows, **options)


def open_source(
    path: str | os.PathLike,
    format: str = "auto",
    robot: str | RobotPreset | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool | None = None,
    **options: Any,
) -> DemonstrationSource:
    """The recorded numbers of a dataset. Cameras need not be chosen, and no video is fetched.

    Args:
        path, format: see `load_demonstrations`.
        robot: see `VLAAdapterDataset.from_lerobot`.
        cache_dir, progress: see `VLAAdapterDataset`.
        options: column names, `name` and `revision` as of `from_lerobot`, `from_rlds` or `from_dataset`. None stands
            for an option that was not given, except for `chunk_column`.

    Raises:
        TypeError: an option of samples, such as `episodes`, which would change nothing here.
        ValueError: as for `load_demonstrations`.
    """
    kind = chosen_format(path, format)
    options = {name: value for name, value in options.items() if value is not None or name == "chunk_column"}
    VLAAdapterDataset.check_options(kind, options, path)
    unused = [name for name in options if name not in OPTIONS[kind]]
    if unused:
        raise TypeError(
            f"{', '.join(unused)} would change nothing: the numbers and the statistics of {str(path)!r} are those of "
            "all its episodes; leave it out"
        )
    data: Any = path
    if kind == "dataset":
        data, options["unnorm_key"] = rows_of_folder(path), Path(path).name
    return random_access(open_reader(kind, data, None, robot, options, fetch="numbers"), cache_dir, progress)


def dataset_statistics(
    path: str | os.PathLike,
    format: str = "auto",
    robot: str | RobotPreset | None = None,
    unnorm_key: str | None = None,
    action_mask: Sequence[bool] | None = None,
    on_bad_episode: str = "error",
    output: str | os.PathLike | None = None,
    use_cache: bool = True,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`vla-adapter stats DATASET`: the norm stats of a dataset, also written to the JSON file `output`.

    Args as for `open_source`, which takes `options`, and `statistics.compute_norm_stats`.
    """
    source = open_source(path, format, robot, **options)
    norm_stats = compute_norm_stats(
        source, unnorm_key, action_mask, on_bad_episode, use_cache, source.cache_dir, source.progress
    )
    if output is not None:
        write_json(output, norm_stats)
    return norm_stats
