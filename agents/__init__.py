"""Agents: what learns in the environments of ``textenv``."""
