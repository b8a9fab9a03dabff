"""`vla-adapter serve` as a process: how it starts, ends, is killed, and what its clients notice."""

import contextlib
import copy
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_fixtures import ServerProcess, free_port, receive, recorded_observation, request, server_thread
from simulator import need_simulator
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from vla_adapter_cli import app
from vla_adapter_hf.checkpoints.checksum import weights_checksum
from vla_adapter_hf.cli.serve import show
from vla_adapter_hf.serving import client as client_module
from vla_adapter_hf.serving.client import PolicyClient, PolicyError
from vla_adapter_hf.serving.server import serve
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.wire import pack


@pytest.fixture(scope="module")
def observation():
    return recorded_observation()


def ask(client, observation, **options):
    images = {name: observation[name] for name in ("image", "wrist_image")}
    return client.predict(images, observation["prompt"], observation["state"], **options)


def test_sigterm_answers_what_has_arrived_and_ends_cleanly(observation):
    with ServerProcess(free_port()) as server:
        server.start()
        robots = []
        for _ in range(3):
            robot = connect(f"ws://127.0.0.1:{server.port}/", compression=None, max_size=None, proxy=None).__enter__()
            receive(robot)
            robots.append(robot)
        for robot in robots:
            robot.send(pack(observation))
        end = time.monotonic() + 30
        while b'vla_adapter_requests_total{protocol="openpi"} 3.0' not in request(f"{server.url}/metrics").body:
            assert time.monotonic() < end
        code, output = server.stop()
        assert code == 0 and "answered first" in output and "Traceback" not in output
        for robot in robots:
            assert receive(robot)["actions"].shape == (8, 7)
            with pytest.raises(ConnectionClosed):
                robot.recv(timeout=10)


def test_a_stopping_server_takes_no_new_requests(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings()) as running, running.websocket() as websocket:
        receive(websocket)
        running.services.engine.is_stopping = True
        websocket.send(pack(observation))
        assert receive(websocket).startswith("stopping")
        assert request(f"{running.url}/healthz").status == request(f"{running.url}/health").status == 503
        assert request(f"{running.url}/act", "{}").status == 503


