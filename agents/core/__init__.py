"""What the agents share: policy, engines, rollout, advantages, losses, learner, run."""
