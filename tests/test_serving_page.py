"""The page at `/`: what it asks the server for, and how it looks and behaves in Chromium."""

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving_fixtures import receive, recorded_observation, request, server_thread

from vla_adapter_hf.processing.image_preparation_vla_adapter import prepare
from vla_adapter_hf.serving.app import VLLM_OMNI_PATH
from vla_adapter_hf.serving.settings import ServeSettings
from vla_adapter_hf.serving.wire import pack
from vla_adapter_hf.utils.attention import overlay_attention, predict_with_attention


@pytest.fixture(scope="module")
def server(embedded_policy):
    with server_thread(embedded_policy, ServeSettings()) as running:
        yield running


@pytest.fixture(scope="module")
def observation():
    return recorded_observation()


def form(observation):
    def encoded(frame):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    images = {name: encoded(observation[name]) for name in ("image", "wrist_image")}
    return {"images": images, "instruction": observation["prompt"], "state": observation["state"].tolist()}


def picture(data_url):
    assert data_url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))))


def test_the_page_loads_nothing_from_elsewhere(server):
    answer = request(f"{server.url}/")
    text = answer.body.decode()
    assert answer.status == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)=\"(?!data:)[^\"]+\"", text)
    assert re.findall(r"https?://[^\s\"']+", text) == ["http://www.w3.org/2000/svg"]  # the name of a namespace
    assert "innerHTML" not in text  # what clients send is shown as text


def test_the_form_predicts_and_shows_the_frames_as_the_model_sees_them(server, embedded_policy, observation):
    answer = json.loads(request(f"{server.url}/try", json.dumps(form(observation))).body)
    inputs = embedded_policy.processor(
        images=[[observation["image"], observation["wrist_image"]]],
        text=[observation["prompt"]],
        state=observation["state"][None],
    )
    np.testing.assert_allclose(answer["actions"], embedded_policy.model.predict_action(**inputs)[0], atol=1e-5)
    assert answer["instruction"] == observation["prompt"]
    assert [camera["name"] for camera in answer["cameras"]] == ["image", "wrist_image"]
    attention = predict_with_attention(embedded_policy.model, inputs)[1][0]
    for index, name in enumerate(("image", "wrist_image")):
        camera = answer["cameras"][index]
        expected = prepare(observation[name], (112, 112), round_trip=False, crop=None)
        assert np.array_equal(picture(camera["frame"]), expected)
        glowing = overlay_attention(expected, attention[index], attention.max())
        np.testing.assert_allclose(picture(camera["attention"]).astype(int), glowing, atol=1)


def test_looking_at_attention_changes_no_robots_actions(server, embedded_policy, observation):
    before = json.loads(request(f"{server.url}/try", json.dumps(form(observation))).body)
    assert before["cameras"][0]["attention"] is not None
    after = json.loads(request(f"{server.url}/try", json.dumps(form(observation))).body)
    assert before["actions"] == after["actions"]
    assert embedded_policy.model.config._attn_implementation != "eager"


def test_no_attention_is_drawn_while_robots_wait(embedded_policy, observation):
    with server_thread(embedded_policy, ServeSettings()) as running:
        request(f"{running.url}/try", json.dumps(form(observation)))
        engine = running.services.engine
        engine._preparing += 1
        try:
            latest = json.loads(request(f"{running.url}/latest").body)
        finally:
            engine._preparing -= 1
        assert [camera["attention"] for camera in latest["cameras"]] == [None, None]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": None}, "images"),
        ({"images": {"image": "no base64!"}}, "base64"),
        ({"images": {"image": "AAAA", "wrist_image": "AAAA"}}, "decoded"),
        ({"state": [1, 2]}, "8 numbers"),
        ({"instruction": " "}, "empty"),
    ],
)
def test_the_form_says_what_is_wrong(server, observation, change, named):
    answer = request(f"{server.url}/try", json.dumps({**form(observation), **change}))
    assert answer.status == 400 and named in json.loads(answer.body)["message"]


