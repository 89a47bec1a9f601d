"""The tasks that come with textenv, one file a family, registered here."""

from textenv.registry import register
from textenv.tasks.arithmetic import Arithmetic
from textenv.tasks.countdown import Countdown
from textenv.tasks.gsm8k import GSM8K, WordProblems
from textenv.tasks.guess_number import GuessNumber
from textenv.tasks.humaneval import HumanEval
from textenv.tasks.ifeval import IFEval
from textenv.tasks.math import MATH
from textenv.tasks.mbpp import MBPP
from textenv.tasks.multiple_choice import MultipleChoice
from textenv.tasks.probes import Constant, DelayedCopy, Length, OneHot, Substring
from textenv.tasks.reasoning_gym import NAMES, PREFIX, ReasoningGym
from textenv.tasks.strings import Copy, Reverse, Sort
from textenv.tasks.tabular import Tabular
from textenv.tasks.try_again import TryAgain

register("textenv/Arithmetic-v0", Arithmetic)
register("textenv/Countdown-v0", Countdown)
register("textenv/Reverse-v0", Reverse)
register("textenv/Sort-v0", Sort)
register("textenv/Copy-v0", Copy)
register("textenv/GuessNumber-v0", GuessNumber)
register("textenv/TryAgain-v0", TryAgain)
register("textenv/GSM8K-v0", GSM8K)
register("textenv/WordProblems-v0", WordProblems)
register("textenv/MATH-v0", MATH)
register("textenv/HumanEval-v0", HumanEval)
register("textenv/MBPP-v0", MBPP)
register("textenv/IFEval-v0", IFEval)
register("textenv/MultipleChoice-v0", MultipleChoice)
register("textenv/ProbeConstant-v0", Constant)
register("textenv/ProbeOneHot-v0", OneHot)
register("textenv/ProbeDelayedCopy-v0", DelayedCopy)
register("textenv/ProbeLength-v0", Length)
register("textenv/ProbeSubstring-v0", Substring)
register("textenv/Tabular-v0", Tabular)
for name in NAMES:
    register(f"{PREFIX}{name}-v0", ReasoningGym, dataset=name)
