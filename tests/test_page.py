"""The page, driven in headless Chromium; what it looks like is left in .cache/screenshots."""

import re
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service needs FastAPI: pip install 'simcse-jax[serve]'")
pytest.importorskip("selenium", reason="drives the browser: pip install selenium")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from simcse_jax.inference.index import Index
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.serve.app import create_app
from simcse_jax.serve.engine import Engine
from simcse_jax.serve.limits import Limits
from simcse_jax.serve.server import Server, bind

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium here: apt-get install chromium chromium-driver", allow_module_level=True)
SHOTS = Path(__file__).parents[1] / ".cache" / "screenshots"
SENTENCES = [
    "A man is playing a flute.",
    "Someone plays an instrument.",
    "A woman is playing a violin in the park.",
    "Two dogs run across a wet field while their owner shouts at them to come back before the storm arrives.",
    "The stock market fell by three per cent on Monday.",
    "",
    "<b>bold</b> & \"quoted\" <script>alert('no')</script>",
    "رجل يعزف على الناي",
    f"Cats {'run ' * 39}",
    *(f"Sentence number {number} says little about anything." for number in range(40)),
]


class Words(SimCSE):
    """In a model's place: the sum of a random vector for each word."""

    def __init__(self) -> None:
        self.gate: threading.Event | None = None

    @property
    def width(self) -> int:
        return 48

    @property
    def max_length(self) -> int:
        return 32

    def warm_up(self) -> None:
        pass

    def are_cut(self, sentences: Any) -> list[bool]:
        return [len(sentence.split()) > 32 for sentence in sentences]

    def encode(self, sentences: Any, **_: Any) -> Any:
        if self.gate and any("slow" in sentence for sentence in sentences):
            assert self.gate.wait(20)
        words = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
        return np.stack([np.sum([np.ones(48) / 2, *map(word_vector, row)], axis=0) for row in words]).astype(np.float32)


def word_vector(word: str) -> Any:
    return np.random.default_rng(zlib.crc32(word.encode())).normal(size=48)


@contextmanager
def service(model: Words, sentences: list[str] | None, bound: socket.socket, name: str = "words") -> Iterator[str]:
    """The real application on a socket, in a thread; its address."""
    ready: Future[Exception | None] = Future()
    vectors = model.encode(sentences or [""])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    engine = Engine(model, Index(sentences, unit) if sentences else None, 100, 64)
    limits = Limits(max_characters=200, max_plot=20)
    app = create_app(engine, name, limits, ["127.0.0.1"], ready.set_result)
    server = Server(app, limits)
    thread = threading.Thread(target=server.run, args=(bound,))
    thread.start()
    try:
        assert ready.result(60) is None
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.stop()
        thread.join()


