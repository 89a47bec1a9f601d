"""textenv: text generation as Gymnasium environments, at token level and at sequence level, from one task."""

from textenv.checks import CheckError, check_environment, check_equivalence
from textenv.episodes import Episodes, Source
from textenv.problems import ProblemStream
from textenv.registry import make_task, register, registry
from textenv.task import Finish, Problem, Task, Transcript
from textenv.wrappers import KLPenalty, TextView, kl_penalty

from textenv import tasks as tasks  # isort: skip - registers the built-in environments, once the names above exist

__all__ = [
    "CheckError",
    "Episodes",
    "Finish",
    "KLPenalty",
    "Problem",
    "ProblemStream",
    "Source",
    "Task",
    "TextView",
    "Transcript",
    "check_environment",
    "check_equivalence",
    "kl_penalty",
    "make_task",
    "register",
    "registry",
]
