"""The page in a browser, as a person uses it: by mouse, by keyboard, on a phone, in the dark."""

import shutil
from contextlib import contextmanager

import pytest

from benchmarks.report.build import build
from benchmarks.report_size import BROWSER
from tests.benchmarks.report import made_up
from tests.benchmarks.report.made_up import HOSTILE, edit_rows

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested in a browser by playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium, and there is none on the path"),
]
TIMEOUT = 15_000
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = made_up.run(tmp_path_factory.mktemp("run"))
    # The last tokens but one are of a reply.
    edit_rows(folder / "rollouts" / "000004.jsonl.gz", source=lambda source: [*source[:-3], 3, 3, 2])
    edit_rows(folder / "rollouts" / "000003.jsonl.gz", finish="length")
    edit_rows(folder / "rollouts" / "000002.jsonl.gz", error="the judge was down", **{"return": None})
    return build(folder, folder / "report.html")


@pytest.fixture(scope="module")
def results_page(tmp_path_factory):
    folder = made_up.results(tmp_path_factory.mktemp("results"))
    return build(folder, folder / "report.html")


@pytest.fixture(scope="module", params=["run", "results"])
def hostile_page(request, tmp_path_factory):
    folder = getattr(made_up, f"hostile_{request.param}")(tmp_path_factory.mktemp("hostile"))
    return build(folder, folder / "report.html")


@contextmanager
def opened(browser, page, **options):
    """The page in a tab that refuses to be anything but silent and alone."""
    context = browser.new_context(**options)
    tab = context.new_page()
    tab.set_default_timeout(TIMEOUT)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    context.on("request", lambda request: asked.append(request.url))
    tab.goto(page.resolve().as_uri())
    tab.wait_for_selector("#problem .card")
    yield tab
    assert said == []
    assert asked == [page.resolve().as_uri()]
    context.close()


@pytest.fixture
def run(browser, run_page):
    with opened(browser, run_page) as tab:
        yield tab


@pytest.fixture
def results(browser, results_page):
    with opened(browser, results_page) as tab:
        yield tab


def choose(tab, name):
    """Click a colour or a filter by its text."""
    tab.locator(".segments label", has_text=name).first.click()


def to_step(tab, number):
    tab.locator("#point").fill(str(number))


def texts(tab, selector):
    return tab.locator(selector).all_inner_texts()


def coloured(tab):
    return tab.locator(".t.plus, .t.minus, .t.amount").count()


@pytest.mark.parametrize("mode", ["Advantage", "Log-probability", "Entropy", "KL", "Ratio", "Credit"])
def test_tokens_are_coloured_by_what_is_clicked(run, mode):
    to_step(run, 0)
    choose(run, "Nothing")
    sync_api.expect(run.locator(".t.plus, .t.minus, .t.amount")).to_have_count(0)
    assert run.locator("#legend").is_hidden()
    choose(run, mode)
    run.wait_for_selector(".t.plus, .t.minus, .t.amount")
    background = run.locator(".t.plus, .t.minus, .t.amount").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert background not in ("rgba(0, 0, 0, 0)", "transparent")
    assert run.locator("#legend").is_visible()


def test_advantages_of_right_and_wrong_answers_differ_in_colour(run):
    to_step(run, 0)
    choose(run, "Advantage")
    run.wait_for_selector(".card.wrong .t.minus")
    assert run.locator(".card.wrong .t.plus, .card.right .t.minus").count() == 0


def test_what_was_not_kept_is_not_offered(results):
    held_out = results.locator("#source optgroup[label='As text'] option").first.get_attribute("value")
    results.locator("#source").select_option(held_out)
    sync_api.expect(results.locator("#modes")).to_be_hidden()
    assert texts(results, "#filters span") == ["All", "Wrong", "Cut", "Ungraded"]


def test_a_reply_of_the_environment_is_marked_and_has_no_colour(run):
    sync_api.expect(run.locator("#point-label")).to_have_text("step 4")
    run.wait_for_selector(".t.given")
    assert run.locator(".t.given.plus, .t.given.minus, .t.given.amount").count() == 0


