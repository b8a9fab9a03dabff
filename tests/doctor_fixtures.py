"""Recordings of point robots in several conventions, with drawn frames, and faults to put into them one at a time."""

from dataclasses import replace

import numpy as np

from vla_adapter_hf.doctor.recording import Recording
from vla_adapter_hf.doctor.rotations import from_axis_angle, from_euler, from_intrinsic_euler, to_axis_angle


SIDE = 32  # pixels of a drawn frame
FPS = 20.0
TASKS = ("push the red cube", "push the blue cube")
KINDS = ("delta", "tool", "joints", "degrees", "velocity")
# Further ways to write an orientation in the state: by kind how three angles become it, and its name in the report.
# The kinds "target ..." have absolute poses as actions, written in the same way; the others have deltas.
ENCODED = {
    "xyz": (lambda angles: angles, "Euler angles, extrinsic xyz (roll, pitch, yaw)"),
    "intrinsic xyz": (lambda angles: angles, "Euler angles, intrinsic xyz"),
    "zyx": (lambda angles: angles, "Euler angles, intrinsic zyx (yaw, pitch, roll)"),
    "xyz degrees": (np.degrees, "Euler angles in degrees, extrinsic xyz (roll, pitch, yaw)"),
    "xyzw": (lambda angles: to_quaternion(from_euler(angles, "xyz")), "quaternion x, y, z, w"),
    "wxyz": (lambda angles: np.roll(to_quaternion(from_euler(angles, "xyz")), 1, axis=1), "quaternion w, x, y, z"),
}
ORIENTATIONS = (*ENCODED, "target xyz", "target zyx", "target xyz degrees", "target xyzw")
# Two arms of six joints and a gripper each, with a camera on every hand.
TWO_ARMS = "two arms"
CORRECT = (*KINDS, *ORIENTATIONS, TWO_ARMS)
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE] / SIDE


def smooth_path(rng, steps, points, start):
    """A path (steps + 1, D) from `start` through waypoints, at rest at each of them, at uneven speed."""
    times = np.sort(rng.choice(np.arange(8, steps - 8), len(points) - 1, replace=False)) if len(points) > 1 else []
    knots = [0, *times, steps]
    path = np.empty((steps + 1, len(start)))
    here = start
    for first, end, point in zip(knots[:-1], knots[1:], points, strict=True):
        share = np.linspace(0, 1, end - first + 1)[:, None]
        share = 10 * share**3 - 15 * share**4 + 6 * share**5
        path[first : end + 1] = here + (point - here) * share
        here = point
    return path + np.cumsum(rng.normal(0, 2e-4, path.shape), axis=0)


def make_recording(kind="delta", seed=0, episodes=24, stray=None):
    """A correct recording: two tasks in one scene, states and actions of moving arms, a camera at each hand.

    With `stray` all episodes end at home, except for that one.
    """
    rng = np.random.default_rng(seed)
    arms = 2 if kind == TWO_ARMS else 1
    scene = rng.uniform(60, 190, (1 + arms, SIDE, SIDE, 3))
    scene = np.stack([smooth_texture(part) for part in scene])
    all_states, all_actions, texts, hands, objects = [], [], [], [], []
    for episode in range(episodes):
        steps = int(rng.integers(56, 76))
        cubes = rng.uniform([0.1, 0.55], [0.9, 0.9], (2, 2))
        task = episode % 2
        home = stray is not None and episode != stray
        if kind in ("joints", "degrees", TWO_ARMS):
            unit = 180 / np.pi if kind == "degrees" else 1.0
            parts = [joint_episode(rng, steps, unit, home) for _ in range(arms)]
        else:
            parts = [pose_episode(rng, steps, kind, cubes[task], home)]
        all_states.append(np.concatenate([states for states, _, _ in parts], axis=1))
        all_actions.append(np.concatenate([actions for _, actions, _ in parts], axis=1))
        texts.append([TASKS[task]])
        hands.append(np.stack([hand for _, _, hand in parts], axis=1))
        objects.append(cubes)

    def read_images(position, step):
        return draw(scene, hands[position][step], objects[position])

    return Recording(
        name=f"{kind} robot",
        states=all_states,
        actions=all_actions,
        texts=texts,
        numbers=list(range(episodes)),
        cameras=("front", "wrist") if arms == 1 else ("front", "left_wrist", "right_wrist"),
        fps=FPS,
        timestamps=[np.arange(len(actions)) / FPS for actions in all_actions],
        read_images=read_images,
    )


