"""The report in a real browser: a script added after the page's own acts as the reader and returns what it read."""

import base64
import contextlib
import html
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom"),
]
LISTEN = """<script>
const complaints = [];
console.error = (...words) => complaints.push(words.join(" "));
for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
  addEventListener(kind, ({message, reason, blockedURI}) =>
    complaints.push(`${kind}: ${message ?? reason ?? blockedURI}`), true);
</script>"""
ACT = """<script>
const texts = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
const ids = () => texts(".card .label span:last-child");
const set = (id, value, kind) => {
  const field = document.getElementById(id); field.value = value; field.dispatchEvent(new Event(kind));
};
addEventListener("load", () => {
  const result = (() => { %s })();
  document.body.replaceChildren(Object.assign(document.createElement("pre"),
    {textContent: JSON.stringify({result, complaints})}));
});
</script>"""


@dataclass(frozen=True)
class Plain:
    """An image of one colour."""

    size: tuple[int, int]
    colour: str

    def open(self) -> Image.Image:
        return Image.new("RGB", self.size, self.colour)

    def key(self) -> str:
        return f"{self.size} {self.colour}"


def metric(name: str, value: float, low: float, high: float) -> dict[str, Any]:
    """A metric whose gain over the blind baseline has the interval from `low` to `high`."""
    blind = {"value": 0.25, "gain": value - 0.25, "low": low, "high": high}
    return {
        "name": name,
        "version": "1",
        "value": value,
        "low": value - 0.05,
        "high": value + 0.05,
        "baselines": {"blind": blind},
    }


def summary(**changed: Any) -> dict[str, Any]:
    return {
        "suite": "tiny-captions",
        "run": "runs/tiny",
        "n": 3,
        "settings": {"prompt": "A picture of", "seed": 0},
        "versions": {"mllm": "0.1"},
        "baselines": ["blind"],
        "metrics": [metric("caption/cider-d", 0.75, 0.4, 0.6)],
        "kinds": {"single": {"n": 2, "caption/cider-d": 0.9}, "pair": {"n": 1, "caption/cider-d": 0.45}},
    } | changed


def row(name: str, score: float | None = 0.5, **changed: Any) -> dict[str, Any]:
    return {
        "id": name,
        "kind": "single",
        "question": None,
        "references": [f"reference of {name}"],
        "prediction": f"prediction of {name}",
        "baselines": {"blind": "a cat"},
        "scores": {"caption/cider-d": score},
    } | changed


def write(folder: Path, rows: list[dict[str, Any]], images: Any = None, **changed: Any) -> Path:
    page = importlib.import_module("mllm.eval.page").write_page(folder, summary(**changed), rows, images or {})
    assert isinstance(page, Path)
    return page


def embedded(page: Path) -> Any:
    """The JSON inside a page; its script element ends at the first closing tag, as in a browser."""
    element = re.search(r'<script id="data" type="application/json">(.*?)</script', page.read_text("utf-8"), re.S)
    assert element
    return json.loads(element[1], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def chromium() -> str:
    """The browser's path; without one a test is skipped, and fails where nothing may be skipped."""
    if CHROMIUM:
        return CHROMIUM
    reason = "Chromium is missing: install the package chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def dumped(page: Path) -> str:
    """Return the page's elements after its scripts have run."""
    for profile in ("first", "second"):  # Chromium itself hangs at its start now and then: once in some hundred times
        command = [chromium(), *FLAGS, f"--user-data-dir={page.parent / profile}", page.as_uri()]
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, capture_output=True, text=True, timeout=45, check=True).stdout
    pytest.fail(f"Chromium did not finish with {page} in two tries.")


def browse(page: Path, script: str) -> Any:
    """Open a page in Chromium, run `script` there, and return what it returns; the page must not complain."""
    text = page.read_text("utf-8").replace("<head>", "<head>" + LISTEN, 1)
    head, end, tail = text.rpartition("</body>")
    acted = page.with_name("acted.html")
    acted.write_text(head + ACT % script + end + tail, "utf-8")
    rendered = dumped(acted)
    element = re.search(r"<pre>(.*)</pre>", rendered, re.S)
    assert element, rendered[-2000:]
    answer = json.loads(html.unescape(element[1]))
    assert answer["complaints"] == []
    return answer["result"]


