"""Tokenizers: our own characters, and any transformers tokenizer with or without a chat template."""

import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from textenv.tokenizer import CHARACTERS, CharTokenizer, TransformersTokenizer, load_tokenizer

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LINES = ["the quick brown fox jumps over the lazy dog", "user and assistant speak in turns", "12+34=46 7*8=56"]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NUMBERED = "{{ messages | length }}" + CHATML  # says at the top how many messages there are: earlier text changes
FORGETFUL = CHATML.replace("{% for message in messages %}", "{% for message in messages[-1:] %}")


def byte_level(template=None, eos="<|im_end|>", adds_bos=False):
    """A byte-level BPE tokenizer, trained on the spot."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, name_or_path="small")
    tokenizer.chat_template = template
    return tokenizer


# Characters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Our tokenizer and what AutoTokenizer makes of its saved export."""
    folder = tmp_path_factory.mktemp("characters")
    CharTokenizer().to_transformers().save_pretrained(folder)
    return CharTokenizer(), CharTokenizer().to_transformers(), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(text=st.text(CHARACTERS).filter(lambda text: CharTokenizer.EOS not in text))
def test_the_export_encodes_and_decodes_as_we_do(exported, text):
    ours, *exports = exported
    tokens = ours.encode(text)
    assert ours.decode(tokens) == text
    for theirs in exports:
        assert theirs.encode(text) == theirs.encode(text, add_special_tokens=False) == tokens
        assert theirs.decode(tokens) == text


def test_every_character_and_the_end_survive_the_export(exported):
    ours, *exports = exported
    everything = [*range(ours.vocab_size)]
    for theirs in exports:
        assert theirs.encode(CHARACTERS) == ours.encode(CHARACTERS) == everything[1:]
        assert theirs.decode(everything) == ours.decode(everything) == "<eos>" + CHARACTERS
        assert (theirs.eos_token_id, len(theirs)) == (0, ours.vocab_size)
        wrapped = TransformersTokenizer(theirs)
        assert (wrapped.eos_ids, wrapped.vocab_size) == (ours.eos_ids, ours.vocab_size)
        assert wrapped.decodable_V.all()
        assert wrapped.encode_prompt("  a\n\n b ") == ours.encode_prompt("  a\n\n b ")


def test_a_character_of_no_alphabet_is_named():
    with pytest.raises(
        ValueError, match="the character 'é' in 'café' is not in the character tokenizer's alphabet of 96"
    ):
        CharTokenizer().encode("café")
    with pytest.raises(ValueError, match="must not repeat a character, got 'aba'"):
        CharTokenizer("aba")


def test_a_system_message_is_a_line_of_its_own():
    tokenizer = CharTokenizer()
    assert tokenizer.decode(tokenizer.encode_prompt("ask", "be kind")) == "be kind\nask"


# Any transformers tokenizer ---------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_byte_level_tokens(byte_level_tokenizer, text):
    assert byte_level_tokenizer.decode(byte_level_tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def byte_level_tokenizer():
    return TransformersTokenizer(byte_level())


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="the tokenizer 'small' has no end-of-sequence token"):
        TransformersTokenizer(byte_level(eos=None))


def test_ids_that_no_token_has_stand_for_no_text():
    tokenizer = byte_level()
    tokenizer.add_tokens(["extra"])
    wrapped = TransformersTokenizer(tokenizer)
    assert wrapped.vocab_size == len(tokenizer) == len(wrapped.decodable_V)
    backend = Backend(models.WordLevel({"a": 0, "b": 5, "<end>": 7}, unk_token=None))
    holes = TransformersTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))
    assert np.flatnonzero(holes.decodable_V).tolist() == [0, 5, 7]
    assert holes.vocab_size == 8


@pytest.mark.parametrize(
    ("written", "want"), [(1, (3, 1)), ([3, 1, 2], (3, 1, 2)), (0, (3, 0)), (None, (3,)), ([], (3,))]
)
def test_further_end_tokens_come_from_the_generation_config(tmp_path, written, want):
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written, "temperature": 0.1}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == want
    assert tokenizer.name == str(tmp_path)
    for end in want:
        env = gym.make("textenv/Arithmetic-v0", level="token", tokenizer=tokenizer)
        env.reset(seed=0)
        assert env.step(end)[4]["finish"] == "eos"


def test_without_a_generation_config_there_is_one_end(tmp_path):
    byte_level().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).eos_ids == (3,)


def test_an_end_token_that_does_not_exist_is_refused(tmp_path):
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 99999]}')
    with pytest.raises(ValueError, match=r"the end-of-sequence ids \[99999\] are no tokens"):
        load_tokenizer(tmp_path)


