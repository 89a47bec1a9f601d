"""Promises of the floor as a whole."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import rewards

MODULES = ["rewards", *sorted(module.name for module in pkgutil.walk_packages(rewards.__path__, "rewards."))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docs_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_importing_rewards_is_light():
    heavy = {"torch", "transformers", "regex", "numpy", "gymnasium", "textenv", "agents", "benchmarks"}
    code = f"import sys, rewards; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
