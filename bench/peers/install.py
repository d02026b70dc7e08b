"""The peers' environments, each its own: python bench/peers/install.py PEER DIR makes DIR/PEER, a venv with pinned versions.

    python bench/peers/install.py all DIR     every one of them, some 1.5 GB each; then bench/frontier.py --peers DIR

Versions are those of November 2026. torch comes from where pip is set to look; a build without CUDA is enough and smaller.
llama.cpp is the source that llama-cpp-python 0.3.36 carries, built here (CMake and a C++ compiler needed, some 15 minutes).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
import venv
from pathlib import Path

TORCH = "torch==2.13.0"

# Each line is one pip install, in this order.
PACKAGES: dict[str, list[list[str]]] = {
    "autoround": [[TORCH, "auto-round==0.16.1", "transformers==5.17.0"]],
    "llmcompressor": [[TORCH, "llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"]],
    # It asks for torch 2.14.1 or later, of which pip may find only CUDA's build; it runs with 2.13, hence no dependencies.
    "gptqmodel": [
        [TORCH, "torchao==0.18.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0", "requests==2.34.2",
         "threadpoolctl==3.8.0", "packaging==26.3", "device-smi==0.5.7", "protobuf>=7.36.2,<8", "pillow>=13,<14",
         "pypcre==0.6.4", "tokenicer==0.0.14", "logbar==0.4.15", "ninja==1.13.2", "defuser==0.0.28", "dill==0.4.1"],
        ["--no-deps", "gptqmodel==7.7.0"],
    ],
    "hqq": [[TORCH, "hqq==0.2.8.post1", "transformers==5.17.0"]],
    "quanto": [[TORCH, "optimum-quanto==0.2.7", "transformers==5.17.0"]],
    "llamacpp": [[TORCH, "transformers==5.17.0", "sentencepiece==0.2.1"]],
}
LLAMA = "llama-cpp-python==0.3.36"
OFF = ("BUILD_SHARED_LIBS", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER",
       "LLAMA_BUILD_APP", "LLAMA_USE_PREBUILT_UI")


def run(*command: object) -> None:
    subprocess.run([str(c) for c in command], check=True)


def build_llama(home: Path, jobs: int) -> None:
    """llama-quantize, llama-imatrix, the converter and its gguf package, in `home`/llama.cpp."""
    with tempfile.TemporaryDirectory() as scratch:
        pip = (home / "bin/python", "-m", "pip")
        run(*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", scratch, LLAMA)
        (sdist,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        source, build = next(Path(scratch).glob("*/vendor/llama.cpp")), Path(scratch) / "build"
        run("cmake", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in OFF))
        run("cmake", "--build", build, "--target", "llama-quantize", "llama-imatrix", "-j", jobs)
        to = home / "llama.cpp"
        shutil.rmtree(to, ignore_errors=True)
        to.mkdir()
        for name in ("llama-quantize", "llama-imatrix"):
            shutil.copy2(build / "bin" / name, to)
        shutil.copy2(source / "convert_hf_to_gguf.py", to)
        for name in ("conversion", "gguf-py"):
            shutil.copytree(source / name, to / name)
        run(*pip, "install", "-q", to / "gguf-py")
        (to / "VERSION").write_text(LLAMA.replace("==", " ") + "\n")


def install(peer: str, folder: Path, jobs: int) -> Path:
    home = folder.resolve() / peer
    venv.create(home, with_pip=True)
    for packages in PACKAGES[peer]:
        run(home / "bin/python", "-m", "pip", "install", "-q", *packages)
    if peer == "llamacpp":
        build_llama(home, jobs)
    return home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=[*PACKAGES, "all"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time")
    args = parser.parse_args()
    for peer in PACKAGES if args.peer == "all" else [args.peer]:
        print(install(peer, args.folder, args.jobs), flush=True)


if __name__ == "__main__":
    main()
