"""A running server: every protocol gets the model's own actions, and everything else gets an error in its own form."""

import base64
import copy
import json
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import json_numpy
import numpy as np
import pytest
import torch
from serving_fixtures import receive, recorded_observation, request, server_thread
from websockets.exceptions import ConnectionClosed, InvalidStatus

from vla_adapter_hf.checkpoints.embedded import embedded_folder
from vla_adapter_hf.robots import get_robot
from vla_adapter_hf.serving.app import VLLM_OMNI_PATH
from vla_adapter_hf.serving.errors import PredictionFailed, StateOutOfRange
from vla_adapter_hf.serving.example import example_observation
from vla_adapter_hf.serving.policy import ActionRules, ServedPolicy
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.vla_eval import VlaEvalEndpoint
from vla_adapter_hf.serving.wire import pack


KEY = "a-key-of-twenty-chars"
# One row of a batch against the same row alone: float32 additions in another order.
BATCH_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def server(embedded_policy):
    with server_thread(embedded_policy, ServeSettings(max_batch=4)) as running:
        yield running


@pytest.fixture(scope="module")
def observation():
    return recorded_observation()


@pytest.fixture(scope="module")
def alone(embedded_policy, observation):
    """The actions of `predict_action` in this process, `(chunk_size, action_dim)` in physical units."""
    return predicted(embedded_policy, observation)


def predicted(policy, observation):
    inputs = policy.processor(
        images=[[observation["image"], observation["wrist_image"]]],
        text=[observation["prompt"]],
        state=observation["state"][None],
    )
    return policy.model.predict_action(**inputs)[0]


def variants(observation, count):
    """Observations that differ in frames, state and length of the instruction."""
    made = []
    for index in range(count):
        changed = dict(observation)
        changed["image"] = np.roll(observation["image"], 16 * index, axis=0)
        changed["state"] = observation["state"] + 0.01 * index
        changed["prompt"] = " ".join([observation["prompt"]] * (1 + index % 3))
        made.append(changed)
    return made


@contextmanager
def model_is_busy(running, observation):
    """The model is at work on an observation of its own until the end of the block; what else comes waits."""
    end = threading.Event()
    engine = running.services.engine
    with ThreadPoolExecutor(1) as another_robot:
        engine._predict_thread.submit(end.wait, 30)
        batches = engine.started_batches
        another = another_robot.submit(ask_once, running, observation)
        try:
            wait_until(lambda: engine.started_batches == batches + 1)
            yield another
        finally:
            end.set()


def metric(running, name):
    lines = request(f"{running.url}/metrics").body.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# Protocols


def test_openpi_gets_metadata_and_then_the_models_chunk_in_the_robots_convention(server, observation, alone):
    with server.websocket() as websocket:
        metadata = receive(websocket)
        websocket.send(
            pack(
                {f"observation/{name}": observation[name] for name in ("image", "wrist_image", "state")}
                | {"prompt": observation["prompt"], "something": "unknown"}
            )
        )
        reply = receive(websocket)
    assert (metadata["action_horizon"], metadata["action_dim"], metadata["robot"]) == (8, 7, "libero")
    assert metadata["cameras"] == ["image", "wrist_image"]
    assert reply["actions"].shape == (8, 7)
    np.testing.assert_allclose(reply["actions"], get_robot("libero").to_environment(alone), atol=BATCH_TOLERANCE)
    assert set(np.unique(reply["actions"][:, -1])) <= {-1.0, 1.0}  # the simulator's gripper, not the learnt 0...1
    assert reply["server_timing"]["infer_ms"] >= reply["policy_timing"]["infer_ms"] > 0


def test_openpi_gets_an_error_as_text_and_the_connection_is_closed(server, observation):
    with server.websocket() as websocket:
        receive(websocket)
        websocket.send(pack({**observation, "state": [1.0, 2.0]}))
        assert receive(websocket) == "invalid: state must be a list of 8 numbers, got shape (2,)."
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(timeout=10)
    assert closed.value.rcvd.code == 1011


