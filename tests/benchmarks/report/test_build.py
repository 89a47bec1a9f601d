import base64
import csv
import hashlib
import json
import os
import re
import time
from html.parser import HTMLParser

import pytest

from agents.core.run import lock
from benchmarks.report.build import build
from benchmarks.report.commands import report
from benchmarks.report.page import Table, script_json
from tests.benchmarks.report import made_up


class Elements(HTMLParser):
    """The elements of a page, each with the names of its attributes; the texts between them by element."""

    def __init__(self, page):
        super().__init__()
        self.found, self.texts, self._open = [], {}, ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(sorted(name for name, _ in attributes))))
        self._open = tag

    def handle_data(self, data):
        self.texts.setdefault(self._open, []).append(data)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    folder = made_up.run(tmp_path_factory.mktemp("run"))
    return build(folder, folder / "report.html")


@pytest.fixture(scope="module")
def results_page(tmp_path_factory):
    folder = made_up.results(tmp_path_factory.mktemp("results"))
    return build(folder, folder / "report.html")


@pytest.fixture(scope="module", params=["run", "results"])
def hostile_page(request, tmp_path_factory):
    folder = getattr(made_up, f"hostile_{request.param}")(tmp_path_factory.mktemp("hostile"))
    return build(folder, folder / "report.html")


def headings(page):
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page.read_text())


# What is on the page


def test_a_run_has_its_curves_frontier_pass_at_k_and_rollouts(run_page):
    assert headings(run_page) == ["Learning curves", "Reward and KL", "pass@k", "Settings", "Rollouts"]


def test_results_have_tables_curves_frontier_pass_at_k_and_rollouts(results_page):
    assert headings(results_page) == [
        *("Results", "Learning curves: sums", "Reward–KL frontier", "pass@k", "Training: sums", "Cells", "Rollouts")
    ]


def test_alarms_of_a_run_are_on_its_page(tmp_path):
    made_up.alarm(made_up.run(tmp_path), step=3)
    page = build(tmp_path, tmp_path / "report.html")
    assert "Alarms" in headings(page)
    assert "entropy collapsed" in page.read_text()


def test_results_have_cards_and_claims_where_they_are_held(tmp_path):
    folder = made_up.hostile_results(tmp_path)
    assert {"Claims", "Conformance"} <= set(headings(build(folder, folder / "report.html")))


@pytest.mark.parametrize("name", ["verdicts.json", "cards/a.json"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"trainer": 1}', "3"])
def test_a_broken_verdict_or_card_is_named(tmp_path, name, content):
    folder = made_up.results(tmp_path)
    (folder / "cards").mkdir()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name} is broken"):
        build(folder, folder / "report.html")


def test_a_verdict_without_an_interval_shows_no_number(tmp_path):
    folder = made_up.hostile_results(tmp_path)
    verdicts = json.loads((folder / "verdicts.json").read_text())
    (folder / "verdicts.json").write_text(json.dumps([{**verdicts[0], "interval": [0.25, None, None]}]))
    page = build(folder, folder / "report.html").read_text()
    assert "+0.250" not in page


def test_claims_without_verdicts_say_how_to_have_them(tmp_path):
    folder = made_up.results(tmp_path)
    (folder / "cells" / "claims" / "clip_higher").mkdir(parents=True)
    page = build(folder, folder / "report.html").read_text()
    assert f"python -m benchmarks.claims verdicts {folder}" in page


def test_what_programs_printed_is_on_the_page(tmp_path):
    (tmp_path / "suite.toml").write_text("title = 'speed'\n[programs.step]\ncommand = ['true']\n")
    cell = tmp_path / "cells" / "programs" / "step" / "0"
    cell.mkdir(parents=True)
    (cell / "cell.json").write_text(
        json.dumps({"schema": 1, "environment": "programs", "agent": "step", "seed": 0, "provenance": {}})
    )
    (cell / "log.txt").write_text("42 tokens <b>a second</b>\x1b[0m")
    (cell / "done.json").write_text("{}")
    page = build(tmp_path, tmp_path / "report.html")
    assert ">42 tokens &lt;b&gt;a second&lt;/b&gt;␛[0m</pre>" in page.read_text()
    assert "\n    42 tokens <b>a second</b>␛[0m\n" in page.with_suffix(".md").read_text()


