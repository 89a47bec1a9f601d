"""The small Qwen-style folder has what is awkward about a real one."""

import json

from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks import small_qwen
from rewards.rows import read_rows
from textenv.tasks.gsm8k import WordProblems

SMALL = {"vocab_size": 300, "hidden_size": 64, "layers": 1}


def test_the_program_makes_a_folder_of_about_two_million_parameters(tmp_path, capsys):
    small_qwen.main(tmp_path)
    assert 1e6 < sum(weight.numel() for weight in load_file(tmp_path / "model.safetensors").values()) < 5e6
    assert str(tmp_path) in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for _, row in read_rows(WordProblems().data):
        ids = tokenizer.encode(row["question"])
        assert tokenizer.decode(ids) == row["question"]
        assert len(ids) < len(row["question"]) / 3


def test_special_tokens_follow_the_ordinary_ones_and_spare_logits_follow_them(tmp_path):
    small_qwen.make_small_qwen(tmp_path, ["What is 2 + 2?"], **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    special = tokenizer.convert_tokens_to_ids(list(small_qwen.SPECIAL_TOKENS))
    assert special == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer.eos_token == small_qwen.END
    assert tokenizer.bos_token is None
    width = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    assert width > len(tokenizer)
    assert width % small_qwen.LOGITS_MULTIPLE == 0


def test_the_generation_config_is_hostile(tmp_path):
    small_qwen.make_small_qwen(tmp_path, ["What is 2 + 2?"], **SMALL)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2
    assert (generation["repetition_penalty"], generation["top_k"], generation["temperature"]) == (1.1, 20, 0.6)


def test_the_same_arguments_make_the_same_folder(tmp_path):
    texts = [row["question"] for _, row in read_rows(WordProblems().data)]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_qwen.make_small_qwen(tmp_path / name, texts, seed=seed, **SMALL)
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert weights[0] == weights[1] != weights[2]
