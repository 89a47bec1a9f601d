"""What a model in this process promises as a judge."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rewards import RewardError, Sample
from rewards.judge import Chat, Judge, Request
from rewards.judge.commands import judge
from rewards.judge.generation import draw
from rewards.judge.local import LocalChat, as_chat
from tests.rewards.judge.server import said
from tests.rewards.learned.conftest import FAMILIES, language_model, letters

GREEDY = {"temperature": 0.0, "max_tokens": 12}
END, SPACE = 1, 5  # ids of "</s>", and of the space with which the template lets a reply begin


def save(folder, model, tokenizer=None, **generation):
    model.generation_config = GenerationConfig(eos_token_id=END, **generation)
    model.save_pretrained(folder)
    (tokenizer or letters(chat=True)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family, with recommendations that would change every reply."""
    leaks = {"do_sample": True, "top_k": 2, "temperature": 3.0, "repetition_penalty": 9.0, "max_length": 9}
    root = tmp_path_factory.mktemp("models")
    return {
        family: save(
            root / family, language_model(family, seed=1 if family == "llama" else 2, context=128, tied=False), **leaks
        )
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def folder(folders):
    return folders["llama"]


def local(folder, **options):
    return LocalChat(folder, **{"dtype": "float32", "device": "cpu", **options})


def question(text, **sampling):
    return Request([{"role": "user", "content": str(text)}], {**GREEDY, **sampling})


QUESTIONS = [question(text) for text in ("b", "what is 6", "a" * 40, "why", "h" * 17 + "?")]


def constant(folder, characters="7"):
    """A model that says these characters, all different, and ends. Its layers do nothing: a token leads to the next."""
    tokenizer = letters(chat=True)
    sizes = {"hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=48, tie_word_embeddings=False, eos_token_id=END, **sizes))
    chain = [SPACE, *tokenizer(characters)["input_ids"], END]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name or "lm_head" in name:
                weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] += model.model.embed_tokens.weight[before]
    return save(folder, model, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_reply_is_the_likeliest_next_token_each_time(folders, family):
    model = FAMILIES[family][1].from_pretrained(folders[family]).eval()
    ids = letters()("<s>u why</s>\n<s>a ")["input_ids"]
    start = len(ids)
    while len(ids) < start + GREEDY["max_tokens"] and END not in ids[start:]:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (reply,) = local(folders[family]).ask([question("why")])
    assert reply.text == letters().decode(ids[start:], skip_special_tokens=True)
    assert (reply.prompt_tokens, reply.completion_tokens) == (start, len(ids) - start)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_does_not_depend_on_what_else_is_asked(folders, family):
    mixed = [*QUESTIONS, question("what is 6", temperature=0.9, seed=3), question("b", max_tokens=3)]
    chat = local(folders[family])
    alone = [chat.ask([request])[0] for request in mixed]
    assert chat.ask(mixed) == alone
    assert local(folders[family], tokens_per_batch=1).ask(mixed) == alone
    assert len({reply.text for reply in alone}) > 4


def test_what_a_model_recommends_does_not_leak_in(folder, tmp_path):
    plain = save(tmp_path / "plain", language_model("llama", seed=1, context=128, tied=False))
    assert local(folder).ask(QUESTIONS) == local(plain).ask(QUESTIONS)


def test_no_special_tokens_are_added_to_those_of_the_template(folder, tmp_path):
    begins = save(tmp_path, language_model("llama", seed=1, context=128, tied=False), letters(chat=True, begins=True))
    assert local(begins).ask(QUESTIONS) == local(folder).ask(QUESTIONS)


def test_all_tokens_that_end_a_reply_do(folder, tmp_path):
    (whole,) = local(folder).ask([question("why")])
    stop = letters().convert_tokens_to_ids(whole.text[2])
    model = language_model("llama", seed=1, context=128, tied=False)
    save(tmp_path, model)
    model.generation_config.eos_token_id = [END, stop]
    model.save_pretrained(tmp_path)
    (reply,) = local(tmp_path).ask([question("why")])
    assert (whole.finish, reply.finish) == ("length", "stop")
    assert whole.text[: len(reply.text) + 1] == reply.text + whole.text[2]


def test_a_draw_repeats_with_its_seed_and_leaves_the_generators_of_others_alone(folder):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    requests = [question("why", temperature=1.0, seed=seed) for seed in (0, 1, 2, 1)] + [
        question("why", temperature=1.0)
    ]
    first = [reply.text for reply in local(folder).ask(requests)]
    torch.manual_seed(99)
    assert [reply.text for reply in local(folder).ask(requests[::-1])] == first[::-1]
    assert len(set(first)) == 3
    assert first[4] == first[0]  # seed 0 is the default
    torch.random.set_rng_state(before[0])
    local(folder).ask(requests)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.5, 0.6)])
