"""Coverage-guided fuzzing of what reads a client's message: inputs that reach new lines are kept and changed further.

    pip install atheris
    python tests/fuzz_decoders.py -runs=1000000

Nothing but a `ServingError` may leave the decoders, and an observation that comes out of them fits the model. The
options are libFuzzer's. A folder that is given keeps the inputs that were found.
"""

import io
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import atheris
import msgpack
import numpy as np
from PIL import Image


with atheris.instrument_imports(include=["vla_adapter_hf.serving", "vla_adapter_hf.utils.frames"]):
    from vla_adapter_hf.serving import observations, wire
    from vla_adapter_hf.serving.errors import ServingError

CAMERAS, STATE_DIM = ("image", "wrist_image"), 8
READER = observations.ObservationReader(CAMERAS, STATE_DIM, {"front": "image"})
MAX_BYTES = 4096  # of a frame; small, so that messages meet the limit
SECONDS = 1  # for one input

# The first byte of an input says what reads the rest. CHANGED changes a right message and keeps msgpack whole.
MSGPACK, JSON, PICTURE, CHANGED = (bytes([kind]) for kind in range(4))
NAMES = sorted(
    {name for row in observations.SAME_VIEW for name in row}
    | {f"{prefix}image" for prefix in observations.PREFIXES}
    | {*observations.INSTRUCTION_KEYS, *observations.STATE_KEYS, observations.JOINTS, observations.GRIPPER}
    | {"front", "images", "age", "timestamp", "request_id"}
)
# How an array, a number and a picture are written, and what their entries usually hold.
FORMS = [
    (b"__ndarray__", b"data", b"dtype", b"shape"),
    ("__ndarray__", "data", "dtype", "shape"),
    (b"__npgeneric__", b"data", b"dtype"),
    ("__image__", "format", "data", "dtype", "shape"),
    ("agentview", "wrist", "front"),
]
USUAL = {
    "data": [b"\0" * 3, b"\0" * 8 * STATE_DIM, 0.5],
    "dtype": ["|u1", "<f4", "<f8", ">f8", "<f2", "<i8", "|b1", "|O", "<U2"],
    "shape": [[1, 1, 3], [STATE_DIM], [2, STATE_DIM // 2], [3], []],
    "format": ["png", "jpeg", "raw"],
}
PLAIN = [None, True, 0, 1, math.nan, math.inf, "go", ""]


def read_input(data: bytes) -> None:
    """Reads one message of a client.

    Raises:
        AssertionError: an observation that does not fit the model.
    """
    kind, message = data[:1], data[1:]
    try:
        if kind == PICTURE:
            check_frame(wire.EncodedImage(message))
            return
        if kind == CHANGED:
            message = changed_message(message)
        value = wire.from_json(message, MAX_BYTES) if kind == JSON else wire.unpack(message, MAX_BYTES)
        observation = READER.read(value, time.monotonic())
        assert isinstance(observation.instruction, str)
        assert observation.state.shape == (STATE_DIM,) and observation.state.dtype == np.float64
        assert np.isfinite(observation.state).all()
        assert math.isfinite(observation.age) and observation.age >= 0
        assert len(observation.frames) == len(CAMERAS)
        for frame in observation.frames:
            check_frame(frame)
    except ServingError:
        pass


def check_frame(frame: np.ndarray | wire.EncodedImage) -> None:
    """A frame has three dimensions and few bytes. Its numbers are the processor's to check."""
    frame = observations.decode_image(frame, CAMERAS[0], MAX_BYTES)
    assert frame.ndim == 3
    assert frame.nbytes <= MAX_BYTES


def changed_message(data: bytes) -> bytes:
    """A right message with the changes that `data` stands for, as msgpack."""
    choices = atheris.FuzzedDataProvider(data)
    message = choices.PickValueInList(right_messages())
    for _ in range(choices.ConsumeIntInRange(0, 4)):
        message[choices.PickValueInList(NAMES)] = any_value(choices)
    return msgpack.packb(message)


def any_value(choices: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    """A value that msgpack can write, often one that looks like an array or a picture."""
    kind = choices.ConsumeIntInRange(0, 8)
    if kind >= 5 and depth < 3:
        return {name: any_entry(choices, name, depth + 1) for name in choices.PickValueInList(FORMS)}
    if kind == 4 and depth < 3:
        return [any_value(choices, depth + 1) for _ in range(choices.ConsumeIntInRange(0, STATE_DIM + 1))]
    if kind == 3:
        return choices.ConsumeIntInRange(-(2**63), 2**64 - 1)
    if kind == 2:
        return choices.ConsumeFloat()
    if kind == 1:
        return choices.ConsumeBytes(choices.ConsumeIntInRange(0, 200))
    return choices.PickValueInList(PLAIN)


def any_entry(choices: atheris.FuzzedDataProvider, name: str | bytes, depth: int) -> Any:
    """A value of an entry of this name, most often one of those that it usually holds."""
    usual = USUAL.get(name.decode() if isinstance(name, bytes) else name)
    if usual is not None and choices.ConsumeIntInRange(0, 3):
        return choices.PickValueInList(usual)
    return any_value(choices, depth)


def right_messages() -> list[dict[str, Any]]:
    """Observations in the forms in which clients write them with msgpack."""
    frame, state = np.full((4, 6, 3), 7, np.uint8), np.linspace(-1, 1, STATE_DIM)
    return [
        {"images": {name: array(frame) for name in CAMERAS}, "state": array(state), "prompt": "go", "age": 0.1},
        {f"observation/{name}": array(frame) for name in CAMERAS} | {"state": state.tolist(), "prompt": "go"},
        {"front": array(frame), "wrist": array(frame), "task": "go"}
        | {"joint_position": array(state[:7]), "gripper_position": [0.5]},
        {"images": {"agentview": picture(frame, "png"), "wrist": picture(frame, "jpeg")}}
        | {"states": array(state), "task_description": "go", "timestamp": time.time()},
    ]


def array(values: np.ndarray) -> dict[bytes, Any]:
    """An array as openpi writes it."""
    parts = {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}
    return {name.encode(): part for name, part in parts.items()}


def picture(frame: np.ndarray, kind: str) -> dict[str, Any]:
    """A picture as vla-eval writes it."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind)
    return {"__image__": True, "format": kind, "data": file.getvalue()}


def write_examples(folder: Path) -> None:
    """Right messages and a few wrong ones, for the fuzzer to begin with."""
    pixel = {"__numpy__": "BwcH", "dtype": "|u1", "shape": [1, 1, 3]}
    posted = {"full_image": pixel, "wrist_image": pixel, "state": [0.1] * STATE_DIM, "instruction": "go"}
    *messages, encoded = right_messages()
    # Numbers that are too large for a float, and frames of more than MAX_BYTES.
    posts = posted, {**posted, "state": [10**400] * STATE_DIM}, {**posted, "age": 10**400}
    large = np.zeros((40, 40, 3), np.uint8)
    pictures = *encoded["images"].values(), picture(large, "png"), picture(large, "jpeg")
    packed = *messages, encoded, {**messages[0], "images": {name: array(large) for name in CAMERAS}}
    inputs = [MSGPACK + msgpack.packb(message) for message in packed]
    inputs += [JSON + json.dumps(message).encode() for message in posts]
    inputs += [PICTURE + image["data"] for image in pictures]
    inputs.append(CHANGED + bytes(range(64)))
    for number, example in enumerate(inputs):
        (folder / f"example-{number}").write_bytes(example)


def main() -> None:
    """Ends with code 0 when all inputs were read, else after it has said which one failed."""
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    with tempfile.TemporaryDirectory() as temporary:
        for message in right_messages():
            READER.read(wire.unpack(msgpack.packb(message), MAX_BYTES), time.monotonic())  # they are right
        dictionary, found = Path(temporary) / "names", Path(temporary) / "found"
        found.mkdir()
        dictionary.write_text("".join(f'"{name}"\n' for name in NAMES), encoding="utf-8")
        write_examples(Path(folders[0]) if folders else found)
        options = [f"-dict={dictionary}", f"-timeout={SECONDS}", f"-max_len={4 * MAX_BYTES}", *sys.argv[1:]]
        atheris.Setup([sys.argv[0], *options, *([] if folders else [str(found)])], read_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
