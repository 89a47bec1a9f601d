"""What a trainer is asked, and the evidence that it leaves: the language between checks and adapters.

An adapter has one method: train on a :class:`Case`, and show of each step what was sampled, what was trained on and what
the gradient was. Cases are small enough for every figure to be computed anew, by :func:`log_probabilities`.

Shapes: B rows of a step, P prompts of G completions each; T tokens of a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.core.policy import no_progress_bar

CHARACTERS = "0123456789+=? "
SPECIAL = ("<eos>", "<pad>", "<bos>", "<end>")
EOS, PAD, BOS, END = range(4)
MERGED = "12"
"""A text that the tokenizer writes as one token, though it has one for each of its characters too."""
VOCAB = len(SPECIAL) + len(CHARACTERS) + 1
CONTEXT = 128

Completions = tuple[tuple[tuple[int, ...], ...], ...]
"""The ids of each turn of each row."""
Baseline = Literal["group", "critic", "none"]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The trainer does not take such a case; the message is its own."""


class Lacks(Exception):  # noqa: N818
    """The trainer has nothing of the kind that is checked; the message says of what kind."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A causal LM of some ten thousand random weights, and what comes with it in its folder."""

    family: Literal["llama", "gpt2"] = "llama"
    """GPT-2 has learned positions, Llama rotary ones"""
    dropout: float = 0.0
    """of GPT-2"""
    pad: Literal["eos", "own"] = "eos"
    """the tokenizer's padding token"""
    eos_ids: tuple[int, ...] = (EOS,)
    """in the generation config"""
    bos: bool = False
    """the tokenizer puts a beginning-of-sequence token before plain text"""
    template: str | None = None
    """chat template; without one, prompts are plain text"""
    generation: tuple[tuple[str, Any], ...] = ()
    """what else the generation config recommends"""
    spare_logits: int = 0
    """width of the logits beyond the tokenizer's ids"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A short training. All lists are by rows, the completions of one prompt beside each other."""

    model: Model = Model()
    prompts: tuple[str, ...]
    """of all steps, equally many in each"""
    rewards: tuple[tuple[float | None, ...], ...]
    """of each step's B rows; None is a completion that could not be graded"""
    group: int = 2
    completions: Completions | None = None
    """what the sampler is made to write; by default it samples"""
    reply: str | None = None
    """what the environment says after the first turn"""
    max_new_tokens: int = 8
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    learning_rate: float = 0.0
    aggregation: Aggregation | None = None
    """default the trainer's own"""
    rows_at_once: int | None = None
    """rows of a micro-batch; default all"""
    updates: int = 1
    """optimiser steps on a batch, each on its own share"""
    kl: float = 0.0
    """weight of the KL to the start"""
    lora: bool = False
    lam: float = 1.0
    """of generalised advantage estimates"""
    value: float = 0.0
    """what the critic says of every state to begin with"""
    critic_warmup: int = 0
    """steps in which only the critic learns"""
    sampler_noise: float = 0.0
    """standard deviation of normal noise on the log-probabilities that the sampler reports"""
    killed_after: int | None = None
    """the run dies after this many steps, and is resumed from its checkpoint"""

    @property
    def steps(self) -> int:
        return len(self.rewards)

    @property
    def prompts_per_step(self) -> int:
        return len(self.prompts) // self.steps

    @property
    def rows(self) -> int:
        """B."""
        return self.prompts_per_step * self.group


@dataclass(frozen=True)
class Row:
    """A completion with its prompt, as it was trained on. Arrays are ``(T,)``, without padding."""

    sent: list[int]
    """the ids that the sampler was given"""
    written: tuple[list[int], ...]
    """the ids that it wrote, turn by turn"""
    tokens_T: np.ndarray
    sampled_T: np.ndarray
    """bool: what the trainer takes for the policy's own choice"""
    logp_T: np.ndarray
    """log-probabilities by which the trainer learns; NaN where it took none"""
    ratio_T: np.ndarray
    """their ratio to the old policy's; NaN as above"""
    advantage_T: np.ndarray
    """as the loss has them; 0 where nothing was trained"""
    credit_T: np.ndarray
    """minus the derivative of the loss by each log-probability"""
    behaviour_T: np.ndarray | None = None
    """log-probabilities reported by the sampler, if the trainer keeps them"""
    reward_T: np.ndarray | None = None
    """each token's reward, if it has one of its own"""

    @property
    def own_T(self) -> np.ndarray:
        """Bool: where what the sampler wrote stands: the first turn after the prompt, the last at the end."""
        own_T = np.zeros(len(self.tokens_T), dtype=bool)
        own_T[len(self.sent) : len(self.sent) + len(self.written[0])] = True
        if len(self.written) > 1:
            own_T[len(own_T) - len(self.written[-1]) :] = True
        return own_T


