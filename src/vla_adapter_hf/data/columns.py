"""Which columns of a dataset are the state, the action, the cameras and so on.

A column is found by its usual name or given by the user. Nothing is guessed: no candidate, or more than one, is an
error that lists the columns that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vla_adapter_hf.processing.camera_names_vla_adapter import matching_names, name_parts
from vla_adapter_hf.robots import GripperConvention, RobotPreset, get_robot


STATE_NAMES = ("observation.state", "state", "proprio", "robot_obs")
ACTION_NAMES = ("action", "actions", "rel_actions")
EPISODE_NAMES = ("episode_index", "episode", "episode_id", "trajectory_id")
FRAME_NAMES = ("frame_index", "step", "step_index", "timestep")
TEXT_NAMES = ("task", "instruction", "language_instruction", "text", "prompt")
CHUNK_COLUMN = "action_chunk"
# In datasets with stored chunks: the control step at which a row's chunk begins, counted within its episode.
STEP_COLUMN = "step"


@dataclass(frozen=True)
class Columns:
    """The columns to read, and the robot whose conventions they follow.

    A column that is None is found by its usual name. A reader keeps a copy in which the columns it reads are filled
    in.

    Args:
        cameras: camera columns in the order the model sees them.
        state, action: columns of numbers.
        chunk: column of stored action chunks. `CHUNK_COLUMN`, the default, may be missing; None ignores it.
        episode: plain datasets: the column that tells episodes apart.
        frame: plain datasets: the column that orders the rows of an episode.
        instruction: RLDS and plain datasets: the column of the instruction.
        text: one instruction for all episodes, instead of the recorded ones.
        robot: the preset whose gripper and state conventions the recordings follow; None converts nothing.
        all_cameras: take the cameras that exist, in any order; for statistics.
    """

    cameras: tuple[str, ...] | None = None
    state: str | None = None
    action: str | None = None
    chunk: str | None = CHUNK_COLUMN
    episode: str | None = None
    frame: str | None = None
    instruction: str | None = None
    text: str | None = None
    robot: RobotPreset | None = None
    all_cameras: bool = False

    @classmethod
    def from_arguments(
        cls, cameras: Sequence[str] | None, robot: str | RobotPreset | None, arguments: dict[str, Any]
    ) -> Columns:
        """Columns from users' arguments: `state_column="x"` becomes `state="x"`, `instruction="x"` becomes `text="x"`.

        Raises:
            TypeError: `cameras` is a string instead of a list.
            ValueError: a robot that is not known.
        """
        if isinstance(cameras, str):
            raise TypeError(f"cameras={cameras!r} is a string; expected a list of camera names, such as [{cameras!r}]")
        named = {name.removesuffix("_column"): value for name, value in arguments.items() if name.endswith("_column")}
        return cls(
            cameras=None if cameras is None else tuple(cameras),
            text=arguments.get("instruction"),
            robot=None if robot is None else get_robot(robot),
            **named,
        )

    def find(self, cameras: Sequence[str], numbers: Sequence[str], where: str) -> Columns:
        """The same with cameras, state, action and chunk filled in.

        Args:
            cameras: columns with camera frames.
            numbers: all other columns that may be state, action or chunk.
            where: the dataset, for messages.

        Raises:
            ValueError: a column that is missing or ambiguous; see `find_column` and `find_cameras`.
        """
        preset = None if self.robot is None else self.robot.cameras
        given = cameras if self.all_cameras else self.cameras
        return replace(
            self,
            cameras=tuple(find_cameras(given, preset, cameras, where)),
            state=find_column("state", self.state, STATE_NAMES, numbers, where),
            action=find_column("action", self.action, ACTION_NAMES, numbers, where),
            chunk=find_chunk_column(self.chunk, numbers, self.robot, where),
        )


def last_name(column: str) -> str:
    """The last part of a column's name: `steps/observation/wrist_image` -> `wrist_image`."""
    return name_parts(column)[-1]