def test_filters_leave_what_they_name(run):
    to_step(run, 0)
    choose(run, "Wrong")
    run.wait_for_selector(".card")
    assert run.locator(".card").count() == run.locator(".card.wrong").count() > 0
    choose(run, "Cut")
    sync_api.expect(run.locator(".empty")).to_have_text("Nothing here passes the filter.")
    to_step(run, 2)
    run.wait_for_selector(".card")
    assert all("cut (length)" in text for text in texts(run, ".card .head"))
    choose(run, "Ungraded")
    to_step(run, 1)
    run.wait_for_selector(".card.ungraded")
    assert texts(run, ".card .error")[0] == "the judge was down"


def test_the_biggest_advantage_comes_first(run):
    to_step(run, 0)
    choose(run, "Biggest advantage")
    run.wait_for_selector(".t.plus")
    shares = [
        float(card.locator(".t").first.evaluate("e => e.style.getPropertyValue('--a')") or 0)
        for card in run.locator(".card").all()
    ]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) > 1


def test_two_steps_of_a_run_are_compared_on_one_problem(run):
    to_step(run, 3)
    run.locator("#compare").check()
    run.wait_for_selector(".side")
    assert [title.split(" · ")[1] for title in texts(run, ".side h3")] == ["step 4", "step 1"]
    assert all(side.locator(".card").count() == 4 for side in run.locator(".side").all())
    # Problems that come at one of the two steps alone are not in the list.
    assert set(texts(run, ".snippet")) == {"1+17=", "3+17="}


def test_two_agents_are_compared_on_one_held_out_problem(results):
    options = results.locator("#source optgroup[label='As text'] option")
    results.locator("#source").select_option(options.first.get_attribute("value"))
    results.locator("#compare").check()
    last = results.locator("#source-b option").last
    name = last.inner_text()
    results.locator("#source-b").select_option(last.get_attribute("value"))
    results.locator("#point-b").fill("4")
    sync_api.expect(results.locator(".side h3").last).to_have_text(f"{name} · 100% of the budget")
    assert texts(results, ".side h3")[0] == "agent-0 on sums, seed 0 · 100% of the budget"
    assert [side.locator(".card").count() for side in results.locator(".side").all()] == [9, 9]


def test_the_keyboard_reaches_problems_steps_and_tokens(run):
    to_step(run, 0)
    run.locator("#problems").focus()
    first = run.locator("#problem dd").first.inner_text()
    run.keyboard.press("ArrowDown")
    sync_api.expect(run.locator("#problems li[aria-selected=true]")).to_have_attribute("id", "problem-1")
    run.keyboard.press("End")
    sync_api.expect(run.locator("#problem dd").first).to_have_text(texts(run, ".snippet")[-1])
    run.keyboard.press("Home")
    sync_api.expect(run.locator("#problem dd").first).to_have_text(first)
    run.locator("#point").focus()
    run.keyboard.press("ArrowRight")
    sync_api.expect(run.locator("#point-label")).to_have_text("step 2")
    run.locator(".tokens").first.focus()
    run.keyboard.press("ArrowRight")
    run.keyboard.press("ArrowRight")
    sync_api.expect(run.locator("#token")).to_contain_text("token 2 of")
    assert "log-probability" in run.locator("#token").inner_text()
    run.keyboard.press("End")
    sync_api.expect(run.locator("#token")).to_contain_text("“<eos>”")


def test_every_control_is_reached_by_tab_and_shows_that_it_has_the_focus(run):
    reached = []
    for _ in range(60):
        run.keyboard.press("Tab")
        at = run.evaluate(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e.type === 'radio' ? e.nextSibling : e);"
            "return [e.id || e.name || e.className || e.tagName, s.outlineStyle]; })()"
        )
        reached.append(at[0])
        if at[0] == "BODY":
            break
        assert at[1] != "none", f"{at[0]} shows no focus"
    for name in ("theme", "source", "point", "compare", "mode", "filter", "problems", "tokens text mono"):
        assert name in reached


