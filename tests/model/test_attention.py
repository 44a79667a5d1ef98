"""Attention over samples laid end to end, beside each sample by itself with the mask written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig

from burnish.model import attention
from burnish.model.attention import ATTENTION_NAME, UnsupportedAttention, packed_attention, register
from burnish.model.probe import packed_inputs

LENGTHS = (9, 1, 16, 4)  # tokens of the documents: 1 is the least, 9 and 16 are longer than the small window
HEADS, HEAD_DIM = 4, 8


class Causal(nn.Module):
    """What transformers hands over first: the layer's attention module."""

    is_causal = True


def parts(kv_heads=2, *, dtype=torch.float32, value_dim=HEAD_DIM, seed=0):
    """query [1, HEADS, T, HEAD_DIM], key [1, kv_heads, T, HEAD_DIM], value [1, kv_heads, T, value_dim]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, value_dim))
    return [
        torch.randn(1, heads, sum(LENGTHS), size, generator=generator).to(dtype).requires_grad_()
        for heads, size in shapes
    ]


def attend(query, key, value, *, attention_mask=None, **keywords):
    borders = packed_inputs(torch.zeros(1, sum(LENGTHS)), LENGTHS)
    given = {name: borders[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    attended, weights = packed_attention(Causal(), query, key, value, attention_mask, **(given | keywords))
    assert weights is None
    return attended


def by_hand(query, key, value, *, scaling=None, window=None):
    """softmax(q kᵀ·scale + mask) v of each document, in float64 → [1, T, HEADS, value_dim]."""
    query, key, value = query.double(), key.double(), value.double()
    group = query.shape[1] // key.shape[1]
    outputs = []
    for start, end in pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]):
        heads = []
        for head in range(query.shape[1]):
            q, k, v = query[0, head, start:end], key[0, head // group, start:end], value[0, head // group, start:end]
            scores = q @ k.T * (HEAD_DIM**-0.5 if scaling is None else scaling)
            length = end - start
            seen = [[j <= i and (window is None or j > i - window) for j in range(length)] for i in range(length)]
            heads.append(scores.masked_fill(~torch.tensor(seen), -torch.inf).softmax(-1) @ v)
        outputs.append(torch.stack(heads, dim=1))
    return torch.cat(outputs)[None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_each_document_is_attended_to_by_itself(window, kv_heads):
    query, key, value = parts(kv_heads)
    ours, exact = attend(query, key, value, sliding_window=window), by_hand(query, key, value, window=window)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    probe = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((x.double() * probe).sum(), (query, key, value)) for x in (ours, exact)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_scaling_is_the_models_own():
    query, key, value = parts()
    exact = by_hand(query, key, value, scaling=0.7)
    torch.testing.assert_close(attend(query, key, value, scaling=0.7).double(), exact, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attend(query, key, value).double(), exact, atol=1e-2)


def test_values_may_be_of_another_size_than_keys():
    query, key, value = parts(value_dim=5)
    torch.testing.assert_close(attend(query, key, value).double(), by_hand(query, key, value), rtol=1e-5, atol=1e-6)


def test_bf16_on_the_cpu_is_computed_in_float32_and_rounded_once():
    low = parts(dtype=torch.bfloat16)
    ours = attend(*low, sliding_window=4)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, attend(*(x.float() for x in low), sliding_window=4).bfloat16())
    ours.float().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 for x in low)


def test_dropout_of_the_weights_acts():
    torch.manual_seed(0)
    query, key, value = parts()
    plain, dropped = attend(query, key, value), attend(query, key, value, dropout=0.9)
    emptied = (dropped == 0).all(-1)  # [1, T, HEADS]: nothing is left of what a token looked at
    assert 0.2 < emptied.float().mean() < 0.9 and not (plain == 0).all(-1).any()


@pytest.mark.parametrize("name, value", [("softcap", 50.0), ("s_aux", torch.ones(HEADS)), ("never_heard_of", 1)])
def test_a_keyword_that_is_not_computed_is_refused_by_name(name, value):
    with pytest.raises(UnsupportedAttention, match=f"attention with {name}"):
        attend(*parts(), **{name: value})
    attend(*parts(), **{name: None})  # said to be absent, it asks for nothing


def test_what_transformers_hands_along_changes_nothing():
    along = {name: torch.ones(1) for name in attention.HARMLESS - {"is_causal", "cu_seq_lens_k", "max_length_k"}}
    assert torch.equal(attend(*parts(), is_causal=True, **along), attend(*parts()))


@pytest.mark.parametrize(
    "keywords, reason",
    [
        ({"attention_mask": torch.ones(1, 1, 30, 30)}, "an attention mask"),
        ({"cu_seq_lens_q": None}, "no cu_seq_lens"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_the_packed_form_cannot_mean_is_refused(keywords, reason):
    with pytest.raises(UnsupportedAttention, match=reason):
        attend(*parts(), **keywords)


def test_a_layer_that_looks_ahead_is_refused():
    class LooksAhead(nn.Module):
        is_causal = False

    with pytest.raises(UnsupportedAttention, match="not causal"):
        packed_attention(LooksAhead(), *parts(), None, cu_seq_lens_q=torch.tensor([0, 30], dtype=torch.int32))


# ---- torch's variable-length attention, with a double where there is no CUDA -----------------------------------------


@pytest.mark.parametrize("takes_gqa", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_variable_length_attention_is_asked_for_the_same_thing(window, takes_gqa, monkeypatch):
    """The double has varlen_attn's contract: [T, heads, head_dim], a window (left, right) of -1 for no border."""
    asked = {}

    def compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, enable_gqa):
        assert torch.equal(cu_q, cu_k) and cu_q.dtype == torch.int32
        assert type(max_q) is int and max_q == max_k == max(LENGTHS)
        left, right = window_size
        assert right == 0
        asked.update(enable_gqa=enable_gqa)
        query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
        return by_hand(query, key, value, scaling=scale, window=None if left == -1 else left + 1)[0].float()

    if takes_gqa:

        def double(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
            return compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, enable_gqa)
    else:

        def double(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
            return compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, None)

    query, key, value = parts()
    expected = attend(query, key, value, scaling=0.5, sliding_window=window)
    monkeypatch.setattr(attention, "varlen_attn", double)
    monkeypatch.setattr(attention, "GROUPED", attention.grouping(double))
    monkeypatch.setattr(attention, "_varlen_fits", lambda *_: True)
    ours = attend(query, key, value, scaling=0.5, sliding_window=window)
    with pytest.raises(UnsupportedAttention, match="no max_length"):
        attend(query, key, value, max_length_q=None)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert asked["enable_gqa"] is (True if takes_gqa else None)


