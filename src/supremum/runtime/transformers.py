"""Stock Transformers: `from_pretrained` of a folder, on the CPU, in float32.

In float32 the decoded weights are exact, so differences to our own decoding are those of the arithmetic alone. Formats that
the compressed-tensors library decodes to bfloat16 (exactly) would need a bfloat16 model: here the library decodes, and the
model is raised to float32 then; that inputs are rounded stays as stored. The folder is loaded by the class that the model
card names. An encoder without a head answers with a softmax over its last hidden state, one that marks the answer to a
question with its two scores of each token, ELECTRA's with whether each was replaced; a head that gives a text one answer is
asked for each beginning of it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.architecture import auto_class
from ..errors import SupremumError
from ..text.pairs import inputs
from . import Capabilities, Speed, Tolerance


@torch.inference_mode()
def answers(model: Any, tokens: list[int], ends: list[int]) -> torch.Tensor:
    """Logits (P, V) behind each tokens[:end], float32; V is at least 2. Of a pair the ends are those of what is written."""
    output = model(**inputs(torch.tensor([tokens])))
    found = output.get("logits")
    if found is None:
        found = torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else \
            output.last_hidden_state
    if type(model).__name__ == "ElectraForPreTraining":
        found = found[..., None]  # against the zero that is added below: a sigmoid
    if found.ndim == 3:
        found_PV = found[0, torch.tensor(ends) - 1]
    else:
        found_PV = torch.cat([model(input_ids=torch.tensor([tokens[:end]])).logits for end in ends])
    return torch.nn.functional.pad(found_PV.float(), (0, max(0, 2 - found_PV.shape[1])))


def _loader(path: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return getattr(transformers, auto_class((config.architectures or ["?"])[0]))


class Transformers:
    """See `supremum.runtime.Runtime`."""

    name = "transformers"
    capabilities = Capabilities("Transformers", rounds=False, compressed=False, floor=Tolerance(kl=1e-6, error=1e-3))

    def __init__(self, path: Path, threads: int = 1, context: int = 1024) -> None:
        """Load a folder. Raises SupremumError if Transformers refuses it or finds tensors missing or left over."""
        import transformers

        del context  # Transformers takes any length
        torch.set_num_threads(threads)
        self._path = path
        self.version = f"transformers {transformers.__version__}"
        try:
            loaded: Any = _loader(path).from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True)
        except ImportError as error:
            raise SupremumError(f"{path}: {error}", "Run: pip install 'supremum[compressed-tensors]'") from error
        except Exception as error:  # whatever a loader raises is a refusal of this folder
            raise SupremumError(f"{path}: Transformers cannot load it ({type(error).__name__}: {error}).") from error
        self._model: Any
        self._model, report = loaded
        for kind, keys in report.items():
            if keys:
                first = sorted(map(str, keys))[0]
                raise SupremumError(f"{path}: Transformers reports {kind.replace('_', ' ')}, first {first}.")
        self._model.eval()
        compressor = getattr(getattr(self._model, "hf_quantizer", None), "compressor", None)
        if compressor is not None:
            compressor.decompress_model(self._model)
            if self._model.config.is_encoder_decoder:
                from compressed_tensors.offload import remove_dispatch

                remove_dispatch(self._model, onload_tensors=True)  # or `generate` fails: `how_to_run`
            torch.nn.Module.float(self._model)  # Transformers' own refuses where a quantiser was

    @torch.inference_mode()
    def _forward(self, tokens: list[int], **options: Any) -> Any:
        return self._model(input_ids=torch.tensor([tokens]), **options)

    def tokenize(self, text: str) -> list[int]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
        return list(tokenizer(text).input_ids)

    def logprobs(self, tokens: list[int], lengths: list[int], count: int) -> list[tuple[list[int], list[float]]]:
        logits_PV = answers(self._model, tokens, lengths)
        top = logits_PV.log_softmax(-1).topk(min(count, logits_PV.shape[1]))
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def speed(self, tokens: list[int], new: int) -> Speed:
        if self._model.config.is_encoder_decoder:
            return self._speed_of_pairs(tokens, new)
        self._forward(tokens[:8])  # compressed weights are decoded by the first pass
        start = time.perf_counter()
        if not self._model.can_generate():
            self._forward(tokens)
            return Speed(prefill=len(tokens) / (time.perf_counter() - start), decode=0.0)
        out = self._forward(tokens, use_cache=True)
        prefilled = time.perf_counter()
        for _ in range(new):
            token = [int(out.logits[0, -1].argmax())]
            out = self._forward(token, use_cache=True, past_key_values=out.past_key_values)
        return Speed(prefill=len(tokens) / (prefilled - start), decode=new / (time.perf_counter() - prefilled))

    @torch.inference_mode()
    def _speed_of_pairs(self, tokens: list[int], new: int) -> Speed:
        """Of an encoder-decoder: the encoder reads the tokens, the decoder writes."""
        ids = torch.tensor([tokens])

        def write(source: torch.Tensor, count: int) -> float:
            start = time.perf_counter()
            self._model.generate(source, min_new_tokens=count, max_new_tokens=count, do_sample=False, num_beams=1)
            return time.perf_counter() - start

        write(ids[:, :8], 1)  # compressed weights are decoded by the first pass
        first = write(ids, 1)
        return Speed(prefill=len(tokens) / first, decode=max(new - 1, 1) / max(write(ids, max(new, 2)) - first, 1e-9))

    def close(self) -> None:
        self._model = None
