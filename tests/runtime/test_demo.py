"""The real model, opened from its package, partly recompressed, and proved in stock llama.cpp."""

from __future__ import annotations

from supremum import codecs
from supremum.checkpoint import open_checkpoint
from supremum.checkpoint.targets import LazyCoded, target
from supremum.runtime.verify import verify
from supremum.solve import nearest


def test_demo_model_end_to_end(tmp_path):
    """Layers 10-19 from Q4_1 to three other types; the rest, the embedding included, is copied."""
    gguf = target("gguf")
    checkpoint = open_checkpoint("demo")
    kinds = {"self_attn": "Q5_0", "mlp.down": "Q4_1", "mlp": "Q4_0"}
    plan = {}
    for name, info in checkpoint.tensors.items():
        if ".layers.1" in name and gguf.codecs(checkpoint, name, tuple(info.shape)) and ".layers.1." not in name:
            plan[name] = next(codec for part, codec in kinds.items() if part in name)
    assert len(plan) == 70
    path = gguf.write(checkpoint, LazyCoded(plan, lambda n: nearest(checkpoint.read(n), codecs.get(plan[n]))), tmp_path)
    assert path.stat().st_size == gguf.size(checkpoint, plan) < gguf.size(checkpoint, {})
    result = open_checkpoint(path)
    for name, info in checkpoint.tensors.items():
        assert result.tensors[name].kind == plan.get(name, info.kind)
    proof = verify(path, gguf, result, threads=1)
    assert proof.passed and proof.same_tokens and proof.same_top >= 0.75
    assert proof.memory > 80e6 and proof.load_seconds < 30