def test_vllm_omnis_path_has_reset_and_errors_as_maps_and_stays_open(server, observation):
    with server.websocket(VLLM_OMNI_PATH) as websocket:
        assert receive(websocket)["max_action_horizon"] == 8
        websocket.send(pack({"endpoint": "reset", "session_id": "arm"}))
        assert receive(websocket) == {"status": "reset successful"}
        websocket.send(pack({"prompt": "go"}))
        error = receive(websocket)
        assert (error["type"], error["kind"], error["may_retry"]) == ("error", "invalid", False)
        websocket.send("text")
        assert receive(websocket)["kind"] == "invalid"
        websocket.send(pack({**observation, "session_id": "arm", "request_id": 7}))
        reply = receive(websocket)
    assert reply["actions"].shape == (8, 7) and reply["request_id"] == 7


@pytest.mark.parametrize("encoded", [False, True])
def test_act_answers_a_list_of_actions_in_physical_units(server, observation, alone, encoded):
    body = json_numpy.dumps(
        {
            "full_image": observation["image"],
            "wrist_image": observation["wrist_image"],
            "state": observation["state"],
            "instruction": observation["prompt"],
        }
    )
    answer = request(f"{server.url}/act", json.dumps({"encoded": body}) if encoded else body)
    actions = json.loads(answer.body)
    actions = json.loads(actions) if encoded else actions
    assert answer.status == 200
    np.testing.assert_allclose(actions, alone, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize(
    "body", ["", "no json", "[]", "{}", '{"encoded": 3}', '{"encoded": "{}", "state": []}', "null"]
)
def test_act_answers_an_error_with_a_status_and_a_message(server, body):
    answer = request(f"{server.url}/act", body)
    error = json.loads(answer.body)
    assert answer.status == 400 and error["kind"] == "invalid" and error["message"]


def test_vla_eval_gets_one_action_for_each_observation_and_a_new_chunk_for_a_new_episode(server, observation, alone):
    expected, seen = get_robot("libero").to_environment(alone), seen_by_vla_eval(observation)
    ask = send_to_vla_eval
    with server.websocket("/vla-eval") as websocket:
        ask(websocket, "hello", {"harness_version": "0.8.0"}, 1)
        hello = receive(websocket)
        assert hello["type"] == "hello" and hello["seq"] == 1 and hello["payload"]["protocol_version"] == 1
        assert hello["payload"]["observation_params"] == {
            "send_state": True, "send_wrist_image": True, "quat_no_antipodal": True,
        }  # fmt: skip
        steps = [*range(8), 0, 1]  # the chunk, and the beginning of the next
        for seq, step in enumerate(steps, 2):
            ask(websocket, "observation", seen, seq)
            answer = receive(websocket)
            assert (answer["type"], answer["seq"]) == ("action", seq)
            np.testing.assert_allclose(answer["payload"]["actions"], expected[step], atol=BATCH_TOLERANCE)
        ask(websocket, "episode_end", {}, 20)
        ask(websocket, "episode_start", {"task": {"name": "x"}}, 21)
        ask(websocket, "observation", seen, 22)
        np.testing.assert_allclose(receive(websocket)["payload"]["actions"], expected[0], atol=BATCH_TOLERANCE)
        ask(websocket, "observation", {**seen, "states": [0.0]}, 23)
        assert receive(websocket)["type"] == "error"
        ask(websocket, "observation", seen, 24)  # after an error nothing is left of the old chunk
        np.testing.assert_allclose(receive(websocket)["payload"]["actions"], expected[0], atol=BATCH_TOLERANCE)


def seen_by_vla_eval(observation):
    return {
        "images": {"agentview": observation["image"], "wrist": observation["wrist_image"]},
        "states": observation["state"],
        "task_description": observation["prompt"],
    }


def send_to_vla_eval(websocket, kind, payload, seq):
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    websocket.send(pack(message, keys_as_bytes=False))


@pytest.mark.parametrize(
    "change", [{"episode_restart": True}, {"task_description": "close the drawer"}], ids=["restart", "instruction"]
)
def test_vla_eval_gets_a_new_chunk_where_a_subtask_begins_inside_an_episode(
    server, embedded_policy, observation, change
):
    seen = seen_by_vla_eval(observation)
    new_task = {**observation, "prompt": change.get("task_description", observation["prompt"])}
    expected = get_robot("libero").to_environment(predicted(embedded_policy, new_task))
    with server.websocket("/vla-eval") as websocket:
        for seq in range(3):  # five actions of the first chunk are left
            send_to_vla_eval(websocket, "observation", seen, seq)
            receive(websocket)
        for seq, changed in enumerate([{**seen, **change}, {**seen, "task_description": new_task["prompt"]}]):
            send_to_vla_eval(websocket, "observation", changed, seq)
            answer = receive(websocket)["payload"]["actions"]
            np.testing.assert_allclose(answer, expected[seq], atol=BATCH_TOLERANCE)


def test_vla_evals_calvin_gets_motions_in_metres_and_radians(embedded_policy, observation):
    """CALVIN's simulator multiplies actions by 0.02 m and 0.05 rad; vla-eval's benchmark adds them as they are."""
    settings = ServeSettings(robot="calvin")
    policy = copy.copy(embedded_policy)
    policy.rules = ActionRules.of(embedded_policy.config, settings)
    learnt = predicted(embedded_policy, observation)
    with server_thread(policy, settings) as running, running.websocket("/vla-eval") as websocket:
        send_to_vla_eval(websocket, "hello", {"harness_version": "0.8.0"}, 1)
        gripper = receive(websocket)["payload"]["action_spec"]["gripper"]
        send_to_vla_eval(websocket, "observation", seen_by_vla_eval(observation), 2)
        action = receive(websocket)["payload"]["actions"]
        ones = VlaEvalEndpoint(running.services).in_benchmark_units(np.ones((1, 7)))
    np.testing.assert_allclose(ones, [[0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 1.0]])
    np.testing.assert_allclose(action[:3], 0.02 * learnt[0, :3], atol=0.02 * BATCH_TOLERANCE)
    assert gripper["format"] == "binary_close_negative"
    assert action[6] == (1.0 if learnt[0, 6] > 0.5 else -1.0)  # +1 opens


def test_health_is_ok_and_metrics_are_prometheus_text(server, observation):
    assert request(f"{server.url}/healthz").body == b"OK"
    assert json.loads(request(f"{server.url}/health").body) == {"status": "ok"}
    before = metric(server, 'vla_adapter_requests_total{protocol="act"}')
    errors = metric(server, 'vla_adapter_errors_total{kind="invalid",protocol="act"}')
    request(f"{server.url}/act", "{}")
    answer = request(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metric(server, 'vla_adapter_requests_total{protocol="act"}') == before + 1
    assert metric(server, 'vla_adapter_errors_total{kind="invalid",protocol="act"}') == errors + 1


def test_metrics_count_observations_and_nothing_else(server, observation):
    def counts():
        return [
            metric(server, name)
            for name in 'vla_adapter_requests_total vla_adapter_seconds_count{stage="total"}'.split()
        ]

    before = counts()
    with server.websocket("/vla-eval") as harness, server.websocket(VLLM_OMNI_PATH) as robot:
        for kind in ("hello", "episode_start"):
            send_to_vla_eval(harness, kind, {}, 1)
        receive(harness), receive(robot)
        robot.send(pack({"endpoint": "reset"}))
        assert receive(robot) == {"status": "reset successful"}
        assert request(f"{server.url}/latest?after=999999").status == 204
        assert counts() == before
        send_to_vla_eval(harness, "observation", seen_by_vla_eval(observation), 2)
        receive(harness)
    assert counts() == [count + 1 for count in before]


def test_the_queue_is_empty_again_after_an_observation_that_cannot_be_prepared(server, observation):
    assert ask_once(server, {**observation, "image": np.zeros((8, 8, 7), np.uint8)})["kind"] == "invalid"
    assert metric(server, "vla_adapter_queue_length") == 0


# Batches


def test_observations_that_wait_are_predicted_together_and_each_gets_what_it_gets_alone(
    server, embedded_policy, observation
):
    asked = variants(observation, 4)
    with ThreadPoolExecutor(4) as robots:
        with model_is_busy(server, observation):
            replies = [robots.submit(ask_once, server, one) for one in asked]
            wait_until(lambda: server.services.engine._queue.qsize() == 4)
        replies = [reply.result(30) for reply in replies]
    assert [reply["batch_size"] for reply in replies] == [4] * 4
    for reply, one in zip(replies, asked, strict=True):
        expected = get_robot("libero").to_environment(predicted(embedded_policy, one))
        np.testing.assert_allclose(reply["actions"], expected, atol=BATCH_TOLERANCE)
    assert np.abs(replies[0]["actions"] - replies[1]["actions"]).max() > 100 * BATCH_TOLERANCE


def ask_once(running, observation, path=VLLM_OMNI_PATH):
    with running.websocket(path) as websocket:
        receive(websocket)
        websocket.send(pack(observation))
        return receive(websocket)


def test_one_observation_that_fails_in_the_model_does_not_fail_its_batch(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_batch=4)) as running:
        prepare = running.services.policy.prepare

        def prepare_broken(one):
            prepared = prepare(one)
            if one.request_id == "broken":
                prepared.inputs["pixel_values"] = prepared.inputs["pixel_values"] * float("nan")
            return prepared

        running.services.policy.prepare = prepare_broken
        with ThreadPoolExecutor(2) as robots:
            with model_is_busy(running, observation):
                asked = [{**observation, "request_id": "broken"}, {**observation, "request_id": "good"}]
                replies = [robots.submit(ask_once, running, one) for one in asked]
                wait_until(lambda: running.services.engine._queue.qsize() == 2)
            broken, good = [reply.result(30) for reply in replies]
    assert broken["kind"] == PredictionFailed.kind and "not finite" in broken["message"]
    assert good["actions"].shape == (8, 7)


def test_what_became_too_old_while_a_failed_batch_is_tried_one_by_one_is_refused(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_batch=4, max_age=2.0)) as running:
        predict = running.services.policy.predict

        def slow(batch):
            if len(batch) > 1:
                raise ValueError("together they fail")
            time.sleep(2.5)
            return predict(batch)

        with ThreadPoolExecutor(2) as robots:
            with model_is_busy(running, observation):
                replies = [robots.submit(ask_once, running, observation) for _ in range(2)]
                wait_until(lambda: running.services.engine._queue.qsize() == 2)
                running.services.policy.predict = slow
            first, second = sorted((reply.result(30) for reply in replies), key=lambda reply: "kind" in reply)
    assert first["actions"].shape == (8, 7)
    assert second["kind"] == "too_old"


