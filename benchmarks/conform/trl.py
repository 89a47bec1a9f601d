"""The adapters of TRL's GRPO and RLOO: real runs of ``train``, with a scripted sampler and eyes on loss and gradient."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.core.policy import no_progress_bar
from benchmarks.conform.cases import Aggregation, Baseline, Case, Lacks, Row, Run, Step, folder_of

NAMES = {
    "completions/mean_length": "new_tokens",
    "completions/clipped_ratio": "cut_share",
    "frac_reward_zero_std": "flat_groups",
}
LOSS_TYPES: Mapping[Aggregation, str] = {"token_mean": "dapo", "sequence_mean": "grpo", "constant": "dr_grpo"}
DROPOUT = "disable_dropout=False is the documented default"


class TRL:
    """What both adapters share.

    Raises:
        ImportError: TRL is not installed.
    """

    name: str
    baseline: Baseline = "group"
    aggregations: tuple[Aggregation, ...]
    choices: Mapping[int, str] = {21: DROPOUT}

    def __init__(self) -> None:
        if find_spec("trl") is None:
            raise ImportError(f"{self.name} needs TRL: pip install 'textenv[trl]'")

    def classes(self) -> tuple[Any, Any]:
        """TRL's trainer and its config."""
        raise NotImplementedError

    def own_settings(self, case: Case) -> dict[str, Any]:
        """What only this trainer's config has."""
        raise NotImplementedError

    def train(self, case: Case) -> Run:
        if case.sampler_noise:
            raise Lacks("log-probabilities from its sampler")
        if case.reply is not None and not _takes_rollouts(self.classes()[0]):
            raise Lacks("several turns")
        with tempfile.TemporaryDirectory() as folder, _silence():
            watch = Watch(case)
            trainer = self._trainer(case, folder, watch, dies=case.killed_after is not None)
            with contextlib.suppress(Killed):
                trainer.train()
            if case.killed_after is not None:
                trainer = self._trainer(case, folder, watch)
                trainer.train(resume_from_checkpoint=True)
            return Run(watch.steps, _state(trainer.model))

    def _trainer(self, case: Case, folder: str, watch: Watch, dies: bool = False) -> Any:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        trainer_class, config_class = self.classes()
        source = folder_of(case.model)
        rows_at_once = case.rows_at_once or case.rows // case.updates
        parts = case.rows // rows_at_once
        config = config_class(
            output_dir=folder,
            seed=case.seed,
            max_steps=case.steps * case.updates,
            per_device_train_batch_size=rows_at_once,
            steps_per_generation=parts,
            gradient_accumulation_steps=parts // case.updates,
            num_generations=case.group,
            max_completion_length=case.max_new_tokens,
            temperature=case.temperature,
            top_k=case.top_k,
            beta=case.kl,
            learning_rate=case.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=1e30,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no" if case.killed_after is None else "steps",
            save_steps=case.updates,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **self.own_settings(case),
        )
        prompts: list[Any] = list(case.prompts)
        if case.model.template is not None:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return _watched(trainer_class)(
            model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
            reward_funcs=watch.reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=_lora() if case.lora else None,
            callbacks=[_callback(watch, dies)],
            watch=watch,
            **({} if case.reply is None else {"rollout_func": watch.roll_out}),
        )


class GRPO(TRL):
    """``trl.GRPOTrainer``."""

    name = "trl-grpo"
    aggregations = tuple(LOSS_TYPES)

    def classes(self) -> tuple[Any, Any]:
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig

    def own_settings(self, case: Case) -> dict[str, Any]:
        return {} if case.aggregation is None else {"loss_type": LOSS_TYPES[case.aggregation]}


class RLOO(TRL):
    """``trl.RLOOTrainer``."""

    name = "trl-rloo"
    aggregations = ("sequence_sum",)

    def classes(self) -> tuple[Any, Any]:
        from trl import RLOOConfig, RLOOTrainer

        return RLOOTrainer, RLOOConfig

    def own_settings(self, case: Case) -> dict[str, Any]:
        return {}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what TRL prints, draws and warns of."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with no_progress_bar(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _takes_rollouts(trainer_class: Any) -> bool:
    """Whether it has a seam for several turns, and room for the sampler's log-probabilities."""
    return "rollout_func" in inspect.signature(trainer_class.__init__).parameters


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


# What is seen -------------------------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    """The run dies here."""


