"""The playground in a real browser, against a running nano: what a person does there, and sees."""

import json
import os
import shutil
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image
from playwright.sync_api import Browser, Error, Page, Route, expect, sync_playwright

from tests.end_to_end.conftest import sample_of

pytestmark = pytest.mark.parametrize("nano", ["auto"], indirect=True)

PATIENCE_MS = 20_000
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
COMPLAINTS = ("error", "warning")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("these tests look at a page in Chromium, which is not installed: make browser")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=[*options, "--disable-dev-shm-usage"])
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def size() -> tuple[int, int]:
    return SIZES["desktop"]


@pytest.fixture
def complaints() -> list[str]:
    """Of the browser: errors of scripts, what a policy forbids, what cannot be loaded."""
    return []


@pytest.fixture
def page(browser, nano, size, complaints) -> Iterator[Page]:
    """The page, loaded; whatever the browser has to complain of in the end is a failure."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    loaded = context.new_page()
    loaded.on("console", lambda message: complaints.append(message.text) if message.type in COMPLAINTS else None)
    loaded.on("pageerror", lambda error: complaints.append(str(error)))
    loaded.goto(f"{nano.address}/")
    expect(loaded.get_by_text("nano", exact=True)).to_be_visible()
    yield loaded
    context.close()
    assert complaints == []


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drop(page: Page, name: str, content: bytes, kind: str = "image/png") -> None:
    """As a file manager does it."""
    page.evaluate(
        """([name, bytes, type]) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
            for (const event of ["dragover", "drop"])
                document.body.dispatchEvent(new DragEvent(event, { dataTransfer, bubbles: true, cancelable: true }));
        }""",
        [name, list(content), kind],
    )


def make_it_long(route: Route) -> None:
    """An answer that would go on for thousands of tokens."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True, "max_tokens": 6000}))


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_drop_an_image_and_see_where_the_time_went(page, size):
    sample = sample_of("number", 11 if size == SIZES["phone"] else 12)
    assert_fits(page)
    drop(page, "number.png", png(sample.images[0]))
    expect(page.get_by_role("list", name="Attached images").get_by_role("img", name="number.png")).to_be_visible()
    page.get_by_role("textbox", name="Question").fill(sample.question)
    page.get_by_role("button", name="Send", exact=True).click()
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text(sample.answer)
    expect(answer).to_contain_text("First word after")
    answer.get_by_role("button", name="See the stages").click()
    row = page.get_by_role("list").get_by_role("button", name=sample.question)
    expect(row).to_have_attribute("aria-expanded", "true")
    for stage in ("queue", "fetch", "encode", "transfer", "prefill", "decode"):
        expect(page.locator(f".request.own .bar.{stage}").first).to_be_visible()
    page.get_by_text("All stages").click()
    table = page.get_by_role("table", name="Stages of a request")
    expect(table.get_by_role("row", name="encode, image 1, tile 1 vision")).to_be_visible()
    expect(table.get_by_role("row", name="decode language")).to_be_visible()
    for tier in ("Router", "Vision", "Transmission", "Language"):
        expect(page.get_by_role("region", name=tier, exact=True)).to_be_visible()
    expect(page.get_by_role("meter", name="Tiles at vision")).to_be_visible()
    assert_fits(page)


def test_samples_are_answered_in_one_click(page):
    for question, answer in {
        "What is in the image?": "An orange triangle.",
        "How many shapes are there?": "There are 4 shapes.",
        "Which shape is this?": "It is a star.",
    }.items():
        page.get_by_role("button", name=question).first.click()
        expect(page.get_by_role("article", name="Answer")).to_contain_text(answer)
        page.get_by_role("button", name="New chat").click()
        expect(page.get_by_role("article")).to_have_count(0)


def test_stop_stops(page, nano):
    page.route("**/v1/chat/completions", make_it_long)
    page.get_by_role("textbox", name="Question").fill("Hello")
    page.get_by_role("button", name="Send", exact=True).click()
    answer = page.get_by_role("article", name="Answer")
    expect(answer).to_contain_text("I am a very small model")
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(answer).to_contain_text("Stopped.")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    row = page.get_by_role("listitem").filter(has=page.get_by_role("button", name="Hello"))
    expect(row).to_contain_text("stopped by the client")


def test_the_keyboard_is_enough(page):
    """Skip link, typing, Enter to send, Escape to stop; the focus is never lost."""
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the question")).to_be_focused()
    page.keyboard.press("Enter")
    question = page.get_by_role("textbox", name="Question")
    expect(question).to_be_focused()
    page.route("**/v1/chat/completions", make_it_long)
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    expect(question).to_have_value("Hello\n")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("I am")
    page.keyboard.press("Escape")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("Stopped.")
    expect(question).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    options = page.get_by_role("button", name="Options")
    expect(options).to_be_focused()
    page.keyboard.press("Enter")
    for control in (
        page.get_by_label("Image detail"),
        page.get_by_label("Longest answer"),
        page.get_by_label("Temperature").first,
    ):
        expect(control).to_be_visible()


def test_errors_are_told_in_plain_words(page, complaints):
    drop(page, "broken.png", b"\x89PNG\r\n\x1a\n and nothing behind it")
    page.get_by_role("button", name="Send", exact=True).click()
    alert = page.get_by_role("alert").filter(has_text="cannot be used")
    expect(alert).to_contain_text("One of the images cannot be used")
    expect(alert.get_by_role("button", name="Try again")).to_be_visible()
    assert ["status of 400" in complaint for complaint in complaints] == [True]
    complaints.clear()


def test_attached_images_can_be_removed_and_others_are_refused(page):
    drop(page, "notes.txt", b"text", "text/plain")
    expect(page.get_by_role("status")).to_contain_text("only images can be read")
    page.get_by_label("Add images").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"x"})
    page.get_by_role("button", name="Remove a.png").click()
    expect(page.get_by_role("list", name="Attached images").get_by_role("img")).to_have_count(0)


def test_it_asks_for_a_key_and_sends_it(page, complaints):
    """Kept in this tab only. The real router's part is told in tests/router/test_playground.py."""
    error = {"error": {"message": "a valid API key is required", "type": "", "param": None, "code": "invalid_api_key"}}

    def need_key(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json=error)

    page.route("**/pipeline*", need_key)
    page.route("**/v1/**", need_key)
    page.reload()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog.get_by_label("Key", exact=True)).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    page.get_by_role("button", name="What is in the image?").click()
    expect(page.get_by_role("article", name="Answer")).to_contain_text("An orange triangle.")
    assert page.evaluate("localStorage.length") == 0
    assert {"status of 401" in complaint for complaint in complaints} == {True}
    complaints.clear()


def test_what_the_model_says_is_text(page):
    """Never markup, whatever it looks like."""
    chunk = {"choices": [{"index": 0, "delta": {"content": "<img src=x onerror=alert(1)> & <b>bold</b>"}}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, content_type="text/event-stream", body=body),
    )
    page.get_by_role("textbox", name="Question").fill("x")
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name="Answer")).to_contain_text("<img src=x onerror=alert(1)> & <b>bold</b>")
    assert page.locator("article img").count() == 0


def test_nothing_written_into_the_page_runs(page, complaints):
    """The policy holds even where the page would not."""
    with pytest.raises(Error):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    assert ["TrustedHTML" in complaint for complaint in complaints] == [True]
    complaints.clear()
