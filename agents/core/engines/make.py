"""Engines by name, as settings and command lines write them."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import shlex
import typing
from typing import Any

from agents.core.engines.base import Engine
from agents.core.policy import Policy
from rewards.options import parse_options

ENGINES = {
    "native": "agents.core.engines.native:NativeEngine",
    "vllm": "agents.core.engines.vllm:VLLMEngine",
    "vllm_server": "agents.core.engines.vllm_server:VLLMServerEngine",
}
"""Where each engine lies; it is imported when it is asked for. Its options are the keyword-only parameters of its class."""


def make_engine(spec: str, policy: Policy) -> Engine:
    """The engine that ``spec`` names, for a policy.

    Args:
        spec: a name of :data:`ENGINES`, which options may follow, each a name and a value: ``"native max_rows 64"``.
        policy: whose weights it generates with.

    Raises:
        ValueError: see :func:`check_engine`; or the engine refuses its options.
    """
    engine_class, options = check_engine(spec)
    return engine_class(policy, **options)


def check_engine(spec: str) -> tuple[type[Any], dict[str, Any]]:
    """The class and the options that ``spec`` names: what of it can be checked before a model loads.

    Raises:
        ValueError: there is no such engine; an option that it does not have, without a value or of another type; what the
            engine needs is not installed.
    """
    try:
        name, *words = shlex.split(spec) or [""]
    except ValueError as error:
        raise ValueError(f"the engine {spec!r} cannot be read: {error}") from None
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no engine {name!r}; {hint}there are {', '.join(ENGINES)}")
    engine_class = pkgutil.resolve_name(ENGINES[name])
    hints = typing.get_type_hints(engine_class.__init__)
    known = {
        option: parameter
        for option, parameter in inspect.signature(engine_class).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    there_are = "; its options are: " + (", ".join(map(_described, known.values())) or "none")
    if len(words) % 2:
        raise ValueError(
            f"the options of the engine {name!r} are names and values in turn, got {' '.join(words)!r}{there_are}"
        )
    if twice := [option for option in words[::2] if words[::2].count(option) > 1]:
        raise ValueError(f"the option {twice[0]!r} of the engine {name!r} is given more than once")
    options = parse_options(dict(zip(words[::2], words[1::2], strict=True)))
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"the engine {name!r} has no option {option!r}{there_are}")
        if not _fits(value, hints[option]):
            raise ValueError(f"the engine {name!r} cannot have {option} {value!r}{there_are}")
    missing = [option for option, parameter in known.items() if parameter.default is parameter.empty]
    if wanted := [option for option in missing if option not in options]:
        raise ValueError(f"the engine {name!r} needs the option {wanted[0]!r}{there_are}")
    if name == "vllm":
        from agents.core.engines.vllm import check_vllm

        check_vllm()
    return engine_class, options


def _described(parameter: inspect.Parameter) -> str:
    default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
    return f"{parameter.name}{default} ({parameter.annotation})"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value as typed is of an option's type. A whole number is also a ``float``, but a truth value no number."""
    kinds = set(typing.get_args(hint) or (hint,))
    return type(value) in kinds or (type(value) is int and float in kinds)