def test_tokenizers_are_loaded_from_whatever_names_them(tmp_path):
    ours = CharTokenizer("ab")
    assert load_tokenizer(ours) is ours
    assert load_tokenizer(None).name == "characters"
    assert load_tokenizer(byte_level()).name == "small"
    with pytest.raises(ValueError, match=f"no tokenizer at '{tmp_path}'") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


# Beginnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_has_one_beginning_at_most(adds_bos):
    plain = TransformersTokenizer(byte_level(adds_bos=adds_bos))
    assert plain.encode_prompt("the fox") == [0] * adds_bos + plain.encode("the fox")
    assert plain.encode_prompt("the fox", "in turns") == [0] * adds_bos + plain.encode("in turns\nthe fox")
    assert plain.encode("the fox").count(0) == 0
    assert plain.encode_reply("the dog", after_eos=True) == plain.encode("the dog")
    chat = TransformersTokenizer(byte_level(CHATML, adds_bos=adds_bos))
    prompt = chat.encode_prompt("the fox", "in turns")
    assert prompt.count(0) == 1
    assert chat.decode(prompt) == (
        "<s><|im_start|>system\nin turns<|im_end|>\n<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_knows_no_system_message_says_so():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    tokenizer = TransformersTokenizer(byte_level(template))
    assert tokenizer.encode_prompt("the fox")
    with pytest.raises(
        ValueError, match="template of 'small' refuses messages of the roles system, user: no system role"
    ):
        tokenizer.encode_prompt("the fox", "in turns")


# Turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_eos", [True, False])
@pytest.mark.parametrize("prompt", ["?", "guess the number"])
def test_a_conversation_is_the_templates_own_rendering(after_eos, prompt):
    tokenizer = TransformersTokenizer(byte_level(CHATML))
    turns = [("the fox", "lower"), ("the dog !", "higher\n"), ("7", "")]
    sampled = tokenizer.encode_prompt(prompt)
    messages = [{"role": "user", "content": prompt}]
    for completion, reply in turns:
        sampled += tokenizer.encode(completion) + [3] * after_eos
        sampled += tokenizer.encode_reply(reply, after_eos)
        messages += [{"role": "assistant", "content": completion}, {"role": "user", "content": reply}]
    rendered = tokenizer.to_transformers().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(sampled) == rendered
    assert sampled.count(0) == 1
    assert sampled.count(3) == 2 * len(turns) + 1


@pytest.mark.parametrize("template", [NUMBERED, FORGETFUL], ids=["numbered", "forgetful"])
def test_a_template_that_rewrites_history_is_refused(template):
    tokenizer = TransformersTokenizer(byte_level(template))
    with pytest.raises(ValueError, match="the chat template of 'small' rewrites earlier turns once a reply follows"):
        tokenizer.encode_reply("lower", after_eos=True)


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_sampled_tokens_are_never_decoded_and_encoded_again(monkeypatch, template):
    """What a policy sampled stands in the context as it was, however odd a split of the text it is."""
    tokenizer = TransformersTokenizer(byte_level(template))
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    env = gym.make("textenv/GuessNumber-v0", tokenizer=tokenizer, max_tokens=512).unwrapped
    env.reset(seed=0)
    odd = [encode(character)[0] for character in "the"] + [3]  # three tokens for what the tokenizer writes in one
    assert len(encode("the")) == 1
    env.step(odd)
    env.step(odd)
    sampled = env.episodes.tokens_NT[0][env.episodes.source_NT[0] == 2]
    assert sampled.tolist() == odd * 2
    assert env.episodes.completions[0] == ["the", "the"]
    assert not any("the<" in text or text == "the" for text in encoded)


def test_a_wider_vocabulary_holds_ids_without_text():
    env = gym.make("textenv/Arithmetic-v0", tokenizer=byte_level(), vocab_size=512)
    env.reset(seed=0)
    assert env.action_space.nvec[0] == 512
    with pytest.raises(ValueError, match="the token id 400 stands for no text in the tokenizer 'small'"):
        env.step([400, 3])
    with pytest.raises(ValueError, match="a vocabulary of 64 is smaller than the ids of the tokenizer 'small'"):
        gym.make("textenv/Arithmetic-v0", tokenizer=byte_level(), vocab_size=64)


def test_special_tokens_that_were_sampled_are_written_out():
    tokenizer = TransformersTokenizer(byte_level())
    assert tokenizer.decode(np.array([2, *tokenizer.encode("fox"), 3])) == "<|im_start|>fox<|im_end|>"


def test_added_tokens_are_known():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    wrapped = TransformersTokenizer(tokenizer)
    assert wrapped.decode(wrapped.encode("<tool>")) == "<tool>"
    assert len(wrapped.encode("<tool>")) == 1
