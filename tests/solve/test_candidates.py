"""Candidates: kept as they would be written, solved once, read back the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from supremum import codecs
from supremum.solve import Metric, nearest, solve
from supremum.solve.candidates import Candidates, load_coded, save_matrices
from supremum.workspace import Workspace

from . import reference

SHAPES = {"b.0.q.weight": (12, 64), "b.0.k.weight": (8, 64), "b.0.o.weight": (64, 32), "b.0.kept.weight": (5, 64)}
MENU = {"b.0.q.weight": ["int4-g64", "int2-g32"], "b.0.k.weight": ["int4-g64", "Q4_1"], "b.0.o.weight": ["MXFP4"],
        "b.0.kept.weight": []}
GROUPS = {"q": ["b.0.q.weight", "b.0.k.weight", "b.0.kept.weight"], "o": ["b.0.o.weight"]}
MOMENTS = {"q": reference.moment(64), "o": reference.moment(32)}


def weight(name: str) -> Tensor:
    return reference.weights(*SHAPES[name], seed=len(name))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_layer_in_every_codec_of_its_menu(tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        candidates = Candidates(Workspace(tmp_path / "work", {}), weight, MENU, SHAPES)
        candidates.solve_block("candidates/0.safetensors", MOMENTS, GROUPS)
    finally:
        torch.set_num_threads(before)
    for name, names in MENU.items():
        for codec in names:
            moment_II = MOMENTS["o" if ".o." in name else "q"]
            alone = solve(weight(name), Metric.of(moment_II), codecs.get(codec), refits=0)
            found = candidates.get(name, codec)
            assert found.codec is codecs.get(codec) and found.shape == SHAPES[name]
            assert all(torch.equal(found.tensors[key], value) for key, value in alone.tensors.items())


def test_a_finished_block_is_not_solved_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", {})
    first = Candidates(workspace, weight, MENU, SHAPES)
    first.solve_block("0.safetensors", MOMENTS, GROUPS)
    before = workspace.path("0.safetensors").stat().st_mtime_ns

    def refuse(name: str) -> Tensor:
        raise AssertionError(f"{name} was read again")

    second = Candidates(workspace, refuse, MENU, SHAPES)
    second.solve_block("0.safetensors", {}, GROUPS)
    assert workspace.path("0.safetensors").stat().st_mtime_ns == before
    assert torch.equal(second.get("b.0.o.weight", "MXFP4").decode(), first.get("b.0.o.weight", "MXFP4").decode())


def test_blocks_without_any_codec_are_finished_too(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "work", {})
    candidates = Candidates(workspace, weight, {}, SHAPES)
    candidates.solve_block("0.safetensors", MOMENTS, GROUPS)
    assert workspace.has("0.safetensors") and not workspace.keys("0.safetensors")


def test_tables_are_rounded_or_solved(tmp_path: Path) -> None:
    menu, shapes = {"embed.weight": ["int4-g32", "Q8_0"], "none.weight": []}, {"embed.weight": (40, 64)}
    workspace, table = Workspace(tmp_path / "work", {}), reference.weights(40, 64)
    for file, metric in (("a.safetensors", None), ("b.safetensors", Metric.of(reference.moment(64)))):
        candidates = Candidates(workspace, lambda name: table, menu, shapes)
        candidates.solve_table(file, "embed.weight", metric)
        for codec in menu["embed.weight"]:
            kind = codecs.get(codec)
            expected = nearest(table, kind) if metric is None else solve(table, metric, kind, refits=0)
            assert torch.equal(candidates.get("embed.weight", codec).decode(), expected.decode())
    candidates.solve_table("c.safetensors", "none.weight", None)
    assert not workspace.has("c.safetensors")


@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_can_be_kept(name: str, tmp_path: Path) -> None:
    """Two layers solved together must not share memory when they are saved."""
    codec, workspace = codecs.get(name), Workspace(tmp_path / "work", {})
    columns = reference.columns(codec)
    coded = {f"{layer}|{name}": nearest(reference.weights(4, columns, seed), codec) for seed, layer in enumerate("ab")}
    save_matrices(workspace, "x.safetensors", coded)
    for key, value in coded.items():
        back = load_coded(workspace, "x.safetensors", key, name, value.shape)
        assert torch.equal(back.decode(), value.decode()) and back.nbytes == value.nbytes == codec.nbytes(value.shape)