def camera_names(cameras: Sequence[str]) -> list[str]:
    """Short names for camera columns, as the model's configuration keeps them: the last part, or more if not unique.

    `observation.images.top` -> `top`; `left.rgb` and `right.rgb` stay as they are.
    """
    names = []
    for column in cameras:
        others = [name_parts(other) for other in cameras if other != column]
        parts = name_parts(column)
        size = 1
        while size < len(parts) and any(other[-size:] == parts[-size:] for other in others):
            size += 1
        names.append(".".join(parts[-size:]))
    return names


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) if columns else "none"


def find_column(what: str, given: str | None, usual: Sequence[str], available: Sequence[str], where: str) -> str:
    """The column that holds `what`.

    Args:
        what: the content, such as "state"; `<what>_column` is the user's argument.
        given: the column's full name, or its last parts, if the user gave one.
        usual: names it usually has.
        available: columns that exist.
        where: the dataset, for the message.

    Raises:
        ValueError: the given column does not exist, or no column or several have a usual name.
    """
    argument = f"{what}_column"
    if given is not None:
        matches = matching_names(given, available)
        problem = f"{argument}={given!r} is not a column"
    else:
        matches = [column for column in available if column in usual]
        matches = matches or [column for column in available if last_name(column) in usual]
        problem = f"no column for the {what} was found (looked for {', '.join(usual)})"
    if len(matches) == 1:
        return matches[0]
    if matches:
        asked = f"{argument}={given!r}" if given is not None else f"the {what}"
        raise ValueError(f"{where}: {asked} could be any of {_listed(matches)}; give {argument}=<full column name>")
    raise ValueError(f"{where}: {problem}; columns that exist: {_listed(available)}. Give {argument}=<column name>")


def find_cameras(
    given: Sequence[str] | None, preset: Sequence[str] | None, available: Sequence[str], where: str
) -> list[str]:
    """The camera columns in the order the model will see them.

    Args:
        given: full column names or their last parts, in order, if the user gave them.
        preset: the robot's cameras, used if the user gave none.
        available: columns with camera frames.
        where: the dataset, for the message.

    Raises:
        ValueError: a camera that does not exist, that is ambiguous or given twice; no cameras given and more than one
            there.
    """
    if not available:
        raise ValueError(f"{where}: there is no column with camera frames")
    if given is None:
        if preset is not None:
            given = preset
        elif len(available) == 1:
            return [available[0]]
        else:
            raise ValueError(
                f"{where}: there are {len(available)} cameras ({_listed(available)}); their order matters to the "
                "model. Give cameras=[...], third person first, then the wrist camera(s)"
            )
    if len(given) == 0:
        raise ValueError(f"{where}: cameras is empty; cameras that exist: {_listed(available)}")
    found = []
    for name in given:
        matches = matching_names(name, available)
        if not matches:
            raise ValueError(
                f"{where}: camera {name!r} does not exist; cameras that exist: {_listed(available)}. Give "
                "cameras=[...]"
            )
        if len(matches) > 1:
            raise ValueError(f"{where}: camera {name!r} could be any of {_listed(matches)}; give its full column name")
        found.append(matches[0])
    if len(set(found)) != len(found):
        raise ValueError(f"{where}: cameras={list(given)} names the same camera twice")
    return found


def find_chunk_column(
    given: str | None, available: Sequence[str], robot: RobotPreset | None, where: str
) -> str | None:
    """The column of stored chunks, or None if chunks are cut from consecutive rows.

    Raises:
        ValueError: the given column does not exist, or the robot's conventions need whole episodes.
    """
    if given is None or (given == CHUNK_COLUMN and given not in available):
        return None
    column = find_column("chunk", given, (CHUNK_COLUMN,), available, where)
    if robot is not None and (robot.relabel_deltas or robot.gripper is GripperConvention.BRIDGE):
        raise ValueError(
            f"{where}: robot {robot.name!r} rebuilds actions from whole episodes of consecutive steps, but column "
            f"{column!r} holds chunks as they were executed. Give another robot, or chunk_column=None if consecutive "
            "rows are consecutive steps"
        )
    return column
