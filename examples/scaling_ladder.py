"""A ladder of small training runs, and two larger ones predicted before they are run.

    python examples/scaling_ladder.py TEXT --out DIR [--vocabulary 1024] [--only-ladder]

TEXT is a text file. Its last tenth is held out; a tokenizer is trained on the rest (characters, or byte-level BPE with
--vocabulary). Fourteen Llama models of four widths and four lengths are trained through Transformers; each adds a line to
DIR/runs.jsonl. Then L = E + A/N^alpha + B/D^beta is fitted to them, DIR/predicted.json is written with the loss of two larger
runs and its interval, and only then are these trained and compared.

Stop it whenever you like: finished runs are kept and the run under way goes on from its last saved step, with the same
batches (a batch depends on seed and step alone). It took 24 minutes on one thread of a busy AVX2 machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT, BATCH = 64, 4  # 256 tokens a step: below some thousand steps these models learn alike, whatever their size
SAVE_EVERY = 20.0  # seconds between saved states of a run


@dataclass(frozen=True)
class Run:
    layers: int
    width: int
    steps: int  # of BATCH * CONTEXT tokens

    @property
    def name(self) -> str:
        return f"l{self.layers}-d{self.width}-s{self.steps}"


WIDTHS = (16, 32, 48, 64)  # 7,200 to 102,528 parameters with 65 characters; heads of 16, two layers
LADDER = [Run(2, width, steps) for steps in (960, 1920, 3840) for width in WIDTHS] + [Run(2, 16, 7680), Run(2, 32, 7680)]
HELD_OUT = [Run(2, 96, 3840), Run(2, 128, 5760)]  # 2.2 and 3.9 times the largest of the ladder


def tokenize(text: str, vocabulary: int, out: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(training tokens, held-out tokens, size of the vocabulary). The tokenizer sees the training text alone."""
    cut = len(text) * 9 // 10
    if vocabulary:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text[at : at + 100_000] for at in range(0, cut, 100_000)], trainer)
        tokenizer.save(str(out / "tokenizer.json"))
        train, held = (torch.tensor(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:]))
        return train, held, tokenizer.get_vocab_size()
    known = {character: index for index, character in enumerate(sorted(set(text[:cut])))}
    write(out / "characters.json", json.dumps(known, ensure_ascii=False))
    train, held = (torch.tensor([known[c] for c in part if c in known]) for part in (text[:cut], text[cut:]))
    return train, held, len(known)


def write(path: Path, text: str) -> None:
    """All or nothing."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def batch(tokens_T: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """Windows of one step. Every epoch cuts the text at another offset and shuffles the windows, so that a text is used up
    before any of it comes again."""
    windows = (len(tokens_T) - CONTEXT) // CONTEXT
    places = []
    for index in range(step * BATCH, (step + 1) * BATCH):
        epoch, within = divmod(index, windows)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        places.append(int(torch.randperm(windows, generator=generator)[within]) * CONTEXT + offset)
    return torch.stack([tokens_T[at : at + CONTEXT] for at in places])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens_T: torch.Tensor, limit: int = 65_536) -> float:
    windows_BT = tokens_T[: min(len(tokens_T), limit) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows_BT.split(64)]
    return math.fsum(losses) / len(windows_BT)


def train(run: Run, train_T: torch.Tensor, held_T: torch.Tensor, vocabulary: int, seed: int, out: Path) -> dict[str, object]:
    """Train one model and measure it; goes on from out/NAME.safetensors if it is there."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=run.width, intermediate_size=run.width * 8 // 3, num_hidden_layers=run.layers,
        num_attention_heads=max(1, run.width // 16), max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, use_cache=False))
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = out / f"{run.name}.safetensors"
    first, spent = resume(state, parameters, optimizer)
    begun, saved = time.perf_counter() - spent, time.perf_counter()
    peak, warm = 0.24 / run.width, run.steps // 10  # the best of a few rates at widths 16, 48 and 64 falls about so
    for step in range(first, run.steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / run.steps)) + 0.01)
        tokens_BT = batch(train_T, seed, step)
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if time.perf_counter() - saved > SAVE_EVERY:
            save(state, parameters, optimizer, step + 1, time.perf_counter() - begun)
            saved = time.perf_counter()
    loss = held_out_loss(model, held_T)
    state.unlink(missing_ok=True)
    count, tokens = sum(p.numel() for p in parameters.values()), run.steps * BATCH * CONTEXT
    return {"name": run.name, **asdict(run), "seed": seed, "params": count, "tokens": tokens, "loss": loss,
            "unique_tokens": min(tokens, len(train_T)), "flops": 6 * count * tokens,
            "seconds": round(time.perf_counter() - begun, 1)}


