"""The page of a run in a browser: filters, search, sorting, keyboard, no request to anywhere, text that stays text; and what
is in it without one. Needs Debian's chromium; skipped, and said, where it is absent."""

import json
import re
import shutil
from pathlib import Path

import pytest

from repro.report.changes import lines
from repro.report.page import stories_of, write_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the page was tried in no browser")
PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010806000000"
                      "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082")
SIDES = ["brief,plain", "not_brief,plain"]
MARKS = ["11", "10", "00 loop", "01"]  # in turn


def story(variant: str, bad: str = "", queries: int = 12) -> dict:
    """As a run's story (repro/report/story.py): texts and marks that say which item, iteration and constitution they are of."""
    return {
        "name": "exp9" + bad, "profile": "mini", "variant": variant, "seed": 0, "kinds": [], "setting": ["Model tiny." + bad],
        "measured": "cpu" + bad, "took": "seed 0: 1.0 min", "not_run": "NOT RUN: nothing.", "worsened": ["Fell." + bad], "notes": [],
        "principles": ["" if variant == "hand" else "a writer" + bad, [["brief", "Be brief." + bad, "Be long." + bad, "brief"],
                                                                      ["plain", "Be plain.", "Be ornate.", "simple_words"]]],
        "note": "Held-out queries." + bad, "items": [
            {"id": f"q{k}", "subset": "tldr", "query": f"Query {variant} number {k}?{bad}", "constitutions": SIDES,
             "answers": [[f"answer {variant} {k} at {i} under {c} stays the same{bad}" for c in (0, 1)] for i in (0, 1, 2)],
             "marks": [[MARKS[(k + i + c) % 4] for c in (0, 1)] for i in (0, 1, 2)]} for k in range(queries)]}


def page(folder: Path, bad: str = "", variants=("weak", "hand")) -> Path:
    """A page with no run behind it."""
    def row(metric, value, iteration, **more):
        return {"metric": metric, "subset": "tldr", "iteration": iteration, "model": "tiny" + bad, "writer": "hand", "cot": None, "seed": 0,
                "baseline": None, "judge": None, "estimator": None, "ties": None, "length": None, "value": value, "sem": 0.1, "n": 12,
                "ci95": [value - 0.2, value + 0.2]} | more
    metrics = [row(*of) for i in (0, 1, 2) for of in (("mi", 0.1 + i, i), ("length_tokens", 30.0 - 10 * i, i), ("answered", 0.5, i))]
    metrics = [r | {"estimator": "infonce"} if r["metric"] == "mi" else r for r in metrics]
    following = [{"query": f"q{k}", "subset": "tldr", "constitutions": SIDES, "tokens": {str(i): [9, 9 - i] for i in (0, 1, 2)},
                  "sides": {str(i): [MARKS[(k + i + c) % 4] for c in (0, 1)] for i in (0, 1, 2)},
                  "bound": {str(i): 0.1 * i + k / 100 for i in (0, 1, 2)}} for k in range(12)]
    (folder / "figures").mkdir(parents=True)
    (folder / "figures/iterations.png").write_bytes(PIXEL)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_page(folder / "report.html", [story(v, bad) for v in variants], metrics, folder / "figures",
               {v: lines("exp9", {0: following}) for v in variants})
    return folder / "report.html"


def test_the_page_begins_with_what_came_out(tmp_path):
    text = page(tmp_path, variants=("hand",)).read_text()
    order = [text.index(part) for part in ("The bound on mutual information rose", "bound on mutual information, nats", "data:image/png",
                                           "Be ornate.", "Query hand number 0?", 'class="sortable"', 'id="meanings"', "Measured on cpu")]
    assert order == sorted(order)
    assert "(n 12, 1 seed)" in text and '<a href="metrics.json">' in text and "run.json" not in text.split("Files beside")[1].split("</p>")[0]
    assert text.count('class="answer"') == 12 * 2 * 3 and text.count("no answer: it repeats itself") == 18
    assert "<h5>not_brief,plain</h5><p>Be long. Be plain.</p>" in text


def test_what_is_new_in_an_answer_is_marked():
    from repro.report.page import _words

    assert _words("Rice sticks to a pot.", "Rice sticks to the pot.") == [(False, "Rice sticks to "), (True, "a"), (False, " pot.")]
    assert _words("the same", "the same") == [(False, "the same")] and _words("", "gone") == []
    assert "".join(text for _, text in _words("a\n\nb  c", "b c")) == "a\n\nb  c"


def test_no_text_leaves_its_place(tmp_path):
    """Markers in every text of users and models: no tag, attribute or script more than without them."""
    from html.parser import HTMLParser

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, [name for name, _ in attrs]))

    counted = []
    for k, bad in enumerate(("", """ <b id=marker>'"&amp;</script><!--""")):
        found: list = []
        Tags().feed(text := page(tmp_path / str(k), bad).read_text())
        counted.append([of for of in found if of[0] != "mark"])
    assert counted[0] == counted[1] and "<b id=marker" not in text and text.count("&lt;b id=marker") > 100
    assert [s["items"][3]["query"] for s in stories_of(tmp_path / "1/report.html")] == [f"Query {v} number 3?{bad}" for v in ("weak", "hand")]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engines:
        browser = engines.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """(a page with markers in it, what it asked for and complained of)."""
    path, heard = page(tmp_path, """ <b id=marker>'"&amp;"""), []
    tab = chromium.new_page(viewport={"width": 1200, "height": 900})
    tab.on("request", lambda request: heard.append(request.url))
    for event in ("console", "pageerror", "dialog"):
        tab.on(event, lambda what: heard.append(str(what)))
    tab.goto(f"file://{path}")
    yield tab
    tab.close()
    assert [url for url in heard if not url.startswith("data:")] == [f"file://{path}"]


