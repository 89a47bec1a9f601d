"""Stable-Baselines3 on language models: a policy class for its own PPO and A2C, on token-level environments.

Example::

    import gymnasium as gym
    import textenv
    from stable_baselines3 import PPO
    from agents.core.models import load_model
    from agents.sb3 import CausalLMPolicy

    lm = load_model("Qwen/Qwen3-0.6B")
    env = gym.make("textenv/Countdown-v0", level="token", tokenizer=lm.tokenizer, vocab_size=lm.vocab_size)
    agent = PPO(CausalLMPolicy, env, gamma=1.0, policy_kwargs={"model": lm})
    agent.learn(total_timesteps=100_000)
    lm.save("mine")  # a transformers folder

Set ``gamma=1.0``: an episode's return is not discounted, while Stable-Baselines3's default of 0.99 a token would leave
0.6 % of a reward that comes 512 tokens later. For several environments at once, hand ``make_vec_env`` a function:
``make_vec_env(lambda: gym.make(…), n_envs=16)``; what ``gym.make_vec`` makes is no vector environment of
Stable-Baselines3.

Where sb3-contrib is installed, :class:`agents.sb3.maskable.MaskableCausalLMPolicy` is the same for its ``MaskablePPO``,
which asks the environments for their ``action_masks()``.
"""

from typing import Any

from agents.sb3.policy import CausalLMPolicy

__all__ = ["CausalLMPolicy"]


def __getattr__(name: str) -> Any:
    """Import ``MaskableCausalLMPolicy`` only where it is asked for: sb3-contrib comes with an extra."""
    if name == "MaskableCausalLMPolicy":
        from agents.sb3.maskable import MaskableCausalLMPolicy

        return MaskableCausalLMPolicy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
