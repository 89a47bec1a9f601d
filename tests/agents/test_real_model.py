"""GRPO with what a downloaded model brings along: byte-level BPE, chat template, two end tokens, spare logits."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rewards
from agents.core.engines.base import Sampling
from agents.core.engines.native import NativeEngine
from agents.core.models import load_model
from agents.core.rollout import Rollout
from agents.grpo import GRPO, GRPOConfig
from benchmarks.small_qwen import make_small_qwen
from rewards import Sample
from rewards.rows import read_rows
from textenv import Finish, make_task
from textenv.cli import main
from textenv.episodes import Episodes
from textenv.tasks.gsm8k import INSTRUCTION, WordProblems
from textenv.tasks.try_again import FEEDBACK
from textenv.tokenizer import TransformersTokenizer, load_tokenizer

DATA = str(WordProblems().data)
SIZES = {"max_new_tokens": 24, "max_tokens": 512}
OPTIONS = ["--options", "data", DATA, "max_new_tokens", "24", "max_tokens", "512"]


def even_length(prompt, completion, reference):
    return float(len(completion) % 2 == 0)


rewards.register("test_even_length", even_length)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    texts = [row["question"] for _, row in read_rows(DATA)]
    return make_small_qwen(tmp_path_factory.mktemp("qwen"), texts, vocab_size=320, hidden_size=64, layers=2)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def policy(folder):
    return load_model(folder)


def train(folder, run: Path, **changes):
    settings = {"prompts_per_step": 4, "group_size": 4, "total_episodes": 48, "eval_episodes": 4, "learning_rate": 1e-3}
    config = GRPOConfig(model=str(folder), env_options={"data": DATA}, run_dir=str(run), **(settings | SIZES | changes))
    return GRPO("textenv/GSM8K-v0", config).learn()


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """Three steps with a reward that varies within groups, and the run they left."""
    run = tmp_path_factory.mktemp("runs") / "run"
    return train(folder, run, reward="test_even_length"), run


def rollout_rows(run):
    files = sorted((run / "rollouts").iterdir())
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def test_a_prompt_is_the_chat_templates_rendering_once(folder, tokenizer):
    episodes = Episodes(make_task("textenv/GSM8K-v0", data=DATA, **SIZES), 1, tokenizer=tokenizer)
    problem = episodes.task.problem(0, "train", 0)
    episodes.begin([0], [problem], [(0,)])
    assert problem.prompt.endswith(f"\n{INSTRUCTION}\n")
    assert episodes.text(0) == f"<|im_start|>user\n{problem.prompt}<|im_end|>\n<|im_start|>assistant\n"
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, return_dict=True
    )
    assert episodes.context(0).tolist() == theirs["input_ids"]


def test_a_template_that_writes_the_beginning_token_gets_it_once(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.bos_token = "<|endoftext|>"
    theirs.chat_template = "{{ bos_token }}" + theirs.chat_template
    special_tokens = [(theirs.bos_token, theirs.bos_token_id)]
    theirs.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=special_tokens)
    assert theirs.encode("a")[0] == theirs.bos_token_id
    ids = TransformersTokenizer(theirs).encode_prompt("a")
    assert [i for i, token in enumerate(ids) if token == theirs.bos_token_id] == [0]


@pytest.fixture(scope="module")
def sampled(policy):
    """A prompt and 256 completions of it."""
    prompt = policy.tokenizer.encode_prompt("2+2=?")
    return prompt, NativeEngine(policy).generate([prompt], Sampling(max_new_tokens=24), n=256)


def test_either_end_token_ends_a_completion(policy, sampled):
    eos_ids = policy.tokenizer.eos_ids
    assert [policy.tokenizer.decode([i]) for i in eos_ids] == ["<|im_end|>", "<|endoftext|>"]
    _, completions = sampled
    assert not np.isin(np.concatenate([tokens[:-1] for tokens in completions.tokens]), eos_ids).any()
    last = np.array([tokens[-1] for tokens in completions.tokens])
    ended = np.array([finish is Finish.EOS for finish in completions.finish])
    assert (np.isin(last, eos_ids) == ended).all()
    assert set(last[ended]) == set(eos_ids)


def test_logits_beyond_the_tokenizers_ids_are_never_sampled(policy, sampled):
    assert policy.vocab_size > policy.tokenizer.vocab_size + 32
    assert np.concatenate(sampled[1].tokens).max() < policy.tokenizer.vocab_size


def test_the_sampling_that_the_folder_recommends_is_ignored(folder, policy, sampled):
    recommended = GenerationConfig.from_pretrained(folder)
    assert (recommended.top_k, recommended.repetition_penalty) == (20, 1.1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt, completions = sampled
    for tokens, logprobs in zip(completions.tokens[:8], completions.logprobs[:8], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        plain = logits[:, : policy.tokenizer.vocab_size].log_softmax(dim=1)
        np.testing.assert_allclose(logprobs, plain[torch.arange(len(tokens)), torch.tensor(tokens)], atol=1e-4)


def test_training_moves_the_weights_by_tokens_scored_as_they_were_sampled(folder, trained):
    agent, run = trained
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 3
    assert all(line["logp_gap_max"] < 1e-4 and line["grad_norm"] > 0 for line in metrics)
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(before[name], weight) for name, weight in agent.policy.model.state_dict().items())


def test_episodes_are_scored_by_the_reward_that_was_asked_for(trained):
    rows = rollout_rows(trained[1])
    assert len(rows) == 48
    assert {row["return"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row["return"] == even_length(row["prompt"], row["completions"][0], None)


def test_answers_are_compared_with_those_of_the_data(folder, tokenizer, tmp_path):
    references = {problem.prompt: problem.reference for problem in WordProblems().preview("train")}
    train(folder, tmp_path / "run", total_episodes=16)
    last_number = rewards.make("last_number")
    for row in rollout_rows(tmp_path / "run"):
        sample = Sample(prompt="", completion=row["completions"][0], reference=references[row["prompt"]])
        assert row["return"] == last_number([sample])[0].value

    episodes = Episodes(make_task("textenv/GSM8K-v0", data=DATA), 2, tokenizer=tokenizer)
    problem = episodes.task.problem(0, "train", 0)
    episodes.begin([0, 1], [problem, problem], [(0,), (1,)])
    answers = (problem.info["solution"], problem.info["solution"] + "0")
    assert episodes.extend([[*tokenizer.encode(text), tokenizer.eos_ids[0]] for text in answers]).tolist() == [1.0, 0.0]


def test_a_checkpoint_is_a_transformers_folder(trained):
    agent, run = trained
    (checkpoint,) = (run / "checkpoints").iterdir()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
        assert torch.equal(theirs, agent.policy.model(tokens).logits)
    messages = [{"role": "user", "content": "naïve – ½?"}]
    rendered = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(messages, return_dict=True)
    assert rendered["input_ids"] == agent.policy.tokenizer.to_transformers().apply_chat_template(messages).input_ids
    kept = GenerationConfig.from_pretrained(checkpoint)
    assert kept.eos_token_id == list(agent.policy.tokenizer.eos_ids)
    assert (kept.top_k, kept.repetition_penalty) != (20, 1.1)


def test_the_commands_take_a_runs_folder(trained, tmp_path):
    agent, run = trained
    figures, episodes = tmp_path / "figures.json", tmp_path / "episodes.jsonl"
    model = ["textenv/GSM8K-v0", "--model", str(run)]
    main(["evaluate", *model, "--episodes", "4", "--json-file", str(figures), *OPTIONS, "reward", "test_even_length"])
    assert json.loads(figures.read_text())["accuracy"] == agent.last_training.after.accuracy
    main(["generate", *model, "--prompts", "2", "--group-size", "3", "--out", str(episodes), *OPTIONS])
    rows = [json.loads(line) for line in episodes.read_text().splitlines()]
    assert [row["group"] for row in rows] == [0, 0, 0, 1, 1, 1]


def rendering(tokenizer, prompt, completions, replies):
    """An episode as the chat template writes it, up to the end of its last completion."""
    messages = [{"role": "user", "content": prompt}]
    for completion, reply in zip(completions, [*replies, None], strict=True):
        messages += [{"role": "assistant", "content": completion}, {"role": "user", "content": reply}]
    return tokenizer.to_transformers().apply_chat_template(messages[:-1], tokenize=False).removesuffix("\n")


@pytest.mark.parametrize("end", ["<|im_end|>", ""], ids=["ended itself", "cut"])
def test_several_turns_are_the_templates_own_tokens(tokenizer, end):
    task = make_task("textenv/TryAgain-v0", turns=3, max_new_tokens=4, max_tokens=256)
    episodes = Episodes(task, 1, tokenizer=tokenizer)
    problem = task.problem(0, "train", 0)
    episodes.begin([0], [problem], [(0,)])
    answers = ["0000" if not end else "0", "1111" if not end else "1", problem.reference]
    for answer, how in zip(answers, [end, end, "<|im_end|>"], strict=True):
        episodes.extend([tokenizer.encode(answer + how)])
    assert episodes.scores[0].correct
    assert len(episodes.replies[0]) == 2
    expected = rendering(tokenizer, problem.prompt, answers, episodes.replies[0])
    assert episodes.text(0) == expected
    assert episodes.context(0).tolist() == tokenizer.encode(expected)


def test_what_a_policy_plays_over_several_turns_reads_as_the_template_writes_it(policy):
    task = make_task("textenv/TryAgain-v0", turns=3, max_tokens=256)
    batch = Rollout(task, NativeEngine(policy), policy).collect(0, 4, 8, temperature=1.0, seed=(0,))
    for i, completions in enumerate(batch.completions):
        text = policy.tokenizer.decode(batch.tokens_BT[i, : batch.length_B[i]].tolist())
        expected = rendering(policy.tokenizer, batch.prompts[i], completions, [FEEDBACK] * (len(completions) - 1))
        # The policy may have chosen the other end token, and its last completion may be cut.
        assert expected.removesuffix("<|im_end|>") == text.replace("<|endoftext|>", "<|im_end|>").removesuffix(
            "<|im_end|>"
        )
    assert {len(completions) for completions in batch.completions} == {3}
    assert (batch.finish_B != Finish.CONTEXT).all()
