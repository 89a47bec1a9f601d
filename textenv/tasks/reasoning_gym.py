"""The datasets of the reasoning-gym package, each as a task.

The package is used in worker processes alone. Some of its datasets draw from global generators or evaluate what they
score as Python; there neither reaches the training process.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from rewards import Reward, Sample, Score, ungraded
from rewards.verifiers.base import unreadable, verdict
from rewards.workers import Failure, Workers
from textenv.datasets import Template
from textenv.task import Problem, Task, Transcript

# Gymnasium allows one namespace in an id, so this cannot be textenv/reasoning-gym/<name>-v0.
PREFIX = "textenv/reasoning-gym-"

# As a table, since importing the package takes longer than importing all of textenv; a test compares.
NAMES = tuple(
    """
    ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix
    bitwise_arithmetic boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic codeio coin_flip
    color_cube_rotation complex_arithmetic composite count_bits count_primes countdown course_schedule cryptarithm
    decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font fraction_simplification
    futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams gsm_symbolic intermediate_integration
    isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting
    letter_jumble list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid n_queens needle_haystack
    number_filtering number_format number_sequence number_sorting palindrome_generation palindrome_partitioning
    path_star polynomial_equations polynomial_multiplication pool_matrix power_function prime_factorization products
    propositional_logic puzzle24 quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges rubiks_cube
    rush_hour self_reference sentence_reordering shortest_path simple_equations simple_geometry simple_integration
    sokoban spell_backward spiral_matrix string_insertion string_manipulation string_splitting string_synthesis sudoku
    survo syllogism time_intervals tower_of_hanoi tsumego word_ladder word_sequence_reversal word_sorting zebra_puzzles
    """.split()  # noqa: SIM905 - a hundred lines otherwise
)

SECONDS = 30.0
"""Limit for drawing or scoring one problem. It is for what hangs: a tower of powers in an answer, say."""
TRIES = 20
"""Seeds that the library may fail on before a problem is given up; a few datasets find no puzzle for some."""
NONSENSE = "no such answer ]"


class ReasoningGymReward(Reward):
    """1 for an answer that the dataset's own rule scores with 1, else 0.

    The answer is what stands between the last ``</answer>`` and the ``<answer>`` before it, without the white space
    around; a completion without these has no answer and earns 0. Most rules give some credit for an answer with the
    right one inside, the more the shorter it is, and some a little for any: that rewards padding and listing, so it
    counts only when asked for.

    A rule that breaks on an answer, but not on the right one, says that it is wrong; one that breaks on both, or takes
    too long, leaves the sample ungraded. A rule that takes nonsense for right is replaced by comparing texts. Where a
    rule would run an answer as Python, only a literal or a plain expression gets that far; anything else earns 0.

    The reference is that of :class:`ReasoningGym`; any other leaves the sample ungraded. Parts: ``correct``, ``score``
    (the rule's own) and ``readable`` (there was an answer).

    Args:
        partial: the value is the rule's own score, with its partial credit.
    """

    name = "reasoning_gym"

    def __init__(self, partial: bool = False) -> None:
        self.partial = partial

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        answers = [find_answer(sample.completion) for sample in samples]
        asked = [i for i, sample in enumerate(samples) if answers[i] is not None and _is_reference(sample.reference)]
        results = _workers().map([{**samples[i].reference, "scored": answers[i]} for i in asked])
        result_of = dict(zip(asked, results, strict=True))
        return [self._score(sample, answers[i], result_of.get(i)) for i, sample in enumerate(samples)]

    def _score(self, sample: Sample, answer: str | None, result: Any) -> Score:
        if not _is_reference(sample.reference):
            return unreadable(sample.reference, wanted="{'dataset', 'config', 'curriculum', 'seed', 'answer'}")
        if answer is None:
            return verdict(False, score=0.0, readable=0.0)
        if isinstance(result, Failure):
            return ungraded(f"{sample.reference['dataset']}: {result.why}")
        correct = result >= 1
        return Score(
            result if self.partial else float(correct),
            {"correct": float(correct), "score": result, "readable": 1.0},
            info={"answer": answer},
        )


def find_answer(completion: str) -> str | None:
    """The text in the last pair of answer tags; None without such a pair.

    Example:
        >>> find_answer("<answer>1</answer> or rather <answer> 2 </answer>."), find_answer("2")
        ('2', None)
    """
    before, closing, _ = completion.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening and closing else None


def _is_reference(reference: Any) -> bool:
    return isinstance(reference, Mapping) and {"dataset", "config", "curriculum", "seed", "answer"} <= reference.keys()


class ReasoningGym(Task):
    """A dataset of reasoning-gym (Stojanovski et al., 2025, arXiv:2505.24760), its problems drawn and scored by its own code.

    Every problem is the first item of a dataset of its own, whose seed is drawn from the problem's address: the library
    itself seeds item i with ``seed + i``, so that neighbouring seeds share items. The split is decided by the question.
    The reference says how to make the item again, ``{"dataset", "config", "curriculum", "seed", "answer"}``; some
    datasets have many right answers and none to show, then ``answer`` is None. See :class:`ReasoningGymReward` for what
    an answer earns. Questions can be long, and not plain ASCII: use a model's tokenizer.

    Args:
        dataset: the library's name for it.
        curriculum: level of the library's own curriculum for the dataset, from 0, the easiest; default the dataset's
            default configuration.
        partial: reward what the library's rule does, partial credit for padded answers included.
        template: the text of a prompt, over the field ``question``. The answer is looked for in ``<answer>`` tags.
        config: fields of the dataset's configuration but ``seed`` and ``size``; they go before the curriculum. For
            ``composite`` ``datasets`` is a list of ``{"name": ..., "weight": ..., "config": {...}}``.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: an unknown option, a level that the curriculum does not have, or a configuration that the library
            refuses.
        RuntimeError: on drawing, when the library fails or takes longer than :data:`SECONDS`.

    Example:
        >>> task = ReasoningGym("gcd", max_numbers=3)
        >>> print(task.problem(seed=0, split="train", index=0).prompt)
        Find the Greatest Common Divisor (GCD) of these numbers: 443, 908, 516. Give only the GCD as your final answer.
        Write the final answer between <answer> and </answer>.
        <BLANKLINE>
    """

    licence = "Apache-2.0"
    max_new_tokens = 1024
    max_tokens = 4096
    template = "{question}\nWrite the final answer between <answer> and </answer>.\n"

    def __init__(
        self,
        dataset: str,
        curriculum: int | None = None,
        partial: bool = False,
        template: str | None = None,
        **config: Any,
    ) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError(f'{PREFIX}{dataset}-v0 needs reasoning-gym: pip install "textenv[tasks]"')
        if curriculum is not None and (not isinstance(curriculum, int) or curriculum < 0):
            raise ValueError(f"curriculum must be a level from 0 on, got {curriculum!r}")
        self.spec = {"dataset": dataset, "config": config, "curriculum": curriculum}
        self.reward = ReasoningGymReward(partial)
        self._template = Template(self.template if template is None else template)
        refusal = _ask(self.spec)
        if refusal is not None:
            raise ValueError(f"{self}: {refusal}")

    def draw(self, rng: np.random.Generator) -> Problem:
        # 31 bits: some datasets seed numpy, which takes 32, with a little more than they are given.
        for _ in range(TRIES):
            spec = {**self.spec, "seed": int(rng.integers(2**31))}
            item = _ask(spec)
            if "question" in item:
                break
        else:
            raise RuntimeError(f"{self} with {self.spec} gave no problem in {TRIES} tries: {item['refused']}")
        prompt = self._template.fill({"question": item["question"]})
        return Problem(prompt, {**spec, "answer": item["answer"]}, {"question": item["question"]})

    def key(self, problem: Problem) -> str:
        return problem.info["question"]

    def demonstrate(self, transcript: Transcript) -> str | None:
        answer = transcript.problem.reference["answer"]
        return None if answer is None else f"<answer>{answer}</answer>"

    def __str__(self) -> str:
        return f"reasoning_gym's {self.spec['dataset']}"


def _workers() -> Workers:
    return Workers(f"{__name__}:work", seconds=SECONDS)


def _ask(item: dict[str, Any]) -> Any:
    (result,) = _workers().map([item])
    if isinstance(result, Failure):
        raise RuntimeError(f"reasoning_gym's {item['dataset']} failed on {item}: {result.why.strip()}")
    return result


# In the workers ---------------------------------------------------------------------------------------------------


def work(item: dict[str, Any]) -> Any:
    """What a worker does: without a seed check a configuration, with one draw, and with ``scored`` score that text.

    Returns:
        what is wrong with the configuration, or None; ``{"question", "answer"}`` or ``{"refused": why}``; the score.
    """
    spec = json.dumps([item["dataset"], item["config"], item["curriculum"]])
    if "seed" not in item:
        try:
            _check(*json.loads(spec))
        except (ValueError, TypeError, AssertionError) as error:
            return str(error) or repr(error)
        return None
    if "scored" in item:
        return _scored(*_entry(spec, item["seed"]), item["scored"])
    try:
        _, entry = _entry(spec, item["seed"])
    except Exception as error:  # noqa: BLE001 - another seed may do
        return {"refused": repr(error)}
    if not _may_score(entry, entry["answer"]):
        return {"refused": f"its own answer is {entry['answer']!r}"}
    return {"question": entry["question"], "answer": entry["answer"]}


def _check(name: str, config: dict[str, Any], level: int | None) -> None:
    factory = _library()
    if name not in factory.DATASETS:
        raise ValueError(f"the installed version has no dataset {name!r}")
    known = [
        field.name for field in dataclasses.fields(factory.DATASETS[name][1]) if field.name not in ("seed", "size")
    ]
    unknown = [option for option in config if option not in known]
    if unknown:
        raise ValueError(f"no option {', '.join(map(repr, unknown))}; its own are {', '.join(known)}")
    _make(name, config, level, 0)


def _make(name: str, config: dict[str, Any], level: int | None, seed: int) -> Any:
    factory = _library()
    dataset_class, config_class = factory.DATASETS[name]
    if name == "composite":
        spec_class = _module("composite").DatasetSpec
        config = {**config, "datasets": [spec_class(**spec) for spec in config.get("datasets", [])]}
    own = {**config, "seed": seed, "size": 1}
    if level is None:
        made = config_class(**own)
    else:
        if not factory.has_curriculum(name):
            raise ValueError("it has no curriculum")
        curriculum = factory.create_curriculum(name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        if level > highest:
            raise ValueError(f"its curriculum has the levels 0 to {highest}, got {level}")
        curriculum.set_global_level(level)
        made = dataclasses.replace(curriculum.generate_configuration({"seed": seed, "size": 1}), **own)
    if hasattr(made, "validate"):
        made.validate()
    return dataset_class(made)


@lru_cache(maxsize=64)
def _entry(spec: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """A dataset of one item, and the item. The answers of a group ask for the same one."""
    name, config, level = json.loads(spec)
    random.seed(seed)  # some datasets draw from the global generators too
    np.random.seed(seed)
    dataset = _make(name, config, level, seed)
    return dataset, dataset[0]


def _scored(dataset: Any, entry: dict[str, Any], answer: str) -> float:
    if not _may_score(entry, answer):
        return 0.0
    try:
        score = float(dataset.score_answer(answer, copy.deepcopy(entry)))
    except Exception:  # noqa: BLE001 - whatever an answer does to the library's rule
        dataset.score_answer(entry["answer"], copy.deepcopy(entry))  # raises too if the answer is not to blame
        return 0.0
    # A rule that takes anything for right (that of game_of_life_halting does) is none: then the text must be the same.
    return 0.0 if score >= 1 and answer != entry["answer"] and _takes(dataset, entry, NONSENSE) else score


def _takes(dataset: Any, entry: dict[str, Any], answer: str) -> bool:
    try:
        return dataset.score_answer(answer, copy.deepcopy(entry)) >= 1
    except Exception:  # noqa: BLE001 - as above
        return False


def _may_score(entry: dict[str, Any], answer: Any) -> bool:
    return entry["metadata"].get("source_dataset") not in _SYMBOLIC or is_expression(answer)


_SYMBOLIC = (
    "countdown",
    "puzzle24",
    "polynomial_multiplication",
    "simple_integration",
    "intermediate_integration",
)
"""Datasets that hand answers to ``sympy.parse_expr``, which runs them as Python."""
_LITERAL = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
"""Modules that call ``eval`` on answers, to read lists."""
_FUNCTIONS = (
    *("sqrt", "exp", "log", "ln", "Abs", "erf", "pi", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan"),
    *("sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
)


def is_expression(text: str) -> bool:
    """Whether a text holds numbers, one-letter names, common functions, operators and parentheses, and nothing else.

    It is one that can be worked out: of no more than :data:`DIGITS` digits.

    Example:
        >>> [is_expression(text) for text in ("3*x**2 + sin(x)/2 + C", "x.subs", "exec(x)", "'a'", "lambda: 0")]
        [True, False, False, False, False]
    """
    if re.fullmatch(r"[A-Za-z0-9+\-*/^()., \n]*", text) is None or re.search(r"\.[ \n]*[A-Za-z]", text):
        return False
    if not all(len(name) == 1 or name in _FUNCTIONS for name in re.findall(r"[A-Za-z]+", text)):
        return False
    try:
        return _digits(ast.parse(text.strip().replace("^", "**"), mode="eval").body) <= DIGITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


DIGITS = 10_000


def _digits(node: ast.AST) -> float:
    """How many digits the value of an expression has, roughly and at most; a name counts as one."""
    match node:
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            return _digits(base) * 10 ** min(_digits(exponent), 9)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _digits(left) + _digits(right)
        case ast.BinOp(left=left, right=right):
            return max(_digits(left), _digits(right)) + 1
        case ast.Call(args=arguments):
            return sum(map(_digits, arguments)) + 1
        case ast.UnaryOp(operand=operand):
            return _digits(operand)
    return len(str(node.value)) if isinstance(node, ast.Constant) else 1


@lru_cache(maxsize=1)
def _library() -> Any:
    """The library's factory, mended for our purposes in this process."""
    importlib.import_module("reasoning_gym")
    sort_key = importlib.import_module("sympy").default_sort_key
    for name in _LITERAL:
        _module(name).eval = ast.literal_eval
    # These five draw from sets, whose order differs between processes.
    for name in ("algorithmic.isomorphic_strings", "algorithmic.ransom_note"):
        _module(name).list = sorted
    _module("games.knight_swap").frozenset = lambda items: tuple(sorted(items))
    _module("algebra.polynomial_multiplication").list = lambda items: sorted(items, key=sort_key)
    ladder = _module("algorithmic.word_ladder").WordLadderDataset
    neighbours = ladder._get_neighbors
    ladder._get_neighbors = lambda *arguments: sorted(neighbours(*arguments))
    return _module("factory")


def _module(name: str) -> Any:
    return importlib.import_module(f"reasoning_gym.{name}")