def smooth_texture(noise):
    """Noise (height, width, 3) -> a colourful, smooth picture that is the same nowhere."""
    spectrum = np.fft.fft2(noise, axes=(0, 1))
    low = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)) < 0.12
    picture = np.fft.ifft2(spectrum * low[..., None], axes=(0, 1)).real
    picture = (picture - picture.mean()) / picture.std() * 35
    warm = np.array([150.0, 115.0, 80.0]) + 60 * (ROWS[..., None] - 0.5) + 40 * (COLUMNS[..., None] - 0.5)
    return (picture + warm).clip(5, 235)


def draw(scene, hands, cubes):
    """Front and wrist frames: hands (arms, 3) and two cubes over the front's scene; a wrist sees its scene scroll."""
    front = scene[0].copy()
    colors = [[220, 20, 20], [20, 20, 220], *[[20, 20, 20]] * len(hands)]
    for place, color in zip((*cubes, *hands[:, :2]), colors, strict=True):
        shape = np.exp(-(((COLUMNS - place[0]) ** 2 + (ROWS - place[1]) ** 2) / 0.008))[..., None]
        front = front * (1 - shape) + np.array(color) * shape
    wrists = [draw_wrist(picture, hand) for picture, hand in zip(scene[1:], hands, strict=True)]
    return [front.astype(np.uint8), *wrists]


def draw_wrist(picture, hand):
    """What a camera on a hand sees of its scene."""
    shift = hand[:2] * 10
    rows, columns = (np.arange(SIDE) + shift[1]) % (SIDE - 1), (np.arange(SIDE) + shift[0]) % (SIDE - 1)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    wrist = picture[top] * (1 - down) + picture[top + 1] * down
    wrist = wrist[:, left] * (1 - right) + wrist[:, left + 1] * right
    wrist[SIDE - 10 :, 10:20] = [40, 160, 60]
    return wrist.clip(0, 255).astype(np.uint8)


def gripper_of(rng, steps):
    """Commands (steps,) that open (-1) and close (1) once, and the aperture (steps,) that follows two steps later."""
    close = int(rng.integers(15, steps - 20))
    command = np.where(np.arange(steps) < close, -1.0, 1.0)
    aperture = 0.04 - 0.04 / (1 + np.exp(-(np.arange(steps) - close - 2.5)))
    return command, aperture + rng.normal(0, 2e-4, steps)


def pose_episode(rng, steps, kind, cube, home=False):
    """An end effector with position, axis-angle and two fingers; actions are scaled motions, or velocities."""
    points = np.concatenate([rng.uniform(-0.3, 0.3, (3, 3))])
    points[1, :2] = cube - 0.5
    if home:
        points[-1] = 0.0
    position = smooth_path(rng, steps, points, rng.uniform(-0.3, 0.3, 3))
    turns = rng.uniform(-0.9, 0.9, (3, 3))
    if home:
        turns[-1] = 0.0
    angles = smooth_path(rng, steps, turns, rng.uniform(-0.9, 0.9, 3))
    written = kind.removeprefix("target ")
    intrinsic = {"intrinsic xyz": "xyz", "zyx": "zyx"}.get(written)
    rotation = from_intrinsic_euler(angles, intrinsic) if intrinsic else from_euler(angles, "xyz")
    turn = to_axis_angle(rotation[1:] @ np.swapaxes(rotation[:-1], 1, 2))
    move = np.diff(position, axis=0)
    if kind == "tool":
        back = np.swapaxes(rotation[:-1], 1, 2)
        move, turn = (back @ move[..., None])[..., 0], to_axis_angle(back @ rotation[1:])
    scale = FPS if kind == "velocity" else 25.0
    command, aperture = gripper_of(rng, steps)
    actions = np.column_stack([move * scale, turn * scale, command])
    actions[:, :6] += rng.normal(0, 0.02 * actions[:, :6].std(0), (steps, 6))
    encode = ENCODED[written][0] if written in ENCODED else lambda angles: to_axis_angle(from_euler(angles, "xyz"))
    orientation = encode(angles)
    if kind.startswith("target"):
        pose = np.column_stack([position, orientation])[1:]
        actions = np.column_stack([pose + rng.normal(0, 0.003 * pose.std(0), pose.shape), command])
    orientation = orientation[:-1]
    states = np.column_stack([position[:-1], orientation, aperture, -aperture])
    return states, actions, position[:-1] + 0.5


