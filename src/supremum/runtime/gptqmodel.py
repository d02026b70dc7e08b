"""GPTQModel (https://github.com/ModelCloud/GPTQModel): its own loader and its PyTorch kernel, on the CPU.

The kernel loads into 16-bit types only. Once loaded, the module is turned to float32: codes and zero points are integers,
the scales that we write are numbers of both 16-bit types, so differences to our own decoding are those of the arithmetic
alone (measured on models stored in bfloat16: none). What a model stores in float32 is rounded by the loading.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import SupremumError
from . import Capabilities, Tolerance
from .transformers import Transformers


class GPTQModel(Transformers):
    """See `supremum.runtime.Runtime`; once loaded it is a Transformers model."""

    name = "gptqmodel"
    capabilities = Capabilities("GPTQModel", rounds=False, compressed=True, floor=Tolerance(kl=1e-5, error=5e-3),
                                package="gptqmodel")

    def __init__(self, path: Path, threads: int = 1, context: int = 1024) -> None:
        """Load a folder. Raises SupremumError if gptqmodel is missing or refuses it."""
        del context  # it takes any length
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.7 asks for two workers of pools that have (cores + 1) // 2
        try:
            import gptqmodel
            from transformers import AutoConfig
        except ImportError as error:
            raise SupremumError(f"GPTQModel is not installed ({error}).", f"Run: pip install {error.name}") from error
        torch.set_num_threads(threads)
        self._path = path
        self.version = f"gptqmodel {gptqmodel.__version__}"
        try:
            stored = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).dtype
            dtype = stored if stored in (torch.float16, torch.bfloat16) else torch.float16
            loaded = gptqmodel.GPTQModel.load(str(path), device="cpu", dtype=dtype, backend=gptqmodel.BACKEND.GPTQ_TORCH)
        except Exception as error:  # whatever a loader raises is a refusal of this folder
            raise SupremumError(f"{path}: GPTQModel cannot load it ({type(error).__name__}: {error}).") from error
        self._model: Any = loaded.model.float().eval()
