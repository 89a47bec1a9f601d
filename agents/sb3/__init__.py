"""Stable-Baselines3 on language models: a policy class for its own PPO and A2C, on token-level environments.

Example::

    import gymnasium as gym
    from stable_baselines3 import PPO
    import textenv
    from agents.sb3 import CausalLMPolicy

    env = gym.make("textenv/Countdown-v0", level="token", tokenizer="mymodel")
    agent = PPO(CausalLMPolicy, env, gamma=1.0, policy_kwargs={"model": "mymodel"})
    agent.learn(total_timesteps=100_000)
    agent.policy.lm.save("mine")  # a transformers folder

Set ``gamma=1.0``: an episode's return is not discounted, and Stable-Baselines3's default of 0.99 a token would leave
0.6 % of a reward that comes 512 tokens later.

With ``sb3-contrib``, :class:`MaskableCausalLMPolicy` is the same for its ``MaskablePPO``.
"""

from typing import Any

from agents.sb3.policy import CausalLMPolicy

__all__ = ["CausalLMPolicy", "MaskableCausalLMPolicy"]


def __getattr__(name: str) -> Any:
    """Import :class:`MaskableCausalLMPolicy` where it is asked for: sb3-contrib comes with an extra."""
    if name == "MaskableCausalLMPolicy":
        from agents.sb3.maskable import MaskableCausalLMPolicy

        return MaskableCausalLMPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
