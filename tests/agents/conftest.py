"""Tiny models of three families, with fresh weights large enough that their distributions have a shape."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agents.core.policy import Policy
from agents.grpo import GRPO
from textenv import make_task
from textenv.tokenizer import CharTokenizer

ALPHABET = "0123456789+= "
SIZES = {"vocab_size": len(ALPHABET) + 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def make_model(family: str, seed: int = 0, **changes):
    sizes = SIZES | changes
    longest = sizes.pop("max_position_embeddings", 64)
    torch.manual_seed(seed)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=longest, **sizes))
    else:
        config, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[
            family
        ]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        model = model_class(
            config(hidden_size=32, intermediate_size=64, max_position_embeddings=longest, **heads, **sizes)
        )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def tokenizer():
    return CharTokenizer(ALPHABET)


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def policy(request, tokenizer):
    return Policy(make_model(request.param), tokenizer)


@pytest.fixture
def llama(tokenizer):
    return Policy(make_model("llama"), tokenizer)


class Undecodable(CharTokenizer):
    """Its ids 3 and 5 stand for no text."""

    def __init__(self):
        super().__init__(ALPHABET)
        self.decodable_V = np.isin(np.arange(self.vocab_size), (3, 5), invert=True)


@pytest.fixture
def fresh_model(tmp_path):
    """Saves a tiny Llama with fresh weights for a task's own tokenizer, and gives its folder."""

    def save(task_id: str, family: str = "llama", **options):
        tokenizer = make_task(task_id, **options).tokenizer()
        model = make_model(family, vocab_size=tokenizer.vocab_size)
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        Policy(model, tokenizer).save(folder)
        return str(folder)

    return save


@pytest.fixture
def config(tmp_path):
    """A config for a few quick steps of an agent, by default GRPO, its run kept under the test's folder."""

    def make(model: str, agent_class=GRPO, /, **changes):
        quick = {
            "model": model,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "prompts_per_step": 4,
            "group_size": 4,
            "total_episodes": 48,
            "critic_warmup_steps": 1,
            "eval_episodes": 8,
            "run_dir": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
        }
        names = {field.name for field in dataclasses.fields(agent_class.config_class)}
        return agent_class.config_class(**{name: quick[name] for name in quick.keys() & names} | changes)

    return make
