"""The tasks in the formats of well-known datasets: what a row becomes, and what is refused."""

import json

import pytest

import rewards
import textenv
from rewards import Sample
from tests.textenv.conftest import ON_THE_HUB
from textenv.datasets import SAMPLES
from textenv.task import Finish, Transcript
from textenv.tasks import GSM8K, MATH, MBPP, HumanEval, IFEval, MultipleChoice, WordProblems
from textenv.tasks.math import last_boxed

SAMPLE_FILES = sorted(path.name for path in SAMPLES.iterdir())
WITH_ANSWERS = (GSM8K, MATH, HumanEval, MBPP, MultipleChoice)


def write(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(task, problem):
    return task.demonstrate(Transcript(problem, (), (), Finish.NONE))


def everything(task):
    """The problems of both splits, each once."""
    problems = [problem for split in ("train", "eval") for problem in task.preview(split)]
    return list({problem.prompt: problem for problem in problems}.values())


def values(task, answer):
    """What the task's own reward pays for ``answer(problem)``, over all problems."""
    problems = everything(task)
    samples = [Sample(prompt=p.prompt, completion=answer(p), reference=p.reference, info=p.info) for p in problems]
    return [score.value for score in rewards.score_samples(rewards.as_reward(task.reward), samples)]


# All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_the_rows_that_come_along_are_different_ones_in_plain_ascii(name):
    content = (SAMPLES / name).read_bytes()
    assert content.isascii()
    rows = content.decode().splitlines()
    assert len({json.dumps({**json.loads(row), "key": 0, "task_id": 0}) for row in rows}) == len(rows) >= 6


@pytest.mark.parametrize("build", WITH_ANSWERS)
def test_the_solutions_that_come_along_are_right_and_no_answer_is_wrong(build):
    task = build(data="sample")
    assert set(values(task, lambda problem: shown(task, problem))) == {1.0}
    assert set(values(task, lambda problem: "")) == {0.0}


def test_requests_that_come_along_can_be_judged():
    assert {value is None for value in values(IFEval(data="sample"), lambda problem: "Yes, sir")} == {False}


@pytest.mark.parametrize("id", ON_THE_HUB)
def test_nothing_is_read_before_the_first_problem_and_the_sample_is_ours(id):
    textenv.make_task(id)
    sample = textenv.make_task(id, data="sample")
    assert sample.licence == "Apache-2.0"
    assert sample.size("train") > 0
    assert sample.size("eval") > 0


@pytest.mark.parametrize("id", [*ON_THE_HUB, "textenv/WordProblems-v0"])
def test_every_template_can_be_replaced(id):
    data = {} if "Word" in id else {"data": "sample"}
    field = {"MATH": "problem", "MBPP": "text", "HumanEval": "prompt", "IFEval": "prompt"}.get(id[8:-3], "question")
    plain = textenv.make_task(id, **data)
    task = textenv.make_task(id, **data, template=f"Hear {{{field}}} and {{{{answer}}}}: ")
    for one, other in zip(task.preview("eval"), plain.preview("eval"), strict=True):
        assert one.prompt.startswith("Hear ")
        assert one.prompt.endswith(" and {answer}: ")
        assert one.reference == other.reference
        assert task.key(one) == plain.key(other)


@pytest.mark.parametrize("build", [*WITH_ANSWERS, WordProblems])
def test_every_task_with_worked_answers_takes_shots(build):
    task = build(shots=2) if build is WordProblems else build(data="sample", shots=2)
    prompts = [problem.prompt for problem in everything(task)]
    common = prompts[0][: prompts[0].rindex("\n\n", 0, -1)]
    assert all(prompt.startswith(common[:60]) for prompt in prompts)
    assert set(values(task, lambda problem: shown(task, problem))) == {1.0}


# MATH -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"It is $\boxed{7}$.", "7"),
        (r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{a_{b_{c}}} and {more}", "a_{b_{c}}"),
        (r"\fbox{3}", "3"),
        (r"\boxed 5$", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed 12$.", "12"),
        (r"\boxed\frac12", None),
        ("no box", None),
        (r"\boxed{never closed", None),
        (r"\boxed", None),
        (r"\boxed{" * 10_000, None),
    ],
)
def test_the_answer_is_in_the_last_balanced_box(text, boxed):
    assert last_boxed(text) == boxed


PROBLEM = {"problem": "Half of 8?", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{4}$."}


def test_math_prefers_a_given_answer_and_shows_the_solution(tmp_path):
    task = MATH(write(tmp_path, PROBLEM, {**PROBLEM, "problem": "And of 9?", "answer": " 4.5 "}))
    task.holdout = 0
    assert sorted((p.reference, p.info["solution"]) for p in task.preview("train")) == [
        ("4", PROBLEM["solution"]),
        ("4.5", PROBLEM["solution"]),
    ]
    assert task.preview("train")[0].prompt.endswith("in \\boxed{}.\n")


def test_math_is_read_from_the_official_folder(tmp_path):
    for place in ("algebra/10", "algebra/2", "geometry/1"):
        path = tmp_path / f"{place}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**PROBLEM, "problem": place}))
    task = MATH(tmp_path)
    task.holdout = 0
    assert {problem.prompt.split("\n")[0] for problem in task.preview("train")} == {
        "algebra/10",
        "algebra/2",
        "geometry/1",
    }


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"levels": [1]}, "a"),
        ({"levels": [2, 5]}, "bd"),
        ({"types": ["Geometry"]}, "bc"),
        ({"levels": [5], "types": ["Number Theory"]}, "d"),
        ({}, "abcd"),
    ],
)
def test_math_can_be_chosen_by_level_and_type(tmp_path, options, kept):
    rows = [
        {**PROBLEM, "problem": "a"},
        {**PROBLEM, "problem": "b", "level": "Level 2", "type": "Geometry"},
        {**PROBLEM, "problem": "c", "level": "Level ?", "type": "Geometry"},
        {"problem": "d", "level": 5, "subject": "Number Theory", "solution": "5", "answer": "5"},  # as in MATH-500
    ]
    task = MATH(write(tmp_path, *rows), **options)
    task.holdout = 0
    assert {problem.prompt[0] for problem in task.preview("train")} == set(kept)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            {**PROBLEM, "solution": "It is 4."},
            {},
            r"row 1: the solution must have its answer in \\boxed{}, got 'It is 4.'",
        ),
        ({**PROBLEM, "solution": r"$\boxed{}$"}, {}, r"row 1: the solution must have its answer"),
        ({"problem": "?", "solution": r"\boxed{1}"}, {"levels": [1]}, r"row 1: wanted the field 'level' to choose by"),
        (PROBLEM, {"levels": [3]}, r"has no rows for MATH"),
    ],
)
def test_math_refuses_rows_that_it_cannot_read(tmp_path, row, options, message):
    with pytest.raises(ValueError, match=message):
        MATH(write(tmp_path, row), **options).problem(0, "train", 0)