def test_actions_that_are_not_finite_are_refused(embedded_policy, observation):
    model = copy.deepcopy(embedded_policy.model)
    model.policy.fc_out.weight.data.fill_(float("inf"))
    settings = ServeSettings()
    policy = ServedPolicy(model, embedded_policy.processor, settings, embedded_policy.rules)
    policy.warm_up = lambda: None
    with pytest.raises(ValueError, match="not finite"):
        policy.predict([policy.prepare(policy_observation(policy, observation))])


def policy_observation(policy, observation):
    return policy.reader.read(observation, time.monotonic())


def test_a_full_queue_refuses_and_goes_on(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_queue=1, max_batch=1)) as running:
        with ThreadPoolExecutor(1) as robot:
            with model_is_busy(running, observation) as first:
                second = robot.submit(ask_once, running, observation)
                wait_until(lambda: running.services.engine._queue.qsize() == 1)
                busy = ask_once(running, observation)
                over_http = request(f"{running.url}/act", json_numpy.dumps(observation))
            assert (busy["kind"], busy["may_retry"]) == ("busy", True)
            assert over_http.status == 503 and over_http.headers["retry-after"] == "1"
            assert first.result(30)["actions"].shape == second.result(30)["actions"].shape == (8, 7)


def test_an_answer_that_takes_too_long_is_an_error_and_the_server_goes_on(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_seconds=3.0)) as running:
        with model_is_busy(running, observation) as at_work:
            assert ask_once(running, observation)["kind"] == "too_slow"
            assert at_work.result(30)["kind"] == "too_slow"
        assert "actions" in ask_once(running, observation)


