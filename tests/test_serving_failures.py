"""Killed clients, a killed server and a full queue: nothing is lost, and nothing wrong is executed."""

import signal
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_fixtures import ServerProcess, free_port, receive, recorded_observation, server_thread
from test_serving_process import RecordedArm, ask
from test_serving_server import (
    BATCH_TOLERANCE,
    ask_once,
    metric,
    model_is_busy,
    predicted,
    seen_by_vla_eval,
    send_to_vla_eval,
    variants,
    wait_until,
)

from vla_adapter_hf.robot import LoopSettings, run
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.serving.app import VLLM_OMNI_PATH
from vla_adapter_hf.serving.client import PolicyClient
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.wire import pack


@pytest.fixture(scope="module")
def observation():
    return recorded_observation()


def kill(websocket) -> None:
    """What the kernel does for a killed client: the connection is reset, without a word."""
    websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    websocket.socket.close()


def expected_of(policy, one) -> np.ndarray:
    return get_robot("libero").to_environment(predicted(policy, one))


def test_a_client_that_is_killed_while_it_waits_harms_nobody_and_frees_its_session(embedded_policy, observation):
    asked = variants(observation, 3)
    with server_thread(embedded_policy, ServeSettings(max_batch=4)) as running, ThreadPoolExecutor(3) as robots:
        engine = running.services.engine
        victim = running.websocket(VLLM_OMNI_PATH).__enter__()
        receive(victim)
        with model_is_busy(running, observation):
            victim.send(pack({**observation, "session_id": "arm"}))
            replies = [robots.submit(ask_once, running, one) for one in asked]
            wait_until(lambda: engine._queue.qsize() == 4)
            kill(victim)
        for reply, one in zip(replies, asked, strict=True):
            np.testing.assert_allclose(
                reply.result(30)["actions"], expected_of(embedded_policy, one), atol=BATCH_TOLERANCE
            )
        wait_until(lambda: metric(running, 'vla_adapter_connections{protocol="vllm-omni"}') == 0)
        again = ask_once(running, {**observation, "session_id": "arm"})
        np.testing.assert_allclose(again["actions"], expected_of(embedded_policy, observation), atol=BATCH_TOLERANCE)
        assert engine.waiting == 0 and engine._answering == 0


def test_a_killed_harness_counts_as_no_error_and_leaves_no_traceback(embedded_policy, observation, caplog, capfd):
    with server_thread(embedded_policy, ServeSettings()) as running:
        victim = running.websocket("/vla-eval").__enter__()
        with model_is_busy(running, observation):
            send_to_vla_eval(victim, "observation", seen_by_vla_eval(observation), 1)
            wait_until(lambda: running.services.engine._queue.qsize() == 1)
            kill(victim)
        wait_until(lambda: metric(running, 'vla_adapter_connections{protocol="vla-eval"}') == 0)
        assert metric(running, "vla_adapter_errors_total") == 0
    assert not caplog.records and "Traceback" not in capfd.readouterr().err


def test_a_closed_client_ends_its_query_and_frees_its_session(embedded_policy, observation):
    """As a loop does that ends while the policy thinks: the query's thread is left behind."""
    with server_thread(embedded_policy, ServeSettings()) as running, ThreadPoolExecutor(1) as robots:
        url = f"ws://127.0.0.1:{running.port}"
        with model_is_busy(running, observation):
            with PolicyClient(url, session="arm") as client:
                left = robots.submit(ask, client, observation)
                wait_until(lambda: running.services.engine._queue.qsize() == 1)
            with pytest.raises(ConnectionError, match="the client was closed before an answer came"):
                left.result(10)
        with PolicyClient(url, session="arm", give_up_after=10) as another:
            assert ask(another, observation).actions.shape == (8, 7)


def test_a_closed_client_does_not_come_back_after_an_outage(embedded_policy, observation):
    with ThreadPoolExecutor(1) as robots:
        with server_thread(embedded_policy, ServeSettings()) as running:
            client = PolicyClient(f"ws://127.0.0.1:{running.port}", session="arm")
        left = robots.submit(ask, client, observation)
        wait_until(lambda: client._connection is None)
        client.close()
        with pytest.raises(ConnectionError, match="the client was closed before an answer came"):
            left.result(10)


def test_a_client_asks_again_while_the_queue_is_full_and_gets_its_own_answer(embedded_policy, observation):
    one, two = variants(observation, 3)[1:]
    with (
        server_thread(embedded_policy, ServeSettings(max_queue=1, max_batch=1)) as running,
        PolicyClient(f"ws://127.0.0.1:{running.port}", timeout=60, give_up_after=60) as client,
        ThreadPoolExecutor(2) as robots,
    ):
        with model_is_busy(running, observation):
            waiting = robots.submit(ask_once, running, one)
            wait_until(lambda: running.services.engine._queue.qsize() == 1)
            refused = robots.submit(ask, client, two)
            wait_until(lambda: metric(running, 'vla_adapter_errors_total{kind="busy"') >= 2)
        answer = refused.result(60)
        assert answer.attempts > 2
        np.testing.assert_allclose(answer.actions, expected_of(embedded_policy, two), atol=BATCH_TOLERANCE)
        np.testing.assert_allclose(
            waiting.result(30)["actions"], expected_of(embedded_policy, one), atol=BATCH_TOLERANCE
        )


def test_an_arm_holds_while_its_server_is_killed_and_goes_on_with_the_next(observation):
    port, steps, starting = free_port(), [], []
    with ServerProcess(port) as first, ServerProcess(port) as second:
        first.start()

        def on_step(step) -> bool:
            steps.append(step)
            if not starting and step.source == "chunk" and step.query == 1:
                first.process.send_signal(signal.SIGKILL)
                first.process.communicate()
                starting.append(threading.Thread(target=second.start))
                starting[0].start()
            return step.query >= 3

        arm = RecordedArm(observation)
        settings = LoopSettings(fps=10, late_after=0.5, give_up_after=120, max_steps=2000)
        with PolicyClient(f"ws://127.0.0.1:{port}", session="arm", give_up_after=120) as client:
            chunk = ask(client, observation).actions
            report = run(client, arm, observation["prompt"], settings, on_step=on_step)
        starting[0].join()
    assert report.ended_by == "on_step" and report.late > 0
    last = None
    for step in steps:
        if step.source == "chunk":  # whole chunks in their order, whichever server they came from
            np.testing.assert_allclose(step.action, chunk[step.position], atol=1e-5)
            last = step.action
        elif last is not None:  # no motion, the gripper as it is
            assert step.source == "hold" and not step.action[:6].any() and step.action[6] == last[6]
    played = [(step.query, step.position) for step in steps if step.source == "chunk"]
    assert played == [(index // 8, index % 8) for index in range(len(played))]
