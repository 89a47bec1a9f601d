"""Verifiers: rules that grade an answer against its reference, one file each, found by name with ``rewards.make``."""
