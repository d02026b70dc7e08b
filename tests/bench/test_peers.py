"""bench/peers: what the peers' bytes and bits are reckoned by."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[2] / "bench/peers"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"bench_peers_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def common():
    return loaded("common")


@pytest.fixture(scope="module")
def rows():
    return loaded("rows")


def test_bytes_of_groups(common):
    # 2 rows of 128 at 4 bits: 128 bytes, and 4 groups of 16 bits: 8 bytes; zero points of 4 bits: 2 more
    assert common.packed([(2, 128)], 4, 64) == 136
    assert common.packed([(2, 128)], 4, 64, zero=4) == 138
    assert common.packed([(2, 128), (2, 128)], 4, 64) == 272
    assert common.packed([(1, 96)], 3, 64) == 36 + 4  # the last group is not full and has its scale all the same


def test_bits_at(rows):
    points = [(4.0, 0.01), (2.0, 1.0), (3.0, 2.0)]  # the third is beaten by the second at fewer bits
    assert rows.bits_at(points, 0.1) == pytest.approx(3.0)  # halfway in log KL
    assert rows.bits_at(points, 1.0) == pytest.approx(2.0)
    assert rows.bits_at(points, 0.01) == pytest.approx(4.0)
    assert rows.bits_at(points, 2.0) is None and rows.bits_at(points, 0.001) is None and rows.bits_at([], 1.0) is None


def test_windows_are_whole_and_evenly_spaced(common, monkeypatch):
    class Words:
        @staticmethod
        def from_pretrained(_):
            return lambda text, add_special_tokens: type("Ids", (), {"input_ids": [int(w) for w in text.split()]})

    monkeypatch.setattr(common, "AutoTokenizer", Words)

    class Args:
        reference, tokens, length = None, 6, 2

        class text:  # stands for a path
            read_text = staticmethod(lambda encoding: " ".join(str(i) for i in range(13)))

    assert common.calibration(Args) == [[0, 1], [4, 5], [8, 9]]
    Args.tokens = 14
    with pytest.raises(SystemExit):
        common.calibration(Args)


def test_floats_replace_only_what_they_name(common, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "config.json").write_text("{}")
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.bfloat16), "b.weight": torch.ones(2, dtype=torch.bfloat16)}
    save_file(tensors, reference / "model.safetensors")
    common.write_floats(reference, {"a": torch.full((2, 2), 3.0)}, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(found["a.weight"], 3 * tensors["a.weight"]) and torch.equal(found["b.weight"], tensors["b.weight"])
    assert found["a.weight"].dtype == torch.bfloat16 and (tmp_path / "out/config.json").exists()


def test_linear_counts_the_blocks_matrices_with_their_scales(rows, tmp_path):
    save_file({"model.layers.0.q_proj.weight_packed": torch.zeros(4, 2, dtype=torch.int32),
               "model.layers.0.q_proj.weight_scale": torch.zeros(4, 1, dtype=torch.bfloat16),
               "model.layers.0.input_layernorm.weight": torch.zeros(16), "model.embed_tokens.weight": torch.zeros(64)},
              tmp_path / "model.safetensors")
    assert rows.linear(tmp_path) == 32 + 8


def test_a_peer_says_its_last_line_or_why_it_failed(rows, tmp_path, monkeypatch):
    python = tmp_path / "hqq/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(rows, "SCRIPTS", tmp_path)
    script = tmp_path / "peer_hqq.py"
    script.write_text("import sys, json; print('noise'); print(json.dumps({'argv': sys.argv[1:]}))")
    assert rows.installed("int4", tmp_path) == [("hqq",)] and rows.installed("archive-4", tmp_path) == []
    said = rows.run(("hqq", "--kind", "x"), tmp_path, Path("r"), "t", Path("o"), 4, 512)
    assert json.loads(json.dumps(said))["argv"] == ["r", "t", "o", "--bits", "4", "--tokens", "512", "--kind", "x"]
    script.write_text("import sys; sys.exit('no such thing')")
    with pytest.raises(rows.PeerError, match="hqq: no such thing"):
        rows.run(("hqq",), tmp_path, Path("r"), "t", Path("o"), 4, 512)