def test_the_curves_are_beside_the_page_as_csv(run_page, results_page):
    steps = list(csv.DictReader(run_page.with_suffix(".csv").open()))
    assert [step["step"] for step in steps] == ["1", "2", "3", "4"]
    logged = [json.loads(line) for line in (run_page.parent / "metrics.jsonl").read_text().splitlines()]
    assert [float(step["reward"]) for step in steps] == [step["reward"] for step in logged]
    assert len(list(csv.DictReader(results_page.with_suffix(".csv").open()))) == 2 * 3 * 5


def test_the_tables_are_beside_the_page_as_markdown(results_page):
    text = results_page.with_suffix(".md").read_text()
    assert "| agent-0 |" in text
    assert text.startswith("# made up\n")


def test_a_band_is_drawn_over_seeds_and_a_number_without_an_interval_is_not_printed(tmp_path):
    folder = made_up.results(tmp_path)
    for cell in folder.glob("cells/*/*/[12]"):
        for path in sorted(cell.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    page = build(folder, folder / "report.html").read_text()
    (kl,) = (
        figure
        for figure in page.split("<figure")
        if ">KL to the start (nats an answer)<" in figure and '"episodes"' in figure
    )
    assert 'class="band"' not in kl
    assert 'data-tip="agent-0 at 0 · 0% of the budget"' in kl


def test_the_rule_of_the_sample_is_on_the_page(run_page, results_page):
    for page in (run_page, results_page):
        index = json.loads(re.search(r'id="index">(.*?)</script>', page.read_text())[1])
        assert all("hash with seed 0" in series["rule"] for series in index)


def test_two_reports_of_the_same_are_the_same(run_page):
    again = build(run_page.parent, run_page.with_name("again.html"))
    assert again.read_bytes() == run_page.read_bytes()


# Runs and results that are not over, or none


def test_a_run_that_goes_on_says_so_and_one_that_is_over_does_not(tmp_path):
    folder = made_up.run(tmp_path)
    page = build(folder, folder / "report.html").read_text()
    assert "This training has not ended, it was stopped" in page
    with lock(folder):
        assert "This training has not ended, it is running" in build(folder, folder / "report.html").read_text()
    assert "Its last step is 4, 64 of 64 episodes" in page
    made_up.hostile_run(tmp_path / "over")
    assert "has not ended" not in build(tmp_path / "over", folder / "over.html").read_text()


def test_a_resumed_run_goes_on_though_it_was_once_over(tmp_path):
    folder = made_up.hostile_run(tmp_path / "run")
    later = time.time() + 60
    os.utime(folder / "metrics.jsonl", (later, later))
    page = build(folder, tmp_path / "report.html").read_text()
    assert "This training has not ended" in page
    assert '<th scope="col">after</th>' not in page


def test_a_broken_rollout_leaves_the_rest(tmp_path):
    made_up.run(tmp_path)
    (tmp_path / "rollouts" / "000001.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    page = build(tmp_path, tmp_path / "report.html").read_text()
    assert "000001.jsonl.gz is left out, it cannot be read" in page


def test_half_a_line_of_metrics_is_left_out(tmp_path):
    folder = made_up.run(tmp_path)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')
    assert "Its last step is 4," in build(folder, folder / "report.html").read_text()


def test_results_that_are_being_filled_say_so(tmp_path):
    folder = made_up.results(tmp_path)
    (folder / "cells/sums/agent-1/2/done.json").unlink()
    assert "This suite has not ended" in (page := build(folder, folder / "report.html").read_text())
    assert "5 done, 1 not ended" in page


def test_cells_that_have_not_begun_are_waited_for(tmp_path):
    folder = made_up.results(tmp_path)
    suite = folder / "suite.toml"
    suite.write_text(suite.read_text().replace("[0, 1, 2]", "[0, 1, 2, 3]"))
    assert "6 done, 2 waiting" in build(folder, folder / "report.html").read_text()


def test_nothing_yet_is_refused(tmp_path):
    run = made_up.run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="has not logged a step"):
        build(run, tmp_path / "a.html")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "suite.toml").write_text("title = 'a'\nseeds = [0]\n")
    with pytest.raises(ValueError, match="nothing to report yet: no cell"):
        build(tmp_path / "results", tmp_path / "a.html")