def test_headline_and_kinds_are_shown(tmp_path: Path) -> None:
    metrics = [
        metric("caption/cider-d", 0.75, 0.4, 0.6),
        metric("caption/bleu-4", 0.27, -0.1, 0.14),
        metric("caption/rouge-l", 0.1, -0.2, -0.1),
        metric("caption/bleu-1", 0.3, 0.0, 0.0) | {"low": None, "high": None, "baselines": {}},  # a corpus figure
    ]
    shown = browse(
        write(tmp_path, [row("one")], metrics=metrics),
        """return {
          title: document.title, heading: texts("h1"), results: texts("#headline tbody tr"),
          marks: [...document.querySelectorAll("#headline tbody tr")].map((line) => line.querySelector(".mark"))
            .map((mark) => mark?.className),
          bars: [...document.querySelectorAll("#kinds .bar div")].map((bar) => bar.style.width),
          about: texts("#about dd"), cards: document.querySelectorAll(".card").length};""",
    )
    assert shown["heading"] == ["tiny-captions"] and "runs/tiny" in shown["title"]
    assert "0.750 [0.700, 0.800]" in shown["results"][0] and "+0.500 [+0.400, +0.600]" in shown["results"][0]
    assert shown["marks"] == ["mark good", None, "mark bad", None]  # an interval that contains 0 has no mark
    assert shown["results"][3] == "caption/bleu-1 v10.300––"  # no interval, no baseline
    assert shown["bars"][0] == "100%" and "50%" in shown["bars"]
    assert shown["about"] == ["A picture of", "0", "0.1"] and shown["cards"] == 1


def test_search_kind_and_order(tmp_path: Path) -> None:
    rows = [
        row("middle", 0.5),
        row("unscored", math.nan, references=["a zebra"]),
        row("worst", 0.1, kind="pair", question="Which zebra?"),
        row("best", 0.9, kind="pair"),
    ]
    shown = browse(
        write(tmp_path, rows),
        """const shown = {original: ids()};
        set("search", "ZEBRA", "input"); shown.search = ids(); shown.count = texts("#count");
        set("search", "which zebra", "input"); shown.words = ids();
        set("search", "no such thing", "input"); shown.nothing = ids();
        set("search", "", "input");
        set("sort", "worst", "change"); shown.worst = ids();
        set("sort", "best", "change"); shown.best = ids();
        set("kind", "=pair", "change"); shown.kind = ids();
        return shown;""",
    )
    assert shown["original"] == ["middle", "unscored", "worst", "best"]
    assert shown["search"] == ["unscored", "worst"] and shown["count"] == ["Showing 2 of 2 items"]
    assert shown["words"] == ["worst"] and shown["nothing"] == []
    assert shown["worst"] == ["worst", "middle", "best", "unscored"]
    assert shown["best"] == ["best", "middle", "worst", "unscored"]
    assert shown["kind"] == ["best", "worst"]


def test_where_lower_is_better_a_fall_is_good_and_the_highest_comes_first_as_the_worst(tmp_path: Path) -> None:
    chair = metric("caption/chair-s", 0.1, -0.2, -0.1) | {"better": "lower"}
    rows = [row(name, scores={"caption/chair-s": score}) for name, score in (("good", 0.0), ("bad", 1.0))]
    shown = browse(
        write(tmp_path, rows, metrics=[chair]),
        """const shown = {mark: document.querySelector("#headline .mark").className, name: texts("#headline td")[0]};
        set("sort", "worst", "change"); shown.worst = ids();
        set("sort", "best", "change"); shown.best = ids();
        return shown;""",
    )
    assert shown["mark"] == "mark good" and "lower is better" in shown["name"]
    assert (shown["worst"], shown["best"]) == (["bad", "good"], ["good", "bad"])


