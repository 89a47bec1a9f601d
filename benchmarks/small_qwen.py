"""A small model folder with everything awkward about a real one: ``python -m benchmarks.small_qwen FOLDER``.

Qwen3 layers, fresh weights, a byte-level BPE tokenizer with a chat template, special tokens after the ordinary ids, more
logits than ids, two end-of-sequence ids, and a ``generation_config.json`` that recommends another sampling than the one
trained with.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rewards.rows import read_rows
from textenv.tasks.gsm8k import WordProblems

END_OF_TEXT, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LOGITS_MULTIPLE = 128
"""The logits' width is the next multiple of this beyond the tokenizer's ids."""


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    text: Path | None = None,
    field: str = "question",
    vocab_size: int = 2000,
    seed: int = 0,
) -> None:
    """Make a small Qwen3-style model folder with fresh weights.

    Args:
        folder: where it goes.
        text: a jsonl, csv or parquet file to train the tokenizer on; default the packaged word problems.
        field: the field of that file with the text.
        vocab_size: ordinary tokens at most.
        seed: of the weights.
    """
    rows = read_rows(WordProblems().data if text is None else text)
    make_small_qwen(folder, (row[field] for _, row in rows), vocab_size=vocab_size, seed=seed)
    print(f"a small model is in {folder}")


def make_small_qwen(
    folder: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 2000,
    hidden_size: int = 192,
    layers: int = 4,
    seed: int = 0,
) -> Path:
    """Make a model folder, the same for the same arguments.

    Args:
        folder: where it goes.
        texts: what the tokenizer is trained on.
        vocab_size: ordinary tokens at most, the 256 bytes among them; the three special ones come on top.
        hidden_size: width of the model, a multiple of 64.
        layers: how many; at the default width a layer has 400,000 parameters.
        seed: of the weights.

    Returns:
        the folder.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    model = fresh_model(tokenizer, hidden_size, layers, seed)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([END, END_OF_TEXT]),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.8,
        repetition_penalty=1.1,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, its special tokens after the ordinary ones."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    )


def fresh_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights; torch's own random state is left as it was."""
    config = Qwen3Config(
        vocab_size=(len(tokenizer) // LOGITS_MULTIPLE + 1) * LOGITS_MULTIPLE,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


if __name__ == "__main__":
    tyro.cli(main)
