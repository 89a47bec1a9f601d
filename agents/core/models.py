"""Models: load one, or build the embedded tiny one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from agents.core.policy import Policy, no_progress_bar
from agents.core.sources import find_model, validate_model_source
from rewards.pretrained import read_pretrained
from textenv.tokenizer import Tokenizer, load_tokenizer


def load_model(
    source: str | Path,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """Load a policy from a transformers folder or the hub: safetensors alone, and no code that comes with a model.

    Args:
        source: a folder that ``save_pretrained`` wrote, a run's folder, or a name on the hub.
        tokenizer: of the model's ids; default the one saved with it.
        device: where the model goes.
        dtype: type of its weights.

    Raises:
        ValueError: there is no such model, its weights are pickles, its tokenizer has no end-of-sequence token, or has ids
            beyond its logits.
    """
    source = validate_model_source(find_model(source))
    try:
        with no_progress_bar():
            model = read_pretrained(AutoModelForCausalLM, source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise ValueError(f"no causal language model at {source!r}: {str(error).splitlines()[0]}") from error
    return Policy(model.to(device), tokenizer or load_tokenizer(source))


def check_model_fits(source: str | Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Refuse, from its config alone, a model that cannot take the tokenizer's ids or contexts of ``max_tokens``.

    Raises:
        ValueError: the model's logits or its context are too narrow, or it has no config.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"no causal language model at {str(source)!r}: {str(error).splitlines()[0]}") from error
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model's vocabulary of {config.vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer "
            f"{tokenizer.name!r}; use the tokenizer saved with the model"
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < max_tokens:
        raise ValueError(
            f"the model's context of {context} tokens is smaller than the environment's max_tokens={max_tokens}; "
            "lower max_tokens, or take a model with a longer context"
        )


def tiny_config(vocab_size: int, eos_id: int, context: int = 1024) -> LlamaConfig:
    """The embedded model: a Llama of about a million parameters for a vocabulary of a hundred."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=3,
        num_attention_heads=8,
        max_position_embeddings=context,
        # Tied embeddings drawn wider than the library's 0.02 learn a character task in half the steps.
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=eos_id,
        # Unset: the embedding of a padding id would never be trained.
        pad_token_id=None,
    )


def build_tiny(tokenizer: Tokenizer, seed: int, context: int = 1024) -> LlamaForCausalLM:
    """A tiny model with fresh weights, a function of the seed alone. torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(tokenizer.vocab_size, tokenizer.eos_ids[0], context))
