"""Text in its tags."""

from __future__ import annotations

import pytest

from rewards.verifiers.format_tags import FormatTags


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>2+2</think><answer>4</answer>", 1.0),
        ("\n<think>\n2 < 3\n</think>\n\n<answer>4</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a <b>bold</b> thought</think><answer>4</answer>", 1.0),
        ("", 0.0),
        ("4", 0.0),
        ("<think>2+2</think>", 0.0),
        ("<think>2+2</think><answer>4", 0.0),
        ("<think>2+2<answer>4</answer>", 0.0),
        ("<think>2+2<think><answer>4<answer>", 0.0),
        ("<answer>4</answer><think>2+2</think>", 0.0),
        ("<think>2+2<answer>4</answer></think>", 0.0),
        ("so <think>2+2</think><answer>4</answer>", 0.0),
        ("<think>2+2</think> so <answer>4</answer>", 0.0),
        ("<think>2+2</think><answer>4</answer> done", 0.0),
        ("<think>2+2</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>2+2</think><answer>4</answer>" * 2, 0.0),
        ("<think>2+2</think><answer>4</answer></answer>", 0.0),
        ("<Think>2+2</Think><answer>4</answer>", 0.0),
        ("<think >2+2</think><answer>4</answer>", 0.0),
        ("</think>2+2<think><answer>4</answer>", 0.0),
    ],
)
def test_table(completion, value, grade):
    score = grade(FormatTags(), completion)
    assert (score.value, score.parts) == (value, {"format": value})


def test_the_tags_can_be_others(grade):
    assert grade(FormatTags(("plan",)), "<plan>go</plan>").value == 1.0
    assert grade(FormatTags(("a", "b", "c")), "<a>1</a><b>2</b><c>3</c>").value == 1.0


@pytest.mark.parametrize("tags", [(), "think", ("a", "a"), ("a b",), ("<a>",), ("",)])
def test_tags_that_make_no_sense_are_refused(tags):
    with pytest.raises(ValueError, match="tags must be different words"):
        FormatTags(tags)
