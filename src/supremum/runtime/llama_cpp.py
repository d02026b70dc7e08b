"""llama.cpp, through the prebuilt wheels of `xllamacpp` (its server, called in this process).

Next-token log-probabilities come from the completion endpoint: a prompt of token ids, one token to generate, `n_probs`
candidates "before sampling", which is a softmax over the whole vocabulary, free of biases. The prompt cache makes
growing prefixes of one text cheap. Logs go to stderr.
"""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

from ..errors import SupremumError
from . import Capabilities, Speed, Tolerance

ERRORS_ONLY = 1  # llama.cpp's log verbosity


class LlamaCpp:
    """See `supremum.runtime.Runtime`."""

    name = "llama_cpp"
    capabilities = Capabilities("llama.cpp", rounds=True, compressed=True, budgets=True,
                                floor=Tolerance(kl=1e-3, error=5e-3))  # float16 keys and values

    def __init__(self, path: Path, threads: int = 1, context: int = 1024, cache: tuple[str, str] | None = None) -> None:
        """Load a .gguf file. cache: ggml types of keys and values, float16 by default. Raises SupremumError if xllamacpp is
        missing or refuses the file."""
        try:
            import xllamacpp
        except ImportError as error:
            raise SupremumError("llama.cpp is not installed.", "Run: pip install 'supremum[gguf]'") from error
        self.version = f"xllamacpp {xllamacpp.__version__}"
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = ERRORS_ONLY
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        if cache is not None:
            kinds = [getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}") for name in cache]
            params.cache_type_k, params.cache_type_v = kinds
            flash = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.flash_attn_type = flash  # without it quantised values are refused; with it for all, types alone differ
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise SupremumError(f"{path}: llama.cpp cannot load it ({error})",
                                "Its log above names the reason.") from error

    def _complete(self, tokens: list[int], count: int, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._server.handle_completions(
            {"prompt": list(tokens), "max_tokens": count, "temperature": 0, "cache_prompt": True, **options})
        if "error" in answer:
            raise SupremumError(f"llama.cpp refuses the prompt ({answer['error'].get('message', answer['error'])}).")
        return answer

    def _post(self, endpoint: str, body: dict[str, Any]) -> Any:
        """llama.cpp's own endpoints, which the bindings reach over the loopback interface only."""
        request = urllib.request.Request(f"{self._server.listening_address}/{endpoint}", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is this process
        with opener.open(request) as reply:
            return json.load(reply)

    def tokenize(self, text: str) -> list[int]:
        tokens = self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        return [int(token) for token in tokens]

    def logprobs(self, tokens: list[int], lengths: list[int], count: int) -> list[tuple[list[int], list[float]]]:
        # nothing is reported for a sampled token that ends the text or is part of a character: sample a plain one
        plain = self._post("tokenize", {"content": "a", "add_special": False})["tokens"][-1]
        out = []
        for length in lengths:
            answer = self._complete(tokens[:length], 1, n_probs=count, logprobs=1, logit_bias=[[plain, 1e3]])
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            out.append(([entry["id"] for entry in top], [entry["logprob"] for entry in top]))
        return out

    def speed(self, tokens: list[int], new: int) -> Speed:
        timings = self._complete(tokens, new + 1, ignore_eos=True, cache_prompt=False)["timings"]
        return Speed(prefill=timings["prompt_per_second"], decode=timings["predicted_per_second"])

    def close(self) -> None:
        self._server = None
