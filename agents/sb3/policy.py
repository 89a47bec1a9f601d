"""A causal language model as Stable-Baselines3's actor and critic.

Shapes: B observations, T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from agents.core.models import load_model
from agents.core.policy import Policy
from agents.core.sources import find_model

NEVER = -1e8
"""Log-probability of an impossible token: exactly 0 once exponentiated, but finite, so that 0 times it is not NaN."""
MAX_VOCAB = 2**24
"""Stable-Baselines3 passes ids on as float32, which holds every whole number up to here."""


class CausalLMActorCritic(BasePolicy):
    """What the two policy classes share; the networks in Stable-Baselines3's places for them.

    The features of an observation are the logits of the next token, for the actor, and the hidden state that these are
    made of, for the critic.
    """

    features_extractor: ContextReader
    action_dist: Any
    """a distribution of Stable-Baselines3, or of sb3-contrib"""
    mlp_extractor: MlpExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        model: Policy | str | Path,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        # PPO and A2C pass on use_sde, which Stable-Baselines3 has refused by now if it is not False.
        _check_token_level(observation_space, action_space)
        lm = _as_policy(model)
        _check_fits(lm, observation_space, action_space)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=ContextReader,
            features_extractor_kwargs={"lm": lm},
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    @property
    def lm(self) -> Policy:
        """The language model under training."""
        return self.features_extractor.lm

    def _build(self, lr_schedule: Schedule) -> None:
        self.mlp_extractor = ActorAndCritic(self.features_extractor.features_dim, net_arch=[], activation_fn=nn.Tanh)
        self.value_net = nn.Linear(self.features_extractor.features_dim, 1)
        # From 0, so that at first the critic says nothing, and its loss moves the language model by nothing.
        nn.init.zeros_(self.value_net.weight)
        nn.init.zeros_(self.value_net.bias)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )

    def _get_action_dist_from_latent(self, logits_BV: Tensor) -> Any:
        logp_BV = self.lm.distribution(logits_BV, temperature=1.0)
        return self.action_dist.proba_distribution(action_logits=logp_BV.clamp(min=NEVER))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "model": self.lm,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


class CausalLMPolicy(CausalLMActorCritic, ActorCriticPolicy):
    """A causal language model for Stable-Baselines3's PPO and A2C, on token-level environments.

    The actor is the model's next-token distribution, :meth:`agents.core.policy.Policy.distribution` at temperature 1:
    ids that the tokenizer cannot decode have probability 0. The critic is a linear head, zero at first, on the hidden
    state that the logits are made of. Every step reads the whole context anew; there is no cache.

    ``policy_kwargs`` of the algorithm:
        model: a :class:`agents.core.policy.Policy`, which is then trained in place, or a folder or hub name to load one
            from. The file that the algorithm's ``save`` writes holds the trained weights either way. With a folder, it
            refers to that folder for the architecture and the tokenizer; with a ``Policy``, it holds the whole object as
            well, and so the weights twice.
        optimizer_class, optimizer_kwargs: as for any policy of Stable-Baselines3.

    Attributes:
        lm: the :class:`agents.core.policy.Policy` under training; ``lm.save(folder)`` writes a transformers folder.

    Raises:
        ValueError: the environment is not at token level, or its vocabulary or contexts do not fit the model.
        TypeError: ``model`` is neither a policy nor a path or name.
    """


class ContextReader(BaseFeaturesExtractor):
    """Reads contexts: the logits of the next token and the hidden state behind them, at each row's last real token."""

    def __init__(self, observation_space: spaces.Space, lm: Policy) -> None:
        super().__init__(observation_space, features_dim=lm.hidden_size)
        self.lm = lm

    def forward(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits ``(B, V)`` and hidden states ``(B, H)``, float32.

        Args:
            observation: ``tokens`` ``(B, T)``, right-padded with any ids, which causal attention never looks at, and
                ``length`` ``(B, 1)``, at least 1.
        """
        last_B = observation["length"].flatten().long() - 1
        tokens_BT = observation["tokens"][:, : last_B.max() + 1].long()
        seen: list[Tensor] = []

        def keep_last(head: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            hidden_BH = inputs[0][torch.arange(len(last_B), device=last_B.device), last_B]
            seen.append(hidden_BH)
            return hidden_BH.unsqueeze(1)  # so no logits of earlier positions are computed

        with self.lm.model.get_output_embeddings().register_forward_pre_hook(keep_last):
            logits_BV = self.lm.model(input_ids=tokens_BT, use_cache=False).logits.squeeze(1)
        return logits_BV, seen[0].float()

    def train(self, mode: bool = True) -> ContextReader:
        """Stay in ``eval`` mode, as :class:`agents.core.policy.Policy` does: a token has one probability."""
        return super().train(False)


class ActorAndCritic(MlpExtractor):
    """Gives the actor the logits and the critic the hidden states; there are no layers of its own."""

    def forward_actor(self, features: Any) -> Tensor:
        return features[0]

    def forward_critic(self, features: Any) -> Tensor:
        return features[1]


def _as_policy(model: Any) -> Policy:
    if isinstance(model, Policy):
        return model
    if isinstance(model, str | Path):
        return load_model(find_model(model))
    raise TypeError(
        f"model must be a Policy, a folder or a hub name, got {type(model).__name__}; "
        "wrap a model of transformers: Policy(model, load_tokenizer(folder))"
    )


def _check_token_level(observation_space: Any, action_space: Any) -> None:
    names = set(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else set()
    if not (isinstance(action_space, spaces.Discrete) and {"tokens", "length"} <= names):
        raise ValueError(
            "a causal LM takes one token at a time, so the environment must be at token level, with observations of "
            f"tokens and length and Discrete actions; got actions {action_space} and observations "
            f"{sorted(names) or observation_space}; make it with gym.make(id, level='token')"
        )


def _check_fits(lm: Policy, observation_space: Any, action_space: Any) -> None:
    vocab_size, max_tokens = int(action_space.n), observation_space["tokens"].shape[0]
    if vocab_size != lm.vocab_size:
        raise ValueError(
            f"the environment has {vocab_size} actions, but the model {lm.vocab_size} logits; make the environment with the "
            f"model's tokenizer and vocab_size={lm.vocab_size}"
        )
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too large: Stable-Baselines3 passes ids on as float32, which is exact up to "
            f"{MAX_VOCAB} alone; take a model with a smaller vocabulary"
        )
    if lm.max_context is not None and lm.max_context < max_tokens:
        raise ValueError(
            f"the model's context of {lm.max_context} tokens is smaller than the environment's max_tokens={max_tokens}; "
            "lower max_tokens, or take a model with a longer context"
        )
