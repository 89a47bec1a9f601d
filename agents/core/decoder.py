"""The forward pass of the common decoder families, written out: flat tokens in, hidden states out.

transformers runs a model on padded rectangles and in many small operations. Here the tokens of all sequences lie side by
side, so that nothing is computed for padding, and how they look at one another is passed in: within sequences that are
learned from, or back into the cache of sequences that are being written.

Shapes: N tokens, E model width, H query heads, K key heads, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from agents.core.attention import Attend
from agents.core.linear import PackedLinear, linear

FAMILIES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "GPT2LMHeadModel",
)
"""The models of transformers whose forward pass is known here."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angle depends on the position alone."""

Map = Callable[[Tensor], Tensor]
AddedMap = Callable[[Tensor, Tensor], Tensor]
"""Of the first, added to the second."""


@dataclass(frozen=True)
class Block:
    """One layer, as functions of flat states."""

    norm_before: Map
    qkv: Callable[[Tensor], tuple[Tensor, Tensor]]
    """``(N, E)`` to queries and keys ``(N, H + K, D)``, not yet turned, and values ``(N, K, D)``"""
    out: AddedMap
    norm_between: Map
    mlp: AddedMap
    scale: float
    """of the products of queries and keys"""


def unsupported(model: Any) -> str | None:
    """Why a model's forward pass is not known here, or None if it is."""
    name, config = type(model).__name__, model.config
    if name not in FAMILIES:
        return f"{name} is none of {', '.join(FAMILIES)}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window, context = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", 0)
    if kinds != {"full_attention"} or (name.startswith("Mistral") and window is not None and window < context):
        return f"this {name} has layers that do not look at the whole context"
    if name == "GPT2LMHeadModel":
        if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
            return "this GPT2LMHeadModel scales its attention by layers"
        return None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return None if rope in STATIC_ROPE else f"its rotary embedding {rope!r} depends on the length"


