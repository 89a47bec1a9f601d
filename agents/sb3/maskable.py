"""The policy class for sb3-contrib's ``MaskablePPO``."""

from __future__ import annotations

from agents.sb3.policy import CausalLMActorCritic

try:
    from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
except ImportError as error:
    raise ImportError('MaskableCausalLMPolicy needs sb3-contrib: pip install "textenv[sb3]"') from error


class MaskableCausalLMPolicy(CausalLMActorCritic, MaskableActorCriticPolicy):
    """A causal language model for ``MaskablePPO``: a token needs the leave of the environment's ``action_masks()`` too.

    Arguments and errors: see :class:`agents.sb3.policy.CausalLMPolicy`.
    """
