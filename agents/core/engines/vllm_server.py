"""Generation by a vLLM server on this machine, whose weights are replaced through a folder that both can see."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from agents.core.engines.base import Sampling
from agents.core.engines.vllm import SUPPORTED, BaseVLLMEngine
from agents.core.policy import Policy

COMMAND = (
    "VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model FOLDER --host 127.0.0.1 "
    "--logprobs-mode processed_logprobs --generation-config vllm"
)
"""How the server is started, FOLDER being the policy as :meth:`agents.core.policy.Policy.save` writes it."""
CONCURRENCY = 64
"""Requests under way at once; further ones wait their turn."""
FORBIDDEN = -100.0
"""What is added to the logits of ids that stand for no text: the least that a server takes."""


class VLLMServerEngine(BaseVLLMEngine):
    """A vLLM server, started by the user with the same model::

        VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model FOLDER --host 127.0.0.1 \\
            --logprobs-mode processed_logprobs --generation-config vllm

    and on a CPU ``--no-enable-chunked-prefill`` as well, since a long prompt with a seed ends the server otherwise. The server
    is for this engine alone: every sync changes what it answers.

    The server does not say what it did with a parameter: that all have arrived is known by the probe alone, which in float32
    notices a change of 0.001 nats, and without a name.

    The routes that change the weights answer everyone who reaches the server, without a key: it must listen on
    ``127.0.0.1``, or on a network that nobody else is on.

    Args:
        policy: whose weights to use.
        url: of the server, such as ``http://127.0.0.1:8000``.
        folder: where the weights are written for the server to read; one that both can see, in memory if possible. Default
            the folder for temporary files.
        context: most tokens of a prompt and its completion together; default the policy's. The server must take as many.
        dtype: in which the server computes; default the policy's.
        timeout: seconds within which one request must be answered.

    Raises:
        ValueError: an option makes no sense.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        url: str,
        folder: str | Path | None = None,
        context: int | None = None,
        dtype: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(policy, dtype, context)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url looks like 'http://127.0.0.1:8000', got {url!r}")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"folder must be one that this process and the server can see, got {str(folder)!r}")
        if timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.folder, self.timeout = folder, timeout

    def _start(self, policy: Policy) -> None:
        # A proxy of the environment is for other machines.
        client = httpx2.Client(base_url=self.url, timeout=self.timeout, trust_env=False)
        self._client = self._held.enter_context(client)
        self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="textenv-", dir=self.folder)))
        version = self._send("GET", "/version")["version"]
        if not SUPPORTED.contains(version, prereleases=True):
            raise RuntimeError(f"the server runs vLLM {version}, and the engine is written for {SUPPORTED}")
        (model, *_) = self._send("GET", "/v1/models")["data"]
        if self.context is not None and model["max_model_len"] < self.context:
            raise RuntimeError(
                f"the server takes {model['max_model_len']} tokens of context and the policy's is {self.context}; "
                "start the server with a larger --max-model-len, or give the engine that as context"
            )
        self._model = model["id"]
        self._check_logprobs(policy.tokenizer.eos_ids[0])

    def _check_logprobs(self, token: int) -> None:
        """See that log-probabilities are those of the distribution drawn from.

        Raises:
            RuntimeError: they are others.
        """
        # All but certain by its bias, a token is so by a log-probability of what is drawn from, and by no other.
        for other in (token, token + 1):
            _, logp = self._complete([token], 1, 0, Sampling(max_new_tokens=1), {other: -FORBIDDEN})
            if logp[0] < -1:
                raise RuntimeError(
                    f"the server gives log-probabilities of another distribution than it draws from; start it so: {COMMAND}"
                )

    def _load(self, policy: Policy, state: dict[str, Tensor]) -> None:
        # Clones, since tied weights share their memory, which the format does not allow.
        weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
        save_file(weights, self._folder / "model.safetensors")
        reload = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
        self._send("POST", "/collective_rpc", reload)
        emptied = self._send("POST", "/reset_prefix_cache")
        if emptied is not None and not emptied["success"]:
            raise RuntimeError("the server's prefix cache could not be emptied: somebody else has requests under way")

    def _answers(
        self, prompts_B: Sequence[Sequence[int]], budget_B: np.ndarray, seed_B: np.ndarray, sampling: Sampling
    ) -> Generator[tuple[int, Sequence[int], Sequence[float]]]:
        bias = dict.fromkeys(self._bias, FORBIDDEN)
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            with self._fatal("generation"):
                rows = {
                    pool.submit(self._complete, prompt, int(budget_B[row]), int(seed_B[row]), sampling, bias): row
                    for row, prompt in enumerate(prompts_B)
                }
            for future in as_completed(rows):
                with self._fatal("generation"):
                    ids, logp = future.result()
                yield rows[future], ids, logp
        finally:  # also when whoever reads has had enough
            pool.shutdown(cancel_futures=True)

    def _complete(
        self, prompt: Sequence[int], budget: int, seed: int, sampling: Sampling, bias: dict[int, float]
    ) -> tuple[Sequence[int], Sequence[float]]:
        """Ids and log-probabilities of one completion."""
        body = {
            "model": self._model,
            "prompt": list(map(int, prompt)),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "seed": seed,
            "max_tokens": budget,
            "stop_token_ids": self._stop_ids(sampling),
            "ignore_eos": True,
            "logit_bias": {str(i): value for i, value in bias.items()},
            "logprobs": 0,
            "return_token_ids": True,
        }
        (choice,) = self._send("POST", "/v1/completions", body)["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def _send(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, None for an empty answer.

        Raises:
            RuntimeError: it refuses.
        """
        response = self._client.request(method, route, json=body)
        if response.status_code == httpx2.codes.NOT_FOUND and not route.startswith("/v1"):
            raise RuntimeError(f"the server at {self.url} does not have {route}; start it so: {COMMAND}")
        if response.is_error:
            raise RuntimeError(
                f"the server at {self.url} answers {route} by {response.status_code}: {response.text[:500]}"
            )
        return response.json() if response.content else None
