"""The web page in a real browser."""

import base64
import io
import json
import re
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from coprs_deploy import CoPRS, demo
from coprs_deploy.data.rle import decode_segmentation, encode_mask
from tests import ROOT
from tests.browser.conftest import serving

pytestmark = pytest.mark.browser

SCENE = ROOT / "examples" / "scene.png"
INSTRUCTION = "the largest red circle"


@pytest.fixture
def page(open_page, address):
    return open_page(address)


@pytest.fixture(scope="module")
def expected():
    with CoPRS.load() as coprs:
        return coprs.segment(SCENE, INSTRUCTION)


def segment(page, image=SCENE, instruction=INSTRUCTION):
    page.set_input_files("#file", image)
    wait_for_text(page, "#file-name", image.name)
    page.fill("#instruction", instruction)
    page.click("#submit")
    page.wait_for_selector("#history button")


def stream(page, text, end):
    """Send a request whose response is a text, and then as `end` says: wait, close or fail."""
    page.evaluate(
        """([text, end]) => {
            const send = fetch;
            fetch = (to, init) => to !== "segment" ? send(to, init) : Promise.resolve(new Response(
                new ReadableStream({
                    start(controller) {
                        controller.enqueue(new TextEncoder().encode(text));
                        init.signal.addEventListener("abort", () =>
                            controller.error(init.signal.reason));
                    },
                    cancel() { window.isCancelled = true; },
                    pull(controller) {
                        if (end === "close") controller.close();
                        if (end === "fail") controller.error(new TypeError("network error"));
                    },
                })));
        }""",
        [text, end],
    )
    page.set_input_files("#file", SCENE)
    page.fill("#instruction", INSTRUCTION)
    page.click("#submit")


def delay_next_image(page):
    """Let the browser take longer to decode the next image than the one after it."""
    page.evaluate(
        """() => {
            const decode = createImageBitmap;
            createImageBitmap = async (source) => {
                createImageBitmap = decode;
                await new Promise(resolve => setTimeout(resolve, 500));
                return decode(source);
            };
        }"""
    )


def wait_for_text(page, selector, text):
    """Wait for an element with a text; unlike `wait_for_function`, this needs no `eval`."""
    page.locator(selector).filter(has_text=text).wait_for(state="attached")


def canvas_pixels(page):
    """Return what the canvas shows, (H, W, 4) uint8."""
    _, _, content = page.locator("#canvas").evaluate("each => each.toDataURL()").partition(",")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGBA"))


def downloaded(page, button, folder):
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_file_is_segmented_and_described(page, expected):
    segment(page)
    assert page.text_content("#status").startswith("1 mask in ")
    assert page.text_content("#reasoning") == expected.reasoning
    assert "<" not in page.text_content("#response")
    assert page.locator("#targets li").count() == 1
    (x1, y1, x2, y2), area = expected.boxes[0], expected.areas[0]
    row = page.text_content("#targets li")
    assert f"{area:,} px" in row
    assert f"box {x1}, {y1} to {x2}, {y2}" in row
    assert page.get_attribute("#canvas", "aria-label").startswith(
        "scene.png, 640 x 640 pixels, 1 mask"
    )
    page.click("#timings-part summary")
    assert "tokens/s" in page.text_content("#timings")


def test_samples_are_answered_as_the_model_answers_them(page):
    samples = json.loads((demo.SAMPLES / "samples.json").read_text())
    with CoPRS.load() as coprs:
        answers = [coprs.segment(demo.SAMPLES / s["image"], s["instruction"]) for s in samples]
    assert [answer.found for answer in answers] == [True, True, True, True, False]
    for number, answer in enumerate(answers, start=1):
        page.click(f"#samples li:nth-child({number}) button")
        page.wait_for_selector(f"#history li:nth-child({number})")
        assert page.text_content("#reasoning") == answer.reasoning
        assert page.locator("#targets li").count() == len(answer.masks)
    assert page.text_content("#status").startswith("Nothing in the image fits")
    assert page.is_hidden("#targets-part")


