"""Whatever a client sends, no input crashes the server, none makes it hang, and only observations get actions."""

import json
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_fixtures import receive, recorded_observation, request, server_thread
from websockets.exceptions import ConnectionClosed

from vla_adapter_hf.serving.app import VLLM_OMNI_PATH
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.wire import pack


SECONDS = 10.0
FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2_500)
SMALL = np.zeros((8, 8, 3), np.uint8)
GOOD = {"image": SMALL, "wrist_image": SMALL, "state": np.zeros(8), "prompt": "go"}

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
ARRAYS = st.builds(
    lambda shape, dtype: np.zeros(shape, dtype),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(["uint8", "float32", "float64", "int64", "bool", "float16"]),
)
BROKEN_ARRAYS = st.fixed_dictionaries(
    {
        b"__ndarray__": st.just(True),
        b"data": st.binary(max_size=40) | PLAIN,
        b"dtype": st.sampled_from(["<f4", "|u1", "|O", "|V8", "<U2"]) | PLAIN,
        b"shape": st.lists(st.integers(-2, 50), max_size=7) | PLAIN,
    }
)
IMAGES = st.fixed_dictionaries(
    {"__image__": st.just(True), "format": st.sampled_from(["png", "jpeg", "raw", "gif"]) | PLAIN,
        "data": st.binary(max_size=60) | PLAIN}
)  # fmt: skip
VALUES = st.recursive(
    PLAIN | ARRAYS | BROKEN_ARRAYS | IMAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    [
        "image",
        "wrist_image",
        "images",
        "state",
        "states",
        "prompt",
        "task",
        "endpoint",
        "session_id",
        "age",
        "timestamp",
    ]
    + ["request_id", "observation/image", "joint_position", "gripper_position", "type", "payload", "seq"]
)
# An observation with one thing that no observation has. Everything else about it is right.
WRONG = (
    st.sampled_from(["image", "wrist_image"]).flatmap(lambda name: st.tuples(st.just(name),
        PLAIN | BROKEN_ARRAYS | IMAGES))
    | st.tuples(st.just("state"), PLAIN | BROKEN_ARRAYS | st.lists(PLAIN, max_size=7))
    | st.tuples(st.just("prompt"), st.none() | st.integers() | ARRAYS)
    | st.tuples(st.just("age"), st.text(max_size=5) | st.just(float("nan")) | st.floats(max_value=-2))
)  # fmt: skip


def written(value):
    """msgpack of whatever; what msgpack itself cannot write is replaced by nothing."""
    try:
        return pack(value)
    except (TypeError, ValueError, OverflowError):
        return msgpack.packb(None)


def cut(parts):
    message, share = parts
    return message[: int(share * len(message))]


WRONG_ENDPOINT = st.text(max_size=8).filter(lambda text: text not in ("infer", "reset"))
WRONG_OBSERVATIONS = WRONG.map(lambda change: written({**GOOD, change[0]: change[1]}))
ANY_MAPS = st.dictionaries(NAMES, VALUES, max_size=5).map(written)
CUT = st.tuples(st.just(pack(GOOD)), st.floats(0, 0.999)).map(cut)
MESSAGES = (
    WRONG_ENDPOINT.map(lambda name: pack({**GOOD, "endpoint": name}))
    | st.binary(max_size=200)
    | CUT
    | WRONG_OBSERVATIONS
    | ANY_MAPS
    | VALUES.map(written)
)
BODIES = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["full_image", "wrist_image", "state", "instruction", "encoded", "images", "__numpy__",
            "dtype", "shape"]),
        inner,
        max_size=4,
    ),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())  # fmt: skip


@pytest.fixture(scope="module")
def server(embedded_policy):
    with server_thread(embedded_policy, ServeSettings()) as running:
        yield running
        # After all of it an honest client is served as ever.
        with running.websocket(VLLM_OMNI_PATH) as websocket:
            receive(websocket)
            websocket.send(pack(recorded_observation()))
            assert receive(websocket)["actions"].shape == (8, 7)


def check_openpi(server, message):
    with server.websocket() as websocket:
        receive(websocket)
        websocket.send(message)
        reply = receive(websocket, SECONDS)
        assert isinstance(reply, str) or reply == {"status": "reset successful"}, reply


def check_vllm_omni(server, message):
    with server.websocket(VLLM_OMNI_PATH) as websocket:
        receive(websocket)
        websocket.send(message)
        reply = receive(websocket, SECONDS)
        assert reply.get("type") == "error" or reply == {"status": "reset successful"}, reply


def check_vla_eval(server, message):
    """Episodes begin and end without an answer, so a hello comes after whatever it is, and must be answered."""
    hello = {"type": "hello", "payload": {}, "seq": 99, "timestamp": 0.0}
    with server.websocket("/vla-eval") as websocket:
        websocket.send(message)
        websocket.send(pack(hello))
        end = time.monotonic() + SECONDS
        while True:
            reply = receive(websocket, max(end - time.monotonic(), 0.1))
            assert reply["type"] in ("error", "hello"), reply
            if reply["seq"] == 99:
                return


def check_act(server, path, body):
    answer = request(server.url + path, body)
    assert 400 <= answer.status < 500 and json.loads(answer.body)["type"] == "error", answer


def with_type(payload):
    return msgpack.packb(
        {"type": "observation", "payload": msgpack.unpackb(payload, strict_map_key=False), "seq": 1, "timestamp": 0}
    )


@pytest.mark.parametrize(
    "runs", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["few", "many"]
)
class TestNoInputIsAnsweredWithActions:
    def test_openpi(self, server, runs):
        given(MESSAGES)(runs(lambda message: check_openpi(server, message)))()

    def test_vllm_omni(self, server, runs):
        given(MESSAGES)(runs(lambda message: check_vllm_omni(server, message)))()

    def test_vla_eval(self, server, runs):
        inside = (WRONG_OBSERVATIONS | ANY_MAPS).map(with_type)
        given(MESSAGES | inside)(runs(lambda message: check_vla_eval(server, message)))()

    @pytest.mark.parametrize("path", ["/act", "/try"])
    def test_http(self, server, runs, path):
        given(BODIES)(runs(lambda body: check_act(server, path, body)))()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_decoders_stand_a_million_inputs_that_look_for_new_lines():
    pytest.importorskip("atheris", reason="pip install atheris")
    command = [sys.executable, str(Path(__file__).with_name("fuzz_decoders.py")), "-runs=1000000"]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout[-2_000:] + run.stderr[-5_000:]
    assert "Done 1000000 runs" in run.stderr


def test_a_client_that_vanishes_in_the_middle_of_a_message_harms_nobody(server):
    for _ in range(20):
        with server.websocket() as websocket:
            receive(websocket)
            websocket.socket.sendall(b"\x82\xff" + b"\0" * 12)  # a frame that says it is longer than what follows
            websocket.socket.close()
    with server.websocket() as websocket:
        assert receive(websocket)["model"] == "vla-adapter"


@pytest.mark.parametrize(
    "handshake",
    [b"\0" * 64, b"GET / HTTP\r\n\r\n", b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"],
)
def test_what_is_no_http_is_closed(server, handshake):
    import socket

    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as raw:
        raw.sendall(handshake)
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")


def test_text_frames_get_an_error(server):
    with server.websocket() as websocket:
        receive(websocket)
        websocket.send("hello?")
        assert receive(websocket) == "invalid: a message must be binary msgpack, got text."
        with pytest.raises(ConnectionClosed):
            websocket.recv(timeout=SECONDS)
