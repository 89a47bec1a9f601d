"""`textenv fit`: rewards that are learned."""

from __future__ import annotations

import pkgutil

KINDS = {"reward-model": "rewards.learned.fit_reward_model:fit_reward_model"}
"""What can be fitted; imported when it is, since it needs torch."""


def fit(arguments: list[str]) -> None:
    """Fit a reward model to preferences: textenv fit reward-model --data DATA --model MODEL --out FOLDER [SETTINGS]."""
    import tyro

    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: textenv fit {'|'.join(KINDS)} [SETTINGS]\n\n{fit.__doc__}\n`--help` after it lists the settings."
        )
    elif arguments[0] not in KINDS:
        raise ValueError(f"nothing called {arguments[0]!r} can be fitted; there is {', '.join(KINDS)}")
    else:
        tyro.cli(pkgutil.resolve_name(KINDS[arguments[0]]), prog=f"textenv fit {arguments[0]}", args=arguments[1:])


fit.takes_arguments = True  # type: ignore[attr-defined]  # what is fitted decides on the settings
