"""LoRA: low-rank adapters inside the policy's own model, whose weights then stay as they are.

Hu et al., arXiv:2106.09685: beside each linear layer W runs ``x -> (alpha / rank) B A x``, and only A and B are trained. With
B = 0 at first, nothing changes until the first step; with the adapters off, the model is what it was before training. A
model can hold several adapters, of which one at most is active: that of a policy, and that of its critic.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from agents.core.policy import Policy

ADAPTERS_FILE = "adapters.safetensors"
POLICY = "policy"
"""Name of the adapter that is merged into a saved policy."""


def check_lora_installed() -> None:
    """Raises ValueError: peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install 'textenv[lora]'")


def add_lora(policy: Policy, rank: int, *, seed: int, name: str = POLICY) -> None:
    """Put a new adapter beside every linear layer of the policy's model but its head, and freeze the model's own weights.

    The adapter is in float32, without dropout, and scaled by alpha / rank = 2. It changes no output yet. The first one is
    active from now on; a further one only within :func:`using_adapter`. All of them are trainable at all times.

    Args:
        policy: changed in place; its model keeps its class, and its weights their memory.
        rank: of the matrices A and B, at least 1.
        seed: all that A depends on. torch's own random state is left as it was.
        name: of the adapter.

    Raises:
        ValueError: the model has an adapter of this name.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    model = policy.model
    before = adapters(model)
    if name in before:
        raise ValueError(f"the model has an adapter {name!r} already; choose another name")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seed)
        # Wanted here: a second adapter, the transposed layers of GPT-2; and the patterns, for experts, are peft's own.
        warnings.filterwarnings(
            "ignore", "Already found a `peft_config`|fan_in_fan_out is set|.*(rank|alpha)_pattern keys"
        )
        inject_adapter_in_model(config, model, name)
    cast_adapter_dtype(model, name)
    _activate(model, before[:1] or [name])
    model.eval()


def adapters(model: Any) -> list[str]:
    """Names of the adapters that a transformers model holds, the oldest first."""
    return list(getattr(model, "peft_config", {}))


@contextmanager
def using_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Within, only the adapter ``name`` is active, None for none of them; after it those that were before.

    Example::

        with using_adapter(policy.model, "critic"):
            hidden_BTD = policy.model.base_model(tokens_BT).last_hidden_state

    Raises:
        ValueError: the model has no such adapter, or none at all.
    """
    held = adapters(model)
    if not held or name not in (None, *held):
        raise ValueError(f"the model holds the adapters {held}, not {name!r}; add it by add_lora")
    before = _lora_layers(model)[0][1].active_adapters
    _activate(model, [] if name is None else [name])
    try:
        yield
    finally:
        _activate(model, before)


class AdapterOff:
    """The policy as it was before its adapters: a frozen reference that holds no weights of its own.

    Args:
        policy: one with a LoRA; its adapters may go on being trained.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def logprobs(self, tokens_BT: Tensor, sampled_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See :meth:`agents.core.policy.Policy.logprobs`; without gradient, since no trainable weight takes part."""
        with using_adapter(self.policy.model, None):
            return self.policy.logprobs(tokens_BT, sampled_BT, temperature)


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The model's state as if it had never had adapters, the change that the policy's makes added to the weights.

    Names are those of the model before :func:`add_lora`. The sums are made one at a time and lie on the CPU; all other
    tensors are the model's own. Without adapters it is the model's state.
    """
    state = model.state_dict()
    for name in adapter_state(model):
        del state[name]
    state = {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}
    for name, layer in _lora_layers(model):
        parameter = getattr(layer, "parameter_name", "weight")  # experts of a mixture keep theirs under other names
        key = f"{name}.{parameter}".replace(".base_layer", "")
        merged = state[key].float() + layer.get_delta_weight(POLICY)
        state[key] = merged.to(device="cpu", dtype=state[key].dtype)
    return state


def save_adapters(policy: Policy, folder: str | Path) -> None:
    """Write all adapters to one file in ``folder``; with the model they were added to, they are the whole policy."""
    save_file(adapter_state(policy.model), Path(folder) / ADAPTERS_FILE)


def load_adapters(policy: Policy, folder: str | Path) -> None:
    """Take the adapters' weights from ``folder``, bit by bit as :func:`save_adapters` left them.

    Raises:
        ValueError: they are of other names or sizes than those of the policy.
    """
    state, saved = adapter_state(policy.model), load_file(Path(folder) / ADAPTERS_FILE)
    sizes, saved_sizes = ({name: tuple(tensor.shape) for name, tensor in held.items()} for held in (state, saved))
    if sizes != saved_sizes:
        name = min(name for name, _ in sizes.items() ^ saved_sizes.items())
        raise ValueError(
            f"the adapters in {folder} do not fit those of the policy: {name} is {saved_sizes.get(name, 'missing')} there, "
            f"{sizes.get(name, 'missing')} here; add adapters of the same names and rank, to the same model"
        )
    for name, tensor in state.items():
        tensor.copy_(saved[name])


def _activate(model: Any, names: list[str]) -> None:
    """peft lets only active adapters be trained; here an optimiser may hold them all."""
    from peft.functional import set_adapter, set_requires_grad

    set_adapter(model, names)
    set_requires_grad(model, adapters(model), True)


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    if not adapters(model):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapters' tensors, sharing the model's memory."""
    prefixes = tuple(f"{name}.lora_" for name, _ in _lora_layers(model))
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}
