"""The transition rule: N episodes of one task side by side.

Every view drives this one class: the vector environments directly, a single environment as N = 1, agents through
:meth:`Episodes.extend`. Arrays: N episodes, T context positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import IntEnum
from typing import Any

import numpy as np

import rewards
from rewards import Sample, Score
from textenv.task import Finish, Problem, Task, Transcript
from textenv.tokenizer import Tokenizer

Snapshot = dict[str, Any]
"""One episode as plain data; JSON as long as the problem's reference and info are."""

_ENDS = (Finish.EOS, Finish.STOP)
_ORDINARY, _REFUSED = 0, 255  # of a token, beside Finish.EOS and Finish.STOP


class Source(IntEnum):
    """Where a token of the context came from. Every mask is derived from it."""

    PAD = 0
    PROMPT = 1
    SAMPLED = 2
    REPLY = 3


# Read for every episode of every batch, where looking a member up in its enum is what takes longest.
_SAMPLED = int(Source.SAMPLED)
_FINISH_LABELS = [finish.label for finish in Finish]


class Episodes:
    """N episodes of ``task`` as arrays.

    Args:
        task: what is asked.
        num: N.
        tokenizer: default the task's own.
        reward: anything :func:`rewards.as_reward` takes; default the task's own.
        vocab_size: V, the width of the model's logits; default the tokenizer's. Ids without text are refused.
        split: ``train`` or ``eval``.
        scored: whether the reward is called when an episode ends; if not, whoever plays writes ``scores``.

    Attributes:
        tokens_NT: int64, the context, right-padded with 0.
        source_NT: uint8, the :class:`Source` of each token.
        length_N: int64, tokens in the context.
        limit_N: int64, the length at which the completion under way is cut.
        done_N: bool.
        finish_N: uint8, the :class:`textenv.Finish` of the last completion.
        problems, scores: per episode; a score is None until the episode is done.

    Raises:
        ValueError: a vocabulary smaller than the tokenizer's ids, a stop text that is not one token, a context that no
            completion fits in, or a task with replies but no turns for them.
    """

    def __init__(
        self,
        task: Task,
        num: int,
        *,
        tokenizer: Tokenizer | None = None,
        reward: Any = None,
        vocab_size: int | None = None,
        split: str = "train",
        scored: bool = True,
    ) -> None:
        self.task = task
        self.num = num
        self.tokenizer = tokenizer or task.tokenizer()
        self.reward = rewards.as_reward(task.reward if reward is None else reward)
        self.vocab_size = self.tokenizer.vocab_size if vocab_size is None else vocab_size
        self.split = split
        self.scored = scored
        _check_task(task)
        self._kind_V = _token_kinds(self.tokenizer, task, self.vocab_size)
        self._ends_V = np.isin(self._kind_V, _ENDS)

        self.tokens_NT = np.zeros((num, task.max_tokens), dtype=np.int64)
        self.source_NT = np.zeros((num, task.max_tokens), dtype=np.uint8)
        self.length_N = np.zeros(num, dtype=np.int64)
        self.start_N = np.zeros(num, dtype=np.int64)
        """where the completion under way starts"""
        self.limit_N = np.zeros(num, dtype=np.int64)
        self.done_N = np.ones(num, dtype=bool)
        self.finish_N = np.zeros(num, dtype=np.uint8)
        self.problems: list[Problem] = [Problem("")] * num
        self.scores: list[Score | None] = [None] * num
        self.completions: list[list[str]] = [[] for _ in range(num)]
        self.replies: list[list[str]] = [[] for _ in range(num)]
        self.episode_seeds: list[tuple[int, ...]] = [()] * num
        self._every_row = np.arange(num)

    # Beginning ------------------------------------------------------------------------------------------------

    def begin(self, rows: Sequence[int], problems: Sequence[Problem], seeds: Sequence[tuple[int, ...]]) -> None:
        """Start an episode on each problem. ``seeds`` are for the randomness of replies.

        Raises:
            ValueError: a prompt too long for the context.
        """
        prompts = self._encode_prompts(problems)
        self.tokens_NT[rows], self.source_NT[rows] = 0, Source.PAD
        self.length_N[rows] = [len(ids) for ids in prompts]
        for n, problem, seed, ids in zip(rows, problems, seeds, prompts, strict=True):
            self.tokens_NT[n, : len(ids)] = ids
            self.source_NT[n, : len(ids)] = Source.PROMPT
            self.problems[n], self.episode_seeds[n] = problem, seed
            self.completions[n], self.replies[n], self.scores[n] = [], [], None
        self.done_N[rows] = False
        self.finish_N[rows] = Finish.NONE
        self._begin_completion(np.asarray(rows))

    def check_prompts(self) -> None:
        """Encode the prompts that the task can preview, so that one that does not fit is known before anything slow.

        Raises:
            ValueError: a prompt too long for the context, or with text that the tokenizer has no token for.
        """
        for problem in self.task.preview(self.split):
            self._encode_prompt(problem)

    def _encode_prompts(self, problems: Sequence[Problem]) -> list[np.ndarray]:
        encoded: list[np.ndarray] = []
        for i, problem in enumerate(problems):
            same = i > 0 and problem is problems[i - 1]  # the members of a group stand side by side
            encoded.append(encoded[-1] if same else self._encode_prompt(problem))
        return encoded

    def _encode_prompt(self, problem: Problem) -> np.ndarray:
        ids = self.tokenizer.encode_prompt(problem.prompt, self.task.system)
        room = self.task.max_tokens - self.task.max_new_tokens
        if len(ids) > room:
            raise ValueError(
                f"the prompt {problem.prompt[:50]!r} is {len(ids)} tokens long, but the context of "
                f"max_tokens={self.task.max_tokens} has room for {room} beside a completion of "
                f"max_new_tokens={self.task.max_new_tokens}; raise max_tokens or shorten the prompt"
            )
        return np.array(ids, dtype=np.int64)

    def _begin_completion(self, rows: np.ndarray) -> None:
        self.start_N[rows] = self.length_N[rows]
        self.limit_N[rows] = np.minimum(self.start_N[rows] + self.task.max_new_tokens, self.task.max_tokens)

    # Going on -------------------------------------------------------------------------------------------------

    def step(self, action_N: np.ndarray) -> np.ndarray:
        """Append one token to every episode that is not done; the actions of the others are ignored.

        Returns:
            reward_N, float64: the score of the episodes that this token ended, else 0.

        Raises:
            ValueError: not one id an episode, an id outside the vocabulary, or one that stands for no text. Nothing changed.
        """
        action_N = _as_ids(action_N)
        if len(action_N) != self.num:
            raise ValueError(f"step takes a token for each of the {self.num} episodes, got {len(action_N)}")
        rows = np.flatnonzero(~self.done_N) if self.done_N.any() else self._every_row
        action = action_N[rows]
        kind = self._kinds(action)
        length = self.length_N[rows]
        self.tokens_NT[rows, length] = action
        self.source_NT[rows, length] = Source.SAMPLED
        length += 1
        self.length_N[rows] = length
        ended = (kind != _ORDINARY) | (length == self.limit_N[rows])
        return self._end_completions(rows[ended], kind[ended]) if ended.any() else np.zeros(self.num)

    def extend(self, completions: Sequence[np.ndarray], rows: Sequence[int] | None = None) -> np.ndarray:
        """Append one whole completion to each of ``rows`` (default: all). What follows its end is ignored.

        Returns:
            reward_N, float64, as :meth:`step`.

        Raises:
            ValueError: not one completion an episode; an episode that is done; a completion that neither ends nor fills its
                budget; a refused id. Nothing changed.
        """
        row_R = self._every_row if rows is None else np.asarray(rows, dtype=np.int64)
        if len(completions) != len(row_R):
            raise ValueError(f"extend takes a completion for each of the {len(row_R)} episodes, got {len(completions)}")
        if self.done_N[row_R].any():
            done = row_R[self.done_N[row_R]][0]
            raise ValueError(f"episode {done} is done; reset it before the next completion")
        given = [_as_ids(completion) for completion in completions]
        count_R = np.array([len(ids) for ids in given], dtype=np.int64)
        # The tokens of all completions side by side: whose each is, and which of its.
        token_M = np.concatenate([np.zeros(0, dtype=np.int64), *given])
        row_M = np.repeat(np.arange(len(row_R)), count_R)
        column_M = np.arange(len(token_M)) - (count_R.cumsum() - count_R)[row_M]

        room_R = self.limit_N[row_R] - self.length_N[row_R]
        size_R = self._sizes(token_M, row_M, column_M, room_R)
        # Ids after the end do not count, so they are not looked at either: negative ones and ids without text included.
        kept_M = column_M < size_R[row_M]
        token_M, row_M, column_M = token_M[kept_M], row_M[kept_M], column_M[kept_M]
        kind_M = self._kinds(token_M)
        if (count_R < size_R).any():
            short = np.flatnonzero(count_R < size_R)[0]
            raise ValueError(
                f"a completion ends with an end-of-sequence token or fills its budget of {room_R[short]} tokens, "
                f"got {count_R[short]} tokens without an end"
            )
        place = row_R[row_M], self.length_N[row_R][row_M] + column_M
        self.tokens_NT[place], self.source_NT[place] = token_M, Source.SAMPLED
        self.length_N[row_R] += size_R
        return self._end_completions(row_R, kind_M[size_R.cumsum() - 1])

    def _sizes(self, token_M: np.ndarray, row_M: np.ndarray, column_M: np.ndarray, room_R: np.ndarray) -> np.ndarray:
        """How many tokens of each completion count: those up to its first end, or as many as there is room for."""
        inside_M = np.minimum(np.maximum(token_M, 0), self.vocab_size - 1)
        end_M = np.flatnonzero(self._ends_V[inside_M])
        size_R = room_R.copy()
        np.minimum.at(size_R, row_M[end_M], column_M[end_M] + 1)
        return size_R

    def _kinds(self, tokens: np.ndarray) -> np.ndarray:
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise ValueError(f"a token is an id from 0 to {self.vocab_size - 1}, got {outside}")
        kind = self._kind_V[tokens]
        if (kind == _REFUSED).any():
            raise ValueError(
                f"the token id {tokens[kind == _REFUSED][0]} stands for no text in the tokenizer {self.tokenizer.name!r}; "
                "choose among tokenizer.decodable_V"
            )
        return kind

    # Ending ---------------------------------------------------------------------------------------------------

    def _end_completions(self, rows: np.ndarray, kind: np.ndarray) -> np.ndarray:
        """Close the completions of ``rows``: let the task reply, or end the episode and score it."""
        spent = np.where(
            self.length_N[rows] - self.start_N[rows] == self.task.max_new_tokens, Finish.LENGTH, Finish.CONTEXT
        )
        self.finish_N[rows] = np.where(kind == _ORDINARY, spent, kind)
        ended: list[int] = rows.tolist()
        text_end = (self.length_N[rows] - (kind != _ORDINARY)).tolist()
        for n, start, end in zip(ended, self.start_N[rows].tolist(), text_end, strict=True):
            self.completions[n].append(self.tokenizer.decode(self.tokens_NT[n, start:end].tolist()))
        going_on = {n for n in ended if self.task.turns > 1 and self._reply(n)}
        self._begin_completion(np.array(sorted(going_on), dtype=np.int64))
        over = [n for n in ended if n not in going_on]
        self.done_N[over] = True
        return self._score(over)

    def _reply(self, n: int) -> bool:
        """Append the task's reply to episode ``n``; False when there is none and the episode ends."""
        if len(self.completions[n]) == self.task.turns or self.finish_N[n] == Finish.CONTEXT:
            return False
        reply = self.task.reply(self.transcript(n))
        if reply is None:
            return False
        if not isinstance(reply, str):
            raise ValueError(f"{self.task}.reply() must return text, or None to end the episode, got {reply!r}")
        ids = self.tokenizer.encode_reply(reply, after_eos=self.finish_N[n] == Finish.EOS)
        start, end = self.length_N[n], self.length_N[n] + len(ids)
        if end >= self.task.max_tokens:  # no room for the reply and a word after it
            self.finish_N[n] = Finish.CONTEXT
            return False
        self.tokens_NT[n, start:end] = ids
        self.source_NT[n, start:end] = Source.REPLY
        self.length_N[n] = end
        self.replies[n].append(reply)
        return True

    def _score(self, rows: Sequence[int]) -> np.ndarray:
        reward_N = np.zeros(self.num)
        if len(rows) == 0 or not self.scored:
            return reward_N
        scores = rewards.score_samples(self.reward, [self.sample(n) for n in rows])
        for n, score in zip(rows, scores, strict=True):
            self.scores[n] = score
            reward_N[n] = 0.0 if score.value is None else score.value
        return reward_N

    @property
    def running(self) -> list[int]:
        """The episodes that are not done."""
        return np.flatnonzero(~self.done_N).tolist()

    # Reading --------------------------------------------------------------------------------------------------

    def sample(self, n: int) -> Sample:
        """Episode ``n`` as its reward sees it."""
        problem, sampled_T = self.problems[n], self.source_NT[n, : self.length_N[n]] == _SAMPLED
        return Sample(
            prompt=problem.prompt,
            completion=self.completions[n][-1],
            reference=problem.reference,
            turns=tuple(self.completions[n]),
            tokens=tuple(self.context(n)[sampled_T].tolist()),
            turn_start=int(np.count_nonzero(sampled_T[: self.start_N[n]])),
            decode=self.tokenizer.decode,
            split=self.split,
            finish=_FINISH_LABELS[self.finish_N[n]],
            info=problem.info,
        )

    def credit(self, n: int) -> np.ndarray:
        """The rewards of the tokens that the policy chose in episode ``n``, in order; their sum is the return.

        The reward's own credit if it gave any, else its whole value on the last token.
        """
        score = self.scores[n]
        sampled = int(np.count_nonzero(self.source_NT[n, : self.length_N[n]] == _SAMPLED))
        if score is not None and score.tokens is not None:
            return np.array(score.tokens, dtype=np.float64)
        credit = np.zeros(sampled)
        if score is not None and score.value is not None:
            credit[-1] = score.value
        return credit

    def transcript(self, n: int) -> Transcript:
        """Episode ``n`` as the task sees it."""
        return Transcript(
            self.problems[n],
            tuple(self.completions[n]),
            tuple(self.replies[n]),
            Finish(self.finish_N[n]),
            self.episode_seeds[n],
        )

    def context(self, n: int) -> np.ndarray:
        """The tokens of episode ``n`` so far, a view."""
        return self.tokens_NT[n, : self.length_N[n]]

    def text(self, n: int) -> str:
        """The whole context of episode ``n``, decoded."""
        return self.tokenizer.decode(self.context(n).tolist())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end a completion beside the end-of-sequence ones."""
        return tuple(np.flatnonzero(self._kind_V == Finish.STOP).tolist())

    @property
    def ordinary_ids(self) -> np.ndarray:
        """The token ids that stand for text and end nothing."""
        return np.flatnonzero(self._kind_V == _ORDINARY)

    # Branching ------------------------------------------------------------------------------------------------

    def snapshot(self, n: int) -> Snapshot:
        """Everything about episode ``n``, to :meth:`restore` here or in another process."""
        problem, score, end = self.problems[n], self.scores[n], self.length_N[n]
        return {
            "problem": {"prompt": problem.prompt, "reference": problem.reference, "info": dict(problem.info)},
            "tokens": self.tokens_NT[n, :end].tolist(),
            "source": self.source_NT[n, :end].tolist(),
            "start": int(self.start_N[n]),
            "finish": int(self.finish_N[n]),
            "done": bool(self.done_N[n]),
            "completions": list(self.completions[n]),
            "replies": list(self.replies[n]),
            "episode_seed": list(self.episode_seeds[n]),
            "score": None if score is None else asdict(score),
        }

    def restore(self, n: int, state: Snapshot) -> None:
        """Make episode ``n`` what it was when ``state`` was taken."""
        end = len(state["tokens"])
        self.tokens_NT[n] = 0
        self.source_NT[n] = Source.PAD
        self.tokens_NT[n, :end] = state["tokens"]
        self.source_NT[n, :end] = state["source"]
        self.length_N[n], self.start_N[n] = end, state["start"]
        self.limit_N[n] = min(state["start"] + self.task.max_new_tokens, self.task.max_tokens)
        self.finish_N[n], self.done_N[n] = state["finish"], state["done"]
        self.problems[n] = Problem(**state["problem"])
        self.completions[n], self.replies[n] = list(state["completions"]), list(state["replies"])
        self.episode_seeds[n] = tuple(state["episode_seed"])
        self.scores[n] = None if state["score"] is None else _as_score(state["score"])

    def state_key(self, n: int) -> str:
        """A name for the state of episode ``n``: equal for equal problems and equal contexts, at equal places in a turn."""
        problem, end = self.problems[n], self.length_N[n]
        place = [int(self.start_N[n]), bool(self.done_N[n])]
        named = [problem.prompt, problem.reference, dict(problem.info), place]
        digest = hashlib.blake2b(json.dumps(named, sort_keys=True, default=repr).encode(), digest_size=16)
        digest.update(self.tokens_NT[n, :end].tobytes())
        digest.update(self.source_NT[n, :end].tobytes())
        return digest.hexdigest()


def _as_ids(ids: Any) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"tokens come as a flat array of whole numbers, got {str(ids)[:60]!r} of type {type(ids).__name__}"
        )
    return array.astype(np.int64, copy=False)


def _as_score(state: dict[str, Any]) -> Score:
    tokens = state["tokens"]  # JSON knows no tuples
    return Score(**{**state, "tokens": None if tokens is None else tuple(tokens)})


def _token_kinds(tokenizer: Tokenizer, task: Task, vocab_size: int) -> np.ndarray:
    """What each id does, ``(V,)``: nothing, end the completion (a :class:`Finish`), or be refused."""
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} is smaller than the ids of the tokenizer {tokenizer.name!r}, which go up to "
            f"{tokenizer.vocab_size - 1}; take the width of the logits of a model made for this tokenizer"
        )
    if isinstance(task.stop, str):
        raise ValueError(f"stop must be a sequence of texts, got the text {task.stop!r}; write ({task.stop!r},)")
    kind_V = np.full(vocab_size, _REFUSED, dtype=np.uint8)
    kind_V[: tokenizer.vocab_size][tokenizer.decodable_V] = _ORDINARY
    for text in task.stop:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise ValueError(
                f"a stop text must be one token, but {text!r} is {len(ids)} in the tokenizer {tokenizer.name!r}; "
                "choose one of its tokens"
            )
        kind_V[ids] = Finish.STOP
    kind_V[list(tokenizer.eos_ids)] = Finish.EOS
    return kind_V


def _check_task(task: Task) -> None:
    whole = isinstance(task.max_new_tokens, int) and isinstance(task.max_tokens, int)
    if not (whole and 0 < task.max_new_tokens < task.max_tokens):
        raise ValueError(
            f"{task}: max_tokens={task.max_tokens!r}, the context, must be a whole number larger than "
            f"max_new_tokens={task.max_new_tokens!r}, and that at least 1"
        )
    if task.turns == 1 and type(task).reply is not Task.reply:
        raise ValueError(f"{task} has a reply() but turns=1, so it would never be asked; set turns to 2 or more")
