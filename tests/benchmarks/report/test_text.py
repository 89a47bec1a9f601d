import pytest

from benchmarks.report.text import html_text, markdown_text, shortened
from rewards.terminal import visible


def test_control_characters_become_their_pictures_and_line_breaks_stay():
    assert visible("a\x1b[31m\x07\x7f\x00\n\tb") == "a␛[31m␇␡␀\n\tb"


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\ud800", "\x9b", "\u200f"])
def test_what_turns_text_round_or_is_half_a_character_is_replaced(character):
    assert visible(f"a{character}b") == "a\ufffdb"


def test_emoji_of_several_characters_stay_whole():
    assert visible("👨‍👩‍👧 ü ﷽") == "👨‍👩‍👧 ü ﷽"


def test_a_text_without_a_middle_says_how_much_is_missing():
    assert shortened("a" * 50 + "b" * 50, 10) == "aaaaa … 90 characters left out … bbbbb"
    assert shortened("abc", 3) == "abc"


def test_html_is_escaped_in_text_and_in_attributes():
    assert html_text("<b a=\"1\" c='2'>&") == "&lt;b a=&quot;1&quot; c=&#x27;2&#x27;&gt;&amp;"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a | b", r"a \| b"),
        ("<script>", r"\<script\>"),
        ("[a](b)", r"\[a\](b)"),
        ("# a", r"\# a"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("1.5 a", "1.5 a"),
        ("http://a", r"http:\//a"),
        ("a\n\nb", "a b"),
    ],
)
def test_markdown_neither_formats_nor_links(text, escaped):
    assert markdown_text(text) == escaped