def test_an_observation_that_is_too_old_or_becomes_so_in_the_queue_is_refused(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_age=2.0)) as running:
        assert ask_once(running, {**observation, "age": 2.5})["kind"] == "too_old"
        assert ask_once(running, {**observation, "timestamp": time.time() - 30})["kind"] == "too_old"
        assert ask_once(running, {**observation, "age": 0.1})["age_ms"] >= 100
        with ThreadPoolExecutor(1) as robot:
            with model_is_busy(running, observation):
                aging = robot.submit(ask_once, running, {**observation, "age": 1.9})
                wait_until(lambda: running.services.engine._queue.qsize() == 1)
                time.sleep(0.2)
            assert aging.result(30)["kind"] == "too_old"


# Safety


def test_clipping_limits_actions_to_the_training_range_and_counts(embedded_policy):
    rules = ActionRules.of(embedded_policy.config, ServeSettings(clip=True, robot="none"))
    stats = embedded_policy.config.norm_stats["libero_object"]["action"]
    actions = np.tile(np.asarray(stats["mean"]), (8, 1))
    actions[0, 0], actions[3, 1] = stats["max"][0] + 0.5, stats["min"][1] - 0.5
    chunk = rules.apply(actions)
    assert chunk.clipped == 2
    assert chunk.actions[0, 0] == stats["max"][0] and chunk.actions[3, 1] == stats["min"][1]
    untouched = ActionRules.of(embedded_policy.config, ServeSettings(robot="none")).apply(actions)
    assert untouched.clipped == 0 and np.array_equal(untouched.actions, actions)


