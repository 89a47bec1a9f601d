"""What a score depends on, and what it does not."""

import pickle

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rewards import RewardError, Sample, score_samples
from rewards.learned.reward_model import RewardModel
from rewards.learned.scalar import batch_by_tokens
from tests.rewards.learned.conftest import letters

ANSWERS = ("yes", "no", "a", "", "it is 42", "maybe so or maybe not", "yes yes yes yes")
TOLERANCE = 1e-5


def samples(*answers, prompt="is it?"):
    return [Sample(prompt=prompt, completion=answer) for answer in answers or ANSWERS]


def values(model, which=None):
    return [score.value for score in model(which or samples())]


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def family(request):
    return request.param


def test_a_score_is_the_heads_number_at_the_end_token(reward_folder, family):
    folder = reward_folder(family)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer("is it?it is 42")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = classifier(torch.tensor([ids])).logits.item()
    [score] = RewardModel(folder)(samples("it is 42"))
    assert score.value == pytest.approx(expected, abs=TOLERANCE)
    assert score.parts == {"head": score.value}
    assert score.correct is False  # it says nothing about correctness


def test_a_score_does_not_depend_on_the_batch(reward_folder, family):
    folder = reward_folder(family)
    alone = [values(RewardModel(folder), samples(answer))[0] for answer in ANSWERS]
    assert len({round(value, 3) for value in alone}) == len(ANSWERS)
    for tokens in (1, 40, 10_000):
        assert values(RewardModel(folder, tokens_per_batch=tokens)) == pytest.approx(alone, abs=TOLERANCE)
    assert values(RewardModel(folder), samples()[::-1])[::-1] == pytest.approx(alone, abs=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_a_score_does_not_depend_on_what_pads_or_where(reward_folder, family, side, pad):
    expected = values(RewardModel(reward_folder(family)))
    padded = RewardModel(reward_folder(family, letters(pad=pad, side=side)))
    assert values(padded) == pytest.approx(expected, abs=TOLERANCE)


def test_end_tokens_inside_a_text_are_read_as_any_other(reward_folder):
    model = RewardModel(reward_folder())
    [alone] = values(model, samples("yes</s>no</s></s>"))
    assert alone != pytest.approx(values(model, samples("yes"))[0], abs=1e-3)
    assert values(model, samples("yes</s>no</s></s>", *ANSWERS))[0] == pytest.approx(alone, abs=TOLERANCE)


def test_a_chat_template_is_used_as_it_is(reward_folder):
    chat, plain = RewardModel(reward_folder(tokenizer=letters(chat=True))), RewardModel(reward_folder())
    [text] = chat._model.encode([("is it?", "yes")])
    assert chat._model.tokenizer.decode(text.ids) == "<s>u is it?</s>\n<s>a yes</s>\n"
    assert values(chat) != pytest.approx(values(plain), abs=1e-3)


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_begins_with_one_beginning_token(reward_folder, chat):
    model = RewardModel(reward_folder(tokenizer=letters(chat=chat, begins=True)))
    [text] = model._model.encode([("is it?", "yes")])
    begun = "<s>u is it?</s>\n<s>a yes</s>\n" if chat else "<s>is it?yes</s>"
    assert model._model.tokenizer.decode(text.ids) == begun


def test_a_template_that_does_not_end_the_turn_has_it_ended(reward_folder):
    tokenizer = letters()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content ~ ' ' }}{% endfor %}"
    model = RewardModel(reward_folder(tokenizer=tokenizer))
    [text] = model._model.encode([("is it?", "yes")])
    assert model._model.tokenizer.decode(text.ids) == "is it? yes </s>"


def test_bfloat16_agrees_with_float32(reward_folder, family):
    folder = reward_folder(family)
    long = samples(*(" ".join(ANSWERS[:n] + ANSWERS[n + 1 :])[:50] for n in range(7)), *ANSWERS)
    full, half = values(RewardModel(folder), long), values(RewardModel(folder, dtype="bfloat16"), long)
    deviation = torch.tensor(full).std().item()
    assert half == pytest.approx(full, abs=0.1 * deviation)
    assert half != full


