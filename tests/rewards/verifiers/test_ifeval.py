"""IFEval's instructions."""

from __future__ import annotations

import sys
import threading

import pytest

from rewards import Sample, score_samples
from rewards.verifiers.ifeval import IFEval, instructions
from rewards.verifiers.ifeval.instructions import read_instruction
from rewards.verifiers.ifeval.text import count_capital_words, count_sentences, detect_language, language_detectors

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}

# id, arguments, texts that follow, texts that do not; where it is not plain, as the official checkers have it
TABLE = [
    ("keywords:existence", {"keywords": ["tea", "milk"]}, ["Milk and TEA", "steam milky"], ["tea", "milk, te a"]),
    ("keywords:existence", {"keywords": ["a.b"]}, ["a.b", "axb"], ["ab"]),  # a keyword is a pattern
    ("keywords:frequency", {"keyword": " tea ", "frequency": 2, **AT_LEAST}, ["tea, Tea", "teatea"], ["tea"]),
    ("keywords:frequency", {"keyword": "tea", "frequency": 2, **LESS}, ["tea", "none"], ["tea tea"]),
    ("keywords:forbidden_words", {"forbidden_words": ["tea", "milk"]}, ["steam milky"], ["Tea.", "no-milk"]),
    (
        "keywords:letter_frequency",
        {"letter": "T", "let_frequency": 2, "let_relation": "at least"},
        ["tT", "attic"],
        ["t"],
    ),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, ["a"], ["a!"]),
    ("language:response_language", {"language": "de"}, ["Das ist ein Satz auf Deutsch.", "123"], ["An English one."]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **AT_LEAST}, ["One. Two!"], ["One, two"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, **LESS}, ["One, two"], ["One. Two!"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "a***b", "***a ***b***"],
        ["a", "a\n\nb", "a *** b *** c", "a******b", "a ** b"],
    ),
    ("length_constraints:number_words", {"num_words": 3, **AT_LEAST}, ["a b c", "it's a"], ["a b", "a_b c"]),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, ["a b", "a-b"], ["a b-c"]),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
        ["a\n\nWell, b", "a\n\n  'well' b", "a\n\nWELL.b", "a\n\nwell\n\n"],
        ["well\n\na", "a\n\nwelly b", "a\n\nwell\n\nb", "a\nwell", "a\n\n\n\nwell", "a\n\n(well"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[name] [address]", "[] []", "[[a] b]\n[c]"],
        ["[name]", "[a\n] [b]", "[[a] b]"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. b", "p. s. b"], ["PS b", "P.S b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a P.P.S. b", "p. p. s b"], ["P.S. b", "PPS"]),
    ("detectable_content:postscript", {"postscript_marker": "Note:"}, ["a note: b"], ["a note b"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  - b", "* a\n- b", "*a\n\n\n* b\nc", "*emphasis* first\n- b", "a\n-\n--- b"],
        ["* a", "* a\n* b\n* c", "** a\n** b", "a * b\nc - d", "+ a\n+ b", "• a\n• b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "So: My answer is maybe."],
        ["Yes.", "my answer is yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* *b*", "**a** and *b*", "*a* b *c*", "**a** b **c**"],
        ["*a*", "* *  * *", "*a\n* b", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section ", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section2 Section3"],
        ["Section 1", "SECTION 1 SECTION 2", "Section A Section B"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', "```json\n[]\n```", "```\n1```", "NaN"],
        ["{a: 1}", "So: {}", "'a'", "[" * 9999],
    ),
    ("detectable_format:title", {}, ["<<Joy>>\na", "a <<b>> c", "<<a>>>"], ["<Joy>", "<<>>", "<< >>", "<<a\n>>"]),
    (
        "combination:two_responses",
        {},
        ["a******b", "******a\n******\nb", "a******b******"],
        ["a", "a******a ", "a***b", "a******b******c", "a******b******a", "a************b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say hi. "},
        [" say HI. Hi.", "Say hi."],
        ["Hi. Say hi.", "Say"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": " The end."},
        ["So. THE END.", '"It is the end."\n'],
        ["The end. So", "The end"],
    ),
    ("startend:quotation", {}, ['"a"', ' "a" b "c"\n', '""'], ["a", '"a', '"', "“a”"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["NASA and the CD-ROM", "IT'S", "I AM", "A,B"],
        ["NASA", "CD-ROM", "NASa ABc"],
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 1, "capital_relation": "less than"},
        ["none at all", "123"],
        ["I"],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS AN ENGLISH SENTENCE."],
        ["This is English.", "DAS IST EIN SATZ", "123"],
    ),
    (
        "change_case:english_lowercase",
        {},
        ["this is an english sentence."],
        ["This is one.", "das ist ein satz", "123"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "1,000"]),
]
IDS = sorted({name for name, *_ in TABLE})


@pytest.mark.parametrize(("name", "kwargs", "followed", "broken"), TABLE, ids=[f"{row[0]}-{row[1]}" for row in TABLE])
def test_table(name, kwargs, followed, broken, grade):
    verifier = IFEval({name: kwargs})
    for text in followed:
        assert grade(verifier, text).parts == {"correct": 1.0, "followed": 1.0, name: 1.0}, text
    for text in [*broken, "", " \n"]:
        assert grade(verifier, text).parts == {"correct": 0.0, "followed": 0.0, name: 0.0}, text


def test_the_table_has_all_25_instructions():
    assert len(IDS) == 25
    with pytest.raises(ValueError, match=r"no instruction is named 'no_comma'; known: ") as error:
        IFEval({"no_comma": {}})
    assert sorted(str(error.value).split("known: ")[1].split(", ")) == IDS


def test_all_instructions_count_or_a_share_of_them_on_request(grade):
    both = {"punctuation:no_comma": {}, "keywords:existence": {"keywords": ["tea"]}}
    assert [grade(IFEval(both), text).value for text in ("tea", "tea, please", "a, b")] == [1.0, 0.0, 0.0]
    shared = grade(IFEval(both, partial_credit=True), "tea, please")
    assert (shared.value, shared.correct) == (0.5, False)
    assert shared.parts == {"correct": 0.0, "followed": 0.5, "punctuation:no_comma": 0.0, "keywords:existence": 1.0}


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("startend:quotation", {}, 'Sure:\n"a"'),
        ("startend:quotation", {}, '"a"\nHope it helps!'),
        ("startend:quotation", {}, 'Sure:\n"a"\nHope it helps!'),
        ("startend:quotation", {}, '**"a"**'),
        ("startend:quotation", {}, 'Sure:\n*"a"*\nHope it helps!'),
        ("startend:end_checker", {"end_phrase": "The end."}, "**The end.**"),
    ],
)
def test_loose_forgives_first_line_last_line_and_asterisks(name, kwargs, text, grade):
    assert grade(IFEval({name: kwargs}), text).value == 0.0
    assert grade(IFEval({name: kwargs}, strict=False), text).value == 1.0
    assert grade(IFEval({name: kwargs}, strict=False), "").value == 0.0


def test_loose_takes_a_variant_for_each_instruction(grade):
    both = {"startend:quotation": {}, "detectable_format:number_highlighted_sections": {"num_highlights": 1}}
    assert grade(IFEval(both, strict=False), '*"a"*').value == 1.0


def test_without_instructions_the_reference_has_them_as_in_the_official_data(grade):
    reference = {
        "key": 1,
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [None, {"num_words": 2, "relation": "at least", "language": None}],
    }
    assert [grade(IFEval(), text, reference).value for text in ("a b", "a", "a, b")] == [1.0, 0.0, 0.0]


def test_an_instruction_that_stands_twice_has_to_hold_both_times(grade):
    name = "keywords:existence"
    reference = {"instruction_id_list": [name, name], "kwargs": [{"keywords": ["a"]}, {"keywords": ["b"]}]}
    for text, holds in (("a b", 1.0), ("a", 0.0), ("b", 0.0)):
        assert grade(IFEval(), text, reference).parts == {"correct": holds, "followed": holds, name: holds}


BAD = [
    ("punctuation:commas", {}, "no instruction is named"),
    ("punctuation:no_comma", {"num": 1}, "takes no arguments; got num"),
    ("punctuation:no_comma", 5, "takes a mapping of arguments, got 5"),
    ("length_constraints:number_words", None, "takes num_words, relation; got none"),
    ("length_constraints:number_words", {"num_words": 3, "relation": None}, "takes num_words, relation; got num_words"),
    (
        "length_constraints:number_words",
        {"num_words": -3, **LESS},
        "num_words must be an integer of at least 0, got -3",
    ),
    ("length_constraints:number_words", {"num_words": "3", **LESS}, "num_words must be an integer"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "must be 'less than' or 'at least'"),
    ("keywords:existence", {"keywords": "tea"}, "keywords must be a list of words, got 'tea'"),
    ("keywords:existence", {"keywords": []}, "keywords must be a list of words"),
    ("keywords:existence", {"keywords": ["("]}, "keywords must be a regular expression"),
    ("keywords:forbidden_words", {"forbidden_words": [" "]}, "forbidden_words must be a text that is not blank"),
    ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "one letter"),
    ("language:response_language", {"language": "German"}, "language must be one of the languages ar, bg"),
    ("combination:repeat_prompt", {}, "takes prompt_to_repeat; got none"),
    *(
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": nth, "first_word": "a"},
            "nth_paragraph must be one of num_paragraphs",
        )
        for nth in (0, 3)
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD)
def test_arguments_that_make_no_sense_are_refused_or_leave_the_sample_ungraded(name, kwargs, message, grade):
    with pytest.raises(ValueError, match=name.split(":")[0]) as error:
        IFEval({name: kwargs})
    assert message in str(error.value)
    score = grade(IFEval(), "a", {"instruction_id_list": [name], "kwargs": [kwargs]})
    assert score.error == f"unreadable reference: {error.value}"


@pytest.mark.parametrize(
    "reference",
    [None, "", [], {}, {"instruction_id_list": [], "kwargs": []}, {"instruction_id_list": ["punctuation:no_comma"]},
     {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, {"instruction_id_list": "a", "kwargs": "b"}],
    ids=repr,
)  # fmt: skip
def test_a_reference_without_instructions_is_ungraded(reference, grade):
    assert grade(IFEval(), "a", reference).error.startswith("unreadable reference: wanted ")


def test_no_instructions_are_refused():
    with pytest.raises(ValueError, match="wanted instructions"):
        IFEval({})


def test_a_keyword_that_backtracks_leaves_its_sample_ungraded_on_any_thread(monkeypatch):
    monkeypatch.setattr(instructions, "SECONDS", 0.1)
    samples = [Sample(prompt="", completion=text) for text in ("aaa", "a" * 300 + "!", "b")]
    verifier = IFEval({"keywords:existence": {"keywords": ["(a|aa)+$"]}})
    scores = []
    thread = threading.Thread(target=lambda: scores.extend(score_samples(verifier, samples)))
    thread.start()
    thread.join(timeout=30)
    assert [score.value for score in scores] == [1.0, None, 0.0]
    assert scores[1].error.startswith("keywords:existence: a pattern took longer than")


HOSTILE = ["\0", "\ud800", *(unit * 100_000 for unit in "[<*\n -.\"'a@"), "a@" * 50_000, "<<a" * 50_000, "***" * 50_000]


@pytest.mark.parametrize(("name", "kwargs"), [row[:2] for row in TABLE], ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("strict", [True, False])
def test_hostile_text_gets_a_score_in_linear_time(name, kwargs, strict, grade):
    verifier = IFEval({name: kwargs}, strict=strict)
    assert None not in [grade(verifier, text).value for text in HOSTILE]


def test_a_language_is_the_same_every_time_whatever_others_do_with_the_seed(monkeypatch):
    from langdetect import DetectorFactory

    text = "bar ton"  # English or Turkish, by chance
    (before,) = {detect_language(text) for _ in range(20)}
    monkeypatch.setattr(DetectorFactory, "seed", 12345)
    assert {detect_language(text) for _ in range(20)} == {before}


def test_without_langdetect_the_extra_is_named_at_once_and_samples_are_ungraded(monkeypatch, grade):
    for module in ("langdetect", "langdetect.detector_factory"):
        monkeypatch.setitem(sys.modules, module, None)
    language_detectors.cache_clear()
    name = "change_case:english_capital"
    with pytest.raises(ImportError, match=r'pip install "textenv\[ifeval\]"'):
        IFEval({name: {}})
    score = grade(IFEval(), "A", {"instruction_id_list": [name], "kwargs": [{}]})
    assert score.error == 'detecting languages needs langdetect: pip install "textenv[ifeval]"'
    assert grade(IFEval({"punctuation:no_comma": {}}), "A").value == 1.0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One", 1),
        ("One. Two? Three!", 3),
        ("One.\n\nTwo.", 2),
        ("no punctuation\nin these\nlines", 1),
        ("Really?! Yes...", 2),
        ('"Go." He went. (Far.) Home', 4),
        ("Dr. Lee and Mrs. J. Smith met at 3.15 p.m. on foot, i.e. late.", 1),
        ("We met at 5 p.m. Then we left.", 2),
        ("Tea, milk, etc. are here. So do I. You too.", 3),
        ("1. Do this. 2. then that.", 3),
        ("Wait... for it. Well... Here.", 3),
        ("see www.a.com and 3.5 of it.", 1),
        ("**Done.** Next", 2),
    ],
)
def test_sentences(text, count):
    assert count_sentences(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("NASA, ESA; and (JAXA).", 3),
        ("CD-ROM", 1),
        ("U.S. A.", 2),
        ("I'm", 1),
        ("IT'S DON'T.", 4),
        ("CANNOT GONNA", 4),
        ("A:1 B,2C", 2),
        ("A:B 1:C A...B A--B A—B", 9),
        ("4U 2B 123", 2),
        ("**BOLD** “QUOTED”", 2),
        ("ÉTÉ", 1),
    ],
)
def test_words_in_capitals(text, count):
    assert count_capital_words(text) == count


def test_a_check_can_be_had_by_itself():
    assert read_instruction("punctuation:no_comma", None)("a")
