"""Engines: generate completions for a policy."""