def head_width(config: Any) -> int:
    """Width of an attention head, of a text model's config: not all say it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Decoder:
    """A model of one of the :data:`FAMILIES` as a function of flat tokens.

    Args:
        model: of transformers, in ``eval`` mode.
        packed: None to compute with the model's own modules, live and differentiable, adapters included. Or the names and
            tensors of a state of the model's: it is then computed with those as they are now, packed for speed, in their type
            and on their device, without gradients; they must not change as long as this is used.

    Raises:
        ValueError: the model is of no known family: see :func:`unsupported`.
    """

    def __init__(self, model: Any, packed: Mapping[str, Tensor] | None = None) -> None:
        if (reason := unsupported(model)) is not None:
            raise ValueError(reason)
        self.model = model
        self.recompute = False
        """keep no activations inside layers, but compute them again for the gradient"""
        parts = _gpt2_parts(model, packed) if type(model).__name__ == "GPT2LMHeadModel" else _llama_parts(model, packed)
        self.embed, self.positions, self.blocks, self.norm, self.head = parts
        config = model.config
        self.heads: int = config.num_attention_heads
        self.key_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.width = head_width(config)

    def __call__(self, tokens_N: Tensor, position_N: Tensor, attend: Attend) -> Tensor:
        """The states ``(N, E)`` that the head makes logits from.

        Args:
            tokens_N: int64 ids.
            position_N: int64, the place of each in its sequence, from 0.
            attend: how they look at one another.
        """
        hidden_NE, turn = self.positions(self.embed(tokens_N), position_N)
        for layer, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                hidden_NE = checkpoint(self._run, block, layer, hidden_NE, turn, attend, use_reentrant=False)
            else:
                hidden_NE = self._run(block, layer, hidden_NE, turn, attend)
        return self.norm(hidden_NE)

    def _run(self, block: Block, layer: int, hidden_NE: Tensor, turn: Map, attend: Attend) -> Tensor:
        both_NHD, value_NKD = block.qkv(block.norm_before(hidden_NE))
        query_NHD, key_NKD = turn(both_NHD).split((self.heads, self.key_heads), dim=1)
        hidden_NE = block.out(attend(layer, query_NHD, key_NKD, value_NKD, block.scale), hidden_NE)
        return block.mlp(block.norm_between(hidden_NE), hidden_NE)


# --- where the weights come from ---


class _Weights:
    """Modules of a model by name, as functions: live, or packed from a state."""

    def __init__(self, model: Any, packed: Mapping[str, Tensor] | None) -> None:
        self.model, self.packed = model, packed

    def tensor(self, module: str, name: str = "weight") -> Callable[[], Tensor]:
        """A parameter that needs no packing, as it is when asked for."""
        if self.packed is not None:
            held = self.packed[f"{module}.{name}"]
            return lambda: held
        owner = self.model.get_submodule(module)
        return lambda: getattr(owner, name)

    def joined(self, *modules: str) -> Map:
        """Several linear maps of one input, their results side by side."""
        if self.packed is None:
            maps = [partial(_live, self.model.get_submodule(module)) for module in modules]
            return maps[0] if len(maps) == 1 else lambda x: torch.cat([apply(x) for apply in maps], dim=-1)
        weight, bias = self._packed(modules[0])
        if len(modules) > 1:
            parts = [self._packed(module) for module in modules]
            weight = torch.cat([part for part, _ in parts])
            bias = None if bias is None else torch.cat([part for _, part in parts if part is not None])
        return PackedLinear(weight, bias)

    def added(self, module: str) -> AddedMap:
        """A linear map whose result is added to something."""
        apply = self.joined(module)
        return apply if isinstance(apply, PackedLinear) else lambda x, hidden: hidden + apply(x)

    def _packed(self, module: str) -> tuple[Tensor, Tensor | None]:
        assert self.packed is not None
        weight, bias = self.packed[f"{module}.weight"], self.packed.get(f"{module}.bias")
        owner = self.model.get_submodule(module)
        # With adapters beside it, the layer itself is its base.
        return (weight.t() if _transposed(getattr(owner, "base_layer", owner)) else weight), bias


def _transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps its weights as (input, output)


def _live(module: Any, x: Tensor) -> Tensor:
    if type(module) is nn.Linear:
        return linear(x, module.weight, module.bias)
    if _transposed(module):
        return linear(x, module.weight.t(), module.bias)
    return module(x)  # with adapters


# --- the families ---

_Parts = tuple[Map, Callable[[Tensor, Tensor], tuple[Tensor, Map]], list[Block], Map, Map]


def _llama_parts(model: Any, packed: Mapping[str, Tensor] | None) -> _Parts:
    """Llama, Mistral, Qwen2, Qwen3, Gemma: rotary positions, root-mean-square norms, gated feed-forward."""
    weights, base, config = _Weights(model, packed), model.model, model.config
    padding = base.embed_tokens.padding_idx  # whose embedding transformers gives no gradient
    # Gemma's norms multiply by 1 + w, and its embeddings are scaled by the root of the width.
    shift = 1.0 if type(model).__name__ == "GemmaForCausalLM" else 0.0
    factor = config.hidden_size**0.5 if shift else None

    def norm(module: str) -> Map:
        held, weight = model.get_submodule(module), weights.tensor(module)
        eps = held.eps if hasattr(held, "eps") else held.variance_epsilon
        eps_1 = torch.full((1,), eps)

        def apply(x: Tensor) -> Tensor:
            if x.device.type == "cpu" and x.dtype == weight().dtype == torch.float32 and not shift:
                return _RMSNorm.apply(x, weight(), eps_1)
            return _rms_norm(x, weight(), eps, shift)

        return apply

    embedding = weights.tensor("model.embed_tokens")

    def embed(tokens_N: Tensor) -> Tensor:
        hidden_NE = functional.embedding(tokens_N, embedding(), padding)
        # The factor is rounded to the model's type, as transformers does.
        return hidden_NE if factor is None else hidden_NE * torch.tensor(factor, dtype=hidden_NE.dtype).item()

    angles = _Angles(base.rotary_emb)

    def positions(hidden_NE: Tensor, position_N: Tensor) -> tuple[Tensor, Map]:
        cos_N1D, sin_N1D = angles(hidden_NE, position_N)
        return hidden_NE, partial(_rotate, cos_N1D=cos_N1D, sin_N1D=sin_N1D)

    def block(index: int) -> Block:
        layer, name = base.layers[index], f"model.layers.{index}"
        attention = layer.self_attn
        width = attention.head_dim
        project = weights.joined(*(f"{name}.self_attn.{which}_proj" for which in "qkv"))
        gate_up = weights.joined(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj")
        down, activation = weights.added(f"{name}.mlp.down_proj"), layer.mlp.act_fn
        key_heads = config.num_key_value_heads
        heads = config.num_attention_heads
        norms = [norm(f"{name}.self_attn.{which}_norm") for which in "qk"] if hasattr(attention, "q_norm") else []

        def qkv(x_NE: Tensor) -> tuple[Tensor, Tensor]:
            both, value = project(x_NE).view(len(x_NE), -1, width).split((heads + key_heads, key_heads), dim=1)
            if norms:
                query, key = both.split((heads, key_heads), dim=1)
                both = torch.cat((norms[0](query), norms[1](key)), dim=1)
            return both, value

        def mlp(x_NE: Tensor, hidden_NE: Tensor) -> Tensor:
            gate, up = gate_up(x_NE).chunk(2, dim=-1)
            return down(activation(gate) * up, hidden_NE)

        return Block(
            norm_before=norm(f"{name}.input_layernorm"),
            qkv=qkv,
            out=weights.added(f"{name}.self_attn.o_proj"),
            norm_between=norm(f"{name}.post_attention_layernorm"),
            mlp=mlp,
            scale=attention.scaling,
        )

    blocks = [block(index) for index in range(config.num_hidden_layers)]
    return embed, positions, blocks, norm("model.norm"), weights.joined("lm_head")


def _gpt2_parts(model: Any, packed: Mapping[str, Tensor] | None) -> _Parts:
    """GPT-2: learned positions, layer norms, one feed-forward branch."""
    weights, base, config = _Weights(model, packed), model.transformer, model.config
    width = head_width(config)

    def norm(module: str) -> Map:
        weight, bias, eps = weights.tensor(module), weights.tensor(module, "bias"), model.get_submodule(module).eps
        return lambda x: functional.layer_norm(x, x.shape[-1:], weight(), bias(), eps)

    embedding, places = weights.tensor("transformer.wte"), weights.tensor("transformer.wpe")

    def embed(tokens_N: Tensor) -> Tensor:
        return functional.embedding(tokens_N, embedding())

    def positions(hidden_NE: Tensor, position_N: Tensor) -> tuple[Tensor, Map]:
        return hidden_NE + functional.embedding(position_N, places()), _as_it_is

    def block(index: int) -> Block:
        layer, name = base.h[index], f"transformer.h.{index}"
        project, activation = weights.joined(f"{name}.attn.c_attn"), layer.mlp.act
        up, down = weights.joined(f"{name}.mlp.c_fc"), weights.added(f"{name}.mlp.c_proj")
        heads = config.num_attention_heads

        def qkv(x_NE: Tensor) -> tuple[Tensor, Tensor]:
            both, value = project(x_NE).view(len(x_NE), -1, width).split((2 * heads, heads), dim=1)
            return both, value

        return Block(
            norm_before=norm(f"{name}.ln_1"),
            qkv=qkv,
            out=weights.added(f"{name}.attn.c_proj"),
            norm_between=norm(f"{name}.ln_2"),
            mlp=lambda x_NE, hidden_NE: down(activation(up(x_NE)), hidden_NE),
            scale=width**-0.5,
        )

    blocks = [block(index) for index in range(config.num_hidden_layers)]
    return embed, positions, blocks, norm("transformer.ln_f"), weights.joined("lm_head")


def _rms_norm(x: Tensor, weight: Tensor, eps: float, shift: float) -> Tensor:
    if shift:  # Gemma's multiplies before it rounds to the model's type
        return functional.rms_norm(x.float(), x.shape[-1:], weight.float() + shift, eps).to(x.dtype)
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


class _RMSNorm(torch.autograd.Function):
    """:func:`torch.nn.functional.rms_norm` in half of its operations, forward and backward: of few rows these are the cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps_1: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.addcmul(eps_1, length, length, value=1 / len(weight)).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With n = x / rms: dx = (g w - n mean(g w n)) / rms, dw = sum(g n)."""
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        scaled = grads[0] * weight
        along = torch.linalg.vecdot(scaled, normed).unsqueeze(-1)
        of_x = torch.addcmul(scaled, normed, along, value=-1 / len(weight)).mul_(inverse)
        of_weight = (grads[0] * normed).flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None


class _Angles:
    """Cosines and sines of a rotary embedding; the sines of the first half of D with their sign changed.

    Args:
        rotary: transformers' module, which knows all kinds, but takes many small operations. On a CPU its results are kept.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.table_SD: tuple[Tensor, Tensor] | None = None

    def __call__(self, hidden_NE: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        if hidden_NE.device.type != "cpu":
            return self._compute(hidden_NE, position_N)
        places = int(position_N.max()) + 1
        if self.table_SD is None or len(self.table_SD[0]) < places or self.table_SD[0].dtype != hidden_NE.dtype:
            self.table_SD = self._compute(hidden_NE, torch.arange(2 * places))
        return self.table_SD[0][position_N], self.table_SD[1][position_N]

    @torch.inference_mode(False)  # what is kept may take part in a gradient later
    @torch.no_grad()
    def _compute(self, hidden_NE: Tensor, position_N: Tensor) -> tuple[Tensor, Tensor]:
        cos_1ND, sin_1ND = self.rotary(hidden_NE, position_N.unsqueeze(0))
        left_ND, right_ND = sin_1ND[0].chunk(2, dim=-1)
        return cos_1ND[0].unsqueeze(1), torch.cat((-left_ND, right_ND), dim=-1).unsqueeze(1)


def _rotate(x_NHD: Tensor, *, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Turn each pair of the two halves of D by its angle (arXiv:2104.09864, eq. 34, with the halves as pairs).

    The sines of the first half come with their sign changed.
    """
    left, right = x_NHD.chunk(2, dim=-1)
    return torch.addcmul(x_NHD * cos_N1D, torch.cat((right, left), dim=-1), sin_N1D)


def _as_it_is(x: Tensor) -> Tensor:
    return x