@pytest.mark.parametrize("options", [{"levels": 5}, {"types": "Algebra"}, {"levels": []}])
def test_math_is_chosen_by_lists(options):
    with pytest.raises(ValueError, match=r"(levels|types) must be a list such as"):
        MATH(**options)


# HumanEval and MBPP -----------------------------------------------------------------------------------------------


def test_humaneval_hands_the_verifier_its_three_fields(tmp_path):
    row = {"task_id": "X/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n"}
    test = "def check(candidate):\n    assert candidate() == 1\n"
    (problem,) = everything(HumanEval(write(tmp_path, {**row, "test": test})))
    assert problem.prompt == row["prompt"]
    assert problem.reference == {"prompt": row["prompt"], "test": test, "entry_point": "f"}
    with pytest.raises(ValueError, match="row 1: wanted text in the field 'test'"):
        HumanEval(write(tmp_path, row)).problem(0, "eval", 0)


def mbpp_row(number, **fields):
    tests = [f"assert f{number}() == 1"]
    return {
        "task_id": number,
        "text": f"Write f{number}.",
        "code": f"def f{number}():\r\n  return 1",
        "test_list": tests,
        **fields,
    }


def test_mbpp_keeps_to_the_papers_parts(tmp_path):
    data = write(tmp_path, *(mbpp_row(number) for number in (1, 10, 11, 510, 511, 600, 601, 974, 975)))
    parts = {"test": {11, 510}, "validation": {511, 600}}
    for evaluate_on, ids in parts.items():
        task = MBPP(data, evaluate_on=evaluate_on)
        assert {problem.info["task_id"] for problem in task.preview("eval")} == ids
        assert {problem.info["task_id"] for problem in task.preview("train")} == {601, 974}
    with pytest.raises(ValueError, match="evaluate_on must be 'test' or 'validation', got 'train'"):
        MBPP(data, evaluate_on="train")


def test_mbpp_shows_the_few_shot_rows_and_loses_none_of_the_others(tmp_path):
    data = write(tmp_path, *(mbpp_row(number) for number in (601, 1, 2, 602, 11)))
    task = MBPP(data, shots=2)
    assert (task.size("train"), task.size("eval")) == (2, 1)
    assert [problem.prompt.count("Write f1.") for problem in everything(task)] == [1, 1, 1]
    assert "assert f1() == 1\ndef f1():\n  return 1\n\nYou are" in task.preview("eval")[0].prompt


def test_mbpp_trains_on_no_row_that_is_asked_again_in_its_test_part(tmp_path):
    asked = mbpp_row(11)
    task = MBPP(write(tmp_path, asked, {**asked, "task_id": 601}, mbpp_row(602)))
    assert [problem.info["task_id"] for problem in task.preview("train")] == [602]
    assert [problem.info["task_id"] for problem in task.preview("eval")] == [11]


