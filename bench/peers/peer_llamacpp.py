"""llama.cpp's own quantiser with the importance matrix of its own llama-imatrix on the calibration tokens.

    peer_llamacpp.py REFERENCE CALIBRATION_TEXT OUT --bits 4 | --kind Q2_K

--kind is any type that llama-quantize lists; --bits 4 stands for IQ4_NL, 3 for Q3_K_S, 2 for Q2_K. Types of 256-weight
blocks fit no rows of another multiple: those fall back to types of 4 bits and more, as llama-quantize says, and
bytes_linear shows it. The embedding, tied to the head, stays bfloat16 by --token-embedding-type. A file of a type that
the stock reader does not know is decoded to bfloat16 by llama-quantize itself for the referee. seconds are those of
llama-imatrix and llama-quantize. The contract is in common.py; install.py builds the programs into the environment.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import Clock, arguments, calibration, report
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from transformers import AutoTokenizer

KINDS = {8: "Q8_0", 4: "IQ4_NL", 3: "Q3_K_S", 2: "Q2_K"}
HOME = Path(sys.prefix) / "llama.cpp"
PLAIN = (Type.F32, Type.F16, Type.BF16)
NEW = (Type.Q1_0, Type.Q2_0, Type.NVFP4)  # not in the stock reader's library yet


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(c) for c in command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def main() -> None:
    args = arguments(__doc__, kind="")
    kind = args.kind or KINDS[args.bits]
    rows = calibration(args)
    args.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()  # OMP_NUM_THREADS, or the cores
    with tempfile.TemporaryDirectory() as scratch:
        whole, text, matrix = (Path(scratch) / name for name in ("whole.gguf", "text", "imatrix.gguf"))
        run(sys.executable, HOME / "convert_hf_to_gguf.py", args.reference, "--outtype", "bf16", "--outfile", whole)
        tokenizer = AutoTokenizer.from_pretrained(args.reference)
        text.write_text("".join(tokenizer.decode(row) for row in rows), encoding="utf-8")
        coded = args.out / f"{kind}.gguf"
        clock = Clock()
        run(HOME / "llama-imatrix", "-m", whole, "-f", text, "-o", matrix, "-c", args.length, "--chunks", len(rows),
            "--no-ppl", "-t", threads)
        run(HOME / "llama-quantize", "--imatrix", matrix, "--token-embedding-type", "bf16", whole, coded, kind, threads)
        spent = clock.read()
    linear = [t for t in GGUFReader(coded).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    assert not any(t.tensor_type in PLAIN for t in linear), "a matrix was left as it is"
    file = coded
    if any(t.tensor_type in NEW for t in linear):
        file = args.out / f"{kind}-decoded.gguf"
        run(HOME / "llama-quantize", "--allow-requantize", coded, file, "BF16")
    report("llama.cpp", spent, sum(int(t.n_bytes) for t in linear), file, version=(HOME / "VERSION").read_text().strip(),
           kind=kind, bytes_file=coded.stat().st_size)


if __name__ == "__main__":
    main()