class Watch:
    """Collects the steps of a case while a trainer trains."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps: list[Step] = []
        self.weights: dict[str, Tensor] = {}
        self.gradient: dict[str, Tensor] | None = None

    def reward(self, completions: list[Any], **_: Any) -> list[float | None]:
        """The rewards of a case, whatever was written."""
        return list(self.case.rewards[len(self.steps)])

    def roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Several turns, by the seam that TRL has for them."""
        assert self.case.completions is not None
        assert self.case.reply is not None
        reply = trainer.processing_class.encode(self.case.reply, add_special_tokens=False)
        self.sent = [list(sent) for sent in trainer._tokenize_prompts(prompts)[0]]
        self.written = [tuple(list(turn) for turn in turns) for turns in self.case.completions]
        return {
            "prompt_ids": self.sent,
            "completion_ids": [[*first, *reply, *second] for first, second in self.written],
            "logprobs": None,
            "env_mask": [[1] * len(first) + [0] * len(reply) + [1] * len(second) for first, second in self.written],
        }

    def note_rollout(self, output: dict[str, Tensor]) -> None:
        """What the loss is to get, before it is shuffled."""
        self.output = {name: x.clone() for name, x in output.items() if isinstance(x, Tensor)}
        shape = output["completion_ids"].shape
        self.logp_BC, self.ratio_BC = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.credit_BC = torch.zeros(shape)
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def note_loss(self, inputs: dict[str, Tensor], logp_RC: Tensor) -> None:
        """A micro-batch, as the loss has just scored it."""
        logp_RC.retain_grad()
        if "old_logps" in inputs:  # of whole sequences
            own_RC = inputs["completion_mask"].bool()
            ratio_R = ((logp_RC.detach() * own_RC).sum(dim=1) - inputs["old_logps"]).exp()
            ratio_RC = ratio_R.unsqueeze(1).expand(logp_RC.shape)
        else:
            ratio_RC = (logp_RC - inputs.get("old_per_token_logps", logp_RC)).detach().exp()
        self.parts.append((inputs["row"], logp_RC, ratio_RC))

    def note_gradients(self, model: Any) -> None:
        """The end of an update's backward passes."""
        for rows, logp_RC, ratio_RC in self.parts:
            width = logp_RC.shape[1]
            self.logp_BC[rows, :width], self.ratio_BC[rows, :width] = logp_RC.detach(), ratio_RC
            assert logp_RC.grad is not None
            self.credit_BC[rows, :width] = -logp_RC.grad
        self.parts = []
        if self.gradient is None:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def end_step(self, logs: dict[str, float]) -> None:
        logged = {NAMES.get(name, name): value for name, value in logs.items()}
        rows = [self._row(i) for i in range(self.case.rows)]
        self.steps.append(Step(self.weights, rows, self.gradient or {}, logged))
        self.gradient = None

    def _row(self, i: int) -> Row:
        output = self.output
        prompt = output["prompt_ids"][i][output["prompt_mask"][i].bool()]
        # What is written but masked is kept, so that a mask that is too short can be seen.
        size = max(self.sizes[i], int(output["completion_mask"][i].sum()))
        own_C = output["completion_mask"][i] * output.get("tool_mask", torch.ones_like(output["completion_mask"]))[i]
        sampled_C = own_C[:size].bool()

        def whole(x_C: Tensor, before: float) -> np.ndarray:
            return torch.cat([torch.full((len(prompt),), before, dtype=x_C.dtype), x_C[:size]]).numpy()

        return Row(
            sent=self.sent[i],
            written=self.written[i],
            tokens_T=torch.cat([prompt, output["completion_ids"][i][:size]]).numpy(),
            sampled_T=whole(sampled_C, False),
            logp_T=whole(self.logp_BC[i][:size].masked_fill(~sampled_C, torch.nan), torch.nan),
            ratio_T=whole(self.ratio_BC[i][:size].masked_fill(~sampled_C, torch.nan), torch.nan),
            advantage_T=whole(output["advantages"][i] * sampled_C, 0.0),
            credit_T=whole(self.credit_BC[i], 0.0),
        )

    @property
    def sizes(self) -> list[int]:
        """Tokens of each completion, replies included."""
        reply = int(self.output["tool_mask"][0].eq(0).sum()) if "tool_mask" in self.output else 0
        return [sum(map(len, turns)) + reply for turns in self.written]


def _watched(trainer_class: Any) -> Any:
    """The trainer with its sampler scripted, if the case says so, and its inner figures noted."""

    class Watched(trainer_class):
        def __init__(self, *, watch: Watch, **options: Any) -> None:
            self.watch = watch
            super().__init__(**options)

        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
            case = self.watch.case
            self.watch.sent = [list(sent) for sent in prompt_ids]
            if case.completions is None:
                result = super()._generate_single_turn(prompt_ids, *rest, **options)
                completions = result[0] if isinstance(result, tuple) else result
            else:
                completions = [list(turns[0]) for turns in case.completions]
                result = (completions, None) if _takes_rollouts(trainer_class) else completions
            self.watch.written = [(list(completion),) for completion in completions]
            return result

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            self.watch.weights = _state(self.model)
            output = super()._generate_and_score_completions(inputs)
            output["row"] = torch.arange(len(output["completion_ids"]))
            self.watch.note_rollout(output)
            return output

        def _get_per_token_logps_and_entropies(self, *arguments: Any, **options: Any) -> Any:
            self.scored = super()._get_per_token_logps_and_entropies(*arguments, **options)
            return self.scored

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            loss = super()._compute_loss(model, inputs)
            self.watch.note_loss(inputs, self.scored[0])
            return loss

    return Watched


def _callback(watch: Watch, dies: bool) -> Any:
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            watch.note_gradients(given["model"])

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if "train_runtime" not in given["logs"] and state.global_step % watch.case.updates == 0:
                watch.end_step(given["logs"])

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if dies and len(watch.steps) == watch.case.killed_after:
                raise Killed

    return Callback()


def _state(model: Any) -> dict[str, Tensor]:
    """Its weights as the model's folder names them, adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