def test_a_gripper_whose_convention_is_not_known_needs_a_robot(embedded_policy):
    config = copy.deepcopy(embedded_policy.config)
    config.norm_stats = {"my_arm": config.norm_stats["libero_object"]}
    with pytest.raises(ValueError, match="--robot"):
        ActionRules.of(config, ServeSettings())
    assert ActionRules.of(config, ServeSettings(robot="libero")).robot.name == "libero"
    assert ActionRules.of(config, ServeSettings(robot="none")).robot is None


def test_a_state_in_other_units_is_the_clients_error_in_every_protocol_on_request(embedded_policy, observation):
    millimetres = {**observation, "state": 1000 * observation["state"]}
    mean = embedded_policy.config.norm_stats["libero_object"]["proprio"]["mean"]
    with server_thread(embedded_policy, ServeSettings(out_of_range="error")) as running:
        error = ask_once(running, millimetres)
        assert error["kind"] == "out_of_range" and "units" in error["message"] and not error["may_retry"]
        with running.websocket() as openpi:
            receive(openpi)
            openpi.send(pack(millimetres))
            assert receive(openpi).startswith("out_of_range: state is far outside")
        with running.websocket("/vla-eval") as harness:
            frames = {"agentview": observation["image"], "wrist": observation["wrist_image"]}
            payload = {"images": frames, "states": millimetres["state"], "task_description": observation["prompt"]}
            message = {"type": "observation", "payload": payload, "seq": 3, "timestamp": 0.0}
            harness.send(pack(message, keys_as_bytes=False))
            answer = receive(harness)
            assert (answer["type"], answer["payload"]["kind"], answer["seq"]) == ("error", "out_of_range", 3)
        body = {"full_image": observation["image"], "wrist_image": observation["wrist_image"]}
        body |= {"state": millimetres["state"], "instruction": observation["prompt"]}
        answer = request(f"{running.url}/act", json_numpy.dumps(body), {"Content-Type": "application/json"})
        assert answer.status == 422 and json.loads(answer.body)["kind"] == "out_of_range"
        metrics = request(f"{running.url}/metrics").body.decode()
        for protocol in ("vllm-omni", "openpi", "vla-eval", "act"):
            assert f'vla_adapter_errors_total{{kind="out_of_range",protocol="{protocol}"}} 1.0' in metrics
        assert "actions" in ask_once(running, {**observation, "state": mean})