def test_it_stops_although_nobody_reads_its_lines_any_more(embedded_policy):
    """As where the reader of a pipe has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with server_thread(embedded_policy, ServeSettings()) as running:
        running.server.report_progress = lambda line: os.write(writer, line.encode())
        running.server.handle_exit(signal.SIGTERM, None)
        end = time.monotonic() + 20
        while not running.server.should_exit:
            assert time.monotonic() < end, "it goes on"
            time.sleep(0.02)
    os.close(writer)


def test_lines_that_nobody_reads_any_more_are_dropped(monkeypatch):
    """As with `vla-adapter serve | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        for line in ("Loading", "Serving"):
            show(line)
        monkeypatch.undo()


def test_a_client_comes_back_after_a_killed_server_and_says_how_old_the_answer_is(observation):
    port = free_port()
    with ServerProcess(port) as first, ServerProcess(port) as second:
        first.start()
        with PolicyClient(f"ws://127.0.0.1:{port}", session="arm", give_up_after=120) as client:
            before = ask(client, observation)
            assert before.attempts == 1 and before.age < 30
            first.process.send_signal(signal.SIGKILL)
            first.process.communicate()
            with ThreadPoolExecutor(1) as robot:
                waiting = robot.submit(ask, client, observation)
                time.sleep(0.5)
                assert not waiting.done()
                started = time.monotonic()
                second.start()
                after = waiting.result(60)
            assert after.attempts > 1 and after.age >= time.monotonic() - started
            np.testing.assert_allclose(after.actions, before.actions, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("robot", "calvin"), ("clip", True), ("weights", "crc32 00000000"), ("fps", 5)]
)
def test_a_client_refuses_a_server_that_came_back_with_another_policy(embedded_policy, observation, name, value):
    with server_thread(embedded_policy, ServeSettings()) as running:
        with PolicyClient(f"ws://127.0.0.1:{running.port}") as client:
            before = running.services.policy.describe()
            running.services.policy.describe = lambda: {**before, name: value}
            client.close()
            with pytest.raises(PolicyError, match=f"{name} changed"):
                ask(client, observation)


def test_other_weights_of_the_same_shape_are_known(embedded_policy):
    model = copy.deepcopy(embedded_policy.model)
    assert weights_checksum(model) == weights_checksum(embedded_policy.model)
    model.policy.fc_out.bias.data[-1] += 1e-3
    assert weights_checksum(model) != weights_checksum(embedded_policy.model)


class SilentOnce:
    """A way to a server that passes on what it gets. Of its first connection it passes on nothing when asked to."""

    def __init__(self, port: int) -> None:
        self.port, self.connections, self.is_silent = port, 0, threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self.port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(*ends, self.connections == 1), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, may_be_silent: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if not (may_be_silent and self.is_silent.is_set()):
                    target.sendall(data)


def test_a_connection_that_falls_silent_is_noticed_before_the_timeout(embedded_policy, observation, monkeypatch):
    monkeypatch.setattr(client_module, "PING_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "PONG_SECONDS", 0.3)
    with server_thread(embedded_policy, ServeSettings()) as running:
        way = SilentOnce(running.port)
        with contextlib.closing(way.listener), PolicyClient(way.url, timeout=60) as client:
            ask(client, observation)
            way.is_silent.set()
            answer = ask(client, observation)
            assert answer.attempts == 2 and answer.age < 30 and way.connections == 2
            assert client.last_error is None


def test_a_client_has_the_names_of_joints_and_the_frame_rate_that_the_checkpoint_has(embedded_policy, monkeypatch):
    names = [f"joint_{index}.pos" for index in range(7)]
    monkeypatch.setattr(embedded_policy.config, "action_names", names)
    monkeypatch.setattr(embedded_policy.config, "fps", 20)
    with (
        server_thread(embedded_policy, ServeSettings()) as running,
        PolicyClient(f"ws://127.0.0.1:{running.port}") as client,
    ):
        assert (client.state_names, client.action_names, client.fps) == (None, names, 20)


class RecordedArm:
    """A robot by LeRobot's methods that always sees the recorded observation."""

    def __init__(self, observation):
        self.seen = {name: observation[name] for name in ("image", "wrist_image")}
        self.seen |= {f"joint_{index}": float(value) for index, value in enumerate(observation["state"])}
        self.observation_features = {name: getattr(value, "shape", float) for name, value in self.seen.items()}
        self.action_features = {f"command_{index}": float for index in range(7)}
        self.sent = []

    def connect(self):
        pass

    def disconnect(self):
        pass

    def get_observation(self):
        return self.seen

    def send_action(self, action):
        self.sent.append(list(action.values()))


def test_the_loop_drives_an_arm_by_a_client(embedded_policy, observation):
    from vla_adapter_hf.robot import LoopSettings, StrategySettings, run

    arm = RecordedArm(observation)
    strategy = StrategySettings("async")
    settings = LoopSettings(fps=20, strategy=strategy, max_steps=60, late_after=30, give_up_after=60, max_age=60)
    with (
        server_thread(embedded_policy, ServeSettings()) as running,
        PolicyClient(f"ws://127.0.0.1:{running.port}", session="arm") as client,
    ):
        report = run(client, arm, observation["prompt"], settings)
        chunk = ask(client, observation).actions
    assert report.queries >= 2 and report.failures == 0
    assert len(arm.sent) >= 8
    for action in arm.sent:  # each is one of the chunk's, which is the same every time, or a blend of two
        assert chunk.min() - 1e-4 <= min(action) and max(action) <= chunk.max() + 1e-4


def test_a_client_gives_up_in_time():
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer within 1 s"):
        PolicyClient(f"ws://127.0.0.1:{free_port()}", give_up_after=1.0)
    assert 1.0 <= time.monotonic() - start < 5


def test_a_client_never_takes_a_late_answer_for_that_of_another_observation(embedded_policy, observation):
    other = {**observation, "state": observation["state"] + 0.05}
    with (
        server_thread(embedded_policy, ServeSettings()) as running,
        PolicyClient(f"ws://127.0.0.1:{running.port}") as client,
    ):
        client.timeout, client.give_up_after = 0.5, 0.6
        end = threading.Event()
        running.services.engine._predict_thread.submit(end.wait, 30)
        with pytest.raises(ConnectionError):
            ask(client, observation)
        end.set()
        client.timeout, client.give_up_after = 30, 60
        late, again = ask(client, other), ask(client, other)
    np.testing.assert_allclose(late.actions, again.actions, atol=1e-5)


def test_a_client_says_what_the_server_refuses(embedded_policy, observation):
    with (
        server_thread(embedded_policy, ServeSettings(max_age=1.0)) as running,
        PolicyClient(f"ws://127.0.0.1:{running.port}") as client,
    ):
        assert client.metadata["cameras"] == ["image", "wrist_image"]
        assert client.averaged.tolist() == [True] * 6 + [False]  # the gripper opens or closes
        assert client.delta_actions == (True,) * 6 + (False,)
        with pytest.raises(PolicyError, match="too_old"):
            ask(client, observation, observed_at=time.monotonic() - 5)
        with pytest.raises(PolicyError, match="8 numbers"):
            ask(client, {**observation, "state": np.zeros(3)})
        client.reset()
        assert ask(client, observation).actions.shape == (8, 7)
        client.metadata["robot"] = "none"  # as of a server that answers in physical units
        assert client.delta_actions is None


def test_a_second_controller_is_refused_until_the_first_leaves(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings()) as running:
        url = f"ws://127.0.0.1:{running.port}"
        with PolicyClient(url, session="arm") as first, PolicyClient(url, session="arm") as second:
            second.give_up_after = 1
            ask(first, observation)
            with pytest.raises(ConnectionError, match="another connection controls the session 'arm'"):
                ask(second, observation)
            first.close()
            second.give_up_after = 30
            assert ask(second, observation).actions.shape == (8, 7)


def test_a_wrong_key_is_an_error_at_once(embedded_policy):
    key = "a-key-of-twenty-chars"
    with server_thread(embedded_policy, ServeSettings(), api_key=key) as running:
        url = f"ws://127.0.0.1:{running.port}"
        with pytest.raises(PolicyError, match="401"):
            PolicyClient(url, api_key="wrong")
        with PolicyClient(url, api_key=key) as client:
            assert client.metadata["model"] == "vla-adapter"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "--without-key"),
        ({"cameras": {"front": "nose"}}, "no camera nose"),
        ({"unnorm_key": "other"}, "other"),
        ({"robot": "aloha"}, "14 values"),
    ],
)
def test_what_cannot_be_served_is_refused_before_the_weights_are_loaded(monkeypatch, options, message):
    monkeypatch.setattr("vla_adapter_hf.checkpoints.checkpoint.Checkpoint.load_model", pytest.fail)
    with pytest.raises(ValueError, match=message):
        serve(None, ServeSettings(**{"port": 0, **options}), report_progress=lambda line: None)


def test_a_taken_port_is_noticed_before_a_checkpoint_is_opened():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--port {port}"):
            serve("no-such-checkpoint", ServeSettings(port=port))


def test_the_command_hands_its_options_over(monkeypatch):
    given = {}
    monkeypatch.setattr(
        "vla_adapter_hf.serving.server.serve",
        lambda checkpoint, settings, report_progress: given.update(checkpoint=checkpoint, settings=settings),
    )
    words = ["--max-age", "0.5", "--clip", "--camera", "front=image", "hand=wrist_image", "--max_batch", "2"]
    result = CliRunner().invoke(app, ["serve", "somewhere", *words])
    assert result.exit_code == 0, result.output
    cameras = {"front": "image", "hand": "wrist_image"}
    assert given["checkpoint"] == "somewhere"
    assert given["settings"] == ServeSettings(max_age=0.5, clip=True, cameras=cameras, max_batch=2)
    refused = CliRunner().invoke(app, ["serve", "--camera", "front"])
    assert refused.exit_code == 1 and "--camera" in refused.output


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sync", "async"])
def test_the_loop_solves_a_libero_episode_by_a_server_in_another_process(strategy):
    need_simulator()
    from vla_adapter_hf.robot import LoopSettings, StrategySettings, run
    from vla_adapter_hf.simulation.libero.robot import LiberoRobot
    from vla_adapter_hf.simulation.libero.suite import LiberoSuite

    environment = LiberoSuite("libero_object").make(9)
    robot = LiberoRobot(environment, episode=40)
    # Slower than the robot's 20 steps a second, so that a busy machine keeps up.
    settings = LoopSettings(
        fps=4,
        strategy=StrategySettings(strategy),
        max_steps=400,
        late_after=60,
        give_up_after=120,
        max_age=60,
    )
    with ServerProcess(free_port()) as server:
        server.start()
        with PolicyClient(f"ws://127.0.0.1:{server.port}", session="libero") as client:
            report = run(client, robot, environment.instruction, settings, on_step=lambda step: robot.is_solved)
    environment.close()
    assert robot.is_solved, report.summary()