@dataclass(frozen=True)
class Step:
    """What one training step leaves."""

    weights: Mapping[str, Tensor]
    """before it, adapters merged, named as the model's folder has them"""
    rows: list[Row]
    gradient: Mapping[str, Tensor]
    """of the first update's loss, before clipping; empty if nothing was trained"""
    logged: Mapping[str, float]
    """the trainer's metrics; where they exist under these names: ``reward``, ``new_tokens`` (mean of a completion),
    ``cut_share``, ``flat_groups`` (shares of completions and groups), ``logp_gap``, ``logp_gap_max``, ``value_loss``,
    ``explained_variance``"""


@dataclass(frozen=True)
class Run:
    """A training: its steps, and the weights after the last."""

    steps: list[Step]
    weights: Mapping[str, Tensor]


class Trainer(Protocol):
    """An adapter.

    Attributes:
        name: heads its column.
        baseline: what a reward is compared with: the rewards of its group, a critic, or nothing.
        aggregations: ways to average the loss that it can be set to.
        choices: numbers of traps whose behaviour it documents as its choice, and how.
    """

    name: str
    baseline: Baseline
    aggregations: tuple[Aggregation, ...]
    choices: Mapping[int, str]

    def train(self, case: Case) -> Run:
        """Train on a case, on the CPU in float32, with a constant learning rate and no bound on the gradient.

        Raises:
            Refused: the trainer's own error for a case that it does not take.
            Lacks: it has nothing of the kind.
        """
        ...


@dataclass
class Remembering:
    """A trainer that trains on each case once, however many checks look at it."""

    trainer: Trainer
    _runs: dict[Case, Run] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def train(self, case: Case) -> Run:
        if case not in self._runs:
            self._runs[case] = self.trainer.train(case)
        return self._runs[case]


# Models -----------------------------------------------------------------------------------------------------------


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="textenv-conform-")


@cache
def folder_of(model: Model) -> Path:
    """A transformers folder with the model and its tokenizer, made when first asked for."""
    from transformers import GenerationConfig

    folder = Path(_home().name) / str(len(list(Path(_home().name).iterdir())))
    language_model = _build(model)
    eos_ids = model.eos_ids[0] if len(model.eos_ids) == 1 else list(model.eos_ids)
    recommended = {name: list(x) if isinstance(x, tuple) else x for name, x in model.generation}
    language_model.generation_config = GenerationConfig(eos_token_id=eos_ids, **recommended)
    with no_progress_bar():
        language_model.save_pretrained(folder)
    tokenizer_of(model).save_pretrained(folder)
    return folder


def _build(model: Model) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB + model.spare_logits,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if model.family == "gpt2":
            sizes |= {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": CONTEXT}
            sizes |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), model.dropout)
            built: Any = GPT2LMHeadModel(GPT2Config(**sizes))
        else:
            sizes |= {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
            sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
            built = LlamaForCausalLM(LlamaConfig(**sizes))
        for parameter in built.parameters():
            if parameter.dim() > 1:  # large enough for the distributions to have a shape
                torch.nn.init.normal_(parameter, std=0.2)
    return built


@cache
def tokenizer_of(model: Model) -> Any:
    """The transformers tokenizer of a model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: i for i, text in enumerate([*SPECIAL, *CHARACTERS, MERGED])}
    backend = Tokenizer(models.BPE(vocabulary, [(MERGED[0], MERGED[1])]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    if model.bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<eos>" if model.pad == "eos" else "<pad>",
        bos_token="<bos>" if model.bos else None,
        chat_template=model.template,
        clean_up_tokenization_spaces=False,
    )


def ids(text: str, *ends: int) -> tuple[int, ...]:
    """A token for each character, and the special tokens after them."""
    return (*(len(SPECIAL) + CHARACTERS.index(character) for character in text), *ends)


# The independent computation ---------------------------------------------------------------------------------------


def load(model: Model, weights: Mapping[str, Tensor]) -> Any:
    """The model with these weights, in double precision and without dropout."""
    from transformers import AutoModelForCausalLM

    with no_progress_bar():
        loaded = AutoModelForCausalLM.from_pretrained(folder_of(model), dtype=torch.float64).eval()
    loaded.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    return loaded


def log_probabilities(loaded: Any, tokens_T: np.ndarray, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probability of each token of a row that is scored alone, ``(T,)``, differentiable; the first one's is 0.

    Only the tokenizer's ids have any probability; with ``top_k`` only the k likeliest of them.
    """
    tokens_1T = torch.as_tensor(tokens_T).unsqueeze(0)
    logits_TV = loaded(input_ids=tokens_1T, use_cache=False).logits[0, :-1, :VOCAB] / temperature
    if top_k:
        logits_TV = logits_TV.masked_fill(logits_TV < logits_TV.topk(top_k).values[:, -1:], -torch.inf)
    logp_T = logits_TV.log_softmax(dim=1).gather(1, tokens_1T[0, 1:, None]).squeeze(1)
    return torch.cat([logp_T.new_zeros(1), logp_T])