def to_quaternion(rotations):
    """Rotation matrices (n, 3, 3) -> quaternions (n, 4) as x, y, z, w, each with the sign of the one before it."""
    turns = to_axis_angle(rotations)
    angle = np.linalg.norm(turns, axis=1, keepdims=True)
    quaternions = np.concatenate([np.sin(angle / 2) * turns / np.maximum(angle, 1e-12), np.cos(angle / 2)], axis=1)
    signs = np.where((quaternions[1:] * quaternions[:-1]).sum(1) < 0, -1.0, 1.0)
    return quaternions * np.cumprod([1.0, *signs])[:, None]


def joint_episode(rng, steps, unit, home=False):
    """Six joints that follow absolute targets within one step, and a gripper."""
    points = rng.uniform(-0.8, 0.8, (3, 6))
    if home:
        points[-1] = 0.0
    target = smooth_path(rng, steps, points, rng.uniform(-0.8, 0.8, 6))[:steps]
    joints = np.empty_like(target)
    joints[0] = target[0]
    for step in range(1, steps):
        joints[step] = joints[step - 1] + 0.9 * (target[step - 1] - joints[step - 1])
    joints += rng.normal(0, 1e-4, joints.shape)
    command, aperture = gripper_of(rng, steps)
    hand = np.column_stack([np.sin(joints[:, 0]), np.sin(joints[:, 1]), joints[:, 2]]) * 0.4 + 0.5
    return np.column_stack([joints * unit, aperture]), np.column_stack([target * unit, command]), hand


def make_detour(seed, ways):
    """A hand that goes round an obstacle, always on one side or, with two ways, on the left and on the right."""
    rng = np.random.default_rng(seed)
    steps, episodes = 60, 16
    time = np.linspace(0, 1, steps + 1)
    aside = 0.25 * np.sin(np.pi * np.clip((time - 0.35) / 0.65, 0, 1))
    states, actions, hands = [], [], []
    for episode in range(episodes):
        side = -1 if ways == 2 and episode % 2 else 1
        path = np.column_stack([0.6 * time - 0.3, side * aside, 0 * time]) + rng.normal(0, 0.004, (1, 3))
        path += np.cumsum(rng.normal(0, 2e-4, path.shape), axis=0)
        states.append(path[:-1])
        actions.append(np.diff(path, axis=0))
        hands.append(path[:-1] + 0.5)
    scene = np.stack([smooth_texture(part) for part in rng.uniform(60, 190, (2, SIDE, SIDE, 3))])
    cubes = np.array([[0.5, 0.5], [0.9, 0.5]])
    return Recording(
        name="detour",
        states=states,
        actions=actions,
        texts=[["go round the cube"]] * episodes,
        numbers=list(range(episodes)),
        cameras=("front", "wrist"),
        fps=FPS,
        read_images=lambda position, step: draw(scene, hands[position][step][None], cubes),
    )


# Faults: each takes a correct recording and a generator of random numbers, and breaks one thing.


def some(recording, rng, share=0.25):
    """Some episodes."""
    count = max(2, int(share * len(recording.actions)))
    return set(rng.choice(len(recording.actions), count, replace=False).tolist())


def edit(recording, what, change, chosen=None):
    """A copy in which `change(values)` is applied to the states or actions of the chosen episodes."""
    values = [
        change(part.copy()) if chosen is None or place in chosen else part
        for place, part in enumerate(getattr(recording, what))
    ]
    return replace(recording, **{what: values})


def edit_frames(recording, change, chosen=None):
    """A copy in which `change(frames, position, step)` is applied to the frames of the chosen episodes."""
    read = recording.read_images

    def read_images(position, step):
        frames = read(position, step)
        return change(frames, position, step) if chosen is None or position in chosen else frames

    return replace(recording, read_images=read_images)


def rolled(steps):
    """Values that come `steps` later; the first one is repeated."""

    def change(values):
        return (
            np.concatenate([np.repeat(values[:1], steps, 0), values])[: len(values)]
            if steps > 0
            else np.concatenate([values[-steps:], np.repeat(values[-1:], -steps, 0)])
        )

    return change