def test_a_folder_that_is_neither_is_refused_and_runs_in_it_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"neither a run .* nor results"):
        build(tmp_path, tmp_path / "a.html")
    made_up.run(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"such as .*mine"):
        build(tmp_path, tmp_path / "a.html")
    with pytest.raises(ValueError, match="no folder"):
        build(tmp_path / "none", tmp_path / "a.html")


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        build(tmp_path, tmp_path / "a.html")


def test_a_place_where_no_page_can_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in .html"):
        build(tmp_path, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="make it first"):
        build(tmp_path, tmp_path / "none" / "a.html")


def test_the_command_tells_where_the_report_is(tmp_path, capsys):
    folder = made_up.run(tmp_path)
    report(folder)
    assert f"the report is in {folder / 'report.html'}" in capsys.readouterr().out
    assert {"report.html", "report.md", "report.csv"} <= {path.name for path in folder.iterdir()}


# Safety


def test_hostile_texts_add_no_element_and_no_attribute(hostile_page, run_page, results_page):
    allowed = {element for page in (run_page, results_page) for element in Elements(page).found}
    allowed |= {("option", ("value",)), ("td", ("class",)), ("p", ("class",)), ("details", ()), ("summary", ())}
    assert set(Elements(hostile_page).found) <= allowed
    assert len(
        [tag for tag, _ in Elements(hostile_page).found if tag == "script"]
    ) == 2 + hostile_page.read_text().count('id="block-')


def test_no_text_of_a_table_is_markup():
    table = Table(["<i>a"], [["<i>b"]], "<i>c", "<i>d")
    assert "<i>" not in table.html()
    assert table.html().count("&lt;i&gt;") == 5  # the title is the region's name as well
    assert "\\<i\\>d" in table.markdown()
    assert table.markdown().count("\\<i") == 4


def test_hostile_texts_are_on_the_page_as_texts(hostile_page):
    assert any("<script>window.hacked=1</script>" in text for text in Elements(hostile_page).texts["td"])


def test_no_control_character_reaches_any_file(hostile_page):
    for path in (hostile_page, hostile_page.with_suffix(".md")):
        text = path.read_text(encoding="utf-8")
        assert not [
            character for character in text if (character < " " and character not in "\n\t") or character in "\x7f\x9b"
        ]
        assert not set(text) & set("\u2028\u2029\u202e")


def test_hostile_texts_do_nothing_in_markdown(hostile_page):
    text = hostile_page.with_suffix(".md").read_text()
    assert not re.search(r"(?<!\\)[<`]", text.replace("> ", "", 0))
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "http://" not in text


def test_the_script_data_ends_no_script_and_begins_no_comment():
    text = script_json({"a": "</script><!--&\u2028\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert text.isascii()
    assert json.loads(text) == {"a": "</script><!--&\u2028\ud800"}


def test_the_policy_lets_only_the_own_script_and_style_through(run_page):
    text = run_page.read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    for element in ("script", "style"):
        content = re.search(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert directives[f"{element}-src"] == f"'sha256-{digest}'"


def test_the_page_refers_to_nothing_outside_itself(run_page, results_page):
    for page in (run_page, results_page):
        assert not re.search(r'(src|href)="(?!#)|url\(|@import|https?://', page.read_text())
