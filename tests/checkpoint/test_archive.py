"""Archives: written, read back to the bit, opened by stock Transformers, and refused when damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from supremum import convert
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.archive import TABLES, Encoder
from supremum.checkpoint.targets import target
from supremum.codecs import trellis
from supremum.codecs.lattice import Frame, Lattice
from supremum.errors import CheckpointError
from supremum.solve.water import flat
from supremum.stats.streaming import BlockStream, orientation

ARCHIVE = target("archive")
PROMPT = [5, 9, 200, 31, 77, 120, 8, 300, 45, 6]


def lattices(checkpoint: Any, bits: float = 3.0) -> dict[str, Lattice]:
    turned = {name: swap for name, (_, swap) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}
    return {name: flat(checkpoint.read(name).float().T.contiguous() if swap else checkpoint.read(name).float(), bits)
            for name, swap in turned.items()}


@pytest.fixture
def archive(tiny_model, tmp_path) -> Path:
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    return ARCHIVE.write(checkpoint, lattices(checkpoint), tmp_path / "archive")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen2", "bert", "albert"])
def test_every_matrix_comes_back_to_the_bit(family, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    coded = lattices(checkpoint)
    folder = ARCHIVE.write(checkpoint, coded, tmp_path / "out")
    opened = open_checkpoint(folder)
    assert opened.tensors.keys() == checkpoint.tensors.keys()
    turned = {name: swap for name, (_, swap) in orientation(BlockStream(checkpoint, dtype=torch.float32)).items()}
    for name in checkpoint.tensors:
        if name in coded:
            expected = coded[name].decode()
            assert torch.equal(opened.read(name), expected.T if turned[name] else expected)
        else:
            assert torch.equal(opened.read(name), checkpoint.read(name))


@pytest.mark.parametrize("kind", ["gguf", "compressed-tensors"])
def test_an_archive_becomes_floats_for_other_runtimes(kind, archive, tmp_path):
    """As near as their 8 or more bits allow, and proved there (`convert` runs the stock runtime)."""
    before, after = open_checkpoint(archive), open_checkpoint(convert(archive, kind, tmp_path / "floats"))
    assert after.tensors.keys() == before.tensors.keys()
    for name, info in after.tensors.items():
        assert info.kind in ("BF16", "F16", "F32"), name
        torch.testing.assert_close(after.read(name).float(), before.read(name).float(), rtol=2.0**-8, atol=1e-7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_bytes_are_counted_exactly(family, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    coded = lattices(checkpoint)
    counted = ARCHIVE.count(checkpoint, coded)
    folder = ARCHIVE.write(checkpoint, coded, tmp_path / "out")
    assert sum(path.stat().st_size for path in folder.iterdir()) == counted["size"]
    opened = open_checkpoint(folder)
    assert coded.keys() <= counted["matrices"].keys()
    shares = {name: opened.tensors[name].nbytes - own for name, own in counted["matrices"].items()}
    assert sum(shares.values()) == counted["tables"]  # by weights:
    weights = {name: opened.tensors[name].shape[0] * opened.tensors[name].shape[1] for name in shares}
    every = sum(weights.values())
    assert all(abs(share - counted["tables"] * weights[name] / every) < 1 for name, share in shares.items())


def test_each_class_has_its_own_table():
    """Columns of very different deviations: the stream is as long as the sum of their entropies; one table for all would
    take most of a bit more."""
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(512, 256, generator=draw) * torch.logspace(-1.5, 0.5, 256)
    coded, encoder = flat(weight_OI, 3.0), Encoder()
    encoder.count("w", coded)
    bits = 32 * len(encoder.encode(coded)[".codes"]) / weight_OI.numel()
    symbol_OI, quantiser_OI, _ = trellis.symbols(coded.integers_OI.numpy())

    def entropy(symbols: np.ndarray) -> float:
        """Bits of all of them."""
        count = np.unique(symbols, return_counts=True)[1]
        return float(-(count * np.log2(count / len(symbols))).sum())

    pooled = sum(entropy(symbol_OI[quantiser_OI == q]) for q in (0, 1)) / symbol_OI.size
    own = sum(entropy(column[which == q]) for column, which in zip(symbol_OI.T, quantiser_OI.T, strict=True)
              for q in (0, 1)) / symbol_OI.size
    assert own - 0.05 < bits < own + 0.05 and bits < pooled - 0.5


def test_integers_too_large_for_a_symbol_are_kept(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight_OI = checkpoint.read(name).float()
    weight_OI[3, 5], weight_OI[7, 1] = 40.0, -90.0
    coded = {name: flat(weight_OI, 7.0)}
    assert int(coded[name].integers_OI.abs().max()) > 127
    opened = open_checkpoint(ARCHIVE.write(checkpoint, coded, tmp_path / "out"))
    assert torch.equal(opened.read(name), coded[name].decode())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_stock_transformers_opens_it(family, tiny_model, tmp_path):
    """In a fresh process, with nothing of ours but `import supremum`, before or after Transformers."""
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16"))
    folder = ARCHIVE.write(checkpoint, lattices(checkpoint), tmp_path / "out")
    script = """
