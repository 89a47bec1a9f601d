import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from agents.core.models import build_tiny, load_model
from agents.core.policy import Policy
from agents.core.sources import validate_model_source
from tests.agents.conftest import make_model
from textenv.tokenizer import CharTokenizer


def test_importing_agents_and_checking_a_source_need_no_torch():
    code = "import agents, agents.core.sources, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_tiny_model_has_about_a_million_parameters_and_a_context_of_1024():
    policy = Policy(build_tiny(CharTokenizer(), seed=0), CharTokenizer())
    assert 0.8e6 <= sum(parameter.numel() for parameter in policy.parameters()) <= 1e6
    assert policy.max_context == 1024


def test_the_tiny_model_is_a_function_of_its_seed_alone():
    first, again, other = (build_tiny(CharTokenizer(), seed).state_dict() for seed in (1, 1, 2))
    for name, weight in first.items():
        assert_close(weight, again[name], atol=0, rtol=0)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_the_tiny_model_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny(CharTokenizer(), seed=0)
    assert_close(torch.rand(3), expected)


def test_the_tiny_model_trains_its_end_token_as_an_input_too():
    model = build_tiny(CharTokenizer(), seed=0)
    model(torch.tensor([[0, 1, 2]])).logits[0, -1, 5].backward()
    assert model.model.embed_tokens.weight.grad[0].abs().sum() > 0


def test_a_folder_without_a_config_is_refused_in_one_line(tmp_path):
    for check in (validate_model_source, load_model):
        with pytest.raises(ValueError, match=r"is not a model folder: no config\.json in it") as error:
            check(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./runs/mine", "runs/mine/last", "a name", ""])
def test_a_source_that_can_be_neither_folder_nor_hub_name_is_refused(source):
    with pytest.raises(ValueError, match="model folder"):
        validate_model_source(source)


@pytest.mark.parametrize("source", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_hub_names_are_let_through(source):
    assert validate_model_source(source) == source


def test_a_name_that_cannot_be_reached_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no causal language model at 'no-such/model'") as error:
        load_model("no-such/model")
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    backend = CharTokenizer("ab").to_transformers().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_model(tmp_path)


def test_a_tokenizer_may_be_given_and_weights_come_in_float32_unless_asked(tmp_path, tokenizer):
    make_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    policy = load_model(tmp_path, tokenizer)
    assert policy.tokenizer is tokenizer
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.model.config._attn_implementation == "sdpa"
    half = load_model(tmp_path, tokenizer, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
