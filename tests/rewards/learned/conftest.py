"""Tiny models with a tokenizer of letters."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHAT = (
    "{% for message in messages %}<s>{{ message.role[0] ~ ' ' ~ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a {% endif %}"
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def letters(chat=False, pad="<pad>", side="right", begins=False):
    """A tokenizer with a token for each character."""
    words = ["<pad>", "</s>", "<s>", "<unk>", "\n", *" abcdefghijklmnopqrstuvwxyz?=0123456789"]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>", "</s>", "<s>"])
    if begins:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token=pad,
        unk_token="<unk>",
        padding_side=side,
        chat_template=CHAT if chat else None,
    )


def language_model(family="llama", seed=0, context=64, tied=True):
    config_class, model_class = FAMILIES[family]
    sizes = {"vocab_size": 48, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": None}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": context}
    if family != "gpt2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(seed)
    return model_class(config_class(tie_word_embeddings=tied, initializer_range=0.1, **sizes))


@pytest.fixture
def language_folder(tmp_path):
    """Saves a language model with its tokenizer, and gives the folder."""

    def save(family="llama", tokenizer=None, **options):
        folder = tmp_path / f"language-{len(list(tmp_path.iterdir()))}"
        language_model(family, **options).save_pretrained(folder)
        (tokenizer or letters()).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def reward_folder(tmp_path, language_folder):
    """Saves a reward model as others publish them, and gives the folder."""

    def save(family="llama", tokenizer=None, labels=1, config=None, **options):
        tokenizer = tokenizer or letters()
        source = language_folder(family, tokenizer, **options)
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels)
        torch.nn.init.normal_(model.score.weight, std=0.2)
        model.config.pad_token_id = tokenizer.pad_token_id
        for name, value in (config or {}).items():
            setattr(model.config, name, value)
        folder = tmp_path / f"reward-{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
