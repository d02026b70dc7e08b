"""A walk shows each layer what it would see in a plain run with the layers before it already changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from supremum.checkpoint import open_checkpoint
from supremum.solve.residual import writers
from supremum.solve.walk import Walk
from supremum.stats import sweep
from supremum.stats.calls import Call
from supremum.stats.streaming import BlockStream, linears
from supremum.stats.sweep import run_block

ORDER = {"llama": ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
         "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]}
SHARED = {"self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
          "mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"]}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCH_TOKENS", 128)


def opened(model: Path, windows: int = 3) -> tuple[BlockStream, Call, Tensor]:
    stream = BlockStream(open_checkpoint(model), dtype=torch.float32)
    windows_NT = torch.randint(2, 380, (windows, 64), generator=torch.Generator().manual_seed(0))
    return stream, stream.calls(windows_NT)[0], stream.embed(windows_NT)


def change(block: nn.Module, key: str) -> None:
    for name in SHARED.get(key, [key]):
        with torch.no_grad():
            linears(block)[name].weight.mul_(1.1)  # type: ignore[operator]


def seen_in_a_plain_run(block: nn.Module, call: Call, hidden_NTd: Tensor, name: str) -> Tensor:
    found: list[Tensor] = []
    handle = linears(block)[name].register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, -2)))
    run_block(block, call, hidden_NTd)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_walk_is_a_run_with_the_layers_changed_on_the_way(family: str, tiny_model: Callable[..., Path]) -> None:
    stream, call, hidden_NTd = opened(tiny_model(family))
    with stream.block(call.block) as block, torch.no_grad():
        places = writers(block, call, hidden_NTd[:1])
        assert list(places) == [ORDER[family][1], ORDER[family][3]]
        walk, expected = Walk(block, call, hidden_NTd, ORDER[family], places), []
        for key, seen in walk:
            assert len(seen.inputs) == 2  # batches
            expected.append((key, torch.cat(seen.inputs), seen))
            change(block, key)
        output_NTd = run_block(block, call, hidden_NTd)
        assert torch.equal(walk.output, output_NTd)
        assert [key for key, *_ in expected] == ORDER[family]
    with stream.block(call.block) as block, torch.no_grad():
        for key, x_TI, seen in expected:
            assert torch.equal(x_TI, seen_in_a_plain_run(block, call, hidden_NTd, key))
            change(block, key)
            if key == ORDER[family][-1]:  # what the stream held, and this layer's own output, are the block's output
                held_Td, y_Td = torch.cat(seen.held), linears(block)[key](x_TI)
                torch.testing.assert_close((held_Td + y_Td).view_as(output_NTd), output_NTd)
            else:
                assert bool(seen.held) == (key in places)


def test_unplanned_layers_are_not_held(tiny_model: Callable[..., Path]) -> None:
    stream, call, hidden_NTd = opened(tiny_model("llama"))
    with stream.block(call.block) as block, torch.no_grad():
        places = writers(block, call, hidden_NTd[:1])
        walk = Walk(block, call, hidden_NTd, ["mlp.gate_proj"], places)
        assert [key for key, _ in walk] == ["mlp.gate_proj"]
        assert torch.equal(walk.output, run_block(block, call, hidden_NTd))


def test_errors_and_early_ends_leave_no_thread_and_no_hook(tiny_model: Callable[..., Path]) -> None:
    stream, call, hidden_NTd = opened(tiny_model("llama"))
    threads = threading.active_count()
    with stream.block(call.block) as block, torch.no_grad():
        before = run_block(block, call, hidden_NTd)
        with pytest.raises(KeyboardInterrupt):
            for _ in Walk(block, call, hidden_NTd, ORDER["llama"], {}):
                raise KeyboardInterrupt
        walk = iter(Walk(block, call, hidden_NTd, ORDER["llama"], {}))
        next(walk)
        walk.close()  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="size"):
            list(Walk(block, call, hidden_NTd[..., :-1], ORDER["llama"], {}))
        assert threading.active_count() == threads
        assert torch.equal(run_block(block, call, hidden_NTd), before)
