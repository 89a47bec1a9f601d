"""The policy: a causal language model whose tokens are scored the same way when sampling and when learning."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from agents.core.attention import Segments
from agents.core.decoder import Decoder, unsupported
from agents.core.head import token_logprobs
from agents.core.linear import linear
from agents.core.lora import merged_state
from agents.core.packing import pack
from textenv.tokenizer import Tokenizer

SMALL_MODEL = 20_000_000
"""Parameters below which more than one CPU thread a tensor operation costs more than it saves, up to twenty times more when
the cores are busy otherwise."""

PROBE_LENGTHS = (5, 3)
"""Tokens of the two sequences by which a decoder is held to its model, before it is first used."""
PROBE_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference of their logits, over the largest logit; in half precision :data:`PROBE_LIMIT_HALF`."""
PROBE_LIMIT_HALF = 0.05


class Scorer(Protocol):
    """Whatever scores tokens as :meth:`Policy.logprobs` does."""

    @property
    def device(self) -> torch.device: ...

    def logprobs(self, tokens_BT: Tensor, sampled_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class States:
    """What the N sampled tokens of a batch were chosen in, row after row.

    Attributes:
        hidden_NH: what the output head makes their logits from, differentiable.
        logits_NV: their logits, of a model whose own forward pass makes them at once; see :meth:`Policy.decoder`.
    """

    hidden_NH: Tensor
    logits_NV: Tensor | None = None


class Policy(nn.Module):
    """A transformers causal LM with the tokenizer whose ids it speaks.

    Dropout is switched off for good, in modules and config, so that a token has one probability whether it is sampled,
    scored or trained on. The model stays in ``eval`` mode; gradients flow all the same.

    For a small model torch is set to one CPU thread, in the whole process.

    Args:
        model: any causal LM of transformers.
        tokenizer: the tokenizer of its ids.

    Attributes:
        vocab_size: V, the width of the logits; it may exceed the tokenizer's ids.
        hidden_size: H, the width of the states that the logits are made from.
        allowed_V: bool ``(V,)``, True for the ids the tokenizer can decode. No other id has any probability.
        max_context: most tokens the model can attend to, None when it sets no limit.
        version: how often the weights were changed by a learner; what an engine holds is told by it.

    Raises:
        ValueError: the tokenizer has ids beyond the model's logits.
    """

    allowed_V: Tensor
    version: int = 0

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        super().__init__()
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        self.vocab_size, self.hidden_size = head.weight.shape
        if self.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"vocabulary smaller than tokenizer's ids: the model has {self.vocab_size} logits, the tokenizer "
                f"{tokenizer.name!r} {tokenizer.vocab_size} ids; use the tokenizer saved with the model"
            )
        _silence_dropout(model)
        if sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL:
            torch.set_num_threads(1)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_context: int | None = getattr(config, "max_position_embeddings", None)
        allowed_V = torch.zeros(self.vocab_size, dtype=torch.bool)
        allowed_V[: tokenizer.vocab_size] = torch.from_numpy(tokenizer.decodable_V)
        self.register_buffer("allowed_V", allowed_V.to(self.device), persistent=False)
        self._all_allowed = bool(allowed_V.all())
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._recomputes = False
        self._decoder: Decoder | None = None
        self._decoder_of: list[nn.Module] | None = None
        self.undecoded: str | None = None
        """why :meth:`decoder` gave none"""

    def __getstate__(self) -> dict[str, Any]:
        """All but the decoder, which computes with this model's modules and not with a copy's."""
        return {**self.__dict__, "_decoder": None, "_decoder_of": None}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, tokens_BT: Tensor, columns_C: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        """Logits ``(B, C, V)`` at the given columns only, and the model's cache.

        Args:
            tokens_BT: int64 ids.
            columns_C: int64 columns of ``tokens_BT``; the logits at column t are those of the token at t + 1.
            inputs: what else the model is to get: masks, positions, a cache.
        """
        if self._keeps_logits:
            output = self.model(input_ids=tokens_BT, logits_to_keep=columns_C, **inputs)
            return output.logits, output.past_key_values
        output = self.model(input_ids=tokens_BT, **inputs)
        return output.logits[:, columns_C], output.past_key_values

    def distribution(self, logits: Tensor, temperature: float) -> Tensor:
        """Log-probabilities ``(..., V)`` over the next token, in float32: the one definition for engine and learner.

        :func:`agents.core.head.token_logprobs` is the same without holding the logits of all tokens.

        Args:
            logits: ``(..., V)``, any float type.
            temperature: greater than 0; the logits are divided by it.
        """
        logits = logits.float()
        if not self._all_allowed:
            logits = logits.masked_fill(~self.allowed_V, -torch.inf)
        return torch.log_softmax(logits / temperature, dim=-1)

    def logprobs(self, tokens_BT: Tensor, sampled_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the sampled tokens and the entropies they were drawn with: :meth:`score` without states."""
        logp_BT, entropy_BT, _ = self.score(tokens_BT, sampled_BT, temperature)
        return logp_BT, entropy_BT

    def score(self, tokens_BT: Tensor, sampled_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the sampled tokens, the entropies they were drawn with, and the states they were drawn in.

        Padding must stand on the right, where causal attention never looks at it, so no attention mask is needed.

        Args:
            tokens_BT: int64 ids, right-padded with any valid id.
            sampled_BT: bool, True where the policy chose the token; never in the first column, which has no context.
            temperature: that of the sampling.

        Returns:
            ``logp_BT``, differentiable, entry t being that of token t given the tokens before it; ``entropy_BT`` in
            nats, without gradient; both float32 and 0 where not sampled. And ``hidden_NH``, differentiable: what the output
            head made the logits of each of the N sampled tokens from, row after row.

        Raises:
            ValueError: a token of the first column is marked as sampled.
        """
        states = self.states(tokens_BT, sampled_BT)
        logp_N, entropy_N = self.readout(states, tokens_BT[sampled_BT], temperature)
        zero_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)
        return (
            zero_BT.masked_scatter(sampled_BT, logp_N),
            zero_BT.masked_scatter(sampled_BT, entropy_N),
            states.hidden_NH,
        )

    def states(self, tokens_BT: Tensor, sampled_BT: Tensor) -> States:
        """The first half of :meth:`score`: the states that the sampled tokens were chosen in. Arguments as there.

        Nothing is computed for padding, for what follows a row's last sampled token, nor twice for a common beginning of
        rows; where the model's forward pass is not known, see :meth:`decoder`, for the whole rectangle.
        """
        columns_C = sampled_BT.any(dim=0).nonzero().squeeze(1)
        if not len(columns_C):  # still something to call backward on
            empty_0H = torch.zeros(0, self.hidden_size, device=tokens_BT.device)
            return States(empty_0H.requires_grad_(torch.is_grad_enabled()))
        if columns_C[0] == 0:
            raise ValueError("a token of the first column is marked as sampled, but it has no context; add a prompt")
        decoder = self.decoder()
        if decoder is None:
            return self._padded_states(tokens_BT[:, : columns_C[-1]], columns_C - 1, sampled_BT[:, columns_C])
        decoder.recompute = self._recomputes
        packed = pack(tokens_BT, sampled_BT)
        hidden_UH = decoder(packed.tokens_U, packed.position_U, packed.attend)
        return States(hidden_UH.index_select(0, packed.state_N))

    def readout(self, states: States, tokens_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The second half of :meth:`score`: what the output head says of the sampled tokens.

        Args:
            states: N of them.
            tokens_N: int64, the token chosen in each.
            temperature: that of the sampling.

        Returns:
            ``logp_N``, differentiable, and ``entropy_N``, without gradient; both float32.
        """
        if states.logits_NV is not None:
            logp_NV = self.distribution(states.logits_NV, temperature)
            entropy_N = torch.special.entr(logp_NV.detach().exp()).sum(dim=1)
            return logp_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1), entropy_N
        head = self.model.get_output_embeddings()
        allowed_V = None if self._all_allowed else self.allowed_V
        logp_N, entropy_N = token_logprobs(states.hidden_NH, head.weight, head.bias, tokens_N, temperature, allowed_V)
        return logp_N.float(), entropy_N.float()

    def decoder(self) -> Decoder | None:
        """The model as a function of flat tokens, with its modules as they are now, adapters included.

        None for a model of another family than :data:`agents.core.decoder.FAMILIES`, and for one that does not give what the
        decoder gives, of which a warning tells. Such a model is run by itself, on padded rows, its logits whole.
        """
        held = list(self.model.modules())  # kept, so that a new one is never taken for an old one
        if self._decoder_of != held:
            self._decoder, self._decoder_of = None, held
            self.undecoded = reason = unsupported(self.model)
            if reason is None:
                self._decoder = Decoder(self.model)
                self.undecoded = reason = self._difference(self._decoder)
            if reason is not None:
                self._decoder = None
                warnings.warn(
                    "tokens are scored by the model itself, on padded rows and with all logits, which is slower and takes "
                    f"more memory: {reason}",
                    stacklevel=2,
                )
        return self._decoder

    @torch.no_grad()
    def _difference(self, decoder: Decoder) -> str | None:
        """How the decoder's logits differ from the model's own, padded ones on two short sequences, None if they agree."""
        lengths = [min(length, self.max_context or length) for length in PROBE_LENGTHS]
        columns_T = torch.arange(max(lengths))
        real_BT = columns_T < torch.tensor(lengths).unsqueeze(1)
        tokens_BT = (torch.arange(real_BT.numel()).view(real_BT.shape) * 7 % self.vocab_size).to(self.device)
        position_N = columns_T.expand(real_BT.shape)[real_BT].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            whole_NV = self.model(input_ids=tokens_BT, use_cache=False).logits[real_BT].double()
            hidden_NH = decoder(tokens_BT[real_BT], position_N, Segments(lengths, self.device))
            head = self.model.get_output_embeddings()  # by its weights, as readout takes it
            difference = float((linear(hidden_NH, head.weight, head.bias).double() - whole_NV).abs().max())
        largest = float(whole_NV.abs().max())
        limit = largest * PROBE_LIMITS.get(hidden_NH.dtype, PROBE_LIMIT_HALF)
        if difference <= limit:
            return None
        return (
            f"the logits of this {type(self.model).__name__} differ from those expected of its family by {difference:.1g}, "
            f"where {limit:.1g} would be rounding"
        )

    def recompute_layers(self) -> None:
        """From now on keep no activations inside the layers, but compute them again for the gradient."""
        self._recomputes = True
        if self.decoder() is None:
            self.model.gradient_checkpointing_enable()  # acts in layers that train, which they do in _padded_states alone

    def _padded_states(self, tokens_BT: Tensor, columns_C: Tensor, sampled_BC: Tensor) -> States:
        with self._watched_head() as entered, self._recomputing():
            logits_BCV, _ = self.logits(tokens_BT, columns_C, use_cache=False)
        hidden_BCH = entered[0] if self._keeps_logits else entered[0][:, columns_C]
        return States(hidden_BCH[sampled_BC], logits_BCV[sampled_BC])

    @contextmanager
    def _watched_head(self) -> Iterator[list[Tensor]]:
        """What enters the model's output head meanwhile: ``(B, C, H)`` a forward pass."""
        entered: list[Tensor] = []
        handle = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda _, inputs: entered.append(inputs[0])
        )
        try:
            yield entered
        finally:
            handle.remove()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Have the model's own layers computed again, if that is wanted."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        wanted = self._recomputes and torch.is_grad_enabled()
        layers = [m for m in self.model.modules() if wanted and isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def save(self, folder: str | Path) -> None:
        """Save model and tokenizer so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load them again.

        Of the model's ``generation_config`` only the end-of-sequence ids are kept: the rest recommends a sampling that
        this policy was not trained with. A LoRA is merged into the weights written, not into those of the policy.
        """
        self._write(merged_state(self.model), folder)

    def snapshot(self) -> Callable[[Path], None]:
        """What writes to a folder what :meth:`save` would write now, whatever becomes of the weights until then."""
        return partial(self._write, copied(merged_state(self.model)))

    def _write(self, state: dict[str, Tensor], folder: str | Path) -> None:
        from transformers import GenerationConfig

        self.model.generation_config = GenerationConfig(eos_token_id=list(self.tokenizer.eos_ids))
        with no_progress_bar():
            self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.to_transformers().save_pretrained(folder)


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are now, in the CPU's memory; where two names share one, so do they in the copy."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        key = tensor.data_ptr(), tensor.shape, tensor.stride()
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        found[name] = copies[key]
    return found


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every file it reads or writes, across the line that shows training."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


def _silence_dropout(model: Any) -> None:
    """Set every dropout probability to 0: of dropout modules, of attributes that attention reads, of the config."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_drop_rates(module)
    _zero_drop_rates(model.config)
    _zero_drop_rates(model.config.get_text_config())


def _zero_drop_rates(holder: Any) -> None:
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)
