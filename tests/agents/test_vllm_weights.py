"""Which of a policy's parameters a model of vLLM's lacks, with modules laid out as vLLM lays out its own."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from agents.core.engines.vllm_weights import differing_parameters, refresh_tied_head

STATE = {
    "embed.weight": (5, 4),
    "layer.q_proj.weight": (4, 4),
    "layer.q_proj.bias": (4,),
    "layer.k_proj.weight": (2, 4),
    "layer.k_proj.bias": (2,),
    "layer.v_proj.weight": (2, 4),
    "layer.v_proj.bias": (2,),
    "norm.weight": (4,),
    "scale": (),
    "lm_head.weight": (5, 4),
    "experts.weight": (3, 4, 4),
}


class Layer(nn.Module):
    """A weight, and on request a packed copy of it in its place, as vLLM makes on a CPU."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.clone())
        self.quant_method = self

    def process_weights_after_loading(self, layer):
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: x @ packed.T

    def pack(self):
        self.process_weights_after_loading(self)
        if type(self) is Layer:
            self.weight = nn.Parameter(torch.empty(0, dtype=self.weight.dtype))


class ParallelLMHead(Layer):
    pass


class Model(nn.Module):
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, state, dtype=torch.float32, packed=False):
        super().__init__()
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
        of_qkv = {kind: [state[f"layer.{one}_proj.{kind}"] for one in "qkv"] for kind in ("weight", "bias")}
        padding = torch.zeros(3, 4, dtype=dtype)
        self.embed = Layer(torch.cat([state["embed.weight"], padding]))
        self.layer = nn.Module()
        self.layer.qkv_proj = Layer(torch.cat(of_qkv["weight"]), torch.cat(of_qkv["bias"]))
        self.norm = Layer(state["norm.weight"])
        self.scale = nn.Parameter(state["scale"].clone())
        self.lm_head = ParallelLMHead(torch.cat([state["lm_head.weight"], padding]))
        if packed:
            self.layer.qkv_proj.pack()
            self.lm_head.pack()


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in STATE.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_each_parameter_is_known_by_its_name_and_no_other_is_blamed(state, dtype, packed):
    model = Model(state, dtype, packed)
    assert differing_parameters(model, state, dtype) == []
    for name in state.keys() - {"experts.weight"}:
        other = {**state, name: state[name] + 0.1}
        assert differing_parameters(model, other, dtype) == [name]


def test_what_vllm_has_under_no_such_name_is_left_out(state):
    model = Model(state)
    assert differing_parameters(model, {**state, "experts.weight": state["experts.weight"] + 1}, torch.float32) == []


def test_a_single_bit_is_seen_where_the_tensor_is_there(state):
    model = Model(state, torch.bfloat16)
    rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
    rounded["layer.v_proj.weight"].view(torch.int16)[1, 2] ^= 1
    assert differing_parameters(model, rounded, torch.bfloat16) == ["layer.v_proj.weight"]


def test_a_step_too_small_for_the_eye_is_seen_in_a_packed_matrix(state):
    model = Model(state, packed=True)
    other = {**state, "layer.q_proj.weight": state["layer.q_proj.weight"] + 1e-5}
    assert differing_parameters(model, other, torch.float32) == ["layer.q_proj.weight"]


def test_a_bias_that_a_kernel_wants_in_float32_is_the_same(state):
    model = Model(state, torch.bfloat16, packed=True)
    model.layer.qkv_proj.bias.data = model.layer.qkv_proj.bias.data.float()
    assert differing_parameters(model, state, torch.bfloat16) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_nan_is_the_same_as_itself_and_different_from_a_number(state, packed):
    broken = {**state, "layer.k_proj.weight": torch.full((2, 4), torch.nan)}
    assert differing_parameters(Model(broken, packed=packed), broken, torch.float32) == []
    assert differing_parameters(Model(broken, packed=packed), state, torch.float32) == ["layer.k_proj.weight"]
    assert differing_parameters(Model(state, packed=packed), broken, torch.float32) == ["layer.k_proj.weight"]


def test_of_a_tied_head_the_packed_copy_counts_until_it_is_renewed(state):
    state["lm_head.weight"] = state["embed.weight"]
    model = Model(state, packed=True)
    model.lm_head.weight = model.embed.weight
    model.embed.process_weights_after_loading(model.embed)  # vLLM packs it too, and never asks for that
    new = {**state, "embed.weight": state["embed.weight"] + 1, "lm_head.weight": state["lm_head.weight"] + 1}
    model.embed.weight.data[:5] += 1
    assert differing_parameters(model, new, torch.float32) == ["lm_head.weight"]
    refresh_tied_head(model)
    assert differing_parameters(model, new, torch.float32) == []


def test_another_layout_differs(state):
    model = Model(state, packed=True)
    short = {**state, "layer.v_proj.weight": torch.cat([state["layer.v_proj.weight"], torch.zeros(1, 4)])}
    assert differing_parameters(model, short, torch.float32) == ["layer.v_proj.weight"]