def test_text_and_prior_appear_while_the_request_runs(page):
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => seen.push(document.getElementById("reasoning").textContent))
                .observe(document.getElementById("reasoning"), {childList: true});
        }"""
    )
    segment(page)
    seen = page.evaluate("seen")
    assert len({text for text in seen if text}) > 3
    assert not any("<" in text for text in seen)
    assert all(longer.startswith(text) for text, longer in pairwise(seen[1:]))


def test_views_opacity_and_compare_change_the_canvas(page):
    segment(page)
    masks = canvas_pixels(page)
    page.check("[name=view][value=prior]")
    prior = canvas_pixels(page)
    page.check("[name=view][value=image]")
    image = canvas_pixels(page)
    assert (masks != prior).any()
    assert (masks != image).any()
    page.check("[name=view][value=masks]")
    assert (canvas_pixels(page) == masks).all()
    page.locator("#opacity").evaluate("e => { e.value = 90; e.dispatchEvent(new Event('input')); }")
    opaque = canvas_pixels(page)
    assert np.abs(opaque - image.astype(int)).sum() > np.abs(masks - image.astype(int)).sum()
    page.locator("#canvas").focus()
    page.keyboard.down("c")
    assert (canvas_pixels(page) == image).all()
    page.keyboard.up("c")
    assert (canvas_pixels(page) == opaque).all()


def test_target_is_toggled_and_selected_by_a_click_on_its_mask(page, expected):
    segment(page)
    page.check("[name=view][value=image]")
    image = canvas_pixels(page)
    page.check("[name=view][value=masks]")
    page.uncheck("#targets input")
    assert (canvas_pixels(page) == image).all()
    page.check("#targets input")
    assert page.get_attribute("#targets .name", "aria-pressed") == "false"
    box = page.locator("#canvas").bounding_box()
    scale = min(box["width"], box["height"]) / 640
    x1, y1, x2, y2 = (float(v) for v in expected.boxes[0])
    center = (
        box["x"] + box["width"] / 2 + ((x1 + x2) / 2 - 320) * scale,
        box["y"] + box["height"] / 2 + ((y1 + y2) / 2 - 320) * scale,
    )
    page.mouse.click(*center)
    assert page.get_attribute("#targets .name", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert page.get_attribute("#targets .name", "aria-pressed") == "false"


def test_zoom_and_pan_by_wheel_buttons_and_keys(page):
    segment(page)
    fitted = canvas_pixels(page)
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -400)
    wait_for_text(page, "#zoom-fit", re.compile(r"^(?!100 %)"))
    zoomed = canvas_pixels(page)
    assert (zoomed != fitted).any()
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowRight")
    assert (canvas_pixels(page) != zoomed).any()
    page.keyboard.press("0")
    assert page.text_content("#zoom-fit") == "100 %"
    assert (canvas_pixels(page) == fitted).all()
    page.click("#zoom-in")
    assert page.text_content("#zoom-fit") == "125 %"
    page.click("#zoom-fit")
    assert page.text_content("#zoom-fit") == "100 %"


def test_downloads_and_copy_hold_the_masks_of_the_result(page, expected, tmp_path):
    segment(page)
    path = downloaded(page, "#download-mask", tmp_path)
    assert path.name == "scene-mask.png"
    with Image.open(path) as image:
        difference = (np.asarray(image.convert("L")) > 127) ^ expected.mask
    assert difference.mean() < 1e-3  # another runtime than that of `expected`
    path = downloaded(page, "#download-overlay", tmp_path)
    with Image.open(path) as image:
        assert (path.name, image.size) == ("scene-overlay.png", (640, 640))
    path = downloaded(page, "#download-json", tmp_path)
    result = json.loads(path.read_text())
    assert (path.name, result["instruction"]) == ("scene.json", INSTRUCTION)
    page.click("#copy-rle")
    wait_for_text(page, "#copy-rle", "Copied")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied == result["masks"]


def test_decoded_rle_equals_that_of_the_library(page):
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < p for h, w, p in ((1, 1, 1), (7, 5, 0.5), (300, 200, 0.02))]
    masks += [np.zeros((4, 6), bool), np.ones((513, 257), bool)]
    for mask in masks:
        rle = encode_mask(mask)
        text = {"size": [*rle.size], "counts": rle.counts}
        found = page.evaluate(
            "async rle => (await import('./page/masks.js')).decodeMask(rle).mask.join('')", text
        )
        assert (np.array([*found]).reshape(mask.shape) == np.where(mask, "1", "0")).all()
        assert (decode_segmentation(text, *mask.shape) == mask).all()


def test_history_brings_an_earlier_result_back(page):
    segment(page)
    first = canvas_pixels(page), page.text_content("#reasoning")
    page.click("#samples li:nth-child(1) button")
    page.wait_for_selector("#history li:nth-child(2)")
    assert page.text_content("#reasoning") != first[1]
    page.click("#history li:nth-child(2) button")
    assert page.input_value("#instruction") == INSTRUCTION
    assert page.text_content("#reasoning") == first[1]
    assert (canvas_pixels(page) == first[0]).all()
    assert page.get_attribute("#history li:nth-child(2) button", "aria-current") == "true"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_image_is_dropped_or_pasted_anywhere(page, way):
    content = base64.b64encode(SCENE.read_bytes()).decode()
    page.evaluate(
        """([content, way]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(content), each => each.charCodeAt(0));
            data.items.add(new File([bytes], "other.png", {type: "image/png"}));
            const options = {bubbles: true, cancelable: true};
            document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", {...options, dataTransfer: data})
                : new ClipboardEvent("paste", {...options, clipboardData: data}));
        }""",
        [content, way],
    )
    wait_for_text(page, "#file-name", "other.png")
    assert page.get_attribute("#canvas", "aria-label") == "other.png, 640 x 640 pixels"


def test_image_that_was_chosen_last_is_shown(page):
    delay_next_image(page)
    page.set_input_files("#file", SCENE)
    page.set_input_files("#file", demo.SAMPLES / "scene-28.jpg")
    wait_for_text(page, "#file-name", "scene-28.jpg")
    page.wait_for_timeout(700)
    assert page.text_content("#file-name") == "scene-28.jpg"


def test_request_has_the_image_that_is_still_loading(page):
    page.set_input_files("#file", demo.SAMPLES / "scene-28.jpg")
    wait_for_text(page, "#file-name", "scene-28.jpg")
    delay_next_image(page)
    page.set_input_files("#file", SCENE)
    page.fill("#instruction", INSTRUCTION)
    page.click("#submit")
    page.wait_for_selector("#history button")
    assert page.get_attribute("#canvas", "aria-label") == (
        f"scene.png, 640 x 640 pixels, 1 mask: {INSTRUCTION}"
    )


def test_stop_ends_the_request(page):
    page.route("**/segment", lambda route: None)  # never answered
    page.set_input_files("#file", SCENE)
    page.fill("#instruction", INSTRUCTION)
    page.click("#submit")
    wait_for_text(page, "#status", "Running")
    page.click("#stop")
    wait_for_text(page, "#status", "Stopped")
    assert page.is_hidden("#stop")


def test_another_image_ends_the_request_and_its_text(page):
    stream(page, 'event: text\ndata: {"text": "<think>There is"}\n\n', "wait")
    wait_for_text(page, "#reasoning", "There is")
    page.set_input_files("#file", demo.SAMPLES / "scene-28.jpg")
    wait_for_text(page, "#file-name", "scene-28.jpg")
    page.wait_for_timeout(200)
    texts = [page.text_content(each) for each in ("#status", "#elapsed", "#reasoning")]
    assert texts == ["", "", ""]
    assert page.is_hidden("#stop")


def test_requests_ahead_are_counted_while_one_waits(page):
    ahead = iter((3, 1))
    page.route("**/segment", lambda route: None)  # never answered
    page.route(
        "**/health?request_id=*",
        lambda route: route.fulfill(json={"requests_ahead": next(ahead, 0)}),
    )
    page.set_input_files("#file", SCENE)
    page.fill("#instruction", INSTRUCTION)
    page.click("#submit")
    for text in ("Waiting, 3 earlier requests", "Waiting, 1 earlier request", "Running"):
        wait_for_text(page, "#status", text)


def test_clock_is_no_live_region(page):
    page.route("**/segment", lambda route: None)
    page.evaluate(
        """() => {
            window.spoken = [];
            const status = document.getElementById("status");
            new MutationObserver(() => spoken.push(status.textContent)).observe(
                status, {childList: true, characterData: true, subtree: true});
        }"""
    )
    page.set_input_files("#file", SCENE)
    page.fill("#instruction", INSTRUCTION)
    page.click("#submit")
    wait_for_text(page, "#elapsed", re.compile(r"^0\.[5-9] s$"))
    assert page.evaluate("spoken") == ["Running"]
    assert page.get_attribute("#elapsed", "role") == "timer"


@pytest.mark.parametrize(
    ("position", "text", "field"),
    [
        (0, "none", ("reasoning", "none")),
        (3, "at most 20 tokens", ("max_reasoning_tokens", "20")),
        (9, "no limit", None),
    ],
)
def test_budget_of_the_reasoning_is_sent(page, position, text, field):
    page.locator("#budget").evaluate(
        "(e, at) => { e.value = at; e.dispatchEvent(new Event('input')); }", position
    )
    assert page.text_content("#budget-text") == text
    assert page.get_attribute("#budget", "aria-valuetext") == text
    page.evaluate(
        "() => { const send = fetch; fetch = (to, init) => {"
        "  if (init?.body) window.sent = [...init.body].filter(([, v]) => !v.size);"
        "  return send(to, init); }; }"
    )
    segment(page)
    fields = dict(page.evaluate("sent"))
    names = {"reasoning", "max_reasoning_tokens"}
    assert {name: fields[name] for name in names & set(fields)} == dict([field] if field else [])


def test_trade_of_a_limit_is_shown_before_and_after_a_request(page):
    move = "(e, at) => { e.value = at; e.dispatchEvent(new Event('input')); }"
    assert page.text_content("#trade") == "The whole reasoning: slowest, most exact."
    page.locator("#budget").evaluate(move, 2)
    limited = "Reasoning cut after 10 tokens: faster, less exact. A mask always comes"
    assert page.text_content("#trade").startswith(limited)
    segment(page)
    trade = page.text_content("#trade")
    assert re.search(r"The last request: \d+ tokens, \d+\.\d\d s\.", trade)
    assert re.search(r"With this limit: at most about \d+\.\d\d s\.$", trade)
    page.locator("#budget").evaluate(move, 9)
    page.fill("#deadline", "5000")
    assert "mask 5000 ms after the request arrived" in page.text_content("#trade")
    page.click("#submit")
    page.wait_for_selector("#history li:nth-child(2)")
    limits = page.locator("#history small").all_inner_texts()
    assert [limit.partition(" · ")[0] for limit in limits] == ["5000 ms", "10 tokens"]


def has_box_color(canvas, corner, within=2):
    """Whether a line of the first target's color goes by a corner, to some pixels."""
    y, x = corner
    near = canvas[y - within : y + within + 1, x - within : x + within + 1, :3]
    return bool((near == (0xFF, 0x4D, 0x8D)).all(axis=-1).any())