import json, sys
{imports}
import torch
import transformers
model, report = transformers.{loader}.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(report.values()), report
print(json.dumps(model.eval()(torch.tensor([{prompt}])).logits[0, -1].tolist()))
"""
    model = open_checkpoint(folder).model(torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0, -1]
    loader = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
    for imports in ("import supremum, transformers", "import transformers.modeling_utils, supremum"):
        code = script.format(imports=imports, prompt=PROMPT, loader=loader)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-4)


@pytest.mark.parametrize("family, architecture, loader", [
    ("llama", None, "AutoModel"), ("gpt2", None, "AutoModel"), ("bert", None, "AutoModel"),
    ("llama", None, "AutoModelForSequenceClassification"), ("bert", "BertModel", "AutoModelForSequenceClassification")])
def test_stock_transformers_opens_its_trunk_for_another_head(family, architecture, loader, tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model(family, "bfloat16", architecture))
    folder = ARCHIVE.write(checkpoint, lattices(checkpoint), tmp_path / "out")
    wanted = open_checkpoint(folder).model(torch.float32).base_model
    found = getattr(transformers, loader).from_pretrained(folder, dtype=torch.float32).base_model.eval()
    with torch.inference_mode():
        ids_BT = torch.tensor([PROMPT])
        assert torch.equal(found(ids_BT).last_hidden_state, wanted(ids_BT).last_hidden_state)


def test_equal_columns_are_stored_once(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    coded = lattices(checkpoint)
    one, two = (f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("gate", "up"))

    def vectors() -> int:
        encoder = Encoder()
        for name in (one, two):
            encoder.count(name, coded[name])
        return encoder.tables()["archive.vectors"].numel()

    apart = vectors()
    sides = vars(coded[two].frame) | {side: vars(coded[one].frame)[side] for side in ("column_I", "column_class_I")}
    coded[two] = Lattice(coded[two].integers_OI, Frame(**sides))
    assert vectors() < apart
    assert torch.equal(open_checkpoint(ARCHIVE.write(checkpoint, coded, tmp_path / "out")).read(two), coded[two].decode())


def changed(archive: Path, change: Any) -> Path:
    """A copy with its stored tensors changed."""
    folder = archive.with_name("changed")
    shutil.copytree(archive, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def packed(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data)), dtype=torch.uint8)


def reindexed(**entries: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        index = json.loads(zlib.decompress(tensors["archive.index"].numpy().tobytes()))
        name = "model.layers.0.mlp.up_proj.weight"
        for place, value in entries.items():
            index[name][int(place[1:])] = value
        tensors["archive.index"] = packed(json.dumps(index).encode())
    return change


def cut(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def test_without_codes_it_is_lossless(tiny_model, tmp_path):
    """bfloat16 matrices to the bit, in two thirds of their bytes (these are small: three quarters)."""
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16", hidden_size=256, intermediate_size=512))
    folder = ARCHIVE.write(checkpoint, {}, tmp_path / "out")
    opened = open_checkpoint(folder)
    for name in checkpoint.tensors:
        assert opened.read(name).dtype == torch.bfloat16 and torch.equal(opened.read(name), checkpoint.read(name))
    assert (folder / "model.safetensors").stat().st_size < 0.70 * sum(i.nbytes for i in checkpoint.tensors.values())


def test_nothing_to_code_is_no_error(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama"))  # float32: no matrix is coded
    opened = open_checkpoint(ARCHIVE.write(checkpoint, {}, tmp_path / "out"))
    assert all(torch.equal(opened.read(name), checkpoint.read(name)) for name in checkpoint.tensors)


CODES = "model.layers.0.mlp.up_proj.weight.codes"


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("archive.vectors"), "lacks archive.vectors"),
    (lambda t: t.pop(CODES), "codes are not there"),
    (cut(CODES), "damaged"),
    (cut("archive.vectors"), "damaged"),
    (cut("archive.index"), "longer or shorter|cannot be unpacked"),
    (lambda t: t.update({CODES: t[CODES].float()}), "not a stream"),
    (lambda t: t.update({"archive.frequencies": packed(b"\0" * TABLES * 512)}), "no distribution"),
    (lambda t: t.update({"archive.frequencies": packed(b"\0" * 10)}), "longer or shorter"),
    (lambda t: t.update({"archive.index": packed(b"[1]")}), "object"),
    (lambda t: t.update({"archive.index": packed(b"0" * (80 << 20))}), "longer or shorter"),
    (reindexed(_0=10**9), "shape|10.*9"),
    (reindexed(_0=-3), "does not describe"),
    (reindexed(_4="nowhere"), "columns that are not there"),
    (reindexed(_5=10**6), "does not describe"),
    (reindexed(_5=1 << 14), "NaN or Inf|does not describe"),
    (lambda t: t.update({CODES.replace("codes", "escapes"): torch.ones(3, dtype=torch.int16)}), "other escapes"),
])  # fmt: skip
def test_damage_is_named(change, words, archive):
    folder = changed(archive, change)
    with pytest.raises(CheckpointError, match=words):
        opened = open_checkpoint(folder)
        for name in opened.tensors:
            opened.read(name)


@pytest.mark.parametrize("version", [2, 99])
def test_another_version_is_refused(archive, version):
    config = json.loads((archive / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (archive / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version"):
        open_checkpoint(archive)


def test_writing_twice_gives_the_same_bytes(tiny_model, tmp_path):
    checkpoint = open_checkpoint(tiny_model("llama", "bfloat16"))
    coded = lattices(checkpoint)
    one, two = (ARCHIVE.write(checkpoint, coded, tmp_path / name) / "model.safetensors" for name in ("one", "two"))
    assert np.array_equal(np.fromfile(one, np.uint8), np.fromfile(two, np.uint8))
