"""Stock Transformers opens an archive: a quantiser that decodes each matrix while the model is loaded.

    import supremum
    AutoModelForCausalLM.from_pretrained("small")        # config.json: quantization_config.quant_method = "supremum"

Transformers finds quantisers by that name in a table of its own, which `register` adds to. `import supremum` does not
load Transformers for it: `when_imported` waits until somebody does.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

METHOD = "supremum"
PLACE = "transformers.modeling_utils"  # where Transformers loads models; its quantisers are there by then


def register() -> None:
    """Make `quant_method: supremum` known to Transformers."""
    import torch
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    class ArchiveConfig(QuantizationConfigMixin):
        """`quantization_config` of an archive."""

        def __init__(self, quant_method: str = METHOD, version: int = 0, **kwargs: Any) -> None:
            self.quant_method: Any = quant_method
            self.version = version

    class Decode(ConversionOps):
        """A matrix from its stream; the archive itself reads it, as it holds what all streams share."""

        def __init__(self, quantizer: ArchiveQuantizer) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            name, model = kwargs["full_layer_name"], kwargs["model"]
            prefix = f"{model.base_model_prefix}."  # of the trunk's tensors, in a model with a head alone
            stored = next((other for other in (name, prefix + name, name.removeprefix(prefix))
                           if other in self.quantizer.store.entries), name)
            with torch.device("cpu"):
                weight = self.quantizer.store.read(stored)
            return {name: weight.to(model.get_parameter(name).dtype)}

    class ArchiveQuantizer(HfQuantizer):
        """Decodes to the floats that the model is loaded in."""

        requires_calibration = True  # there is nothing to quantise on the fly
        store: Any

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
            files = [Path(file) for file in checkpoint_files]
            settings = {"version": getattr(self.quantization_config, "version", None)}
            with torch.device("cpu"):  # Transformers calls this where new tensors, a module's too, are on the meta device
                from .archive import ArchiveStore
                from .hf import SafetensorsStore
                from .safetensors_file import SafetensorsFile

                self.store = ArchiveStore(SafetensorsStore([SafetensorsFile(file) for file in files]), settings,
                                          files[0].with_name("config.json"))
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), r"^archive\."}

        def get_weight_conversions(self) -> list[Any]:
            return [WeightConverter(["weight.codes", "weight.rest", "weight.escapes"], "weight", [Decode(self)])]

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False  # the model holds floats now; what was read stands where it was

        @property
        def is_trainable(self) -> bool:
            return True

    auto.register_quantization_config(METHOD)(ArchiveConfig)
    auto.register_quantizer(METHOD)(ArchiveQuantizer)


class _AfterImport(MetaPathFinder, Loader):
    """Runs `register` once PLACE has been imported by anyone."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != PLACE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if self._loader else None

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None and module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()


def when_imported() -> None:
    """Register now if Transformers is there, else as soon as it is."""
    if PLACE in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
