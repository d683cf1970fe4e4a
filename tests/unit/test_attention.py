"""Packed attention and the scoring pass: packed = each sample alone, values and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlver_dist.learner import attention, scoring

SHAPE = dict(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
LENGTHS = [5, 1, 9, 2]


def tiny(family, implementation):
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    attention.register()
    return model._from_config(config(**SHAPE, tie_word_embeddings=True), attn_implementation=implementation)


def packed_inputs():
    tokens = torch.randint(61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return tokens, positions, (positions > 0).nonzero().squeeze(1)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_row_equals_samples_alone(family, recompute, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    tokens, positions, scored = packed_inputs()
    temperature, weights = 0.7, torch.linspace(-1, 1, len(scored))
    packed = scoring.PolicyModel(tiny(family, attention.ATTENTION_NAME).train(), recompute=recompute)
    logprobs, entropies = packed(tokens, positions, LENGTHS, scored, temperature)
    (logprobs @ weights + 0.3 * entropies.sum()).backward()

    alone = tiny(family, "eager")
    rows = [alone(sample[None]).logits[0, :-1] / temperature for sample in tokens.split(LENGTHS)]
    targets = torch.cat([sample[1:] for sample in tokens.split(LENGTHS)])
    expected = torch.log_softmax(torch.cat(rows), dim=-1)
    expected_logprobs = expected.gather(-1, targets[:, None]).squeeze(-1)
    expected_entropies = torch.distributions.Categorical(logits=torch.cat(rows)).entropy()
    (expected_logprobs @ weights + 0.3 * expected_entropies.sum()).backward()

    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    for (name, parameter), (_, reference) in zip(packed.model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("block", [1, 3, 8, 64])
def test_blockwise_attention_equals_torch(block, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    torch.manual_seed(2)
    parts = [torch.randn(heads, 17, 8, requires_grad=True) for heads in (6, 2, 2)]
    copies = [part.detach().clone().requires_grad_() for part in parts]
    upstream = torch.randn(6, 17, 8)
    output = attention.BlockwiseCausalAttention.apply(*parts, 0.4)
    expected = scaled_dot_product_attention(*(copy[None] for copy in copies), is_causal=True, scale=0.4, enable_gqa=True)[0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.backward(upstream)
    expected.backward(upstream)
    for part, copy in zip(parts, copies, strict=True):
        torch.testing.assert_close(part.grad, copy.grad, rtol=1e-5, atol=1e-5)


def test_no_trained_token_gives_a_zero_gradient_for_every_parameter():
    model = scoring.PolicyModel(tiny("llama", attention.ATTENTION_NAME), recompute=False)
    logprobs, entropies = model(torch.zeros(2, dtype=torch.int64), torch.arange(2), [2], torch.empty(0, dtype=torch.int64), 1.0)
    (logprobs.sum() + entropies.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_lengths": [3, 3]}, "do not cover"),
        ({"segment_lengths": [5], "dropout": 0.1}, "neither a mask nor dropout"),
        ({"segment_lengths": [5], "sliding_window": 4}, "sliding window 4"),
    ],
)
def test_refuses_what_it_cannot_do(arguments, message):
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        attention.packed_causal_attention(torch.nn.Identity(), query, key, key, None, **arguments)