def times(factor, dims):
    """Values whose dimensions are multiplied."""

    def change(values):
        values[:, dims] *= factor
        return values

    return change


def flip_gripper(values):
    values[:, -1] *= -1
    return values


def drop_steps(recording, rng, keep_time):
    """Every episode without some of its steps."""
    kept = [np.sort(rng.choice(len(part), int(0.93 * len(part)), replace=False)) for part in recording.actions]
    read = recording.read_images
    timestamps = recording.timestamps if keep_time else None
    return replace(
        recording,
        states=[part[places] for part, places in zip(recording.states, kept, strict=True)],
        actions=[part[places] for part, places in zip(recording.actions, kept, strict=True)],
        timestamps=None if timestamps is None else [t[places] for t, places in zip(timestamps, kept, strict=True)],
        read_images=lambda position, step: read(position, int(kept[position][step])),
    )


def duplicated(recording, rng):
    read, count = recording.read_images, len(recording.actions)
    copies = sorted(some(recording, rng, 0.15))
    both = [*range(count), *copies]
    return replace(
        recording,
        states=[recording.states[place] for place in both],
        actions=[recording.actions[place] for place in both],
        texts=[recording.texts[place] for place in both],
        timestamps=[recording.timestamps[place] for place in both],
        numbers=list(range(len(both))),
        read_images=lambda position, step: read(both[position], step),
    )


def holding_still(recording, before, after):
    """Every episode begins and ends with some steps in which nothing happens."""
    read, lengths = recording.read_images, [len(part) for part in recording.actions]
    is_delta = recording.name.split()[0] in ("delta", "tool", "velocity")

    def hold(values, still):
        edges = [
            np.repeat(values[place : place + 1], count, 0) for place, count in ((0, before), (len(values) - 1, after))
        ]
        for edge in edges:
            edge[:, :-1] *= 0 if still else 1
        return np.concatenate([edges[0], values, edges[1]])

    return replace(
        recording,
        states=[hold(part, False) for part in recording.states],
        actions=[hold(part, is_delta) for part in recording.actions],
        timestamps=None,
        read_images=lambda position, step: read(position, min(max(0, step - before), lengths[position] - 1)),
    )


def chatter(recording, rng):
    def change(values):
        for step in rng.choice(len(values), 6, replace=False):
            values[step, -1] *= -1
        return values

    return edit(recording, "actions", change)


