"""Programs, graded by running their tests against them."""

from rewards.verifiers.code.verifier import Code

__all__ = ["Code"]