@pytest.fixture
def model_in_millimetres(embedded_policy):
    """Its statistics say that states of 200...600 are usual, so that LIBERO's, in metres, are far from them."""
    model = copy.deepcopy(embedded_policy.model)
    proprio = model.config.norm_stats["libero_object"]["proprio"]
    for name, value in (("min", 200.0), ("q01", 200.0), ("mean", 400.0), ("q99", 600.0), ("max", 600.0)):
        proprio[name] = [value] * 8
    return model


def test_warming_up_does_not_use_up_the_warning_of_a_wrong_unit(
    model_in_millimetres, embedded_policy, observation, caplog
):
    policy = ServedPolicy(model_in_millimetres, embedded_policy.processor, ServeSettings(), embedded_policy.rules)
    policy.warm_up()
    assert "far outside" not in caplog.text
    policy.predict([policy.prepare(policy_observation(policy, observation))])
    assert "state is far outside the range of the training data" in caplog.text


def test_a_model_in_other_units_than_the_example_starts_where_a_wrong_unit_is_an_error(
    model_in_millimetres, embedded_policy, observation
):
    settings = ServeSettings(out_of_range="error")
    policy = ServedPolicy(model_in_millimetres, embedded_policy.processor, settings, embedded_policy.rules)
    policy.warm_up()
    with pytest.raises(StateOutOfRange, match="far outside"):
        policy.prepare(policy_observation(policy, observation))
    assert np.array_equal(example_observation(policy.config).state, [400.0] * 8)  # the page's


def test_a_processor_with_other_settings_than_the_models_is_refused(embedded_policy, observation):
    processor = copy.deepcopy(embedded_policy.processor)
    processor.image_processor.do_center_crop = True
    policy = ServedPolicy(embedded_policy.model, processor, ServeSettings(), embedded_policy.rules)
    with pytest.raises(ValueError, match="crop"):
        policy.warm_up()


def test_a_session_has_one_controller_until_it_leaves(server, observation):
    with server.websocket(VLLM_OMNI_PATH) as first, server.websocket(VLLM_OMNI_PATH) as second:
        receive(first), receive(second)
        first.send(pack({**observation, "session_id": "arm"}))
        assert "actions" in receive(first)
        second.send(pack({**observation, "session_id": "arm"}))
        assert receive(second)["kind"] == "session_taken"
        second.send(pack({**observation, "session_id": "other arm"}))
        assert "actions" in receive(second)
        first.close()
        wait_until(lambda: "arm" not in server.services.sessions._controllers)
        second.send(pack({**observation, "session_id": "arm"}))
        assert "actions" in receive(second)


@pytest.mark.parametrize("name", ["", "x" * 129, 3, ["a"]])
def test_a_session_needs_a_short_name(server, observation, name):
    assert ask_once(server, {**observation, "session_id": name})["kind"] == "invalid"


def test_connections_over_the_limit_are_refused_before_they_open(embedded_policy):
    with server_thread(embedded_policy, ServeSettings(max_connections=1)) as running:
        with running.websocket() as websocket:
            receive(websocket)
            for path in ("/", "/vla-eval", VLLM_OMNI_PATH):
                with pytest.raises(InvalidStatus) as refused:
                    running.websocket(path)
                assert refused.value.response.status_code == 503
            assert request(f"{running.url}/healthz").status == 200
        wait_until(lambda: running.services.sessions._connections == 0)
        with running.websocket() as websocket:
            assert receive(websocket)["model"] == "vla-adapter"


