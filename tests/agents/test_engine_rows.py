"""Rows of the native engine: they wait, enter, leave, and go on over several turns; and what a row's room costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from agents.core.engines import contexts, native
from agents.core.engines.base import Sampling
from agents.core.engines.cache import Cache, Reading
from agents.core.engines.native import NativeEngine
from agents.core.engines.sampling import BLOCK, draw
from agents.core.lora import add_lora
from agents.core.policy import Policy
from tests.agents.conftest import make_model
from tests.agents.test_decoder import CONFIGS, make
from tests.agents.test_native_engine import RAGGED, Endless, sampling, scored, texts
from textenv.task import Finish


def long_prompts(number, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 14, rng.integers(1, 25)).tolist() for _ in range(number)]


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_the_learner_gives_in_every_family(name, tokenizer):
    policy = Policy(make(CONFIGS[name]), tokenizer)
    prompts = long_prompts(5)
    completions = NativeEngine(policy).generate(prompts, sampling(max_new_tokens=30, temperature=1.3), n=4)
    assert len(set(map(len, completions.tokens))) > 3
    for logprobs, rescored in zip(completions.logprobs, scored(policy, prompts, completions, 4, 1.3), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=3e-5, rtol=0)


@pytest.mark.parametrize("max_rows", [1, 3, 5, 16, 1000])
def test_waiting_completions_enter_as_others_leave_and_none_is_changed(policy, max_rows):
    prompts, budgets = long_prompts(9), np.random.default_rng(1).integers(1, 30, 36).tolist()
    ask = {"n": 4, "budgets": budgets}
    expected = NativeEngine(policy).generate(prompts, sampling(max_new_tokens=30), **ask)
    told = []
    got = NativeEngine(policy, max_rows=max_rows).generate(
        prompts,
        sampling(max_new_tokens=30),
        on_end=lambda number, tokens: told.append((number, tokens.tolist())),
        **ask,
    )
    assert texts(got) == texts(expected)
    assert got.finish == expected.finish
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert sorted(told) == list(enumerate(texts(got)))


def test_no_more_rows_than_allowed_are_written_at_once_and_a_long_one_does_not_hold_the_rest(llama, monkeypatch):
    widths = []
    attend = Reading.__call__
    monkeypatch.setattr(
        Reading, "__call__", lambda self, *args: widths.append((self.one_each, self.span.stop)) or attend(self, *args)
    )
    budgets = [30] + [2] * 31
    NativeEngine(llama, max_rows=8).generate([[5]] * 32, sampling(max_new_tokens=30), budgets=budgets)
    assert max(rows for _, rows in widths) <= 8
    decoding = sum(one for one, _ in widths) / 2  # of two layers
    assert decoding < 45, "the long row and the short ones were written beside each other"


def test_memory_falls_as_rows_leave_and_is_given_back():
    engine = NativeEngine(Policy(make_model("llama"), Endless()))
    engine.generate([[5]] * 64, sampling(max_new_tokens=60), budgets=[60] + [2] * 63)
    assert engine._cache.rows < 64
    engine.release()
    assert engine._cache is None


class Counted:
    """Counts the tokens that go through a decoder."""

    def __init__(self, monkeypatch):
        self.tokens = 0
        call = contexts.Decoder.__call__

        def counted(decoder, tokens_N, *args):
            self.tokens += len(tokens_N)
            return call(decoder, tokens_N, *args)

        monkeypatch.setattr(contexts.Decoder, "__call__", counted)

    def take(self):
        tokens, self.tokens = self.tokens, 0
        return tokens


def test_the_members_of_a_group_share_one_reading_of_their_prompt(llama, monkeypatch):
    engine, counted = NativeEngine(llama), Counted(monkeypatch)
    engine.generate([[5] * 20, [6] * 10], sampling(max_new_tokens=1), n=8)
    assert counted.take() == 30


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("max_rows", [None, 6])
def test_later_turns_read_only_what_is_new_and_write_the_same(policy, monkeypatch, max_rows, static):
    counted = Counted(monkeypatch)
    if static:
        act_as_a_gpu(monkeypatch)
    engine, plain = NativeEngine(policy, max_rows=max_rows), NativeEngine(policy)
    engine.keep_contexts = True
    ask = sampling(max_new_tokens=10, seed=4)
    prompts = long_prompts(4)
    first = engine.generate(prompts, ask, n=2)
    counted.take()
    # Some episodes are over, the others get replies of several lengths.
    replies = [[7, 8], [9], [], [3, 4, 5], [11], [2, 2], [1], [6]]
    going = [0, 1, 3, 4, 6, 7]
    following = [[*prompts[i // 2], *first.tokens[i].tolist(), *replies[i]] for i in going]
    second = engine.generate(following, ask, budgets=[3] * len(going))
    read = counted.take() - sum(len(tokens) - 1 for tokens in second.tokens)
    expected = plain.generate(following, ask, budgets=[3] * len(going))
    assert texts(second) == texts(expected)
    for ours, theirs in zip(second.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    if max_rows is None and not static:  # rows that ended while others waited have lost their room
        assert read <= sum(1 + len(replies[i]) for i in going) + len(going)


def act_as_a_gpu(monkeypatch):
    """Do what a GPU does, but for the recording of it: the steps that it would record."""
    recorded = []
    monkeypatch.setattr(contexts, "_record", lambda compute: recorded.append(compute) or compute)
    monkeypatch.setattr(contexts, "ROWS_STEP", 4)
    monkeypatch.setattr(contexts, "PLACES_STEP", 16)
    monkeypatch.setattr(contexts.FlatContexts, "static", True)
    monkeypatch.setattr(native, "LOOK", {"cpu": 5})
    return recorded


@pytest.mark.parametrize("max_rows", [None, 5])
def test_steps_of_a_fixed_size_in_fixed_memory_change_nothing(policy, monkeypatch, max_rows):
    ask = {"n": 3, "budgets": np.random.default_rng(1).integers(1, 30, 12).tolist()}
    prompts = long_prompts(4)
    expected = NativeEngine(policy).generate(prompts, sampling(max_new_tokens=30), **ask)
    recorded = act_as_a_gpu(monkeypatch)
    got = NativeEngine(policy, max_rows=max_rows).generate(prompts, sampling(max_new_tokens=30), **ask)
    assert len(recorded) >= 3
    assert texts(got) == texts(expected)
    for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("look", [1, 16])
def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(llama, monkeypatch, look):
    ask, stops = sampling(max_new_tokens=40), ("=+", "7")
    free = NativeEngine(llama).generate(RAGGED, ask, n=16)
    monkeypatch.setattr(native, "LOOK", {"cpu": look})
    got = NativeEngine(llama).generate(RAGGED, replace(ask, stop_texts=stops), n=16)
    stopped = 0
    for tokens, whole, finish, old in zip(got.tokens, free.tokens, got.finish, free.finish, strict=True):
        text = llama.tokenizer.decode(whole.tolist())
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        assert tokens.tolist() == whole[: min(ends, default=len(whole))].tolist()
        assert finish == (Finish.STOP if ends else old)
        stopped += bool(ends)
    assert 5 < stopped < 60
    with pytest.raises(ValueError, match="stop_texts must be a tuple of texts"):
        replace(ask, stop_texts="7")


def test_contexts_that_are_kept_are_forgotten_when_the_weights_change(llama, tokenizer):
    engine = NativeEngine(llama)
    engine.keep_contexts = True
    prompts, ask = long_prompts(4), sampling(temperature=0)
    first = engine.generate(prompts, ask)
    following = [[*prompt, *tokens.tolist(), 5] for prompt, tokens in zip(prompts, first.tokens, strict=True)]
    other = Policy(make_model("llama", seed=1), tokenizer)
    engine.sync(other)
    assert texts(engine.generate(following, ask)) == texts(NativeEngine(other).generate(following, ask))


def test_a_cache_that_cannot_fit_says_how_many_rows_would(llama):
    # 2 layers of 2 heads of width 8, and room for half a layer more: 320 bytes a token, so 3.75 KiB for the 12 of a row.
    engine = NativeEngine(llama, memory=16 * 12 * 320 / 2**30)
    assert engine.room(12) == 16
    assert engine.plan(20, 12) == "completions written at once: 16, 4 waiting; keys and values of up to 0 MiB"
    assert NativeEngine(llama, memory=1).plan(64, 64) == (
        "completions written at once: 64; keys and values of up to 1 MiB"
    )
    with pytest.raises(ValueError, match=r"completions of 12 tokens .* 16 would fit; lower max_rows or max_new_tokens"):
        NativeEngine(llama, max_rows=17, memory=16 * 12 * 320 / 2**30).generate([[5, 5]], sampling(max_new_tokens=10))
    with pytest.raises(ValueError, match=r"1 completions of 12 tokens .* 0 would fit"):
        NativeEngine(llama, memory=1e-7).generate([[5, 5]], sampling(max_new_tokens=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be float32, bfloat16, float16, got 'int8'"),
        ({"dtype": "float16"}, "no instructions for torch.float16; generate in float32"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"memory": 0.0}, "memory must be a finite number of GiB above 0, got 0.0"),
        ({"memory": float("inf")}, "memory must be a finite number of GiB above 0, got inf"),
    ],
)
def test_an_option_out_of_range_is_refused(llama, options, message):
    with pytest.raises(ValueError, match=message):
        NativeEngine(llama, **options)


def test_bfloat16_is_refused_where_the_processor_only_imitates_it(llama, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx512_f": True})
    with pytest.raises(ValueError, match=r"no instructions for torch\.bfloat16"):
        NativeEngine(llama, dtype="bfloat16")


def test_bfloat16_is_near_float32_in_the_mean(llama, monkeypatch):
    monkeypatch.setattr(native, "check_dtype", lambda dtype, device: None)
    prompts = long_prompts(8)
    completions = NativeEngine(llama, dtype="bfloat16").generate(prompts, sampling(max_new_tokens=30), n=8)
    gaps = [
        ours - theirs
        for ours, theirs in zip(completions.logprobs, scored(llama, prompts, completions, 8, 1.0), strict=True)
    ]
    assert 1e-5 < np.abs(np.concatenate(gaps)).mean() < 0.03


def test_adapters_have_their_say(llama):
    before = texts(NativeEngine(llama).generate(RAGGED, sampling(temperature=0)))
    add_lora(llama, rank=2, seed=0)
    for name, parameter in llama.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(2))
    completions = NativeEngine(llama).generate(RAGGED, sampling(temperature=0))
    assert texts(completions) != before
    for logprobs, rescored in zip(completions.logprobs, scored(llama, RAGGED, completions, 1, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=3e-5, rtol=0)


@pytest.mark.parametrize("vocabulary", [7, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
def test_a_large_vocabulary_is_searched_in_blocks_to_the_same_token(vocabulary):
    torch.manual_seed(0)
    logits_BV = 3 * torch.randn(200, vocabulary)
    logits_BV[:, torch.randperm(vocabulary)[: vocabulary // 3]] = -torch.inf
    uniform_B = torch.rand(200, dtype=torch.float64)
    uniform_B[:2] = torch.tensor([0.0, 1 - 2**-53])
    token_B, logp_B = draw(logits_BV, uniform_B)
    probability_BV = logits_BV.double().softmax(dim=1)
    rows = torch.arange(200)
    # The number lies between the mass before the token and the mass up to it.
    upto_B = probability_BV.cumsum(dim=1)[rows, token_B]
    assert ((upto_B - probability_BV[rows, token_B] <= uniform_B + 1e-6) & (uniform_B <= upto_B + 1e-6)).all()
    assert (probability_BV[rows, token_B] > 0).all()
    assert_close(logp_B, logits_BV.log_softmax(dim=1)[rows, token_B], rtol=0, atol=1e-5)


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(llama):
    completions = NativeEngine(llama).generate([[2, 3]], sampling(max_new_tokens=1, min_p=0.4), n=400)
    probability_V = torch.softmax(llama.model(torch.tensor([[2, 3]])).logits[0, -1].detach(), dim=0).numpy()
    support = np.flatnonzero(probability_V >= 0.4 * probability_V.max())
    assert {int(tokens[0]) for tokens in completions.tokens} == set(support.tolist())
    for tokens, logprobs in zip(completions.tokens, completions.logprobs, strict=True):
        assert np.exp(logprobs[0]) == pytest.approx(probability_V[tokens[0]] / probability_V[support].sum(), rel=1e-5)
    with pytest.raises(ValueError, match=r"min_p must be in \[0, 1\]"):
        Sampling(max_new_tokens=1, min_p=1.5)


def test_a_cache_keeps_what_it_held_when_it_grows_and_its_rows_can_change_places():
    cache = Cache(1, 1, 2, torch.float32, torch.device("cpu"))
    cache.resize(3, 4, held=0)
    cache.keys[0][:] = torch.arange(3.0).view(3, 1, 1, 1)
    cache.resize(4, 6, held=2)
    assert cache.keys[0][:2, 0, :4, 0].tolist() == [[0] * 4, [1] * 4]
    cache.swap(torch.tensor([0]), torch.tensor([1]))
    assert cache.keys[0][:2, 0, :4, 0].tolist() == [[1] * 4, [0] * 4]
    cache.swap(torch.tensor([0]), torch.tensor([1]))
    cache.copy(torch.tensor([1]), torch.tensor([2]))
    assert cache.keys[0][2, 0, :4, 0].tolist() == [1] * 4
    cache.take(torch.tensor([2, 0]))
    assert cache.rows == 2
    assert cache.keys[0][0, 0, 0, 0] == 1


@pytest.mark.parametrize("seed", range(20))
def test_every_layer_keeps_what_it_held_however_often_the_cache_moves(seed):
    rng = np.random.default_rng(seed)
    cache = Cache(3, 2, 4, torch.float32, torch.device("cpu"))
    cache.resize(2, 3, held=0, most_places=int(rng.integers(3, 20)))
    for number, buffer in enumerate((*cache.keys, *cache.values)):
        buffer[:] = torch.randn(buffer.shape) + number
    for _ in range(6):
        before = [buffer.clone() for buffer in (*cache.keys, *cache.values)]
        if rng.random() < 0.3:
            row_R = torch.from_numpy(rng.integers(0, cache.rows, rng.integers(1, 5)))
            kept = [buffer[row_R] for buffer in before]
            cache.take(row_R)
        else:
            held = int(rng.integers(1, cache.rows + 1))
            kept = [buffer[:held] for buffer in before]
            cache.resize(held + int(rng.integers(0, 3)), cache.places + int(rng.integers(0, 4)), held)
        for old, buffer in zip(kept, (*cache.keys, *cache.values), strict=True):
            assert torch.equal(buffer[: len(old), :, : old.shape[2]], old)
            assert buffer.isfinite().all()
            assert buffer.is_contiguous()


def test_contexts_that_are_kept_outlast_the_growth_of_the_cache():
    """Rows leave, and a prompt longer than anything before enters in their stead."""
    policy = Policy(make_model("llama"), Endless())
    engine, plain = NativeEngine(policy, max_rows=8), NativeEngine(policy)
    engine.keep_contexts = True
    short, long = [[5, number] for number in range(8)], [[6] * 30, [7] * 33]
    ask, budgets = sampling(max_new_tokens=20), [2, 2, 2, *[12] * 5, 3, 3]
    first = engine.generate([*short, *long], ask, budgets=budgets)
    following = [[*prompt, *tokens.tolist(), 9] for prompt, tokens in zip([*short, *long], first.tokens, strict=True)][
        :8
    ]
    second, expected = (each.generate(following, ask, budgets=[4] * 8) for each in (engine, plain))
    assert texts(second) == texts(expected)
    for ours, theirs in zip(second.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


def test_a_model_that_was_changed_is_seen_through_by_the_engine_too(llama):
    """What a hook does is not in the weights."""
    llama.model.lm_head.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    with pytest.warns(UserWarning, match="differ from those expected of its family"):
        completions = NativeEngine(llama).generate(RAGGED, sampling(), n=2)
    for logprobs, rescored in zip(completions.logprobs, scored(llama, RAGGED, completions, 2, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=1e-5, rtol=0)


def test_a_module_that_was_replaced_is_used_by_learner_and_engine(llama):
    prompts, before = long_prompts(4), texts(NativeEngine(llama).generate(long_prompts(4), sampling(temperature=0)))
    scored(llama, prompts, NativeEngine(llama).generate(prompts, sampling()), 1, 1.0)
    attention = llama.model.model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.normal_(attention.q_proj.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    completions = NativeEngine(llama).generate(prompts, sampling(temperature=0))
    assert texts(completions) != before
    for prompt, tokens, logprobs in zip(prompts, completions.tokens, completions.logprobs, strict=True):
        logits = llama.model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(dim=1)[torch.arange(len(tokens)), torch.from_numpy(tokens)].detach().numpy()
        np.testing.assert_allclose(logprobs, own, atol=1e-5, rtol=0)
    rescored = scored(llama, prompts, completions, 1, 1.0)
    np.testing.assert_allclose(np.concatenate(completions.logprobs), np.concatenate(rescored), atol=1e-5, rtol=0)