def test_every_control_has_a_name(run, results):
    for tab in (run, results):
        unnamed = tab.evaluate(
            """[...document.querySelectorAll("button, select, input, [role=listbox], [role=group], svg")]
            .filter((e) => !(e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length || e.textContent.trim()))
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert unnamed == []


def test_a_legend_hides_its_line_and_a_choice_changes_what_is_drawn_to_the_right(results):
    section = results.locator("section", has=results.locator(".x-kind"))
    line = section.locator("figure:not([hidden]) g[data-line='0']").first
    section.locator(".key").first.click()
    sync_api.expect(line).to_be_hidden()
    section.locator(".key").first.click()
    sync_api.expect(line).to_be_visible()
    section.locator(".x-kind").select_option("tokens")
    labels = section.locator("figure:not([hidden]) text.label").all_text_contents()
    assert set(labels) == {"tokens"}


def test_a_point_of_a_curve_tells_its_numbers(results):
    results.locator("figure:not([hidden]) .hit").first.hover()
    sync_api.expect(results.locator("#tip")).to_be_visible()
    assert "agent-" in results.locator("#tip").inner_text()


def test_nothing_scrolls_sideways_on_a_phone(browser, run_page, results_page, hostile_page):
    for page in (run_page, results_page, hostile_page):
        with opened(browser, page, viewport=PHONE, has_touch=True) as tab:
            for fold in tab.locator("summary").all():
                fold.click()
            tab.locator("#compare").check()
            tab.wait_for_selector(".side, .empty")
            assert tab.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_the_page_follows_the_system_into_the_dark_and_the_button_overrules_it(browser, run_page):
    def brightness(tab):
        red, green, blue = tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")[
            :3
        ]
        return (red + green + blue) / 3

    with opened(browser, run_page, color_scheme="dark") as tab:
        assert brightness(tab) < 60
        tab.locator("#theme").click()
        assert tab.locator("#theme").inner_text() == "Theme: light"
        assert brightness(tab) > 200
    with opened(browser, run_page, color_scheme="light") as tab:
        assert brightness(tab) > 200


def test_hostile_texts_do_nothing(browser, hostile_page):
    with opened(browser, hostile_page) as tab:
        prompts = []
        for i in range(tab.locator("#source option").count()):
            tab.locator("#source").select_option(str(i))
            tab.wait_for_selector("#problem .card")
            prompts += texts(tab, "#problem dd")
            tab.locator(".card").first.hover()
            for name in ("Wrong", "All"):
                choose(tab, name)
        tab.locator("#compare").check()
        tab.wait_for_selector(".side, .empty")
        assert tab.evaluate("window.hacked === undefined")
        assert tab.locator("img, iframe, object, main script, header script").count() == 0
        assert any(prompt.startswith(HOSTILE[:30]) for prompt in prompts)


def test_tokens_of_hostile_texts_are_texts(browser, tmp_path):
    made_up.run(tmp_path)
    edit_rows(tmp_path / "rollouts" / "000004.jsonl.gz", completions=[HOSTILE])
    made_up.without_tokenizer(tmp_path)
    with opened(browser, build(tmp_path, tmp_path / "report.html")) as tab:
        assert "no checkpoint" in tab.locator("#rule").inner_text()
        assert tab.locator(".card .text").first.inner_text().startswith(HOSTILE[:30])
        assert tab.locator("#modes").is_hidden()


def test_a_page_without_rollouts_has_no_browser_and_no_error(browser, tmp_path):
    made_up.run(tmp_path)
    for path in tmp_path.glob("rollouts/*"):
        path.unlink()
    page = build(tmp_path, tmp_path / "report.html")
    tab = browser.new_page()
    said = []
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())
    assert tab.locator("#rollouts").count() == 0
    assert said == []
    tab.close()