def test_the_last_prediction_of_a_robot_is_shown_once(server, observation):
    with server.websocket(VLLM_OMNI_PATH) as websocket:
        receive(websocket)
        websocket.send(pack(observation))
        actions = receive(websocket)["actions"]
    latest = json.loads(request(f"{server.url}/latest").body)
    np.testing.assert_allclose(latest["robot_actions"], actions, atol=1e-6)
    assert len(latest["actions"]) == 8 and len(latest["action_names"]) == 7
    assert request(f"{server.url}/latest?after={latest['number']}").status == 204
    assert request(f"{server.url}/latest?after=x").status == 400


def test_the_example_fits_the_form(server):
    example = json.loads(request(f"{server.url}/example").body)
    images = {name: data_url.partition(",")[2] for name, data_url in example["images"].items()}
    assert request(f"{server.url}/try", json.dumps({**example, "images": images})).status == 200


@pytest.fixture
def browser_page():
    """A page of a real Chromium; errors of its console fail the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here (apt-get install chromium); CHROMIUM may name one")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1080, "height": 1400})
        complaints = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield page
        browser.close()
    # The console also lists the form's refusal and the server's end.
    assert not [text for text in complaints if "status of 400" not in text and "ERR_CONNECTION" not in text]


def screenshot(page, name):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.mark.browser
def test_a_browser_follows_robots_live_and_asks_by_the_form(embedded_policy, observation, browser_page):
    from playwright.sync_api import expect

    page = browser_page
    with server_thread(embedded_policy, ServeSettings()) as running:
        page.goto(running.url)
        expect(page.locator("#status")).to_have_text("connected", timeout=30_000)
        expect(page.locator("#facts")).to_contain_text("libero_object")
        expect(page.locator("#nothing")).to_be_visible()
        expect(page.locator("#prediction")).to_be_hidden()
        screenshot(page, "empty")

        instruction = "pick up the <b>milk</b> & place it in the basket"  # shown as text, whatever it holds
        with running.websocket() as websocket:
            receive(websocket)
            websocket.send(pack({**observation, "prompt": instruction}))
            receive(websocket)
        expect(page.locator("#instruction")).to_have_text(f"“{instruction}”", timeout=30_000)
        sizes = page.eval_on_selector_all("#frames img", "images => images.map(image => image.naturalWidth)")
        assert sizes and set(sizes) == {112}
        expect(page.locator("#charts svg")).to_have_count(7)
        expect(page.locator("#charts circle")).to_have_count(7 * 8)
        screenshot(page, "robot")

        page.click("#example")
        expect(page.locator("#ask")).to_have_value(re.compile("milk"))
        page.fill("#ask", "pick up the ketchup and place it in the basket")
        page.fill("#state", "1, 2, three")
        page.click("#predict")
        expect(page.locator("#error")).to_contain_text("numbers")
        page.fill("#state", ", ".join(map(str, observation["state"])))
        page.click("#predict")
        expect(page.locator("#instruction")).to_contain_text("ketchup", timeout=30_000)
        expect(page.locator("#error")).to_have_text("")
        screenshot(page, "form")
    expect(page.locator("#status")).to_have_text("server not reached", timeout=30_000)


@pytest.mark.browser
def test_a_browser_shows_what_the_server_refuses(embedded_policy, browser_page):
    from playwright.sync_api import expect

    page = browser_page
    with server_thread(embedded_policy, ServeSettings()) as running:
        page.goto(running.url)
        expect(page.locator("#status")).to_have_text("connected", timeout=30_000)
        page.click("#example")
        expect(page.locator("#ask")).to_have_value(re.compile("milk"))
        broken = {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"}
        page.set_input_files("input[data-camera=wrist_image]", broken)
        expect(page.locator("#pictures img").nth(1)).to_have_attribute("src", re.compile("bm8g"))  # "no " in base64
        page.click("#predict")
        expect(page.locator("#error")).to_contain_text("cannot be decoded", timeout=30_000)
        screenshot(page, "refused")
