"""The critic: what a policy may expect to earn from here on, a number for every state that it chose a token in.

A value is a linear function of the state's hidden vector, the one that the logits of the next token come from: it never
sees the token that was chosen. Shapes: B episodes, T tokens, N sampled tokens of all rows, H hidden width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agents.core.lora import add_lora, using_adapter
from agents.core.models import check_model_fits
from agents.core.policy import Policy, no_progress_bar
from agents.core.sources import validate_model_source
from rewards.pretrained import read_pretrained
from textenv.tokenizer import Tokenizer, load_tokenizer

ADAPTER = "critic"


class Critic(nn.Module):
    """A value head on the policy's own trunk.

    The head starts at 0, so that advantages start as the rewards to come.

    Args:
        hidden_size: H, of the states that are valued.
        device: where the head is.
        learning_rate_factor: its learning rate over the policy's.

    Attributes:
        detached: True while the policy is not to be moved by the critic's errors.
    """

    detached = False

    def __init__(self, hidden_size: int, device: torch.device, learning_rate_factor: float = 1.0) -> None:
        super().__init__()
        self.learning_rate_factor = learning_rate_factor
        self.head = nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens_BT: Tensor, sampled_BT: Tensor, hidden_NH: Tensor) -> Tensor:
        """Values ``(B, T)`` of the states before each sampled token, float32, differentiable, 0 elsewhere.

        Args:
            tokens_BT, sampled_BT, hidden_NH: as :meth:`agents.core.policy.Policy.score` takes and gives them.
        """
        return self.values(sampled_BT, self.hidden(tokens_BT, sampled_BT, hidden_NH))

    def hidden(self, tokens_BT: Tensor, sampled_BT: Tensor, hidden_NH: Tensor) -> Tensor:
        """The first half of :meth:`forward`: the states' hidden vectors ``(N, H)``."""
        return hidden_NH.detach() if self.detached else hidden_NH

    def values(self, sampled_BT: Tensor, hidden_NH: Tensor) -> Tensor:
        """The second half of :meth:`forward`: values from what :meth:`hidden` gave."""
        value_N = self.head(hidden_NH.to(self.head.weight.dtype)).squeeze(1)
        return torch.zeros(sampled_BT.shape, device=sampled_BT.device).masked_scatter(sampled_BT, value_N.float())

    def trained_parameters(self) -> list[nn.Parameter]:
        """What belongs to the critic alone."""
        return list(self.parameters())


class SeparateCritic(Critic):
    """A critic with a trunk of its own.

    Args:
        trunk: a transformers model without a head, which reads from left to right.
        hidden_size: H, of its states.
        learning_rate_factor: its learning rate over the policy's.
    """

    def __init__(self, trunk: Any, hidden_size: int, learning_rate_factor: float = 1.0) -> None:
        super().__init__(hidden_size, trunk.device, learning_rate_factor)
        self.trunk = trunk.requires_grad_(True)

    def hidden(self, tokens_BT: Tensor, sampled_BT: Tensor, hidden_NH: Tensor) -> Tensor:
        return states(self.trunk, tokens_BT, sampled_BT)


class AdapterCritic(Critic):
    """A critic that is an adapter on the policy's weights, which are held once.

    Args:
        policy: one with a LoRA; another adapter is put beside its own.
        rank, seed: of the adapter.
        learning_rate_factor: its learning rate over the policy's.
    """

    def __init__(self, policy: Policy, rank: int, seed: int, learning_rate_factor: float = 1.0) -> None:
        super().__init__(policy.hidden_size, policy.device, learning_rate_factor)
        before = {id(parameter) for parameter in policy.parameters()}
        add_lora(policy, rank, seed=seed, name=ADAPTER)
        # In a tuple, so that the policy's parameters do not become the critic's.
        self._policy = (policy,)
        self._adapter = (*(parameter for parameter in policy.parameters() if id(parameter) not in before),)

    def hidden(self, tokens_BT: Tensor, sampled_BT: Tensor, hidden_NH: Tensor) -> Tensor:
        (policy,) = self._policy
        with using_adapter(policy.model, ADAPTER):
            if policy.decoder() is None:
                return states(policy.model.get_decoder(), tokens_BT, sampled_BT)
            return policy.states(tokens_BT, sampled_BT).hidden_NH

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*self.parameters(), *self._adapter]


def states(trunk: Any, tokens_BT: Tensor, sampled_BT: Tensor) -> Tensor:
    """The hidden vector ``(N, H)`` of the state before each sampled token, row after row. Padding stands on the right."""
    hidden_BTH = trunk(input_ids=tokens_BT[:, :-1], use_cache=False).last_hidden_state
    return hidden_BTH[sampled_BT[:, 1:]]


def critic_from_reward_model(
    source: str | Path,
    device: torch.device,
    learning_rate_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> SeparateCritic:
    """A critic that begins as a reward model: its trunk, and its scalar head (InstructGPT, arXiv:2203.02155, section 3.5).

    Args:
        source: a folder or hub name of an ``AutoModelForSequenceClassification`` with one label.
        device: where the critic goes.
        learning_rate_factor: the critic's learning rate over the policy's.
        dtype: of the trunk.

    Raises:
        ValueError: it cannot be read, or its weights are pickles.
    """
    from transformers import AutoModelForSequenceClassification

    with no_progress_bar():
        try:
            model = read_pretrained(AutoModelForSequenceClassification, source, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(f"no critic can begin as {str(source)!r}: {str(error).splitlines()[0]}") from error
    model = model.to(device).eval()
    critic = SeparateCritic(model.base_model, model.score.in_features, learning_rate_factor)
    critic.head.load_state_dict({"weight": model.score.weight, "bias": torch.zeros(1)})
    return critic


def check_reward_model_fits(source: str | Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Refuse, from its config and tokenizer alone, a reward model that cannot begin a critic.

    Args:
        source: see :func:`critic_from_reward_model`.
        tokenizer: the policy's.
        max_tokens: size of the contexts to be valued.

    Raises:
        ValueError: there is none at ``source``; it has more than one label, or does not read from left to right; it speaks
            another vocabulary; or its context is too short.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    source = str(source)
    try:
        config = AutoConfig.from_pretrained(validate_model_source(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            'a critic is "shared", "separate", "lora", or begins as a reward model, but there is none at '
            f"{source!r}: {str(error).splitlines()[0]}"
        ) from error
    kind = (getattr(config, "architectures", None) or ["none"])[0]
    if not kind.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise ValueError(
            f"a critic begins as a sequence classifier with one label, but {source!r} is a {kind} with "
            f'{config.num_labels}; give a reward model, or critic "shared" or "separate"'
        )
    with torch.device("meta"):  # its modules without their weights
        model = AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):  # the name of the head in every classifier that is made of a causal trunk
        raise ValueError(
            f"the critic {source!r} is a {kind}, which reads a text as a whole, so a state's value would depend on what "
            "follows; take a reward model made from a causal language model"
        )
    own = load_tokenizer(source)
    # Ids of its own beside the policy's, such as one for padding, never occur.
    if not tokenizer.to_transformers().get_vocab().items() <= own.to_transformers().get_vocab().items():
        raise ValueError(
            f"the critic {source!r} speaks another vocabulary ({own.vocab_size} ids) than the policy "
            f"({tokenizer.vocab_size} ids); take a reward model with the policy's tokenizer"
        )
    try:
        check_model_fits(source, tokenizer, max_tokens)
    except ValueError as error:
        raise ValueError(f"the critic {source!r} does not fit: {error}") from error