def test_markup_in_any_text_is_shown_as_text(tmp_path: Path) -> None:
    evil = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'><!--<script> & é \u2028"
    rows = [row(evil, kind=evil, question=evil, references=[evil], prediction=evil, baselines={"blind": evil})]
    page = write(tmp_path, rows, suite=evil, run=evil, settings={evil: evil}, kinds={evil: {"n": 1}})
    assert embedded(page)["rows"][0]["prediction"] == evil
    shown = browse(
        page,
        """return {harmed: window.harmed ?? null, heading: texts("h1"), images: document.images.length,
          card: [".label span", ".question", ".prediction", ".baseline"].flatMap((part) => texts(`.card ${part}`)),
          setting: texts("#about dt")[0]};""",
    )
    assert shown["harmed"] is None and shown["images"] == 0
    assert shown["heading"] == [evil] and shown["card"] == [evil] * 5 and shown["setting"] == evil


def test_many_rows_are_rendered_sixty_at_a_time_and_have_images_up_to_a_limit(tmp_path: Path) -> None:
    rows = [row(f"item {n}") for n in range(510)]
    images = {item["id"]: [Plain((64, 32), "red")] for item in rows}
    page = write(tmp_path, rows, images)
    shown = browse(
        page,
        """const button = document.getElementById("more"), shown = {drawn: [ids().length]};
        button.click(); shown.drawn.push(ids().length);
        while (!button.hidden) button.click();
        shown.drawn.push(ids().length);
        shown.note = document.getElementById("omitted").checkVisibility() && texts("#omitted")[0];
        shown.images = document.querySelectorAll(".card img").length;
        shown.missing = texts(".card .missing");
        return shown;""",
    )
    assert shown["drawn"] == [60, 120, 510]
    assert shown["images"] == 500 and shown["missing"] == ["image not embedded"] * 10
    assert "first 500 items" in shown["note"]
    assert len(embedded(page)["thumbnails"]) == 1  # the image that they share is stored once


def test_thumbnails_are_small_jpegs_in_the_order_given(tmp_path: Path) -> None:
    images = {"two": [Plain((800, 400), "#c81e1e"), Plain((40, 60), "#1e1ec8")]}
    content = embedded(write(tmp_path, [row("none"), row("two")], images))
    assert [item["thumbnails"] for item in content["rows"]] == [[], [0, 1]]
    opened = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in content["thumbnails"]]
    assert [image.format for image in opened] == ["JPEG", "JPEG"]
    assert [image.size for image in opened] == [(224, 112), (40, 60)]  # never enlarged
    for image, colour in zip(opened, [(200, 30, 30), (30, 30, 200)], strict=True):
        pixel = image.getpixel((10, 10))
        assert isinstance(pixel, tuple) and max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 8


def test_numbers_that_json_cannot_represent_become_null(tmp_path: Path) -> None:
    content = embedded(write(tmp_path, [row("one", math.nan), row("two", -math.inf)], settings={"t": math.inf}))
    assert [item["scores"]["caption/cider-d"] for item in content["rows"]] == [None, None]
    assert content["summary"]["settings"] == {"t": None}


def test_the_page_may_request_nothing(tmp_path: Path) -> None:
    text = write(tmp_path / "new" / "folder", []).read_text("utf-8")
    assert "default-src 'none'" in text and "://" not in text


def test_a_ranking_is_shown_with_its_first_images(tmp_path: Path) -> None:
    suite, item = importlib.import_module("mllm.eval.suite"), importlib.import_module("mllm.data.items").Item
    scoring, metric = importlib.import_module("mllm.eval.scoring"), importlib.import_module("mllm.registry").lookup
    images = tuple(Plain((10 + number, 20), "red") for number in range(8))
    asked = item("a", images, ("2",), document=("A cat.", images[7], "And then?"))
    name, ranking = "retrieval/r@1", ["4 2 0 1 3 5 6"]
    result = scoring.Result(ranking, {name: metric("metrics", name)(ranking, [("2",)])})
    report = importlib.import_module("mllm.eval.report").report
    config = suite.load_suite("vist", [f"metrics=[{name}]"])
    page = report(config, [asked], {"model": result}, tmp_path, run="x", settings={}, about={}).page
    shown = browse(page, "return {wide: [...document.querySelectorAll('.card img')].map((one) => one.naturalWidth),"
                        "text: document.querySelector('.card').textContent}")  # fmt: skip
    assert shown["wide"] == [17, 14, 12, 10, 11, 13]  # the query's, and the first five
    assert "A cat.And then?" in shown["text"]