class Page:
    """A browser on the page."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, tab: str = "search", width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """Loads the page anew, on a screen of that size and brightness."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}#/{tab}")
        self.until(lambda: self["service"].get_attribute("data-state") == "ready")

    def __getitem__(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        """Waits; elements that are replaced meanwhile, or not there yet, are looked up again."""
        from selenium.common.exceptions import StaleElementReferenceException as Stale

        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except (Stale, IndexError):
                pass
            assert time.monotonic() < deadline, "the page did not come to that"
            time.sleep(0.03)

    def search(self, text: str) -> None:
        """Types a query and waits for its hits."""
        self.type("query", text)
        self.until(lambda: self.all(".hit") and self["hits"].get_attribute("aria-busy") is None)

    def type(self, name: str, text: str) -> None:
        """Types into a field, in place of what stands there, as a user does: `clear` would not be an input."""
        self[name].send_keys(Keys.CONTROL + "a", Keys.NULL + Keys.BACKSPACE + text)

    def keys(self, *keys: str) -> None:
        """Typed at whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def focused(self) -> str:
        """Id of what has the focus, or its text."""
        element = self.driver.switch_to.active_element
        return element.get_attribute("id") or element.text

    def shot(self, name: str) -> None:
        """A picture of the page."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def colour(self, name: str, of: str) -> float:
        """Brightness of an element's colour, from 0 to 1."""
        parts = self.driver.execute_script(
            "const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
            "c.fillStyle = getComputedStyle(arguments[0])[arguments[1]]; c.fillRect(0, 0, 1, 1);"
            "return [...c.getImageData(0, 0, 1, 1).data]",
            self.driver.find_element(By.CSS_SELECTOR, name),
            of,
        )
        return sum(parts[:3]) / 765


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def model() -> Words:
    return Words()


@pytest.fixture(scope="module")
def address(model: Words) -> Iterator[str]:
    with bind("127.0.0.1", 0) as bound, service(model, SENTENCES, bound) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    browser.get_log("browser")
    yield Page(browser, address)
    # What the browser refuses, be it for the policy or for an error in a script, it says there. Answers that are errors
    # are there too.
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert [text for text in said if "Failed to load resource" not in text] == []
    browser.execute_script("localStorage.clear()")


def test_searches_as_one_types(page: Page) -> None:
    page.open()
    assert page.focused() == "query"
    assert page["search-status"].text == "Type to search 49 sentences."
    page.search("a man plays a flute")
    hits = page.all(".hit")
    assert len(hits) == 10
    assert hits[0].text.startswith("A man is playing a flute.")
    scores = [float(score.text.replace("−", "-")) for score in page.all(".hit .score")]
    assert scores == sorted(scores, reverse=True)
    track, bar = (page.all(f".hit {part}")[0].rect["width"] for part in (".track", ".track > div"))
    assert bar / track == pytest.approx(scores[0], abs=0.02)
    assert page["search-status"].text.startswith("10 nearest of 49 sentences, in ")
    page.shot("search-wide-light")
    page.type("query", "a woman plays a violin in the park")
    page.until(lambda: page.all(".hit")[0].text.startswith("A woman is playing a violin in the park."))


def test_options_and_text_that_is_no_markup(page: Page) -> None:
    page.open()
    page.search("b bold b quoted script alert no script")
    assert page.all(".hit .text")[0].text.startswith("<b>bold</b> & \"quoted\" <script>alert('no')</script>")
    Select(page["top-k"]).select_by_visible_text("5")
    page.until(lambda: len(page.all(".hit")) == 5)
    slide = "arguments[0].value = 0.95; arguments[0].dispatchEvent(new Event('input'))"
    page.driver.execute_script(slide, page["threshold"])
    page.until(lambda: len(page.all(".hit")) == 1)
    assert page["threshold-value"].text == "0.95"
    page["query"].send_keys(" market river city")
    page.until(lambda: "No sentence has a score of 0.95 or more" in page["search-status"].text)
    page.shot("search-nothing")


HOSTILE = [
    "<script>document.title = 'run'</script> a man",
    "<img src=x onerror=\"document.title = 'run'\"> a man",
    "<svg onload=\"document.title = 'run'\"></svg> a man",
    "<iframe srcdoc=\"<script>parent.document.title = 'run'</script>\"> a man",
    "</textarea></script><a href=\"javascript:document.title = 'run'\">a man</a>",
    "a man \u202e{{7*7}} ${7*7} `<style>*{display:none}</style>",
]


def test_no_sentence_or_name_runs_as_script(browser: Any) -> None:
    with bind("127.0.0.1", 0) as bound, service(Words(), HOSTILE, bound, HOSTILE[1]) as address:
        browser.get_log("browser")
        page = Page(browser, address)
        page.open()
        markup = {name: len(page.all(name)) for name in ("script", "img", "iframe", "style", "a")}
        page.search("a man")
        texts = [hit.text for hit in page.all(".hit .text")]
        assert sorted(text.split(" line ")[0] for text in texts) == sorted(text.strip() for text in HOSTILE)
        page["plot-hits"].click()
        page.until(lambda: len(page.all("#plane circle")) == len(HOSTILE))
        page["tab-compare"].click()
        page.type("first", HOSTILE[1])
        page.type("second", HOSTILE[0])
        page.until(lambda: page["cosine"].text != "–")
        assert HOSTILE[1] in page["about"].text
        assert {name: len(page.all(name)) for name in markup} == markup
        assert browser.title == "simcse_jax"
        assert browser.get_log("browser") == []
        # Were the page to make markup of a text, the browser would refuse it.
        refused = browser.execute_script("try { document.body.innerHTML = '<b>' } catch (error) { return error.name }")
        assert refused == "TypeError"


def test_a_late_answer_does_not_replace_a_newer_one(page: Page, model: Words) -> None:
    page.open()
    model.gate = threading.Event()
    try:
        page["query"].send_keys("slow dogs")
        page.until(lambda: page["hits"].get_attribute("aria-busy") == "true")
        time.sleep(0.3)  # until it has been asked
        page.type("query", "the stock market")
        time.sleep(0.3)
        model.gate.set()
        page.until(lambda: page.all(".hit") and page["hits"].get_attribute("aria-busy") is None)
        assert page.all(".hit")[0].text.startswith("The stock market")
        time.sleep(0.2)
        assert page.all(".hit")[0].text.startswith("The stock market")
    finally:
        model.gate.set()
        model.gate = None


def test_with_the_keyboard_alone(page: Page) -> None:
    page.open("compare")
    page.keys("/")
    assert page.focused() == "query"
    page.keys("a man plays a flute")
    page.until(lambda: page.all(".hit"))
    page.until(lambda: page["hits"].get_attribute("aria-busy") is None)
    first, second = (hit.text for hit in page.all(".hit")[:2])
    page.keys(Keys.ARROW_DOWN)
    assert page.focused() == first
    page.keys(Keys.ARROW_DOWN)
    assert page.focused() == second
    outline = page.driver.switch_to.active_element.value_of_css_property("outline-style")
    assert outline == "solid"
    page.shot("search-keyboard")
    page.keys(Keys.ARROW_UP, Keys.ARROW_UP)
    assert page.focused() == "query"
    page.keys(Keys.ARROW_DOWN, Keys.END)
    assert page.focused() == page.all(".hit")[-1].text
    page.keys(Keys.HOME)
    page.keys(Keys.ENTER)  # searches for the hit
    page.until(lambda: page["query"].get_attribute("value") == SENTENCES[0])
    assert page.focused() == "query"
    page.keys("/")  # typed, where one types
    assert page["query"].get_attribute("value").endswith("/")
    page.keys(Keys.SHIFT + Keys.TAB)
    assert page.focused() == "tab-search"
    page.keys(Keys.SHIFT + Keys.NULL + Keys.ARROW_RIGHT)
    assert page.focused() == "tab-compare"
    assert page["compare"].is_displayed()
    page.keys(Keys.TAB)
    assert page.focused() in ("panels", "first")


def test_compares(page: Page) -> None:
    page.open("compare")
    assert page["cosine"].text == "–"
    page["first"].send_keys("a man plays")
    page["second"].send_keys("a man plays")
    page.until(lambda: page["cosine"].text == "1.0000")
    page["second"].send_keys(" the violin")
    page.until(lambda: page["cosine"].text not in ("–", "1.0000"))
    page.shot("compare-wide-light")
    page.type("second", "x" * 201)
    page.until(lambda: page["compare-problem"].is_displayed())
    assert page["compare-problem"].text == "This text has 201 characters; at most 200 are taken."
    assert page["cosine"].text == "–"
    page.type("second", "a man " * 20)
    page.until(lambda: page["compare-note"].text)
    assert page["compare-note"].text.startswith("The second sentence is longer than the 32 tokens that the model reads")
    page.shot("compare-cut")
    page.type("second", "a man")
    page.until(lambda: not page["compare-note"].text)


def boxes(page: Page, selector: str) -> Any:
    script = (
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(b => [b.left, b.top, b.right, b.bottom])"
    )
    return np.array(page.driver.execute_script(script, selector))


@pytest.mark.parametrize("width", [1100, 380])
def test_plots_with_labels_that_do_not_collide(page: Page, width: int) -> None:
    page.open("plot", width, 1100)
    page["example"].click()
    page.until(lambda: len(page.all("#plane circle")) == 11)
    labels, frame = boxes(page, "#plane text"), boxes(page, "#plane")[0]
    assert len(labels) >= (9 if width > 500 else 5)
    assert (labels[:, :2] >= frame[:2]).all()
    assert (labels[:, 2:] <= frame[2:]).all()
    # A text's box has a little room above and below its letters.
    inner = labels + np.array([[1, 3, -1, -3]])
    for number, box in enumerate(inner):
        left, top, right, bottom = np.delete(inner, number, axis=0).T
        apart = (left >= box[2]) | (right <= box[0]) | (top >= box[3]) | (bottom <= box[1])
        assert apart.all()
    assert len(page.all("#points li")) == 11
    page.driver.execute_script("arguments[0].focus()", page.all("#points li")[0])
    page.keys(Keys.ARROW_DOWN)
    assert page.focused().startswith("Someone plays an instrument.")
    assert len(page.all("#plane .marked")) == 1
    page.driver.execute_script("window.scrollTo(0, 0)")
    page.shot(f"plot-{'wide' if width > 500 else 'narrow'}-light")
    page.type("lines", "one")
    page.until(lambda: page["plot-status"].text == "Give two sentences or more.")
    assert not page["figure"].is_displayed()
    fill = "arguments[0].value = 'a\\n'.repeat(21); arguments[0].dispatchEvent(new Event('input'))"
    page.driver.execute_script(fill, page["lines"])
    page.until(lambda: "21 sentences; a plot may have 20" in page["plot-problem"].text)


def test_hits_go_to_the_plot(page: Page) -> None:
    page.open()
    page.search("a man plays a flute")
    page["plot-hits"].click()
    page.until(lambda: len(page.all("#plane circle")) == 10)
    assert page["lines"].get_attribute("value").splitlines()[:2] == ["a man plays a flute", SENTENCES[0]]
    assert len(page.all("#plane .asked path")) == 1
    assert page.all("#plane .asked text")[0].text == "a man plays a flute"
    assert [item.text.split("\n")[0] for item in page.all("#points .asked")] == ["a man plays a flute"]
    assert "◆ is the query" in page["plane-caption"].text
    page.shot("plot-query")
    page.type("lines", "a man plays a flute\ntwo dogs run")  # still the same query
    page.until(lambda: len(page.all("#plane circle")) == 1)
    assert len(page.all("#plane .asked path")) == 1
    page["example"].click()
    page.until(lambda: len(page.all("#plane circle")) == 11)
    assert not page.all("#plane .asked")
    assert "query" not in page["plane-caption"].text


def test_lines_and_scores_are_those_of_the_command(page: Page, model: Words) -> None:
    vectors = [vector / np.linalg.norm(vector) for vector in model.encode([*SENTENCES, "a man plays a flute"])]
    cosines = np.stack(vectors[:-1]) @ vectors[-1]
    page.open()
    page.search("a man plays a flute")
    for hit, number in zip(page.all(".hit")[:3], np.argsort(-cosines), strict=False):
        text = hit.find_element(By.CSS_SELECTOR, ".text").text
        assert text == f"{SENTENCES[number]} line {number + 1}"
        assert hit.find_element(By.CSS_SELECTOR, ".score").text == f"{cosines[number]:.4f}"


def test_texts_that_are_cut_say_so(page: Page) -> None:
    page.open()
    page.search("cats " + "run " * 32)
    page.until(lambda: "This query is longer than the 32 tokens that the model reads" in page["search-status"].text)
    long = next(hit for hit in page.all(".hit") if hit.text.startswith("Cats run"))
    assert ", cut at 32 tokens" in long.text
    assert "longer than the 32 tokens" in long.get_attribute("title")
    others = [hit for hit in page.all(".hit") if not hit.text.startswith("Cats run")]
    assert not any("cut" in hit.text for hit in others)
    page.shot("search-cut")
    page["plot-hits"].click()
    page.until(lambda: "2 of them are longer than the 32 tokens" in page["plot-status"].text)
    assert sum("cut" in item.text for item in page.all("#points li")) == 2
    page.shot("plot-cut")


def test_what_is_too_long_is_said_and_forgotten(page: Page) -> None:
    page.open()
    page.search("dogs")
    page["query"].send_keys("x" * 200)
    page.until(lambda: page["search-problem"].is_displayed())
    assert page["search-problem"].text == "This text has 204 characters; at most 200 are taken."
    assert not page.all(".hit")
    page.shot("search-too-long")
    page.type("query", "")
    page.until(lambda: page["search-status"].text == "Type to search 49 sentences.")
    assert not page["search-problem"].is_displayed()


def test_dark(page: Page) -> None:
    page.open(dark=True)
    page.search("a man plays a flute")
    assert page.colour("html", "backgroundColor") < 0.2
    assert page.colour(".hit", "color") > 0.8
    page.shot("search-wide-dark")
    page["theme"].click()
    assert page.colour("html", "backgroundColor") > 0.8
    page.open(dark=True)  # what was chosen outlasts the page
    assert page.colour("html", "backgroundColor") > 0.8
    assert (page["theme"].text, page["theme"].accessible_name) == ("Dark theme", "Dark theme")  # what it will do
    page["theme"].click()
    assert page.colour("html", "backgroundColor") < 0.2
    assert (page["theme"].text, page["theme"].accessible_name) == ("Light theme", "Light theme")
    page.open(width=380)
    assert (page["theme"].text, page["theme"].accessible_name) == ("", "Light theme")


@pytest.mark.parametrize("tab", ["search", "compare", "plot"])
def test_on_a_narrow_screen_nothing_sticks_out(page: Page, tab: str) -> None:
    page.open(tab, 340, 720, dark=True)
    if tab == "search":
        page.search("dogs run across a field")
    elif tab == "compare":
        page["first"].send_keys("a man plays")
        page["second"].send_keys("a woman plays")
        page.until(lambda: page["cosine"].text != "–")
    else:
        page["example"].click()
        page.until(lambda: page.all("#plane circle"))
    wide = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0
    page.shot(f"{tab}-narrow-dark")


def test_it_asks_nobody_else(page: Page) -> None:
    page.driver.get_log("performance")
    page.open()
    page.search("a man plays")
    sent = [entry["message"] for entry in page.driver.get_log("performance")]
    requests = {match for text in sent for match in re.findall(r'"url":"(https?://[^"]*)"', text)}
    assert f"{page.address}api/search" in requests
    assert all(request.startswith(page.address) for request in requests), requests


def test_a_service_that_goes_and_comes_back(browser: Any) -> None:
    model = Words()
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with service(model, SENTENCES, bound) as address:
            page = Page(browser, address)
            page.open()
            page.search("a man is playing")
    page["query"].send_keys(" a flute")
    page.until(lambda: page["gone"].is_displayed())
    assert "The service does not answer" in page["gone"].text
    page.shot("service-gone")
    with bind("127.0.0.1", port) as bound, service(model, SENTENCES, bound):
        page.until(lambda: not page["gone"].is_displayed() and "1.000" in page.all(".hit")[0].text)


def test_without_sentences_it_compares_and_plots(browser: Any) -> None:
    with bind("127.0.0.1", 0) as bound, service(Words(), None, bound) as address:
        page = Page(browser, address)
        page.open()
        page.until(lambda: "start the service with a file" in page["search-status"].text)
        assert not page["query"].is_enabled()
        page.shot("search-no-sentences")
        page["tab-plot"].click()
        page["example"].click()
        page.until(lambda: len(page.all("#plane circle")) == 11)