def test_draws_follow_temperature_and_top_p(folder, temperature, top_p):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = letters()("<s>u why</s>\n<s>a ")["input_ids"]
    p_V = (model(torch.tensor([ids])).logits[0, -1].detach() / temperature).softmax(0).numpy()
    order = np.argsort(-p_V)
    kept = order[: int(np.searchsorted(np.cumsum(p_V[order]), top_p)) + 1]
    wanted_V = np.zeros_like(p_V)
    wanted_V[kept] = p_V[kept] / p_V[kept].sum()
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": 1}
    replies = local(folder).ask([question("why", seed=seed, **sampling) for seed in range(2000)])
    drawn = [reply.text or "" for reply in replies]
    names = [letters().decode([token], skip_special_tokens=True) for token in range(len(p_V))]
    wanted, found = {}, {}
    for name, p in zip(names, wanted_V, strict=True):  # special tokens are all read as nothing
        wanted[name] = wanted.get(name, 0.0) + p
    for name in drawn:
        found[name] = found.get(name, 0) + 1 / len(drawn)
    assert all(wanted[name] > 0 for name in found)
    assert sum(abs(found.get(name, 0.0) - p) for name, p in wanted.items()) / 2 < 0.06


def test_a_draw_inverts_the_distribution_of_the_likeliest_tokens():
    p = torch.tensor([[0.2, 0.5, 0.3]]).double().expand(4, 3)
    uniform = torch.tensor([[0.0], [0.49], [0.51], [0.99]]).double()
    assert draw(p, torch.ones(4, 1), uniform).flatten().tolist() == [1, 1, 2, 0]
    # From 0.8 of the mass: 0.5 and 0.3, that is 0.625 and 0.375.
    assert draw(p, torch.full((4, 1), 0.7), uniform + 0.005).flatten().tolist() == [1, 1, 1, 2]
    assert draw(p, torch.full((4, 1), 0.5), uniform).flatten().tolist() == [1, 1, 1, 1]


def test_a_reply_ends_by_itself_or_is_cut(tmp_path):
    chat = local(constant(tmp_path, "four"))
    whole, exact, cut = chat.ask([question("x", max_tokens=most) for most in (20, 5, 4)])
    assert (whole.text, whole.finish, whole.completion_tokens) == ("four", "stop", 5)
    assert exact == whole
    assert (cut.text, cut.finish, cut.completion_tokens) == ("four", "length", 4)


def test_it_judges(tmp_path):
    judge = Judge({"model": str(constant(tmp_path / "model")), "dtype": "float32", "cache_dir": tmp_path / "cache"})
    (score,) = judge([Sample(prompt="two and two?", completion="four")])
    assert score.value == pytest.approx(6 / 9)
    assert (judge.counts["graded"], judge.chat.calls) == (1, 1)
    (entry,) = map(json.loads, (tmp_path / "cache" / "verdicts.jsonl").open())
    assert entry["reply"]["text"] == "7"


@pytest.mark.parametrize(
    ("sampling", "fault"),
    [
        ({"max_tokens": 5, "top_k": 4, "stop": ["x"]}, "does not know stop, top_k"),
        ({"temperature": 1.0}, "needs max_tokens"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 5, "temperature": -1.0}, "temperature=-1.0"),
        ({"max_tokens": 5, "temperature": float("nan")}, "temperature=nan"),
        ({"max_tokens": 5, "top_p": 0.0}, "top_p=0.0"),
        ({"max_tokens": 5, "seed": -1}, "seed=-1"),
    ],
)
def test_a_field_that_it_cannot_honour_is_refused_before_the_model_is_read(sampling, fault):
    with pytest.raises(ValueError, match=fault):
        local("no-such-model").ask([Request(QUESTIONS[0].messages, sampling)])


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"tokens_per_batch": 0}, {"max_calls": -1}, {"max_tokens": -1}], ids=str
)
def test_impossible_options_are_refused_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        LocalChat("m", **options)


def test_a_model_that_is_not_there_or_not_made_to_reply_is_an_error_at_first_use(tmp_path):
    save(tmp_path / "base", language_model(), letters(chat=False))
    for model, fault in (
        (tmp_path / "nothing", "no language model can be read"),
        (tmp_path / "base", "no chat template"),
    ):
        with pytest.raises(RewardError, match=fault):
            local(model).ask(QUESTIONS)


def test_a_chat_that_cannot_be_replied_to_has_an_error_and_no_other_does(tmp_path):
    refuses = letters(chat=True)
    refuses.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        + refuses.chat_template
    )
    chat = local(save(tmp_path, language_model(context=64), refuses))
    bad_role = Request([{"role": "system", "content": "x"}], GREEDY)
    replies = chat.ask([bad_role, question("why"), question("a" * 60), question("why", max_tokens=60)])
    assert "no system here" in replies[0].error
    assert replies[1].error is None
    assert "context of 64 tokens" in replies[2].error
    assert "max_tokens=60" in replies[3].error
    assert chat.calls == 1


