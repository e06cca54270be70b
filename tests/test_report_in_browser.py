# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The page in a real browser: a headless Chromium, without a network."""

import shutil

import pytest
from report_runs import add_pictures, record, write_history, write_run

from evolmm_trl.report import write_report


pytestmark = pytest.mark.xdist_group("browser")  # one browser for all
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: `make browser` installs it", allow_module_level=True)

RUN_CODE = "window.ran = 1; document.title = 'ran'"
EVIL = (
    f"<script>{RUN_CODE}</script>",
    f"</script><script>{RUN_CODE}</script>",
    f"</textarea></title></style><script>{RUN_CODE}</script>",
    f"<!--<script>{RUN_CODE}</script>-->",
    f'<img src=x onerror="{RUN_CODE}">',
    f"<svg onload=\"{RUN_CODE}\"><iframe srcdoc='<script>parent.ran=1</script>'>",
    f"\"><a href='javascript:{RUN_CODE}'>click</a><base href=http://evil.example/>",
    "<link rel=stylesheet href=http://evil.example/a.css><img src=http://evil.example/b.png>",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'>",
    "{{ 7 * 7 }}{% raw %} ${7*7} <template><form id=filters><input name=from>",
    "constructor",
    "__proto__",
    "toString",
    "\u202egnp.exe \u2066 \u200f\x00\x07\x1b[2J\r\x85\u2028\ud800 \U000e0041",
    "x" * 1_000_000,
    "W\u0300\u0301\u0302\u0303\u0304\u0305" * 3_000,
    "\u05d0\u05d1\u05d2 123 (\u05d3",
    "\n" * 5_000,
    "",
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that is open, with what it asked for and complained of."""

    def __init__(self, browser, file, width=1280, height=900, **options):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.requests, self.complaints, self.refused = [], [], {}
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("requestfailed", lambda request: self.refused.update({request.url: request.failure}))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri())
        self.file = file

    def cards(self) -> list[str]:
        return self.page.locator(".card:not(.empty) .question").all_inner_texts()

    def status(self) -> str:
        return self.page.locator("#status").inner_text()

    def open_answers(self) -> None:
        """Opens every card's answers. They are filled by an event that comes a little later."""
        for summary in self.page.locator("summary").all():
            summary.click()
        sync_api.expect(self.page.locator("details:not([open]), details:not(:has(li))")).to_have_count(0)

    def overflow(self) -> list:
        """What is wider than the window."""
        return self.page.evaluate(
            "() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll('*')]"
            ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"
        )

    def close(self) -> None:
        """Nothing was asked of a network, and nothing was complained of."""
        outside = [url for url in self.requests if not url.startswith("data:") and url != self.file.as_uri()]
        assert outside == []
        assert self.complaints == []
        self.context.close()


@pytest.fixture
def open_page(browser):
    tabs = []

    def open_it(file, **options):
        tabs.append(Tab(browser, file, **options))
        return tabs[-1]

    yield open_it
    for tab in tabs:
        tab.close()


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """The page of a run in which everything that a model or a dataset wrote is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    digests = add_pictures(folder, 2)
    records = []
    for i, text in enumerate(EVIL):
        rollout = record(
            i + 1,
            question=text,
            question_completion=text,
            question_well_formed=bool(i % 2),
            image_id=text,
            image_digest=[text, *digests][i % 3],
            answers=[text, text, None],
            blind_answers=[text, None],
        )
        for answer in rollout["answers"]:
            answer["completion"] = text
        records.append(rollout)
    write_run(folder, records, end=EVIL[0].encode())
    write_history(folder / "_report", [{"step": 1, "solver/kl": 0.1, EVIL[1]: 3.0}])
    return write_report(folder)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """40 rollouts, two a step: all agree in the first half, none in the second. Every other one has a picture."""
    folder = tmp_path_factory.mktemp("ordinary")
    digests = add_pictures(folder, 5)
    records = []
    for i in range(40):
        question = f"How many bars are there? {i}" if i % 4 else f"What colour is bar {i}?"
        answers = ["4"] * 5 if i < 20 else ["1", "2", "3", "4", None]
        digest = digests[i // 2 % 5] if i % 2 else None
        records.append(record(1 + i // 2, question=question, answers=answers, image_digest=digest))
    write_run(folder, records)
    write_history(folder / "_report", [{"step": step, "solver/kl": step / 100} for step in range(1, 21)])
    return write_report(folder)


@pytest.fixture(scope="module")
def two(ordinary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    records = [record(step, question=f"How many of run B? {step}") for step in range(1, 12)]
    return write_report([ordinary.parent.parent, write_run(folder, records)], folder / "two.html")


# Hostile text


def test_nothing_that_a_model_wrote_runs_or_loads(evil, open_page):
    tab = open_page(evil)
    tab.page.get_by_label("with a picture").uncheck()
    assert len(tab.cards()) == len(EVIL)
    tab.open_answers()
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.ran") is None
    assert tab.page.title().endswith("evolmm report")
    tags = tab.page.evaluate("[...new Set([...document.querySelectorAll('#cards *')].map(e => e.tagName))].sort()")
    assert tags == sorted(
        "ARTICLE B BDI DETAILS DIV IMG LI OL P PRE SPAN SUMMARY UL".split()
    )  # what the page's script makes, and nothing else
    assert tab.page.evaluate("document.scripts.length") == 2
    assert tab.page.locator("#cards a, iframe, base, link, meta[http-equiv=refresh]").count() == 0


def test_hostile_text_is_shown_as_it_was_written(evil, open_page):
    tab = open_page(evil)
    tab.page.get_by_label("with a picture").uncheck()
    shown = tab.page.evaluate("[...document.querySelectorAll('.question')].map(e => e.textContent)")
    for text, question in zip(EVIL[:13], shown, strict=False):
        assert question == text
    assert "\u27e8U+202E\u27e9gnp.exe" in shown[13] and "\u27e8U+0000\u27e9" in shown[13]
    assert shown[14].endswith("[999,400 more characters]")


@pytest.mark.parametrize("width", [320, 1280])
def test_hostile_text_breaks_no_layout(evil, open_page, width):
    tab = open_page(evil, width=width)
    tab.page.get_by_label("with a picture").uncheck()
    tab.open_answers()
    assert tab.overflow() == []
    cut_off = "e => e.scrollWidth > e.clientWidth + 1"
    assert (
        tab.page.evaluate(f"[...document.querySelectorAll('.question, .written, pre')].filter({cut_off}).length") == 0
    )
    heights = tab.page.evaluate("[...document.querySelectorAll('.card')].map(e => e.getBoundingClientRect().height)")
    assert max(heights) < 2500
    # A text from right to left turns nothing around it
    count = tab.page.locator(".card", has_text="123 (").locator(".count").first
    assert count.inner_text() == "2 of 3 · reward 0.75"


# Use


def test_filters_show_what_they_say(ordinary, open_page):
    tab = open_page(ordinary)
    page = tab.page
    assert tab.status() == "20 of 40 rollouts match."
    assert page.locator(".card img").count() == 20
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.get_by_label("with a picture").uncheck()
    assert tab.status() == "40 of 40 rollouts match."
    assert len(tab.cards()) == 24 and page.locator("#page").inner_text() == "page 1 of 2"
    page.get_by_role("button", name="Next").click()
    assert len(tab.cards()) == 16 and page.get_by_role("button", name="Next").is_disabled()
    page.get_by_role("combobox", name="Agreement").select_option("all")
    assert tab.status() == "20 of 40 rollouts match." and page.locator("#pager").is_hidden()
    page.get_by_role("combobox", name="Agreement").select_option("split")
    page.get_by_label("Step from").fill("12")
    page.get_by_label("Step to").fill("13")
    assert tab.cards() == [
        "How many bars are there? 22",
        "How many bars are there? 23",
        "What colour is bar 24?",
        "How many bars are there? 25",
    ]
    kinds = page.locator("#kind option").all_inner_texts()
    assert kinds == ["any", "counting (30)", "colour (10)"]
    page.get_by_label("Question kind").select_option("colour")
    assert tab.cards() == ["What colour is bar 24?"]
    page.get_by_role("button", name="Reset").click()
    sync_api.expect(page.locator("#status")).to_have_text("20 of 40 rollouts match.")
    page.get_by_label("Text").fill("BAR 36")
    page.get_by_label("with a picture").uncheck()
    assert tab.cards() == ["What colour is bar 36?"]
    page.get_by_label("Text").fill("nothing like it")
    assert tab.status() == "No rollout matches."


def test_a_card_shows_votes_rewards_and_all_answers(ordinary, open_page):
    tab = open_page(ordinary)
    first = tab.page.locator(".card").first
    assert first.locator(".votes li").all_inner_texts() == ["4\n5 of 5 · reward 1.00"]
    assert "agreement 100 %" in first.locator(".sums").inner_text()
    tab.page.get_by_role("combobox", name="Agreement").select_option("split")
    second = tab.page.locator(".card").first
    votes = second.locator(".votes li").all_inner_texts()
    assert (
        len(votes) == 5
        and votes[0].startswith("1\n1 of 5")
        and votes[4].startswith("unreadable\n1 of 5 · reward 0.00")
    )
    second.locator("summary").click()
    sync_api.expect(second.locator("details li")).to_have_count(5)
    assert second.locator("pre").first.inner_text() == "I count. <answer>1</answer>"


def test_a_card_says_how_many_answers_it_leaves_out(tmp_path, open_page):
    answers = [str(i) for i in range(62)] + [None] * 2
    tab = open_page(write_report(write_run(tmp_path, [record(1, answers=answers)])))
    votes = tab.page.locator(".votes li").all_inner_texts()
    assert len(votes) == 10
    assert votes[8].startswith("unreadable\n2 of 64") and votes[9] == "54 more answers\n54 of 64"
    assert tab.page.locator("summary").inner_text() == "33 of the 64 answers in full"
    tab.open_answers()
    assert tab.page.locator("details li").count() == 32


def test_a_chart_tells_its_values_and_leads_to_the_rollouts_of_a_step(ordinary, open_page):
    tab = open_page(ordinary)
    figure = tab.page.locator("figure", has_text="KL to the base model")
    assert "end solver 0.2" in figure.locator(".readout").inner_text().replace("\n", " ")
    figure.locator(".plot").hover(position={"x": 40, "y": 40})
    assert "step 1 solver 0.01" in figure.locator(".readout").inner_text().replace("\n", " ")
    figure.locator(".plot").click(position={"x": 40, "y": 40})
    assert tab.cards() == ["How many bars are there? 1"]
    assert tab.page.get_by_label("Step from").input_value() == "1"


def test_a_finger_reads_a_chart_and_leads_nowhere(ordinary, open_page):
    tab = open_page(ordinary, width=390, has_touch=True)
    figure = tab.page.locator("figure", has_text="KL to the base model")
    figure.locator(".plot").tap(position={"x": 40, "y": 40})
    assert "step 1" in figure.locator(".readout").inner_text()
    assert tab.page.get_by_label("Step from").input_value() == ""


def test_all_of_it_can_be_used_by_keyboard(ordinary, open_page):
    tab = open_page(ordinary)
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "plot"
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert "step 3" in page.locator(".readout").first.inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "gallery"
    assert tab.cards() == ["How many bars are there? 5"]
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert names == ["from", "to", "agreement", "kind", "text", "pictured", "BUTTON", "SUMMARY"]
    page.keyboard.press("Enter")
    sync_api.expect(page.locator("details[open] li")).to_have_count(1)


def test_two_runs_stand_side_by_side(two, open_page):
    tab = open_page(two)
    assert tab.status() == "20 of 40 of run A, 11 of 11 of run B rollouts match."
    boxes = [tab.page.locator(".card").nth(i).bounding_box() for i in range(4)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert boxes[2]["x"] == boxes[0]["x"] and boxes[2]["y"] > boxes[0]["y"]
    assert tab.cards()[:2] == ["How many bars are there? 1", "How many of run B? 1"]
    assert tab.page.locator(".heat figure").count() == 2
    narrow = open_page(two, width=390)
    boxes = [narrow.page.locator(".card").nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[1]["y"] > boxes[0]["y"]
    assert narrow.overflow() == []


def test_nothing_is_wider_than_the_window_and_colours_follow_the_system(ordinary, open_page):
    tab = open_page(ordinary)
    for width in (320, 390, 800, 1280, 1920):
        tab.page.set_viewport_size({"width": width, "height": 900})
        assert tab.overflow() == []
    for scheme, line in (("light", "rgb(47, 111, 222)"), ("dark", "rgb(110, 162, 255)")):
        tab.page.emulate_media(color_scheme=scheme)
        colours = tab.page.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
        background, text = (sum(map(int, colour[4:-1].split(", "))) for colour in colours)
        assert (background > 600 and text < 150) if scheme == "light" else (background < 150 and text > 600)
        drawn = "getComputedStyle(document.querySelector('.plot path[stroke=\"var(--solver)\"]')).stroke"
        assert tab.page.evaluate(drawn) == line


def test_without_scripts_the_curves_are_there_and_the_gallery_says_what_it_needs(ordinary, open_page):
    tab = open_page(ordinary, java_script_enabled=False)
    assert tab.page.locator(".plot svg").first.is_visible()
    assert tab.page.get_by_text("The gallery needs JavaScript").is_visible()
    assert not tab.page.locator("#filters").is_visible()


def test_a_script_that_is_not_the_pages_own_would_not_run(ordinary, open_page, tmp_path):
    """The second line of defence: the page's policy, should the first ever fail."""
    file = tmp_path / "page.html"
    injected = (
        f"<script>{RUN_CODE}</script><img src=x onerror=\"{RUN_CODE}\"><img src='http://evil.example/a.png'></main>"
    )
    file.write_text(ordinary.read_text(encoding="utf-8").replace("</main>", injected), encoding="utf-8")
    tab = open_page(file)
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.ran") is None
    assert len(tab.complaints) >= 3 and all("Content Security Policy" in text for text in tab.complaints)
    assert tab.refused == {"http://evil.example/a.png": "csp", (tmp_path / "x").as_uri(): "csp"}
    tab.complaints.clear()
    tab.requests[:] = [url for url in tab.requests if url not in tab.refused]  # asked for, and stopped before it left
