"""Packed attention and the scoring pass: packed or branching off a shared history = each sample alone, values
and gradients."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    Qwen2Config,
)

from rlver_dist.errors import ConfigError
from rlver_dist.experience.packing import Span, pack
from rlver_dist.experience.prefixes import make_units
from rlver_dist.learner import attention, scoring
from rlver_dist.learner.rows import score_row
from tests.unit import builders

SHAPE = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
LENGTHS = [5, 1, 9, 2]
TEMPERATURE = 0.7
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def tiny(family, implementation):
    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
    attention.register()
    shape = config(**SHAPE, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(shape, attn_implementation=implementation)


def make_samples(contexts, lengths, dialogue="d"):
    """Samples with random trained tokens after each context."""
    draw = torch.Generator().manual_seed(1)
    samples = []
    for context, length in zip(contexts, lengths, strict=True):
        token_ids = context + torch.randint(61, (length,), generator=draw).tolist()
        mask = [False] * len(context) + [True] * length
        samples.append(
            builders.sample(token_ids, mask, rollout_logprobs=[0.0] * len(mask), dialogue_id=dialogue)
        )
    return samples


def think_samples():
    """Four turns over one growing history, the second one's history as long as the first's, and a sample of
    another dialogue."""
    history = torch.randint(61, (23,), generator=torch.Generator().manual_seed(2)).tolist()
    return [
        *make_samples([history[:end] for end in (6, 6, 15, 23)], [5, 3, 1, 9]),
        *make_samples([[3, 1, 4]], [7], dialogue="e"),
    ]


def backward(logprobs, entropies):
    """A scalar in which each token has a weight of its own."""
    (logprobs @ torch.linspace(-1, 1, len(logprobs)) + 0.3 * entropies.sum()).backward()


def check_equals_samples_alone(family, samples, units, *, recompute):
    """Log-probs, entropies and gradients of one packed row against dense logits of each sample by itself."""
    row = pack(samples, units)
    packed = scoring.PolicyModel(tiny(family, attention.ATTENTION_NAME).train(), recompute=recompute)
    logprobs, entropies = score_row(packed, row, TEMPERATURE)
    backward(logprobs, entropies)

    alone = tiny(family, "eager")
    scores = []
    for index in row.indices:
        tokens, mask = torch.tensor(samples[index].token_ids), torch.tensor(samples[index].loss_mask)[1:]
        logits = alone(tokens[None]).logits[0, :-1][mask] / TEMPERATURE
        scored = torch.log_softmax(logits, dim=-1).gather(-1, tokens[1:][mask][:, None]).squeeze(-1)
        scores.append((scored, torch.distributions.Categorical(logits=logits).entropy()))
    expected_logprobs, expected_entropies = (torch.cat(parts) for parts in zip(*scores, strict=True))
    backward(expected_logprobs, expected_entropies)

    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    for (name, parameter), (_, reference) in zip(
        packed.model.named_parameters(), alone.named_parameters(), strict=True
    ):
        assert reference.grad.norm() > 0, name
        assert (parameter.grad - reference.grad).norm() <= 1e-5 * reference.grad.norm(), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_row_equals_samples_alone(family, recompute, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    samples = make_samples([[token] for token in range(len(LENGTHS))], LENGTHS)
    check_equals_samples_alone(
        family,
        samples,
        make_units(samples, range(len(LENGTHS)), share_prefixes=False, max_tokens=100),
        recompute=recompute,
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("recompute", [False, True])
def test_shared_prefixes_equal_samples_alone(family, recompute, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    samples = think_samples()
    units = make_units(samples, range(len(samples)), share_prefixes=True, max_tokens=100)
    assert [unit.indices for unit in units] == [[0, 1, 2, 3], [4]]
    check_equals_samples_alone(family, samples, units, recompute=recompute)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_of_a_branch_equal_those_of_its_sample(family):
    samples = think_samples()
    row = pack(samples, make_units(samples, range(len(samples)), share_prefixes=True, max_tokens=100))
    model, alone = tiny(family, attention.ATTENTION_NAME), tiny(family, "eager")
    with torch.no_grad():
        logits = model.lm_head(
            scoring.hidden_states(model.model, row.token_ids, row.position_ids, row.spans)
        )[row.logit_index]
        expected = [
            alone(torch.tensor([sample.token_ids])).logits[0, :-1][torch.tensor(sample.loss_mask)[1:]]
            for sample in samples
        ]
    assert (logits - torch.cat(expected)).norm() <= 1e-5 * torch.cat(expected).norm()


@pytest.mark.parametrize("block", [1, 3, 8, 64])
@pytest.mark.parametrize("in_front", [0, 1, 11])
def test_blockwise_attention_equals_torch(block, in_front, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    torch.manual_seed(2)
    parts = [
        torch.randn(heads, length, 8, requires_grad=True)
        for heads, length in ((6, 17), (2, 17 + in_front), (2, 17 + in_front))
    ]
    copies = [part.detach().clone().requires_grad_() for part in parts]
    upstream = torch.randn(6, 17, 8)
    output = attention.BlockwiseCausalAttention.apply(*parts, 0.4)
    mask = torch.ones(17, 17 + in_front, dtype=torch.bool).tril(in_front)
    expected = scaled_dot_product_attention(
        *(copy[None] for copy in copies), attn_mask=mask, scale=0.4, enable_gqa=True
    )[0]
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    output.backward(upstream)
    expected.backward(upstream)
    for part, copy in zip(parts, copies, strict=True):
        torch.testing.assert_close(part.grad, copy.grad, rtol=1e-5, atol=1e-5)


def seen_by(span, start):
    """Positions of the keys that a span beginning at `start` attends to."""
    return [
        *range(span.context_start, span.context_start + span.context_length),
        *range(start, start + span.length),
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-5),
        ("cpu", torch.bfloat16, 1e-2),
        pytest.param("cuda", torch.float32, 1e-5, marks=ON_GPU),
        pytest.param("cuda", torch.bfloat16, 1e-2, marks=ON_GPU),
    ],
)
def test_packed_attention_equals_torch_on_every_span(device, dtype, tolerance):
    torch.manual_seed(3)
    spans = [
        Span(length=70),
        Span(length=300, context_start=0, context_length=40),
        Span(length=1),
        Span(length=29),
    ]
    parts = [torch.randn(1, heads, 400, 64, dtype=dtype).to(device).requires_grad_() for heads in (4, 2, 2)]
    exact = [part.detach().cpu().double().requires_grad_() for part in parts]
    upstream = torch.randn(1, 400, 4, 64, dtype=dtype)
    output, _ = attention.packed_causal_attention(torch.nn.Identity(), *parts, None, spans=spans)
    output.backward(upstream.to(device))

    expected, start = [], 0
    for span in spans:
        query, (key, value) = (
            exact[0][:, :, start : start + span.length],
            (part[:, :, seen_by(span, start)] for part in exact[1:]),
        )
        mask = torch.ones(span.length, span.context_length + span.length, dtype=torch.bool).tril(
            span.context_length
        )
        expected.append(
            scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        )
        start += span.length
    torch.cat(expected, dim=1).backward(upstream.double())
    pairs = [
        (output, torch.cat(expected, dim=1)),
        *((part.grad, copy.grad) for part, copy in zip(parts, exact, strict=True)),
    ]
    for ours, theirs in pairs:
        assert (ours.cpu().double() - theirs).norm() <= tolerance * theirs.norm()


def test_plan_of_the_variable_length_kernel_by_hand():
    spans = (Span(length=3), Span(length=2, context_start=0, context_length=1), Span(length=1))
    query_starts, key_starts, keys = attention._varlen_plan(spans, torch.device("cpu"))
    assert (query_starts.tolist(), key_starts.tolist()) == ([0, 3, 5, 6], [0, 3, 6, 7])
    assert keys.tolist() == [0, 1, 2, 0, 3, 4, 5]
    assert attention._varlen_plan((Span(length=3), Span(length=2)), torch.device("cpu"))[2] is None


def test_no_trained_token_gives_a_zero_gradient_for_every_parameter():
    model = scoring.PolicyModel(tiny("llama", attention.ATTENTION_NAME), recompute=False)
    logprobs, entropies = score_row(model, pack([], []), 1.0)
    (logprobs.sum() + entropies.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spans": [Span(length=3), Span(length=3)]}, "do not cover"),
        ({"spans": [Span(length=5)], "dropout": 0.1}, "neither a mask nor dropout"),
        ({"spans": [Span(length=5)], "sliding_window": 4}, "sliding window 4"),
        ({"spans": [Span(length=5)], "softcap": 50.0}, "capped scores"),
        ({"spans": [Span(length=5)], "s_aux": torch.zeros(4)}, "attention sinks"),
    ],
)
def test_refuses_what_it_cannot_do(arguments, message):
    query, key = torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=message):
        attention.packed_causal_attention(torch.nn.Identity(), query, key, key, None, **arguments)


def test_a_model_that_bounds_its_logits_is_refused(tmp_path):
    shape = dict(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=4, attn_logit_softcapping=None)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ConfigError,
        match=rf"^model.path={tmp_path}: final_logit_softcapping=30.0 is not trained as the engines sample",
    ):
        scoring.load_model(str(tmp_path), torch.float32)
