"""The page in a real browser: nothing is fetched, nothing fails, and it can be read on a phone and in the dark."""

import asyncio
import base64
import io
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from featurepipe.reporting.nights import nights_report
from featurepipe.reporting.report import Features, write_report
from featurepipe.store import FeatureStore

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine"),
]
SECONDS = 60


class Browser:
    """One tab of a headless Chromium, driven by the DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu"]
        options += [
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
        ]
        options += ["--no-sandbox", "--disable-dev-shm-usage"] if os.geteuid() == 0 else []
        log = (folder / "log").open("wb")
        with log:
            self._process = subprocess.Popen([str(CHROMIUM), *options, "about:blank"], stdout=log, stderr=log)
        self._runner = asyncio.Runner()
        self.events: list[dict[str, Any]] = []
        self._number = 0
        try:
            self._runner.run(self._connect(folder / "DevToolsActivePort"))
        except BaseException:
            self.close()
            raise

    _http: aiohttp.ClientSession | None = None
    _tab: str | None = None
    _target: str | None = None

    async def _connect(self, port_file: Path) -> None:
        end = time.monotonic() + SECONDS
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"chromium did not start: {(port_file.parent / 'log').read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        port, path = port_file.read_text().splitlines()[:2]
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._runner.run(self._send(method, params))

    async def _send(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        order = {"id": self._number, "method": method, "params": params}
        await self._socket.send_json(order | ({"sessionId": self._tab} if self._tab else {}))
        while True:
            message = await self._socket.receive_json(timeout=SECONDS)
            if message.get("id") != self._number:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            else:
                return message["result"]

    def run(self, expression: str) -> Any:
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + SECONDS
        while not self.run(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never became true: {expression}"
            time.sleep(0.1)

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, touch: bool = False
    ) -> None:
        self._new_tab()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.scheme("dark" if dark else "light")
        self.send("Page.navigate", url=path.as_uri())
        self.wait_for(f"location.href === {path.as_uri()!r} && document.readyState === 'complete'")
        self.wait_for("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
        self.wait_for("document.documentElement.dataset.plots")

    def _new_tab(self) -> None:
        self._tab = None  # what follows is for the browser
        if self._target:  # pages left open would go on painting beside the next
            self.send("Target.closeTarget", targetId=self._target)
        self._target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self.send("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def scheme(self, name: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def move(self, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, x: float, y: float) -> None:
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def colours(self, selector: str) -> int:
        """How many colours a part of the page is painted in."""
        left, top, width, height = self.box(selector)
        clip = {"x": left, "y": top + self.run("scrollY"), "width": width, "height": height, "scale": 1}
        data = self.send("Page.captureScreenshot", clip=clip)["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            return len(image.convert("RGB").getcolors(1 << 24))

    def box(self, selector: str) -> list[float]:
        """Left, top, width and height of an element, which is brought into view."""
        return self.run(f"""(() => {{
            const element = document.querySelector({selector!r});
            element.scrollIntoView({{block: "center", behavior: "instant"}});
            const {{left, top, width, height}} = element.getBoundingClientRect();
            return [left, top, width, height];
        }})()""")

    def paper(self) -> bytes:
        """The page as it is printed, PDF."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])

    def requests(self) -> list[str]:
        self.run("0")  # reads what has arrived
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[Any]:
        self.run("0")
        logged = [e["params"]["entry"] for e in self.events if e["method"] == "Log.entryAdded"]
        said = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        thrown = [e["params"]["exceptionDetails"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        return (
            [e for e in logged if e["level"] != "verbose"]
            + [e for e in said if e["type"] in {"error", "warning"}]
            + thrown
        )

    def close(self) -> None:
        if self._http is not None:
            self._runner.run(self._http.close())
        self._runner.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# Bokeh's parts are in shadow roots, which selectors do not enter.
DEEP = """
globalThis.deep = (selector, root = document) => [
  ...root.querySelectorAll(selector),
  ...Array.from(root.querySelectorAll("*")).flatMap((e) => (e.shadowRoot ? deep(selector, e.shadowRoot) : [])),
];
globalThis.tips = () => deep(".bk-Tooltip").filter((e) => e.getBoundingClientRect().height > 10);
"""
MAP = "#map .panel:not(.tucked) .plot"
NAMES = ("<img src=x onerror=alert(1)>", "$$x^2$$", 'a & b\'s "class"')


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(tmp_path_factory.mktemp("chromium"))
    yield tab
    tab.close()


COLUMNS = ("blocks.", "bottleneck:gap")


@pytest.fixture(scope="module")
def page(new_document, features, read_image, tmp_path_factory):
    """A page with names that are hard on browsers."""
    document, folder = new_document(), tmp_path_factory.mktemp("page")
    ids, values, labels, _ = features
    document["details"]["metrics"]["mistakes"]["most_confident"][0]["id"] = NAMES[0]
    names = dict(zip(("Shirt", "Bag", "Coat"), NAMES, strict=True))
    labels = [names.get(label, label) for label in labels]
    classes = document["details"]["metrics"]["confusion"]["classes"]
    classes[:] = [names.get(name, name) for name in classes]
    return write_report(
        document, folder / "page.html", images=read_image, features=Features(ids, values, labels), silent=True
    )


@pytest.fixture(scope="module")
def nights_page(night_records, tmp_path_factory):
    """A page of four weeks of nights, one of whose steps has a name that is hard on browsers."""
    folder = tmp_path_factory.mktemp("nights")
    store = FeatureStore(folder / "store")
    for record in night_records():
        for step in record.get("steps", ()):
            step["name"] = step["name"].replace("heads", NAMES[0])
        store.write_run(record)
    return nights_report(store, folder / "nights.html", silent=True)


@pytest.fixture(params=["page", "nights_page"])
def any_page(request):
    """A page of each kind."""
    return request.getfixturevalue(request.param)


def find_tip(browser: Browser, selector: str, act) -> dict[str, Any]:
    """Points at places of a plot until a tooltip shows; returns its text, pictures and edges."""
    left, top, width, height = browser.box(selector)
    browser.run(DEEP + "0")
    for down in range(8, 92, 4):
        for right in range(12, 96, 2):
            act(left + width * right / 100, top + height * down / 100)
            if browser.run("tips().length"):
                return browser.run("""(async () => {
                    const [tip] = tips(), content = tip.shadowRoot.querySelector(".bk-tooltip-content");
                    const images = [...content.querySelectorAll("img")];
                    await Promise.all(images.map((image) => image.decode()));
                    const {left, right} = tip.getBoundingClientRect();
                    return {
                        text: content.textContent, left, right,
                        sizes: images.map((image) => image.naturalWidth), sources: images.map((image) => image.src.slice(0, 11)),
                    };
                })()""")
    raise AssertionError(f"no tooltip anywhere in {selector}")


def test_nothing_fails_and_nothing_is_fetched(browser, page):
    browser.open(page)
    assert browser.run("Bokeh.documents[0].roots().length") == 9
    for plot in ("#curves .plot", "#similarity .plot", "#scores .plot", "#details .plot", MAP):
        assert browser.colours(plot) > 20, plot  # drawn, not blank
    find_tip(browser, MAP, browser.move)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.as_uri()]


def test_names_of_nodes_stand_level_where_they_fit(browser, page, new_document, tmp_path):
    """At a desk, also in the file; on a phone, or side by side with another panel, slanted."""
    document = new_document()
    document["results"] = [row for row in document["results"] if row["tested_on"] == "source"]
    alone = write_report(document, tmp_path / "alone.html", silent=True)
    turned = """Bokeh.documents[0].get_model_by_id(document.querySelector("#curves .panel").id.slice(6))
        .below[0].major_label_orientation"""
    lines = """Array.from(Bokeh.documents[0].get_model_by_id(document.querySelector("#curves .panel").id.slice(6))
        .below[0].major_label_overrides.values(), (label) => label.text.split("\\n").length)"""
    for shown, width, is_level in ((alone, 1280, True), (alone, 390, False), (page, 1280, False)):
        browser.open(shown, width=width)
        browser.wait_for(f"({turned} === 0) === {str(is_level).lower()}")
        assert set(browser.run(lines)) == ({2} if is_level else {1})
        assert browser.run("document.documentElement.scrollWidth") == width


def test_the_policy_stops_what_would_be_fetched_or_run(browser, page):
    """So that the test before means something, and a name that slipped through unescaped could do nothing."""
    browser.open(page)
    browser.run("""(() => {
        const image = document.createElement("img"), script = document.createElement("script");
        image.src = "https://example.invalid/a.png";
        script.textContent = "globalThis.ran = true";
        document.body.append(image, script);
    })()""")
    time.sleep(0.5)
    assert browser.run("globalThis.ran === undefined")
    assert len(browser.complaints()) >= 2


def test_nothing_fails_and_nothing_is_fetched_for_nights(browser, nights_page):
    browser.open(nights_page)
    for plot in ("#images .plot", "#speed .plot", "#drift .plot", "#classes .plot"):
        assert browser.colours(plot) > 5, plot
        find_tip(browser, plot, browser.move)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [nights_page.as_uri()]


def test_the_names_of_runs_are_whole_in_a_small_window(browser, night_records, tmp_path):
    """A name breaks at its hyphen where reasons why a run did not end well take the room."""
    (tmp_path / "store").mkdir()
    store, records = FeatureStore(tmp_path / "store"), night_records()
    records[-1]["warnings"] = [
        "2 files cannot be read, see /srv/share/photographs-of-all-sites/2026/november/by-camera/readme"
    ]
    for record in records:
        store.write_run(record)
    browser.open(nights_report(store, tmp_path / "nights.html", silent=True), width=1000)
    table = "[...document.querySelectorAll('table')].find((one) => one.textContent.includes('Rejected'))"
    inside, outside = browser.run(
        f"(({{scrollWidth, clientWidth}}) => [scrollWidth, clientWidth])({table}.parentElement)"
    )
    assert inside == outside <= 1000
    assert browser.run(f"{table}.rows[1].lastElementChild.textContent") == records[-1]["run_id"]


def test_the_tooltip_of_a_bar_shows_its_night(browser, nights_page):
    """Anywhere above a night, also where its bar is too small to be hit."""
    browser.open(nights_page)
    left, top, width, height = browser.box("#images .plot")
    browser.run(DEEP + "0")
    browser.move(left + width * 0.9, top + height * 0.2)
    browser.wait_for("tips().length")
    text = browser.run("tips()[0].shadowRoot.querySelector('.bk-tooltip-content').textContent")
    night, computed = re.fullmatch(r"2026-11-(\d\d) 02:00computed (\d+)ended done ", text).groups()
    assert int(computed) == 100 + int(night) - 2
    tip = find_tip(browser, "#classes .plot", browser.move)
    assert re.match(r"2026-11-\d\d 02:00 (cat|dog)share \d\d\.\d\u00a0%images \d+ of \d+", tip["text"])


def test_a_finger_sees_the_night_as_well(browser, nights_page):
    browser.open(nights_page, width=390, height=844, touch=True)
    tip = find_tip(browser, "#images .plot", browser.tap)
    assert tip["text"].startswith("2026-11-")
    assert tip["left"] >= 0
    assert tip["right"] <= 390


def test_the_tooltip_of_the_map_shows_the_image(browser, page):
    browser.open(page)
    tip = find_tip(browser, MAP, browser.move)
    assert tip["sizes"] == [28]
    assert tip["sources"] == ["data:image/"]
    assert re.search(r"test/\d+", tip["text"])


def test_a_finger_sees_the_image_as_well(browser, page):
    browser.open(page, width=360, height=740, touch=True)
    tip = find_tip(browser, MAP, browser.tap)
    assert tip["sizes"] == [28]
    browser.tap(180, 20)
    browser.wait_for("tips().length === 0")
    for plot in ("#curves .plot", "#details .plot"):
        tip = find_tip(browser, plot, browser.tap)
        assert tip["left"] >= 0, plot
        assert tip["right"] <= 360, plot


def test_a_phone_scrolls_a_confusion_matrix_of_many_classes_and_paper_has_it_large(browser, bundle_document, tmp_path):
    """So that the names of its columns stay apart."""
    names = [f"animals and nature {k}" for k in range(36)]
    counts = np.full((36, 36), 2) + 50 * np.eye(36, dtype=int)
    bundle_document["evaluation"]["metrics"]["confusion"] = {"classes": names, "counts": counts.tolist()}
    dense = write_report(bundle_document, tmp_path / "page.html", silent=True)
    browser.open(dense, width=390, height=844, touch=True)
    plot = "document.querySelector('.dense .plot')"
    assert browser.run("document.documentElement.scrollWidth") == 390
    assert browser.run(f"{plot}.clientWidth") < 390
    assert browser.run(f"{plot}.scrollWidth") == 180 + 30 * 13
    browser.open(dense)
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    height = browser.run("document.querySelector('.dense .paper > svg').getBoundingClientRect().height")
    browser.send("Emulation.setEmulatedMedia", media="")
    assert 500 < height <= 511  # 13.5 cm


def test_a_score_says_which_node_it_is_of(browser, page):
    browser.open(page)
    tip = find_tip(browser, "#scores .plot", browser.move)
    assert tip["text"].startswith(tuple(COLUMNS))
    assert re.search(r"LogME 0\.\d{3}", tip["text"])


def test_accuracy_is_shown_over_cost_too(browser, page):
    browser.open(page)
    browser.run("document.querySelectorAll('#curves .choice button')[1].click()")
    tip = find_tip(browser, "#curves .chosen .panel:not(.tucked) .plot", browser.move)
    assert tip["text"].startswith(tuple(COLUMNS))
    assert re.search(r"milliseconds per image \d+\.\d+ ms", tip["text"])


def test_a_phone_shows_accuracy_beside_each_node_and_a_desk_all_of_it(browser, page):
    browser.open(page, width=390, height=844, touch=True)
    browser.box("#nodes table")
    cells = "[...document.querySelectorAll('#nodes tbody tr')].map((row) => row.cells[1].getBoundingClientRect().right)"
    assert max(browser.run(cells)) <= 390
    browser.open(page, width=1440)
    assert browser.run("document.querySelector('main').getBoundingClientRect().width") > 1300
    words, plot = browser.box("#similarity figcaption"), browser.box("#similarity .plot")
    assert words[0] + words[2] < plot[0]  # words beside the plot
    tables = browser.run(
        "[...document.querySelectorAll('#details > .scroll')].map((t) => t.getBoundingClientRect().top)"
    )
    assert len(tables) == 2
    assert tables[0] == tables[1]  # side by side


def test_names_stay_text_in_tooltips_and_legends(browser, page):
    browser.open(page)
    browser.run(DEEP + "0")
    shown = browser.run("""(() => {
        const source = Bokeh.documents[0].get_model_by_id(document.querySelector("#map .exhibit").dataset.source);
        return [...new Set(source.data.label)];
    })()""")
    assert set(NAMES) < set(shown)
    labels = browser.run("[...document.querySelectorAll('#map .keys button')].map((b) => b.textContent.trim())")
    assert set(NAMES) < set(labels)
    keys = "document.querySelectorAll('#map .keys button')"
    for position, label in enumerate(labels):
        if label not in NAMES:
            browser.run(f"{keys}[{position}].click()")
    tip = find_tip(browser, MAP, browser.move)
    assert tip["text"].startswith(NAMES)
    assert len(tip["sizes"]) == 1  # the thumbnail and no other
    assert browser.complaints() == []


def test_the_legend_hides_and_shows(browser, page):
    browser.open(page)
    first = "document.querySelector('#curves .keys button')"
    models = f"JSON.parse({first}.dataset.models).map((id) => Bokeh.documents[0].get_model_by_id(id).visible)"
    assert browser.run(models) == [True] * 6  # bars, line and markers in two panels
    browser.run(f"{first}.focus()")
    for pressed in (False, True):
        browser.send(
            "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )
        browser.send("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
        assert browser.run(models) == [pressed] * 6
        assert browser.run(f"{first}.getAttribute('aria-pressed')") == str(pressed).lower()


def test_the_projections_are_chosen_by_a_button(browser, page):
    browser.open(page)
    seen = "[...document.querySelectorAll('#map .panel')].map((p) => getComputedStyle(p).visibility)"
    assert browser.run(seen) == ["visible", "hidden"]
    browser.run("document.querySelectorAll('#map .choice button')[1].click()")
    assert browser.run(seen) == ["hidden", "visible"]
    assert browser.colours(MAP) > 20
    assert find_tip(browser, MAP, browser.move)["sizes"] == [28]


SAVED = """
globalThis.saved = [];
const made = [], make = URL.createObjectURL;
URL.createObjectURL = (blob) => { made.push(blob); return make.call(URL, blob); };
HTMLAnchorElement.prototype.click = function () { saved.push({ name: this.download, blob: made.at(-1) }); };
"""


def saved(browser: Browser, selector: str, number: int) -> tuple[str, str]:
    """Presses the button that saves as the first (0) or second kind; the one file's name, and its text or sizes."""
    browser.run(f"saved.length = 0; document.querySelectorAll({selector!r} + ' .downloads button')[{number}].click()")
    browser.wait_for("saved.length")
    return browser.run("""(async () => {
        const [{ name, blob }] = saved;
        if (saved.length > 1) return ["more than one file", ""];
        if (blob.type !== "image/png") return [name, await blob.text()];
        const { width, height } = await createImageBitmap(blob);
        return [name, `${width} x ${height}`];
    })()""")


def test_a_figure_is_saved_as_one_file_with_all_its_plots_and_its_legend(browser, page):
    browser.open(page, dark=True)
    browser.run(f"(() => {{ {SAVED} }})()")
    name, svg = saved(browser, "#curves .panels:not(.chosen)", 0)
    assert name == "Accuracy-over-depth.svg"
    for words in ("Tested on fashion", "Tested on emoji-outlined", "recommended", "xgboost, random weights", "node"):
        assert f">{words}</text>" in svg, words
    assert "#e8eaed" not in svg  # the ink of a dark page
    width, height = (float(re.search(rf'{side}="([\d.]+)"', svg)[1]) for side in ("width", "height"))
    whole = browser.box("#curves .panels:not(.chosen)")[2]
    assert whole - 40 < width <= whole
    name, sizes = saved(browser, "#curves .panels:not(.chosen)", 1)
    assert (name, sizes) == ("Accuracy-over-depth.png", f"{2 * width:.0f} x {2 * height:.0f}")
    name, svg = saved(browser, "#curves .panels.chosen", 0)
    assert name == "Accuracy-over-cost-Share-of-the-operations.svg"
    assert ">share of the operations</text>" in svg
    assert browser.complaints() == []


def test_a_table_is_saved_with_its_numbers_in_full(browser, page):
    browser.open(page)
    browser.run(f"(() => {{ {SAVED} }})()")
    name, text = saved(browser, "#nodes", 0)
    assert name.endswith(".csv")
    header, first, *rows = text.splitlines()
    assert header.startswith('Node,Accuracy: logistic,"Accuracy: logistic, note",Accuracy: xgboost,')
    assert len(rows) == 6
    cells = browser.run("Array.from(document.querySelector('#nodes tbody tr').cells, (cell) => cell.dataset.order)")
    assert first.split(",")[1] == cells[1]
    name, text = saved(browser, "#nodes", 1)
    assert name.endswith(".tex")
    assert text.count("\\\\\n") == 8
    assert "\\toprule\nNode & Accuracy: logistic & " in text
    assert "\\%" in text


def test_tables_are_sorted_by_a_click(browser, page):
    browser.open(page)
    header = "document.querySelectorAll('#nodes thead tr:last-child th')[1]"
    widths = "[...document.querySelectorAll('#nodes tbody tr')].map((row) => Number(row.cells[1].dataset.order))"
    before = browser.run(widths)
    browser.run(f"{header}.querySelector('button').click()")
    assert browser.run(widths) == sorted(before) != before
    assert browser.run(f"{header}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{header}.querySelector('button').click()")
    assert browser.run(widths) == sorted(before, reverse=True)
    assert browser.run("document.querySelectorAll('#nodes tr.marked').length") == 1


@pytest.mark.parametrize("width", [320, 360, 768, 1280, 1920])
def test_the_page_never_scrolls_sideways(browser, any_page, width):
    browser.open(any_page, width=width, height=740, touch=width < 500)
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth") == browser.run("innerWidth") == width
    outside = browser.run(f"""[...document.querySelectorAll("main *, header *")].filter((e) => {{
        const box = e.getBoundingClientRect();
        return box.width && box.right > {width} + 1 && !e.closest(".scroll");
    }}).map((e) => e.className || e.tagName)""")
    assert outside == []


def test_the_dark_scheme_reaches_page_and_plots(browser, any_page):
    browser.open(any_page)
    colours = """[getComputedStyle(document.body).backgroundColor,
        Bokeh.documents[0].get_model_by_id(JSON.parse(document.getElementById("colours").textContent)[0][0])
            .axis_line_color]"""
    light = browser.run(colours)
    assert light == ["rgb(255, 255, 255)", "#dfe3e8"]
    browser.scheme("dark")
    browser.wait_for("document.documentElement.dataset.plots === 'dark'")
    assert browser.run(colours) == ["rgb(21, 24, 29)", "#363c45"]
    browser.scheme("light")
    browser.wait_for("document.documentElement.dataset.plots === 'light'")
    assert browser.run(colours) == light
    browser.open(any_page, dark=True)
    assert browser.run(colours) == ["rgb(21, 24, 29)", "#363c45"]


def test_paper_has_every_plot_of_the_nights(browser, nights_page):
    browser.open(nights_page)
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run("[...document.querySelectorAll('.panel')].every((p) => p.clientHeight > 80)")
    browser.send("Emulation.setEmulatedMedia", media="")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", browser.paper())) <= 20


def test_paper_has_every_plot_and_table_and_no_controls(browser, page):
    browser.open(page)
    browser.send("Emulation.setEmulatedMedia", media="print")
    plots = browser.run("document.querySelectorAll('.plot').length")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    figures = browser.run("""[...document.querySelectorAll(".paper > svg")].map((svg) => {
        const figure = svg.getBoundingClientRect(), around = svg.closest("figure").getBoundingClientRect();
        return [figure.width, figure.height, around.right - figure.right];
    })""")
    assert len(figures) == plots  # each as an SVG of its own
    assert all(width > 150 and 80 < height <= 303 and right >= -1 for width, height, right in figures)  # 8 cm at most
    assert browser.run("[...document.querySelectorAll('.panel > .plot')].every((p) => p.offsetWidth === 0)")
    button = "getComputedStyle(document.querySelector('th button')).display"
    assert browser.run(button) == "contents"  # as any other, it would keep the head of a table from its later sheets
    shown = "getComputedStyle(document.querySelector({!r})).display !== 'none'"
    assert not browser.run(shown.format("nav"))
    assert not browser.run(shown.format(".choice"))
    tall = "[...document.querySelectorAll('.panel')].every((p) => p.clientHeight > 230)"  # 6.2 cm, as in style.css
    assert browser.run(tall)
    assert browser.run("[...document.querySelectorAll('table, .record')].every((t) => t.clientHeight > 20)")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("document.querySelectorAll('details[open]').length") == 0
    browser.send("Emulation.setEmulatedMedia", media="")
    pdf = browser.paper()
    assert pdf.startswith(b"%PDF")
    assert 5 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 20


def test_routes_without_a_result_are_read_on_a_phone_without_scrolling(browser, tmp_path) -> None:
    row = {
        "route": "bottleneck", "kind": "bottleneck", "size": 5, "per_class": 5.0, "images": 10, "tested_on": "source",
        "accuracy": 0.9, "low": 0.8, "high": 0.95, "cells": [0.9], "params": [{}], "train_accuracy": 1.0, "seconds": 1.0,
        "seconds_features": 0.5, "seconds_fit": 0.5, "memory": None,
    }  # fmt: skip
    path = "/data/projects/" + "a-long-name-of-a-folder" * 3
    lacking = [
        {"route": "as-it-is", "why": f"the images were extracted from {path}, which cannot be opened now"},
        {
            "route": "tail from blocks.10",
            "size": "all",
            "draws": 3,
            "seconds": 5400.0,
            "why": "the budget would not have sufficed",
        },
    ]
    sizes = [{"size": 5, "per_class": 5.0, "images": 10, "text": "5 a class"}]
    document = {
        "kind": "routes",
        "version": 1,
        "dataset": "d",
        "measure": "accuracy",
        "results": [row],
        "sizes": sizes,
        "not_tried": lacking,
    }
    browser.open(write_report(document, tmp_path / "page.html", silent=True), width=390, height=844, touch=True)
    table = "document.querySelector('#untried .scroll')"
    assert browser.run(f"{table}.scrollWidth") <= browser.run(f"{table}.clientWidth") < 390
    said = browser.run(f"{table}.querySelector('tbody tr:last-child').innerText")
    assert "3 draws, about 1:30:00 h by the estimate" in said