@pytest.mark.parametrize(
    "kind, head_dim, value_dim, dropout, fits",
    [
        ("cuda bf16", 64, 64, 0.0, True),
        ("cuda fp16", 256, 256, 0.0, True),
        ("cuda bf16", 288, 288, 0.0, False),
        ("cuda bf16", 192, 128, 0.0, False),
        ("cuda bf16", 64, 64, 0.1, False),
        ("cuda float32", 64, 64, 0.0, False),
        ("cpu bf16", 64, 64, 0.0, False),
    ],
)
def test_variable_length_attention_is_used_only_where_it_can_be(kind, head_dim, value_dim, dropout, fits):
    class Shape:
        """What is asked of a tensor here, so that a CUDA one needs no CUDA."""

        def __init__(self, size):
            self.is_cuda = kind.startswith("cuda")
            self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[kind.split()[1]]
            self.shape = (1, HEADS, 30, size)

    assert bool(attention._varlen_fits(Shape(head_dim), Shape(value_dim), dropout)) is fits


# ---- inside transformers' models -------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOWED = {
    "mistral": lambda: MistralConfig(**SHAPE, num_hidden_layers=2),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
}


@pytest.mark.parametrize("family", WINDOWED)
def test_a_model_with_windows_gives_what_its_own_eager_attention_gives_each_document(family):
    register()
    register()  # again: nothing happens
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(WINDOWED[family](), attn_implementation=ATTENTION_NAME).eval()
    eager = AutoModelForCausalLM.from_config(WINDOWED[family](), attn_implementation="eager").eval()
    wide = AutoModelForCausalLM.from_config(WINDOWED[family](), attn_implementation="eager").eval()
    for layer in packed.model.layers:  # weights that tell one token from another, or a window would hardly show
        nn.init.normal_(layer.self_attn.q_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.k_proj.weight, std=0.5)
        nn.init.normal_(layer.self_attn.o_proj.weight, std=0.5)
    eager.load_state_dict(packed.state_dict()), wide.load_state_dict(packed.state_dict())
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    wide.config.sliding_window = wide.model.config.sliding_window = 1000

    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    ours = packed(**packed_inputs(ids, LENGTHS), use_cache=False).logits
    alone, unbounded = (
        torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
        for model in (eager, wide)
    )
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
    assert (ours - unbounded).abs().max() > 0.01  # so the window does show
    gradients = [
        torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters())[1:])
        for model, logits in ((packed, ours), (eager, alone))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