def shown(tab, selector: str) -> list[str]:
    return [e.inner_text() for e in tab.locator(selector).all() if e.is_visible()]


@needs_browser
def test_filters_and_search(opened):
    assert len(shown(opened, ".query")) == 8 and opened.locator("#f-count").inner_text() == "8 of 24 queries shown, 96 responses fit"
    assert {t.split()[4] for t in shown(opened, ".answer p:nth-child(2)")} == {"0", "2"}  # first and last
    opened.get_by_role("button", name="Show more queries").click()
    assert len(shown(opened, ".query")) == 16
    opened.get_by_label("Iteration").select_option("1")
    assert {t.split()[4] for t in shown(opened, ".answer p:nth-child(2)")} == {"1"}
    opened.get_by_label("Constitution").select_option("not_brief,plain")
    assert set(shown(opened, "h5")) == {"not_brief,plain"}
    opened.get_by_label("Sides").select_option("none")
    assert set(shown(opened, ".said")) == {"no answer: it repeats itself"}
    assert opened.locator("#f-count").inner_text() == "6 of 6 queries shown, 6 responses fit"
    opened.get_by_label("Sides").select_option(value="every")
    assert set(shown(opened, ".said")) == {"not_brief followed, plain followed"}
    opened.get_by_label("Variant").select_option(label="hand seed 0")
    assert shown(opened, "#answers h3") == ["hand"]
    for name in ("Sides", "Variant", "Constitution", "Iteration"):
        opened.get_by_label(name).select_option(value="")
    opened.get_by_label("Search").fill("NUMBER 7?")  # in a query: all its responses
    assert opened.locator("#f-count").inner_text() == "2 of 2 queries shown, 12 responses fit"
    opened.get_by_label("Search").fill("hand 5 at 1")  # in responses alone
    assert opened.locator("#f-count").inner_text() == "1 of 1 queries shown, 2 responses fit"
    opened.get_by_label("Search").fill("<b id=marker>")  # text, not markup
    assert opened.locator("#f-count").inner_text() == "8 of 24 queries shown, 144 responses fit"
    assert opened.locator("#marker").count() == 0


@needs_browser
def test_sorting_and_the_keyboard(opened):
    def column(k):
        return [row.locator("td").nth(k).inner_text() for row in opened.locator(".sortable tbody tr").all()]

    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "To what came out"
    opened.locator("#values summary").click()
    head = opened.locator(".sortable th").nth(3)
    head.get_by_role("button").focus()
    opened.keyboard.press("Enter")
    up = [float(t.split()[0]) for t in column(3)]
    assert up == sorted(up) == [0.1, 0.5, 30] and head.get_attribute("aria-sort") == "ascending"
    opened.keyboard.press("Enter")
    assert [float(t.split()[0]) for t in column(3)] == up[::-1] and head.get_attribute("aria-sort") == "descending"
    opened.locator(".sortable th").nth(0).get_by_role("button").click()
    assert column(0) == sorted(column(0), key=str.lower) and head.get_attribute("aria-sort") is None
    roles = [opened.get_by_role(role) for role in ("banner", "main", "search")]
    assert [r.count() for r in roles] == [1, 1, 1] and opened.get_by_role("navigation", name="Contents").count() == 1
    for link in opened.get_by_role("navigation").get_by_role("link").all():
        assert opened.locator(link.get_attribute("href")).count() == 1


@needs_browser
def test_nothing_is_wider_than_a_phone_and_all_is_there_without_scripts(chromium, tmp_path):
    path = page(tmp_path)
    for scheme in ("light", "dark"):
        context = chromium.new_context(viewport={"width": 400, "height": 800}, color_scheme=scheme, java_script_enabled=scheme == "dark")
        tab = context.new_page()
        tab.goto(f"file://{path}")
        if scheme == "dark":
            assert tab.evaluate("document.documentElement.scrollWidth") <= 400
            colours = tab.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
            light, ground = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colours)
            assert light > 600 and ground < 150
        else:
            assert tab.locator(".answer:visible").count() == 2 * 12 * 2 * 3 and not tab.locator("form").is_visible()
        context.close()


def test_the_page_says_which_server_sampled_and_how_it_differed():
    from repro.report.story import _sampled

    assert _sampled({}) == []
    facts = {"engine": "vllm", "version": "0.32.0", "started_here": True}
    assert _sampled({"sampled_by": facts}) == ["Responses were sampled by vLLM 0.32.0"]
    assert _sampled({"sampled_by": facts | {"engine": "server", "version": None, "differs": ["its weights are quantised to 4.5 bits each"]}}) == [
        "Responses were sampled by a server of text, taken as it is: its weights are quantised to 4.5 bits each"]
    published = (Path(__file__).parents[1] / "results/exp1_dialogue_vllm/mini/report.html").read_text()
    assert "Responses were sampled by vLLM 0.32.0." in published
