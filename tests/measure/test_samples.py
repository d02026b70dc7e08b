"""Greedy continuations side by side."""

from __future__ import annotations

import torch

from supremum.checkpoint import open_checkpoint
from supremum.measure import samples
from supremum.measure.samples import prompt_ids


def test_side_by_side(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    tokenizer, original, compressed = checkpoint.tokenizer(), *(checkpoint.model(torch.float32) for _ in range(2))
    with torch.no_grad():
        compressed.model.layers[1].mlp.down_proj.weight.mul_(-1)
    prompts = ["The river", "A stone at 7 o'clock"]
    for prompt, same, changed in zip(prompts, samples(original, original, tokenizer, prompts, tokens=12),
                                     samples(original, compressed, tokenizer, prompts, tokens=12), strict=True):
        assert same.prompt == changed.prompt == prompt
        assert same.original == same.compressed and same.same_tokens == same.tokens
        assert changed.original == same.original != changed.compressed and changed.same_tokens < changed.tokens
        assert changed.to_dict()["prompt"] == prompt


@torch.inference_mode()
def test_what_is_shown_is_the_most_likely_continuation(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    tokenizer, model = checkpoint.tokenizer(), checkpoint.model(torch.float32)
    ids = prompt_ids(tokenizer, "The river")
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\nThe river<|im_end|>\n<|im_start|>assistant\n"
    start = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    [sample] = samples(model, model, tokenizer, ["The river"], tokens=8)
    assert sample.original == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_without_a_template_the_prompt_stands_alone(tiny_model):
    tokenizer = open_checkpoint(tiny_model("llama")).tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, "The river")[0]) == "The river"