def test_selected_target_has_its_box_on_the_canvas_but_not_in_the_download(
    page, expected, tmp_path
):
    segment(page)
    before = downloaded(page, "#download-overlay", tmp_path).read_bytes()
    masks = canvas_pixels(page)
    page.click("#targets .name")
    selected = canvas_pixels(page)
    height, width = masks.shape[:2]
    scale = min(height, width) / 640
    x1, _, _, y2 = (float(v) for v in expected.boxes[0])
    corner = (
        round(height / 2 + (y2 - 320) * scale),
        round(width / 2 + (x1 - 320) * scale),
    )
    assert has_box_color(selected, corner)
    assert not has_box_color(masks, corner)
    page.keyboard.press("c")
    page.click("#targets .name")
    assert (canvas_pixels(page) == masks).all()
    assert downloaded(page, "#download-overlay", tmp_path).read_bytes() == before


def test_colors_of_many_targets_are_distinct_and_readable(page):
    colors = page.evaluate(
        "async () => { const { colorOf } = await import('./page/masks.js');"
        " return [...Array(64).keys()].map(colorOf); }"
    )
    assert len(set(colors)) == 64
    channels = np.array(
        [[int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)] for color in colors]
    )
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (luminance + 0.05).min() / 0.05 >= 4.5  # contrast with black text