def test_mbpp_hands_the_verifier_asserts_and_their_setup(tmp_path):
    task = MBPP(write(tmp_path, mbpp_row(11, test_setup_code="import math"), mbpp_row(12)))
    references = [problem.reference for problem in task.preview("eval")]
    assert references[0] == {"tests": ["assert f11() == 1"], "setup": "import math"}
    assert references[1]["setup"] == ""
    assert "Write f11. Your code should pass these tests:\n\nassert f11() == 1\n" in task.preview("eval")[0].prompt


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_list": []}, r"row 1: the field 'test_list' must hold asserts, got \[\]"),
        ({"test_list": None}, r"row 1: the field 'test_list' must hold asserts, got None"),
        ({"task_id": "11"}, r"row 1: the field 'task_id' must hold a whole number, got '11'"),
    ],
)
def test_mbpp_refuses_rows_that_it_cannot_read(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        MBPP(write(tmp_path, mbpp_row(11, **fields))).problem(0, "eval", 0)


# IFEval -----------------------------------------------------------------------------------------------------------


def test_ifeval_drops_arguments_that_are_null(tmp_path):
    row = {
        "prompt": "Say it in 3 words.",
        "instruction_id_list": ["a:b", "c:d"],
        "kwargs": [{"num_words": 3, "keywords": None}, None],
    }
    (problem,) = everything(IFEval(write(tmp_path, row)))
    assert problem.reference == {"instruction_id_list": ["a:b", "c:d"], "kwargs": [{"num_words": 3}, {}]}
    assert problem.prompt == row["prompt"]
    assert shown(IFEval(), problem) is None


@pytest.mark.parametrize(
    "fields", [{"kwargs": []}, {"kwargs": [{}]}, {"instruction_id_list": None}, {"kwargs": "[{}]"}]
)
def test_ifeval_wants_arguments_for_each_instruction(tmp_path, fields):
    row = {"prompt": "Go.", "instruction_id_list": ["a:b", "c:d"], "kwargs": [{}, {}], **fields}
    with pytest.raises(
        ValueError, match="row 1: the fields 'instruction_id_list' and 'kwargs' must hold lists of one length"
    ):
        IFEval(write(tmp_path, row)).problem(0, "eval", 0)


# Multiple choice --------------------------------------------------------------------------------------------------

ARC = {"text": ["3", "4", "1"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["3", "4"], 1, "B"),
        (["3", "4"], "B", "B"),
        (["3", "4"], "4", "B"),
        (["A", "C"], "A", "A"),
        (ARC, "2", "B"),
        (ARC, "1", "A"),  # the label, not the text
        (ARC, 2, "C"),
    ],
)
def test_the_answer_is_an_index_a_label_a_letter_or_a_text(tmp_path, choices, answer, letter):
    row = {"question": "2+2?", "choices": choices, "answer": answer}
    (problem,) = everything(MultipleChoice(write(tmp_path, row)))
    assert problem.reference == letter


def test_choices_are_lettered_and_their_fields_may_have_other_names(tmp_path):
    row = {"stem": "2+2?", "options": ["3", "4 {choices}"], "key": "A", "answer": "no"}
    task = MultipleChoice(write(tmp_path, row), question="stem", choices="options", answer="key")
    (problem,) = everything(task)
    assert problem.prompt == "2+2?\nA. 3\nB. 4 {choices}\nAnswer with the letter of the right choice.\n"
    assert values(task, lambda problem: "A") == [1.0]
    assert values(task, lambda problem: "B") == [0.0]


def test_more_letters_make_room_for_more_choices(tmp_path):
    row = {"question": "Which?", "choices": list("zyxwvu"), "answer": 5}
    with pytest.raises(ValueError, match="row 1: it has 6 choices, but letters=5"):
        MultipleChoice(write(tmp_path, row)).problem(0, "train", 0)
    task = MultipleChoice(write(tmp_path, row), letters=10)
    assert values(task, lambda problem: "The answer is F.") == [1.0]
    with pytest.raises(ValueError, match="letters must be a whole number from 2 to 26, got 1"):
        MultipleChoice(letters=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 2}, r"row 1: the answer must be one of the choices \['3', '4'\], got 2"),
        ({"answer": -1}, "row 1: the answer must be one of"),
        ({"answer": "C"}, "row 1: the answer must be one of"),
        ({"answer": None}, "row 1: the answer must be one of"),
        ({"choices": ["B", "A"], "answer": "A"}, "row 1: the answer must be one of"),  # letter or text?
        ({"choices": ["4", "4"]}, "row 1: the field 'choices' must hold different choices"),
        ({"choices": "34"}, "row 1: the field 'choices' must hold different choices, got 34"),
    ],
)  # fmt: skip
def test_an_answer_must_be_exactly_one_of_the_choices(tmp_path, fields, message):
    row = {"question": "2+2?", "choices": ["3", "4"], "answer": 1, **fields}
    with pytest.raises(ValueError, match=message):
        MultipleChoice(write(tmp_path, row)).problem(0, "train", 0)


def test_the_same_question_with_other_choices_is_another_problem(tmp_path):
    rows = [{"question": "Which is true?", "choices": [f"{n}", f"not {n}"], "answer": 0} for n in range(40)]
    task = MultipleChoice(write(tmp_path, *rows))
    assert len(everything(task)) == 40
    assert task.size("eval") > 0