def spikes(what):
    def fault(recording, rng):
        place = int(rng.integers(len(recording.actions)))

        def change(values):
            values[len(values) // 2, 1] += 60 * np.abs(values[:, 1]).max()
            return values

        return edit(recording, what, change, {place})

    return fault


def to_other_kind(recording, rng):
    """Some episodes in the other convention: absolute targets among deltas, or the other way round."""
    chosen = some(recording, rng)
    size = 6

    def change(place):
        states, actions = recording.states[place], recording.actions[place].copy()
        following = np.concatenate([states[1:, :size], states[-1:, :size]])
        is_absolute = recording.name.split()[0] in ("joints", "degrees")
        actions[:, :size] = following - states[:, :size] if is_absolute else following
        return actions

    actions = [change(place) if place in chosen else part for place, part in enumerate(recording.actions)]
    return replace(recording, actions=actions)


def frozen(camera):
    def fault(recording, rng):
        first = {}

        def change(frames, position, step):
            frames[camera] = first.setdefault(position, frames[camera])
            return frames

        return edit_frames(recording, change, some(recording, rng, 0.3))

    return fault


def through(turn, camera=0):
    """Frames of one camera changed in some episodes."""

    def fault(recording, rng):
        def change(frames, position, step):
            frames[camera] = np.ascontiguousarray(turn(frames[camera]))
            return frames

        return edit_frames(recording, change, some(recording, rng))

    return fault


def letterboxed(frames, *_):
    """Frames with black bars at the top and at the bottom."""
    return [np.pad(frame[4:-4], ((4, 4), (0, 0), (0, 0))) for frame in frames]


def late_frames(steps):
    def fault(recording, rng):
        read = recording.read_images
        last = [len(part) - 1 for part in recording.actions]
        return replace(
            recording,
            read_images=lambda position, step: read(position, min(max(0, step - steps), last[position])),
        )

    return fault


def half_rate_frames(recording, rng):
    read = recording.read_images
    return replace(recording, read_images=lambda position, step: read(position, step - step % 2))


def wrapped(dims, unit=1.0):
    """Angles that are moved next to pi, so that they jump to minus pi on the way."""

    def fault(recording, rng):
        def change(values):
            turned = values[:, dims] / unit + np.pi - np.median(values[:, dims]) / unit
            values[:, dims] = ((turned + np.pi) % (2 * np.pi) - np.pi) * unit
            return values

        return edit(recording, "states", change)

    return fault


def around_pi(recording, rng):
    """Rotation vectors of a tool that points down: a half turn, and a little more or less than that."""

    def change(values):
        half = np.broadcast_to(from_axis_angle(np.array([[2.2, 2.2, 0.0]])), (len(values), 3, 3))
        values[:, 3:6] = to_axis_angle(from_axis_angle(values[:, 3:6]) @ half)
        return values

    return edit(recording, "states", change)


def negated(recording, rng):
    """Quaternions whose sign follows from another rule than the step before: x is never below 0."""

    def change(values):
        values[:, 3:7] *= np.where(values[:, 3:4] < 0, -1.0, 1.0)
        return values

    return edit(recording, "states", change)


def released(recording, rng, chosen, first):
    """Episodes whose gripper stays open, or opens again, from a step on; a negative one counts from the end."""
    fingers = (-1, -2) if recording.states[0].shape[1] > 7 else (-1,)

    def open_states(values):
        for sign, dim in zip((1, -1) if len(fingers) == 1 else (-1, 1), fingers, strict=False):
            values[first:, dim] = 0.04 * sign + rng.normal(0, 2e-4, len(values[first:]))
        return values

    def open_actions(values):
        values[first:, -1] = -1.0
        return values

    return edit(edit(recording, "actions", open_actions, chosen), "states", open_states, chosen)


def cut_off(edge):
    """Episodes that begin and end at rest, some without what comes after (edge 1) or before (edge 0) a fast motion."""

    def fault(recording, rng):
        recording = holding_still(recording, 5, 5)
        spread = recording.all_states.std(0)
        first, end = [0] * len(recording.actions), [len(part) for part in recording.actions]
        for place in some(recording, rng, 0.08):
            speed = np.linalg.norm(np.diff(recording.states[place], axis=0) / spread, axis=1)
            smooth = np.convolve(speed, np.ones(5), "same")
            if edge:
                end[place] = 31 + int(smooth[30:-5].argmax())
            else:
                first[place] = 5 + int(smooth[5:30].argmax())
        read = recording.read_images
        return replace(
            recording,
            **{
                name: [part[a:b] for part, a, b in zip(getattr(recording, name), first, end, strict=True)]
                for name in ("states", "actions")
            },
            read_images=lambda position, step: read(position, step + first[position]),
        )

    return fault


def stray_end(recording, rng):
    """All episodes but one end at home."""
    kind, seed = recording.name.removesuffix(" robot"), int(rng.integers(2**31))
    return make_recording(kind, seed, stray=int(rng.integers(24)))


def across_splits(recording, rng):
    """Copies of some episodes at the end, which are the validation split."""
    both = duplicated(recording, rng)
    count = len(recording.actions)
    return replace(both, splits=["train"] * count + ["validation"] * (len(both.actions) - count))


# By name: the fault, the finding that must name it, and the robots it is for ("all" or some of KINDS).
POSES = ("delta", "velocity")
JOINTS = ("joints", "degrees")
ALL = KINDS
FAULTS = {
    "actions one step late": (
        lambda r, g: edit(r, "actions", rolled(1)), "actions are late", ("delta", "tool", "velocity")),
    "actions two steps late": (lambda r, g: edit(r, "actions", rolled(2)), "actions are late", ALL),
    "actions three steps late": (lambda r, g: edit(r, "actions", rolled(3)), "actions are late", ALL),
    "actions five steps late": (lambda r, g: edit(r, "actions", rolled(5)), "actions are late", ALL),
    "actions one step early": (lambda r, g: edit(r, "actions", rolled(-1)), "actions are early", (*POSES, *JOINTS)),
    "actions three steps early": (lambda r, g: edit(r, "actions", rolled(-3)), "actions are early", (*POSES, *JOINTS)),
    "actions five steps early": (lambda r, g: edit(r, "actions", rolled(-5)), "actions are early", (*POSES, *JOINTS)),
    "some actions three steps late": (
        lambda r, g: edit(r, "actions", rolled(3), some(r, g)),
        "the lag between action and motion differs between episodes", (*POSES, *JOINTS)),
    "actions of other episodes": (
        lambda r, g: replace(r, actions=[g.permutation(part) for part in r.actions]),
        "actions have nothing to do with the motion", ALL),
    "two conventions mixed": (to_other_kind, "two action conventions are mixed", (*POSES, *JOINTS)),
    "millimetres in some actions": (
        lambda r, g: edit(r, "actions", times(1000.0, slice(0, 6)), some(r, g)), "units differ between episodes",
        (*POSES, *JOINTS)),
    "degrees in the actions only": (
        lambda r, g: edit(r, "actions", times(180 / np.pi, slice(0, 6))), "actions and states are in different units",
        ("joints",)),
    "millimetres in some states": (
        lambda r, g: edit(r, "states", times(1000.0, slice(None)), some(r, g)),
        "units of the state differ between episodes", ALL),
    "actions turned in some episodes": (
        lambda r, g: edit(r, "actions", times(-1.0, slice(0, 6)), some(r, g)),
        "the sign of the actions differs between episodes", POSES),
    "one axis turned in some episodes": (
        lambda r, g: edit(r, "actions", times(-1.0, [1]), some(r, g)),
        "the sign of some dimensions differs between episodes", (*POSES, *JOINTS)),
    "one axis turned": (
        lambda r, g: edit(r, "actions", times(-1.0, [1])), "some actions point against the motion", POSES),
    "two axes swapped": (
        lambda r, g: edit(r, "actions", lambda a: a[:, [1, 0, *range(2, a.shape[1])]]),
        "actions are in another order than the states", (*POSES, *JOINTS)),
    "gripper turned in some episodes": (
        lambda r, g: edit(r, "actions", flip_gripper, some(r, g)), "the gripper's sign differs between episodes", ALL),
    "gripper in percent in some episodes": (
        lambda r, g: edit(r, "actions", times(100.0, [-1]), some(r, g)),
        "the gripper's range differs between episodes", ALL),
    "gripper chatters": (chatter, "the gripper chatters", ALL),
    "dead dimension": (
        lambda r, g: edit(r, "actions", times(0.0, [2])), "constant action dimensions", ALL),
    "saturated dimension": (
        lambda r, g: edit(r, "actions", lambda a: np.column_stack(
            [a[:, :1].clip(*np.quantile(r.all_actions[:, 0], [0.3, 0.7])), a[:, 1:]])),
        "saturated action dimensions", ALL),
    "tiny dimension": (
        lambda r, g: edit(r, "actions", lambda a: np.column_stack([a[:, :4], 1e-5 * a[:, 4:5], a[:, 5:]])),
        "tiny action ranges", ALL),
    "spike in the actions": (spikes("actions"), "outliers in the actions", ALL),
    "spike in the states": (spikes("states"), "outliers in the states", ALL),
    "steps dropped, with timestamps": (lambda r, g: drop_steps(r, g, True), "steps were dropped", ALL),
    "steps dropped, without timestamps": (lambda r, g: drop_steps(r, g, False), "steps were dropped", POSES),
    "wrong fps": (lambda r, g: replace(r, fps=10.0), "timestamps disagree with fps", ALL),
    "waiting": (lambda r, g: holding_still(r, 25, 0), "many idle steps", ALL),
    "duplicates": (duplicated, "duplicate episodes", ALL),
    "duplicates in the validation split": (across_splits, "the same episodes in several splits", ALL),
    "Euler order swapped in some episodes": (
        lambda r, g: edit(r, "actions", lambda a: a[:, [0, 1, 2, 5, 4, 3, 6]], some(r, g)),
        "the order of the dimensions differs between episodes", ("target xyz", "target zyx", "target xyz degrees")),
    "Euler order swapped": (
        lambda r, g: edit(r, "actions", lambda a: a[:, [0, 1, 2, 5, 4, 3, 6]]),
        "actions are in another order than the states", ("target xyz", "target zyx", "target xyz degrees")),
    "Euler angles in degrees in the actions only": (
        lambda r, g: edit(r, "actions", times(180 / np.pi, slice(3, 6))),
        "actions and states are in different units", ("target xyz", "target zyx")),
    "yaw jumps at pi": (wrapped([5]), "angles in the state jump by a full turn", ("xyz", "intrinsic xyz")),
    "yaw in degrees jumps at 180": (
        wrapped([5], 180 / np.pi), "angles in the state jump by a full turn", ("xyz degrees",)),
    "rotation vectors turn round at pi": (
        around_pi, "rotation vectors in the state turn round at pi", ("delta", "velocity")),
    "quaternions change their sign": (
        negated, "quaternions in the state change their sign", ("xyzw", "target xyzw")),
    "two quaternion orders mixed": (
        lambda r, g: edit(r, "states", lambda s: s[:, [0, 1, 2, 6, 3, 4, 5, *range(7, s.shape[1])]], some(r, g)),
        "two orders of the quaternion are mixed", ("xyzw", "target xyzw")),
    "gripper opens too early in some episodes": (
        lambda r, g: released(r, g, some(r, g, 0.08), -8), "episodes end in another way than the others", ALL),
    "gripper stays open in some episodes": (
        lambda r, g: released(r, g, some(r, g, 0.08), 0),
        "the gripper closes more or less often than in the other episodes", ALL),
    "gripper opens at half of the ends": (
        lambda r, g: released(r, g, set(range(12)), -8), "one instruction ends in two ways", ALL),
    "some episodes without their end": (cut_off(1), "episodes end in another way than the others", ALL),
    "some episodes without their beginning": (cut_off(0), "episodes start in another way than the others", ALL),
    "one episode ends elsewhere": (stray_end, "episodes end in another way than the others", ALL),
    "an instruction for two cubes, with one gripped": (
        lambda r, g: replace(r, texts=[["push the two cubes"] if t == [TASKS[0]] else t for t in r.texts]),
        "the instruction counts otherwise than the gripper", ALL),
    "short episodes": (
        lambda r, g: replace(r, **{
            name: [part[:5] if place < 4 else part for place, part in enumerate(getattr(r, name))]
            for name in ("states", "actions", "timestamps")}),
        "episodes shorter than a chunk", ALL),
    "several spellings": (
        lambda r, g: replace(r, texts=[[t[0].upper() + "."] if place < 5 else t for place, t in enumerate(r.texts)]),
        "instructions that differ only in writing", ALL),
    "black camera": (through(np.zeros_like), "black frames", ALL),
    "over-exposed camera": (through(lambda f: np.full_like(f, 255), 1), "over-exposed frames", ALL),
    "front camera frozen": (frozen(0), "a frozen camera", ALL),
    "wrist camera frozen": (frozen(1), "a frozen camera", ALL),
    "camera at half the rate": (half_rate_frames, "repeated frames", ALL),
    "frames two steps late": (late_frames(2), "frames and states are of different moments", ALL),
    "frames four steps late": (late_frames(4), "frames and states are of different moments", ALL),
    "frames three steps early": (late_frames(-3), "frames and states are of different moments", ALL),
    "frames three steps late, two arms": (
        late_frames(3), "frames and states are of different moments", (TWO_ARMS,)),
    "cameras swapped in some episodes": (
        lambda r, g: edit_frames(r, lambda frames, *_: frames[::-1], some(r, g)),
        "cameras are swapped in some episodes", ALL),
    "one picture at all starts": (
        lambda r, g: replace(r, read_images=lambda position, step: r.read_images(position if step else 0, step)),
        "objects are in the same places in all episodes", ALL),
    "one scene for each instruction": (
        lambda r, g: edit_frames(r, lambda frames, position, step: [
            frame if position % 2 else (frame // 2 + 100).astype(np.uint8) for frame in frames]),
        "the picture alone tells the instruction", ALL),
    "upside down in some episodes": (
        through(lambda f: f[::-1, ::-1]), "frames are upside down in some episodes", ALL),
    "mirrored in some episodes": (through(lambda f: f[:, ::-1]), "frames are mirrored in some episodes", ALL),
    "flipped in some episodes": (through(lambda f: f[::-1]), "frames are flipped vertically in some episodes", ALL),
    "BGR in some episodes": (through(lambda f: f[..., ::-1]), "frames are in BGR order in some episodes", ALL),
    "letterboxed frames": (lambda r, g: edit_frames(r, letterboxed), "frames have empty borders", ALL),
    "frames of two sizes": (through(lambda f: f[:-8]), "frames of several sizes", ALL),
}  # fmt: skip