def save(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, step: int,
         seconds: float) -> None:
    tensors = {}
    for name, weight in parameters.items():
        tensors[name] = weight.detach().clone()
        tensors[f"first.{name}"], tensors[f"second.{name}"] = (
            optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq"))
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary, metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(temporary, path)


def resume(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """(first step to do, seconds already spent)."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, weight in parameters.items():
            weight.copy_(file.get_tensor(name))
            optimizer.state[weight] = {"step": torch.tensor(float(step)), "exp_avg": file.get_tensor(f"first.{name}"),
                                       "exp_avg_sq": file.get_tensor(f"second.{name}")}
        return step, float(file.metadata()["seconds"])


def records(path: Path) -> list[dict[str, object]]:
    """The whole lines of a file of runs; a line that a kill has cut short is dropped, and its run done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]
    if len(whole) < len(lines):
        write(path, "".join(whole))
    return [json.loads(line) for line in whole]


def ladder(runs: list[Run], path: Path, *data: object) -> None:
    """Do the runs that `path` does not hold yet."""
    done = {record["name"] for record in records(path)}
    for run in runs:
        if run.name in done:
            continue
        record = train(run, *data, path.parent)  # type: ignore[arg-type]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{run.name}: {record['params']:,} parameters, {record['tokens']:,} tokens, "
              f"loss {record['loss']:.4f}, {record['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens of a byte-level BPE; 0: characters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only-ladder", action="store_true", help="stop before the two larger runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = *tokenize(arguments.text.read_text(encoding="utf-8"), arguments.vocabulary, arguments.out), arguments.seed
    if len(data[0]) < 10 * BATCH * CONTEXT:
        parser.error(f"{arguments.text} gives {len(data[0]):,} training tokens; at least {10 * BATCH * CONTEXT:,} are needed")
    ladder(LADDER, arguments.out / "runs.jsonl", *data)
    if arguments.only_ladder:
        return

    from supremum.limits.forecast import predict
    from supremum.limits.runs import read_runs
    from supremum.limits.scaling import fit_runs

    path = arguments.out / "runs.jsonl"
    fit = fit_runs([run for run in read_runs(path) if run.name in {rung.name for rung in LADDER}])
    shapes = [(count(run, data[2]), run.steps * BATCH * CONTEXT) for run in HELD_OUT]
    said = arguments.out / "predicted.json"
    if not said.exists():
        predictions = [predict(fit, *shape, unique=min(shape[1], len(data[0]))) for shape in shapes]
        write(said, json.dumps([asdict(prediction) for prediction in predictions], indent=1))
    for run, row in zip(HELD_OUT, json.loads(said.read_text()), strict=True):
        print(f"{run.name}: predicted {row['loss']:.4f} [{row['low']:.4f}, {row['high']:.4f}]", flush=True)
    ladder(HELD_OUT, path, *data)
    measured = {run.name: run for run in read_runs(path)}
    for run, row in zip(HELD_OUT, json.loads(said.read_text()), strict=True):
        loss = measured[run.name].loss
        print(f"{run.name}, {row['params']:,.0f} parameters: measured {loss:.4f}, predicted {row['loss']:.4f} "
              f"[{row['low']:.4f}, {row['high']:.4f}], error {100 * (row['loss'] / loss - 1):+.2f} %, "
              f"{'inside' if row['low'] <= loss <= row['high'] else 'OUTSIDE'} the interval")
    print(f"supremum limit --scaling {path} " + " ".join(f"--held-out {run.name}" for run in HELD_OUT))


def count(run: Run, vocabulary: int) -> int:
    """Parameters of the model that `train` makes: attention 4 w^2, MLP 3 w h, two norms a layer, last norm, tied head."""
    width, hidden = run.width, run.width * 8 // 3
    return run.layers * (4 * width**2 + 3 * width * hidden + 2 * width) + width + vocabulary * width


if __name__ == "__main__":
    main()
