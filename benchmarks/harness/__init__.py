"""Agents × environments × seeds under one budget: suites, how they are run, measured, kept and compared."""
