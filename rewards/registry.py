"""Rewards by name."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import shlex
from collections.abc import Callable
from typing import Any, overload

from rewards.contract import FunctionReward, PlainReward, Reward
from rewards.options import parse_options

Target = str | Reward | type | PlainReward
"""An import string, a reward, a class that makes one, or ``(prompt, completion, reference) -> float``."""

Spec = str | Reward | PlainReward
"""How a reward is given: by its registered name, which options may follow (``"reward_model model my-reward"``), itself, or
as ``(prompt, completion, reference) -> float``."""

_targets: dict[str, Target] = {}


def register(name: str, target: Target) -> None:
    """Make ``target`` known as ``name``.

    Args:
        name: what :func:`make` and task definitions call it.
        target: a :class:`Reward`, a class whose constructor's parameters are the reward's options, a plain function
            ``(prompt, completion, reference) -> float``, or an import string ``"package.module:Attribute"`` of one of
            these, imported when first made.

    Raises:
        ValueError: the name is taken, or the import string has no colon.
        TypeError: the target is none of these.

    Example:
        >>> register("always", lambda prompt, completion, reference: 1.0)
        >>> make("always").name
        'always'
    """
    if name in _targets:
        raise ValueError(f"a reward named {name!r} is registered already ({_targets[name]!r}); choose another name")
    if isinstance(target, str) and target.count(":") != 1:
        raise ValueError(f"an import string looks like 'package.module:Attribute', got {target!r} for reward {name!r}")
    if not (isinstance(target, str) or callable(target)):
        raise TypeError(f"a reward's target is an import string, a Reward, a class or a function, got {target!r}")
    _targets[name] = target


def names() -> list[str]:
    """The names of all registered rewards, sorted.

    Example:
        >>> "exact" in names()
        True
    """
    return sorted(_targets)


def make(name: str, **options: Any) -> Reward:
    """The reward registered as ``name``.

    Args:
        name: one of :func:`names`.
        options: parameters of the reward's constructor.

    Raises:
        ValueError: no reward has this name.
        TypeError: an option that the reward does not have, or one that is missing.

    Example:
        >>> from rewards import Sample
        >>> make("exact", ignore_case=True)([Sample(prompt="", completion="YES", reference="yes")])[0].value
        1.0
    """
    if name not in _targets:
        near = difflib.get_close_matches(name, _targets)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise ValueError(f"no reward is named {name!r}{hint} known: {', '.join(names())}; add yours with register")
    target = _targets[name]
    if isinstance(target, str):
        target = pkgutil.resolve_name(target)
    if isinstance(target, type):
        target = _construct(name, target, options)
    elif options:
        raise TypeError(f"reward {name!r} takes no options, got {', '.join(options)}")
    return target if isinstance(target, Reward) else FunctionReward(target, name)


def _construct(name: str, cls: type, options: dict[str, Any]) -> Any:
    signature = inspect.signature(cls)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = signature.parameters
        wrong = [option for option in options if option not in known]
        what = f"it has no option {wrong[0]!r}" if wrong else str(error)
        shown = (
            each.name if each.default is each.empty else f"{each.name}={each.default!r}" for each in known.values()
        )
        raise TypeError(f"reward {name!r}: {what}; its options are: {', '.join(shown) or 'none'}") from None
    return cls(**options)


@overload
def reward(function: PlainReward) -> FunctionReward: ...
@overload
def reward(*, name: str) -> Callable[[PlainReward], FunctionReward]: ...
def reward(function: PlainReward | None = None, *, name: str | None = None) -> Any:
    """Turn a plain function into a :class:`Reward` and register it, under its own name or ``name``.

    Raises:
        ValueError: the name is taken.
        TypeError: the function does not take ``(prompt, completion, reference)``.

    Example:
        >>> from rewards import Sample
        >>> @reward
        ... def brevity(prompt, completion, reference):
        ...     return 1.0 / (1 + len(completion))
        >>> make("brevity")([Sample(prompt="", completion="abc")])[0].value
        0.25
    """
    if function is None:
        return lambda function: _decorate(function, name)
    return _decorate(function, name)


def _decorate(function: PlainReward, name: str | None) -> FunctionReward:
    made = FunctionReward(function, name)
    register(made.name, made)
    return made


def as_reward(spec: Spec) -> Reward:
    """``spec`` as a :class:`Reward`: a reward as it is, a registered name made, a plain function wrapped.

    After a name may follow options, each a name and a value as on a command line: :func:`rewards.options.parse_options`.

    Raises:
        ValueError: no reward has this name or these options.
        TypeError: ``spec`` is something else, such as a class in place of an instance.

    Example:
        >>> as_reward("exact").name, as_reward(lambda prompt, completion, reference: 0.0).name
        ('exact', '<lambda>')
        >>> as_reward("exact ignore_case true").ignore_case
        True
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        return _make_from_words(*([spec] if spec in _targets else shlex.split(spec)))
    if callable(spec) and not isinstance(spec, type):
        return FunctionReward(spec)
    raise TypeError(
        "a reward is a registered name, a rewards.Reward instance or a function "
        f"(prompt, completion, reference) -> float, got {spec!r}"
    )


def _make_from_words(name: str = "", *words: str) -> Reward:
    if len(words) % 2:
        raise ValueError(f"the options of the reward {name!r} are names and values in turn, got {' '.join(words)!r}")
    options = parse_options(dict(zip(words[::2], words[1::2], strict=True)))
    try:
        return make(name, **options)
    except TypeError as error:  # an option that there is not, or of another type
        # Without the values: a key may be among them.
        raise ValueError(f"the reward {name!r} cannot be made with the options {list(options)}: {error}") from error


for _name, _target in {
    "choice": "rewards.verifiers.choice:Choice",
    "code": "rewards.verifiers.code:Code",
    "endogenous": "rewards.learned.endogenous:Endogenous",
    "exact": "rewards.verifiers.exact:Exact",
    "fine_grained": "rewards.learned.fine_grained:FineGrained",
    "format_tags": "rewards.verifiers.format_tags:FormatTags",
    "group_judge": "rewards.judge:GroupJudge",
    "ifeval": "rewards.verifiers.ifeval:IFEval",
    "judge": "rewards.judge:Judge",
    "implicit": "rewards.learned.implicit:ImplicitReward",
    "json": "rewards.verifiers.json_schema:JSON",
    "last_number": "rewards.verifiers.last_number:LastNumber",
    "math": "rewards.verifiers.math:Math",
    "normalised": "rewards.normalised:Normalised",
    "numeric": "rewards.verifiers.numeric:Numeric",
    "principles_judge": "rewards.judge:PrinciplesJudge",
    "process_reward": "rewards.learned.process:ProcessReward",
    "reference_conditioned": "rewards.learned.reference_conditioned:ReferenceConditioned",
    "regex": "rewards.verifiers.regex:Regex",
    "repetition": "rewards.verifiers.repetition:Repetition",
    "reward_model": "rewards.learned.reward_model:RewardModel",
    "rubric": "rewards.judge:Rubric",
    "soft_overlong": "rewards.verifiers.soft_overlong:SoftOverlong",
}.items():
    register(_name, _target)