def test_messages_over_the_limit_of_bytes_are_refused_in_every_protocol(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings(max_message_mb=0.5, max_frame_mb=0.2)) as running:
        for path in ("/", "/vla-eval", VLLM_OMNI_PATH):
            with running.websocket(path) as websocket, pytest.raises(ConnectionClosed) as closed:
                websocket.send(b"\0" * 600_000)
                while True:
                    websocket.recv(timeout=10)
            assert closed.value.rcvd.code == 1009
        assert request(f"{running.url}/act", b"\0" * 600_000).status == 413
        assert request(f"{running.url}/try", b"\0" * 600_000).status == 413
        larger = {**observation, "image": np.zeros((300, 300, 3), np.uint8)}
        assert ask_once(running, larger)["kind"] == "too_large"
        assert request(f"{running.url}/act", json_numpy.dumps(larger)).status == 413
        assert "actions" in ask_once(running, observation)


def test_a_body_that_never_arrives_is_given_up(embedded_policy):
    with server_thread(embedded_policy, ServeSettings(max_seconds=0.3)) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as slow:
            slow.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(10)
            assert slow.recv(4096).startswith(b"HTTP/1.1 504")


@pytest.mark.parametrize(
    "parts", [[], [b"GET /hea"], [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /hea"]]
)
def test_a_connection_without_a_whole_request_is_closed_and_makes_room(embedded_policy, observation, parts):
    with server_thread(embedded_policy, ServeSettings()) as running:
        running.server.config.timeout_keep_alive = 0.2
        with running.websocket() as robot, socket.create_connection(("127.0.0.1", running.port)) as silent:
            receive(robot)
            silent.settimeout(5)
            for part in parts:
                silent.sendall(part)
                if part.endswith(b"\r\n\r\n"):
                    assert silent.recv(4096).startswith(b"HTTP/1.1 200")
            while silent.recv(4096):
                pass
            robot.send(pack(observation))  # a websocket may be silent
            assert receive(robot)["actions"].shape == (8, 7)


def test_the_key_is_asked_for_everywhere_but_in_health(embedded_policy, observation):
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    with server_thread(embedded_policy, ServeSettings(), api_key=KEY) as running:
        for path in ("/", "/metrics", "/metadata", "/latest", "/example"):
            answer = request(running.url + path)
            assert answer.status == 401 and "Basic" in answer.headers["www-authenticate"]
            assert request(running.url + path, headers={"Authorization": f"Api-Key {KEY}x"}).status == 401
            assert request(running.url + path, headers={"Authorization": f"Api-Key {KEY}"}).status in (200, 204)
        assert request(f"{running.url}/act", "{}").status == 401
        assert request(f"{running.url}/healthz").status == request(f"{running.url}/health").status == 200
        for path in ("/", "/vla-eval", VLLM_OMNI_PATH):
            with pytest.raises(InvalidStatus) as refused:
                running.websocket(path)
            assert refused.value.response.status_code == 401
            for header in (f"Api-Key {KEY}", f"Bearer {KEY}", f"Basic {basic}"):
                with running.websocket(path, additional_headers={"Authorization": header}) as websocket:
                    websocket.ping().wait(10)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://127.0.0.1:1"])
def test_other_websites_are_refused(server, origin):
    assert request(f"{server.url}/metadata", headers={"Origin": origin}).status == 403
    with pytest.raises(InvalidStatus) as refused:
        server.websocket(additional_headers={"Origin": origin})
    assert refused.value.response.status_code == 403


def test_a_name_that_was_pointed_at_this_machine_is_refused(server):
    assert request(f"{server.url}/metadata", headers={"Host": f"evil.example:{server.port}"}).status == 403
    assert request(f"{server.url}/metadata", headers={"Host": f"localhost:{server.port}"}).status == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70_000}, "--port"),
        ({"max_batch": 0}, "--max-batch"),
        ({"max_age": -1.0}, "--max-age"),
        ({"max_seconds": float("nan")}, "--max-seconds"),
        ({"resize": "squeeze"}, "--resize"),
        ({"robot": "r2d2"}, "--robot"),
        ({"device": "cuda:99"}, "--device"),
        ({"tls_certificate": "only.pem"}, "belong together"),
        ({"tls_certificate": "none.pem", "tls_key": "none.pem"}, "cannot be used"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_option(options, message):
    with pytest.raises(ValueError, match=message):
        ServeSettings(**options)


def test_another_host_needs_a_key_or_to_be_said_twice():
    with pytest.raises(ValueError, match="--without-key"):
        ServeSettings(host="0.0.0.0").check_access(None)
    ServeSettings(host="0.0.0.0").check_access(KEY)
    ServeSettings(host="0.0.0.0", without_key=True).check_access(None)
    for host in ("127.0.0.1", "::1", "localhost"):
        ServeSettings(host=host).check_access(None)


@pytest.mark.parametrize("key", ["", "short", "x" * 15, "spaces in the middle of it", "ключ-достаточной-длины"])
def test_a_key_that_is_weak_is_refused(monkeypatch, key):
    from vla_adapter_hf.serving.settings import API_KEY_VARIABLE, api_key_from_environment

    monkeypatch.setenv(API_KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=API_KEY_VARIABLE):
        api_key_from_environment()


def test_tls_serves_wss_to_a_client_that_knows_the_certificate(embedded_policy, observation, tmp_path):
    import shutil
    import ssl

    from vla_adapter_hf.serving.client import PolicyClient

    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test")
    files = {"tls_certificate": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-out", str(files["tls_certificate"]), "-keyout", str(files["tls_key"])]
    subprocess.run(command, check=True, capture_output=True)
    with server_thread(embedded_policy, ServeSettings(**files)) as running:
        context = ssl.create_default_context(cafile=files["tls_certificate"])
        with PolicyClient(f"wss://localhost:{running.port}", tls=context) as client:
            images = {name: observation[name] for name in ("image", "wrist_image")}
            assert client.predict(images, observation["prompt"], observation["state"]).actions.shape == (8, 7)
        with pytest.raises(ConnectionError, match="certificate"):
            PolicyClient(f"wss://localhost:{running.port}", give_up_after=0.2)


def embedded_with(settings):
    with embedded_folder() as folder:
        return ServedPolicy.load(str(folder / "checkpoint"), settings)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"dtype": "bfloat16"}, 0.1), ({"quantize": "int8"}, 0.5), ({"resize": "pad"}, BATCH_TOLERANCE)],
    ids=["bfloat16", "int8", "padded"],
)
def test_the_model_is_loaded_as_the_settings_say(embedded_policy, observation, options, tolerance):
    policy = embedded_with(ServeSettings(**options))
    (chunk,) = policy.predict([policy.prepare(policy_observation(policy, observation))])
    arm = slice(0, 6)  # the gripper is a decision, which rounding may turn
    difference = np.abs(chunk.actions[:, arm] - predicted(embedded_policy, observation)[:, arm]).max()
    assert difference < tolerance
    if "dtype" in options:
        assert policy.model.dtype == torch.bfloat16
    if "quantize" in options:
        assert "Int8" in type(policy.model.language_model.layers[0].mlp.up_proj.weight).__name__


def test_a_compiled_model_predicts_batches_of_a_few_sizes_with_the_same_actions(embedded_policy, observation):
    model = copy.deepcopy(embedded_policy.model)
    model.compile_for_inference = partial(
        model.compile_for_inference, backend="eager"
    )  # the graph without its compiler
    policy = ServedPolicy(
        model, embedded_policy.processor, ServeSettings(compiled=True, max_batch=4), embedded_policy.rules
    )
    assert policy.batch_sizes == [1, 2, 4]
    asked = variants(observation, 3)
    chunks = policy.predict([policy.prepare(policy_observation(policy, one)) for one in asked])
    assert len(chunks) == 3
    for chunk, one in zip(chunks, asked, strict=True):
        np.testing.assert_allclose(chunk.actions, predicted(embedded_policy, one), atol=BATCH_TOLERANCE)
    assert policy.attention_pictures(policy.prepare(policy_observation(policy, asked[0]))) is None