def test_budgets_stop_cleanly_and_what_is_on_the_disk_costs_nothing(folder, tmp_path):
    chat = local(folder, max_calls=3, cache_dir=tmp_path)
    replies = chat.ask(QUESTIONS)
    assert sum(reply.over_budget for reply in replies) == 2
    assert all("3 calls" in reply.error for reply in replies if reply.over_budget)
    resumed = local(folder, cache_dir=tmp_path)
    assert not any(reply.error for reply in resumed.ask(QUESTIONS))
    assert (chat.calls, resumed.calls, resumed.cached) == (3, 2, 3)
    one_by_one = local(folder, max_tokens=1, tokens_per_batch=1)
    assert [reply.over_budget for reply in one_by_one.ask(QUESTIONS)].count(True) == len(QUESTIONS) - 1
    assert one_by_one.tokens > 1


def test_equal_requests_are_replied_to_once(folder):
    chat = local(folder)
    replies = chat.ask([question("why"), question("b"), question("why")])
    assert replies[0] == replies[2] != replies[1]
    assert chat.calls == 2


def test_a_second_run_answers_from_the_disk_and_does_not_read_the_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    first = local(tmp_path / "model", cache_dir=tmp_path / "cache").ask(QUESTIONS)
    (tmp_path / "model" / "model.safetensors").unlink()
    again = local(tmp_path / "model", cache_dir=tmp_path / "cache", max_calls=0)
    replies = again.ask(QUESTIONS)
    assert [reply.text for reply in replies] == [reply.text for reply in first]
    assert all(reply.cached for reply in replies)


def test_the_disk_tells_apart_folders_dtypes_and_servers(folder, folders, tmp_path, serve):
    local(folder, cache_dir=tmp_path).ask(QUESTIONS[:1])
    for other in (local(folders["gpt2"], cache_dir=tmp_path), local(folder, dtype="bfloat16", cache_dir=tmp_path)):
        assert not other.ask(QUESTIONS[:1])[0].cached
    server = serve(lambda *_: said("x"))
    assert not Chat(str(folder), server.url, cache_dir=tmp_path).ask(QUESTIONS[:1])[0].cached


def test_a_folder_is_the_same_by_any_path(folder, tmp_path, monkeypatch):
    local(folder, cache_dir=tmp_path).ask(QUESTIONS[:1])
    monkeypatch.chdir(folder.parent)
    assert local(folder.name, cache_dir=tmp_path).ask(QUESTIONS[:1])[0].cached


def test_threads_and_copies_may_ask(folder, tmp_path):
    chat = local(folder, cache_dir=tmp_path)
    alone = local(folder).ask(QUESTIONS)
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: chat.ask(QUESTIONS[i:] + QUESTIONS[:i])}))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [reply.text for reply in alone]
    assert all([reply.text for reply in found[i]] == texts[i:] + texts[:i] for i in range(4))
    assert chat.calls == len(QUESTIONS)
    twin = pickle.loads(pickle.dumps(chat))  # noqa: S301
    assert twin._loaded is None
    assert [reply.text for reply in twin.ask(QUESTIONS)] == texts
    assert copy.deepcopy(chat) is chat


def test_a_mapping_with_an_address_is_a_server_and_one_without_a_local_model(folder):
    served = as_chat({"model": "m", "base_url": "http://127.0.0.1:1/v1", "concurrency": 2})
    assert (type(served), served.concurrency) == (Chat, 2)
    here = as_chat({"model": str(folder), "dtype": "bfloat16"})
    assert (type(here), here.dtype) == (LocalChat, "bfloat16")
    assert as_chat(here) is here
    with pytest.raises(TypeError, match="base_urll"):
        as_chat({"model": "m", "base_urll": "http://127.0.0.1:1/v1"})
    with pytest.raises(TypeError, match="mapping of its arguments"):
        as_chat("http://127.0.0.1:1/v1")


def test_a_local_judge_is_made_without_openai_and_without_torch():
    code = (
        "import sys; sys.modules['openai'] = None\n"
        "from rewards.judge import Judge\n"
        "Judge({'model': 'm'}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_commands_judge_with_a_local_model_too(tmp_path, capsys):
    rows = [{"prompt": "q", "response": answer, "score": score} for answer, score in (("a", 7), ("b", 1))]
    data = tmp_path / "rated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ["--sampling", "max_tokens", "4"]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    judge(["calibrate", "--data", str(data), "--model", str(constant(tmp_path / "model")), *sampling, *cache])
    assert re.search(r"graded .* 100\.0% .* of 2", capsys.readouterr().out)