class TestErrors:
    @pytest.mark.parametrize(("end", "reason"), [("close", "no result"), ("fail", "network error")])
    def test_lost_connection_is_named(self, page, end, reason):
        stream(page, 'event: text\ndata: {"text": "<think>There is"}\n\n', end)
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == (
            f"The server ended the connection before the result ({reason}). Check that it still "
            "runs, then try again."
        )
        assert page.is_hidden("#stop")
        assert page.text_content("#elapsed") == page.text_content("#status") == ""

    def test_event_that_cannot_be_read_ends_the_request(self, page):
        stream(page, "event: text\ndata: {cut\n\n", "wait")
        page.wait_for_selector("#error:not([hidden])")
        assert page.evaluate("isCancelled")
        assert page.is_hidden("#stop")

    def test_large_file_is_refused_with_the_limit(self, page, tmp_path):
        path = tmp_path / "large.png"
        path.write_bytes(bytes(33 << 20))
        page.set_input_files("#file", path)
        wait_for_text(page, "#file-name", "large.png")
        page.fill("#instruction", "x")
        page.click("#submit")
        page.wait_for_selector("#error:not([hidden])")
        assert "accepted: at most 32 MiB; send a smaller image" in page.text_content("#error")

    def test_instruction_of_spaces_is_refused(self, page):
        page.set_input_files("#file", SCENE)
        page.fill("#instruction", "  ")
        page.click("#submit")
        wait_for_text(page, "#error", "the instruction is empty; say what to segment")

    @pytest.mark.parametrize("way", ["drop", "paste"])
    def test_what_is_no_file_is_refused_outside_the_fields_only(self, page, way):
        was_prevented = page.evaluate(
            """way => ["canvas", "instruction"].map((id) => {
                const data = new DataTransfer();
                data.setData("text/uri-list", "http://127.0.0.1/image.png");
                const options = {bubbles: true, cancelable: true};
                const event = way === "drop"
                    ? new DragEvent("drop", {...options, dataTransfer: data})
                    : new ClipboardEvent("paste", {...options, clipboardData: data});
                document.getElementById(id).dispatchEvent(event);
                return event.defaultPrevented;
            })""",
            way,
        )
        assert was_prevented == [way == "drop", False]
        assert page.text_content("#error").startswith("That is no file; choose, drop or paste")

    def test_missing_image_is_requested(self, page):
        page.fill("#instruction", "x")
        page.click("#submit")
        assert page.text_content("#error") == "Choose an image first."

    def test_file_of_another_kind_is_refused(self, page, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("no image")
        page.set_input_files("#file", path)
        assert page.text_content("#error") == "text.txt is text/plain; choose an image file."

    def test_message_of_the_server_is_shown(self, open_page, address, tmp_path):
        page = open_page(address)
        path = tmp_path / "broken.png"
        path.write_bytes(SCENE.read_bytes()[:2000])
        page.set_input_files("#file", path)
        wait_for_text(page, "#status", "cannot display")
        page.fill("#instruction", "x")
        with page.expect_response("**/segment") as response:
            page.click("#submit")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error") == response.value.json()["error"]

    def test_sample_that_cannot_be_loaded_is_named(self, page):
        page.wait_for_selector("#samples button")
        page.route("**/samples/*", lambda route: route.abort())
        page.click("#samples li:nth-child(1) button")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error").startswith("Cannot load scene-")

    def test_response_of_a_proxy_is_named_by_its_status(self, page):
        page.route("**/segment", lambda route: route.fulfill(status=502, json={"detail": "x"}))
        page.set_input_files("#file", SCENE)
        page.fill("#instruction", INSTRUCTION)
        page.click("#submit")
        wait_for_text(page, "#error", "The server answered with status 502.")

    def test_lost_server_is_named(self, open_page):
        with serving("--runtime", "openvino", "--policy", "openvino") as address:
            page = open_page(address)
            page.wait_for_selector("#samples button")
        page.set_input_files("#file", SCENE)
        page.fill("#instruction", INSTRUCTION)
        page.click("#submit")
        page.wait_for_selector("#error:not([hidden])")
        assert page.text_content("#error").startswith("Cannot reach the server")


def test_api_key_is_requested_and_sent(open_page):
    options = ("--runtime", "openvino", "--policy", "openvino")
    with serving(*options, COPRS_API_KEY="secret") as address:
        page = open_page(address)
        page.set_input_files("#file", SCENE)
        page.fill("#instruction", INSTRUCTION)
        page.click("#submit")
        wait_for_text(page, "#key-text", "This server needs an API key")
        page.fill("#key", "wrong")
        page.click("#key-dialog button[value=ok]")
        wait_for_text(page, "#key-text", "does not accept this API key")
        page.fill("#key", "secret")
        page.click("#key-dialog button[value=ok]")
        page.wait_for_selector("#targets li")


@pytest.mark.parametrize("width", [360, 768, 1280, 3840])
def test_page_fits_its_window(open_page, address, width):
    page = open_page(address, viewport={"width": width, "height": 900})
    page.click("#samples li:nth-child(1) button")
    page.wait_for_selector("#history button")
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0
    assert page.locator("#canvas").bounding_box()["width"] > 0.55 * min(width, 2000)


def test_phone_shows_state_and_image_of_a_request(open_page, address):
    page = open_page(address, viewport={"width": 360, "height": 740}, has_touch=True)
    segment(page)
    for name in ("#status", "#canvas"):
        box = page.locator(name).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 740


def test_page_is_used_by_keyboard_alone(page):
    page.set_input_files("#file", SCENE)
    page.locator("#instruction").focus()
    page.keyboard.type(INSTRUCTION)
    page.keyboard.press("Enter")
    page.wait_for_selector("#targets li")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {"canvas", "compare", "zoom-in", "download-mask", "copy-rle"} <= reached


def test_controls_have_names_and_colors_have_contrast(open_page, address):
    for scheme in ("light", "dark"):
        page = open_page(address, color_scheme=scheme)
        page.click("#samples li:nth-child(1) button")
        page.wait_for_selector("#targets li")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, canvas")].filter(each =>
                each.checkVisibility() && !(each.textContent.trim() || each.ariaLabel
                || each.labels?.length)).map(each => each.id)"""
        )
        assert unnamed == []
        ratios = page.evaluate(CONTRAST)
        assert ratios
        assert min(ratios) >= 4.5


class TestDocs:
    def test_interface_is_listed_and_tried_without_another_server(self, open_page, address):
        page = open_page(address)
        page.goto(f"{address}/docs")
        page.locator(".opblock-summary-path").first.wait_for()
        paths = page.locator(".opblock-summary-path").all_inner_texts()
        assert {"/segment", "/health/ready", "/metrics"} <= {each.strip("\u200b") for each in paths}
        health = page.locator("#operations-default-health_health_get")
        health.locator(".opblock-summary").click()
        health.get_by_role("button", name="Try it out").click()
        health.get_by_role("button", name="Execute").click()
        answer = health.locator(".live-responses-table tbody .response-col_description")
        answer.wait_for()
        assert '"status": "ok"' in answer.inner_text()

    def test_colors_follow_those_of_the_system(self, open_page, address):
        grounds = {}
        for scheme in ("light", "dark"):
            page = open_page(address, color_scheme=scheme)
            page.goto(f"{address}/docs")
            shown = page.locator(".opblock-summary-path").first
            shown.wait_for()
            grounds[scheme] = page.evaluate(
                "getComputedStyle(document.querySelector('.swagger-ui')).backgroundColor"
            )
        assert grounds["light"] != grounds["dark"] == "rgb(28, 32, 34)"


CONTRAST = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const luminance = color => {
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(v =>
            v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = each => {
        for (; each; each = each.parentElement) {
            const color = getComputedStyle(each).backgroundColor;
            if (!/, 0\\)$/.test(color) && color !== "transparent") return color;
        }
    };
    const hasText = each => [...each.childNodes].some(
        child => child.nodeType === 3 && child.data.trim());
    return [...document.querySelectorAll("body *")].filter(
        each => each.checkVisibility() && hasText(each)).map(each => {
        const [a, b] = [luminance(getComputedStyle(each).color), luminance(ground(each))];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""
