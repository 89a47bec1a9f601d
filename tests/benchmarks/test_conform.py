"""The score card: what is found of a trainer, how it is shown, and TRL's."""

import json

import pytest
import tyro
from rich.console import Console

from benchmarks.conform.card import card, examine, footer, reasons
from benchmarks.conform.cases import Case, Lacks, Remembering, Run
from benchmarks.conform.checks import CHECKS, Check, Fault
from benchmarks.conform.commands import conform, find_trainer, known_trainers


class Absent:
    """A trainer that has nothing to check, and breaks on a cut distribution."""

    name = "absent"
    baseline = "none"
    aggregations = ()
    choices = {}  # noqa: RUF012 - a plain attribute, as an adapter has it

    def train(self, case: Case) -> Run:
        if case.top_k:
            raise ZeroDivisionError("no such cut")
        raise Lacks("training")


class Lenient(Absent):
    name = "lenient"


def verdicts(findings):
    return {finding.check.number: finding.verdict for finding in findings}


def text(renderable):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_what_a_trainer_lacks_does_not_apply_and_is_no_pass():
    found = verdicts(examine(Absent()))
    assert set(found) == {check.number for check in CHECKS}
    assert found.pop(6) == "FAIL"
    assert set(found.values()) == {"n.a."}


def test_a_documented_choice_is_no_failure(monkeypatch):
    def fault(trainer):
        raise Fault("seen")

    check = Check(21, "dropout", "no dropout", fault)
    assert verdicts(examine(Absent(), [check])) == {21: "FAIL"}
    monkeypatch.setattr(Absent, "choices", {21: "it says so"})
    (finding,) = examine(Absent(), [check])
    assert (finding.verdict, finding.why) == ("by choice", "seen; it says so")


def test_the_card_has_a_row_a_trap_and_a_reason_for_all_that_did_not_pass():
    findings = [*examine(Absent()), *examine(Lenient())]
    shown = text(card(findings))
    assert all(f" {check.number} " in shown for check in CHECKS)
    assert "0 of 1" in shown
    lines = list(reasons(findings))
    assert lines[0].endswith("6, absent, lenient: broke with ZeroDivisionError: no such cut")
    assert any("it is without training" in line for line in lines)
    assert "28, " in next(iter(footer()))


def test_a_case_is_trained_on_once():
    calls = []

    class Counted(Absent):
        def train(self, case):
            calls.append(case)
            return Run([], {})

    trainer, case = Remembering(Counted()), Case(prompts=("1=",), rewards=((1.0, 0.0),))
    assert trainer.train(case) is trainer.train(case)
    assert len(calls) == 1
    assert trainer.name == "absent"


def test_the_command_takes_a_trainer_by_module_and_fails_with_it(capsys):
    with pytest.raises(SystemExit) as stop:
        tyro.cli(conform, args=["--trainer", f"{__name__}:Absent"])
    assert stop.value.code == 1
    assert "no such cut" in capsys.readouterr().out


def test_the_card_of_each_trainer_is_kept_in_a_folder_of_results(tmp_path, capsys):
    paths = tuple(f"{__name__}:{name}" for name in ("Absent", "Lenient"))
    with pytest.raises(SystemExit):
        conform(trainer=paths, results=tmp_path)
    cards = [json.loads(path.read_text()) for path in sorted((tmp_path / "cards").iterdir())]
    assert [card["trainer"] for card in cards] == ["absent", "lenient"]
    for kept in cards:
        found = {finding["trap"]: (finding["promise"], finding["verdict"]) for finding in kept["findings"]}
        assert found.keys() == {check.number for check in CHECKS}
        assert found[6][1] == "FAIL"
        assert "Python" in kept["machine"]


def test_every_agent_that_samples_can_be_named_and_others_are_refused():
    assert {"grpo", "dapo", "raft", "raft++", "ppo", "trl-grpo", "trl-rloo"} <= set(known_trainers())
    assert find_trainer("raft++").name == "raft++"
    with pytest.raises(ValueError, match=r"no trainer 'sft' to check; there are .*grpo"):
        find_trainer("sft")


def test_a_missing_trl_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("benchmarks.conform.trl.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"trl-grpo needs TRL: pip install 'textenv\[trl\]'"):
        find_trainer("trl-grpo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl-grpo", "trl-rloo"])
def test_trls_card(name):
    pytest.importorskip("trl")
    findings = examine(find_trainer(name))
    found = verdicts(findings)
    assert set(found) == {check.number for check in CHECKS}
    assert all((finding.verdict == "pass") == (finding.why == "") for finding in findings)
    assert not [finding.why for finding in findings if "broke with" in finding.why or "refused" in finding.why]
    assert found[22] == found[2] == "pass", "masks and shifts are read from where TRL keeps them"