def test_center_and_scale_of_the_config_are_applied(reward_folder):
    plain = RewardModel(reward_folder())(samples())
    centred = RewardModel(reward_folder(config={"reward_center": 0.5, "reward_scale": 3.0}))(samples())
    assert [score.value for score in centred] == pytest.approx([3 * (score.value - 0.5) for score in plain], abs=1e-4)
    assert [score.parts["head"] for score in centred] == pytest.approx([score.value for score in plain])


def test_a_prompt_too_long_loses_its_front_and_says_so(reward_folder):
    # The context has 64 tokens, of which "42" and the end token take three.
    model = RewardModel(reward_folder())
    long, cut = model([Sample(prompt="x" * 9 + "e" * 61, completion="42"), Sample(prompt="e" * 61, completion="42")])
    assert long.value == pytest.approx(cut.value, abs=TOLERANCE)
    assert long.info == {"cut": "9 of 73 tokens at the front of the prompt"}
    assert cut.info == {}


def test_an_answer_too_long_is_ungraded(reward_folder):
    model = RewardModel(reward_folder())
    fits, long, short = model(samples("a" * 63, "a" * 64, "yes"))
    assert fits.value is not None
    assert fits.info["cut"] == "6 of 70 tokens at the front of the prompt"
    assert long.error == "the completion has 65 tokens, and the reward model reads 64"
    assert short.value == pytest.approx(values(model, samples("yes"))[0], abs=TOLERANCE)


def test_max_tokens_shortens_the_context_further(reward_folder):
    [score] = RewardModel(reward_folder(), max_tokens=5)(samples("42"))
    assert score.info["cut"] == "4 of 9 tokens at the front of the prompt"


def test_a_score_that_is_not_finite_is_ungraded(reward_folder):
    model = RewardModel(reward_folder())
    with torch.no_grad():
        model._model.model.get_input_embeddings().weight[letters().convert_tokens_to_ids("q")] = float("nan")
    good, bad = model(samples("yes", "q"))
    assert good.value is not None
    assert bad.error == "the reward model's score is nan"


def test_any_text_is_scored(reward_folder):
    model = RewardModel(reward_folder())
    hostile = ["\ud800", "a\x00b", "", "é" * 5, "</s>", "<pad><pad>", "{{ 7 * 7 }}"]
    assert all(score.value is not None for score in model(samples(*hostile)))
    assert model(samples("x" * 1_000_000))[0].value is None


def test_no_samples_no_scores(tmp_path):
    assert RewardModel(tmp_path / "none")([]) == []


def test_offloaded_weights_give_the_same_scores(reward_folder):
    folder = reward_folder()
    model = RewardModel(folder, offload=True)
    assert values(model) == values(RewardModel(folder))
    assert model._model.device.type == "cpu"


def test_a_model_can_be_sent_to_another_process_before_use(reward_folder):
    folder = reward_folder()
    assert values(pickle.loads(pickle.dumps(RewardModel(folder)))) == values(RewardModel(folder))  # noqa: S301


def test_what_is_no_reward_model_is_refused_in_a_line(tmp_path, reward_folder, language_folder):
    for folder, line in {
        tmp_path / "none": "no reward model can be read from",
        language_folder(): "is a LlamaForCausalLM with 2",
        reward_folder(labels=3): "is a LlamaForSequenceClassification with 3",
    }.items():
        with pytest.raises(RewardError, match=line) as caught:
            score_samples(RewardModel(folder), samples())
        assert "\n" not in str(caught.value)


def test_a_missing_head_is_refused(reward_folder):
    folder = reward_folder()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "score.weight"}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(RewardError, match=r"lacks weights: score\.weight"):
        RewardModel(folder)(samples())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "float8"}, "dtype is one of float32, bfloat16, float16, got 'float8'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, line):
    with pytest.raises(ValueError, match=line):
        RewardModel("nobody/nothing", **options)


def test_batches_hold_like_lengths_and_no_more_than_their_tokens():
    lengths = [5, 1, 9, 3, 3, 20, 8]
    batches = batch_by_tokens(lengths, tokens=18)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert [[lengths[i] for i in batch] for batch in batches] == [[20], [9, 8], [5, 3, 3], [1]]


def test_items_of_several_rows_are_not_split():
    assert batch_by_tokens([4, 4, 4], tokens=20, rows=[2, 4, 2]) == [[0], [1], [2]]
    assert batch_by_tokens([4, 4, 4], tokens=20, rows=[2, 3, 9]) == [[0, 1], [2]]
