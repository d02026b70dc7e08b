"""LoRA beside QLoRA on one quantised base: peak memory, speed and loss of the same steps, each in a fresh process.

    python bench/qlora.py RECIPE DATA [--model small/model.gguf] [--steps 12] [--set KEY=VALUE ...]

RECIPE: as for `supremum tune`, of a task that adapts a quantised base, such as examples/dialogsum-lora.yaml. The base's own
size is that of its tensors; "as floats" is what they take in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

from supremum.checkpoint import open_checkpoint
from supremum.train.recipe import load
from supremum.train.sections import Tune

CHILD = """
import json, sys
import torch
from pathlib import Path
from supremum.progress import peak_rss_mb
from supremum.train.tune import tune
started = peak_rss_mb()
done = tune(sys.argv[1], sys.argv[2], sys.argv[3], changes=json.loads(sys.argv[4]))
print(json.dumps({"started": started, "peak": peak_rss_mb(), "minutes": done.minutes, "loss": done.loss,
                  "trained": done.trained, "parameters": done.parameters}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a quantised base, in place of the recipe's")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], dest="changes")
    options = parser.parse_args()
    changes = [f"steps={options.steps}", "epochs=null", *options.changes]
    changes += [f"model={options.model}"] if options.model else []
    base = str(load(options.recipe, Tune, changes).model)
    tensors = open_checkpoint(base).tensors.values()
    floats = sum(4 * math.prod(info.shape) for info in tensors)
    print(f"{base}: {sum(info.nbytes for info in tensors) / 1e6:.0f} MB, as floats {floats / 1e6:.0f} MB")
    with tempfile.TemporaryDirectory() as folder:
        for way in ("lora", "qlora"):
            out = Path(folder) / way
            finished = subprocess.run(
                [sys.executable, "-c", CHILD, str(options.recipe), str(options.data), str(out),
                 json.dumps([*changes, f"way.name={way}"])], stdout=subprocess.PIPE, check=True)
            found = json.loads(finished.stdout.splitlines()[-1])
            print(f"{way:6} peak {found['peak']:.0f} MB ({found['started']:.0f} MB with everything imported), "
                  f"{60 * found['minutes'] / options.steps:.2f} s a step, last loss {found['loss']:.4f}, "
                  f"trained {found['trained']:,} of {found['parameters']:,}", flush=True)


if __name__ == "__main__":
    main()
