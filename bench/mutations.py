"""Break a line of the solver on purpose, one at a time: the tests that guard it must fail.

    python bench/mutations.py

The source and the tests are copied to a temporary folder. There the tests named below must pass as they are, and of each
mutation at least one must fail; one that none notices is named, and the exit status is 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HOUSE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    """In `file` the one place that reads `right` becomes `wrong`; `tests` are to notice."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str


WATER, FILL, ARCHIVE = "tests/solve/test_water.py", "tests/test_fill.py", "tests/checkpoint/test_archive.py"
GAINS, DESCENT, SWAPS = "tests/solve/test_gains.py", "tests/solve/test_descent.py", "tests/test_swaps.py"
MUTATIONS = [
    Mutation("a water level for each layer by itself", "fill.py", "self.level / coupling",
             "self.level / coupling * metric.moment_II.diagonal().mean() * 1e3", FILL),
    Mutation("levels that know no rows", "solve/water.py", "math.log2(level / DISTORTION) + pivot_O.log2()",
             "math.log2(level / DISTORTION) + pivot_O.log2().mean().expand(len(pivot_O))", WATER),
    Mutation("a level twice as high", "solve/water.py", "math.log2(level / DISTORTION)",
             "math.log2(2 * level / DISTORTION)", WATER),
    Mutation("one table for all columns", "checkpoint/archive.py", ".astype(np.int32) + parts.vectors[\"column_class_I\"]\n",
             ".astype(np.int32)\n", ARCHIVE),
    Mutation("bits that cost nothing", "solve/water.py", "RATE = 2 * math.log(2) * DISTORTION", "RATE = 1e-6", WATER),
    Mutation("columns decided too soon", "solve/viterbi.py", "alive_C[decided] == 1", "alive_C[decided] >= 1", WATER),
    Mutation("every other number without a symbol", "solve/viterbi.py", "nearest if below > np.float32(LARGEST) else even",
             "even", WATER),
    Mutation("survivors that take their past from another", "solve/viterbi.py", "row_ST[root_CS[d, s]]", "row_ST[s]", WATER),
    Mutation("rows that make up for nothing", "solve/descent.py", "slope_I[j] += share * moved_BI[p, j]",
             "slope_I[j] += 0 * share * moved_BI[p, j]", DESCENT),
    Mutation("a polish that goes up", "solve/gains.py", "value=-rate / (1 - FIRST**step)", "value=rate / (1 - FIRST**step)",
             GAINS),
    Mutation("a polish that is always kept", "solve/gains.py", 'if found["kl_mean"] < before:', "if True:", GAINS),
    Mutation("swaps that are always kept", "swaps.py", "accepted = falls(log.kl, kl)", "accepted = True", SWAPS),
]


def passes(folder: Path, tests: str) -> bool:
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", tests],
                          cwd=folder, env=os.environ | {"PYTHONPATH": str(folder / "src")}, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(done.stdout + done.stderr)
    return done.returncode == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in ("src", "tests", "bench", "examples", "docs", "pyproject.toml", "README.md"):
            source = HOUSE / name
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
        for tests in dict.fromkeys(mutation.tests for mutation in MUTATIONS):
            if not passes(folder, tests):
                sys.exit(f"{tests} fails as it is")
        unnoticed = 0
        for mutation in MUTATIONS:
            path = folder / "src/supremum" / mutation.file
            source_text = path.read_text()
            if source_text.count(mutation.right) != 1:
                sys.exit(f"{mutation.file} has not one place that reads: {mutation.right}")
            path.write_text(source_text.replace(mutation.right, mutation.wrong))
            noticed = not passes(folder, mutation.tests)
            path.write_text(source_text)
            unnoticed += not noticed
            print(f"{'noticed' if noticed else 'NOT NOTICED':12} {mutation.what} ({mutation.file})", flush=True)
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
