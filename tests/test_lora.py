"""LoRA: fresh changes nothing, disabled is the frozen model to the bit, merged equals unmerged, and the arithmetic is the paper's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora
from model import FrozenLinear


def small():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"q_proj": nn.Linear(12, 8, bias=False), "other": nn.Linear(12, 8, bias=False)}
    )


def shaken(module):
    for _, layer in lora.lora_layers(module):
        nn.init.normal_(layer.lora_b)
    return module


def test_layer_is_w0_plus_scaled_ba():
    module, x = small(), torch.randn(5, 12)
    weight = module["q_proj"].weight.clone()
    assert lora.attach(module, rank=3, alpha=6) == 1  # "other" is no target
    layer = shaken(module)["q_proj"]
    wanted = x @ weight.T + (6 / 3) * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(
        layer(x), wanted, atol=1e-5, rtol=1e-5
    )  # float32 rounding in another order


def test_fresh_adapter_changes_nothing():
    module, x = small(), torch.randn(5, 12)
    before = module["q_proj"](x)
    lora.attach(module, rank=3, alpha=6)
    assert torch.equal(module["q_proj"](x), before)


def test_disabled_is_the_frozen_layer_to_the_bit_and_only_inside():
    module, x = small(), torch.randn(5, 12)
    before = module["q_proj"](x)
    lora.attach(module, rank=3, alpha=6)
    shaken(module)
    with lora.disabled(module):
        assert torch.equal(module["q_proj"](x), before)
    assert not torch.allclose(module["q_proj"](x), before)


def test_merged_equals_unmerged():
    module, x = small(), torch.randn(5, 12)
    lora.attach(module, rank=3, alpha=6)
    unmerged = shaken(module)["q_proj"](x)
    assert lora.merge(module) == 1 and isinstance(module["q_proj"], nn.Linear)
    torch.testing.assert_close(
        module["q_proj"](x), unmerged, atol=1e-5, rtol=1e-5
    )  # float32 rounding in another order


def test_only_a_and_b_get_gradients(random_model):
    names = {name.rsplit(".", 1)[-1] for name, _ in random_model.trained() if "lora" in name}
    assert names == {"lora_a", "lora_b"}
    layers = lora.lora_layers(random_model.lvlm)
    assert (
        len(layers) == 7 * random_model.lvlm.config.decoder.num_hidden_layers
    )  # q, k, v, o, gate, up, down
    assert not any(layer.weight.requires_grad for _, layer in layers)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: lora.attach(m, 0, 1), "rank is 0"),
        (lambda m: lora.attach(m, 2, 2) and lora.attach(m, 2, 2), "LoRA layers already"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_a_layer_with_bias_keeps_it():
    """W0 x + b + (alpha / R) B A x as peft; switched off bit for bit the frozen layer; merging keeps b, and b takes no gradient."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"q_proj": nn.Linear(6, 5)}).requires_grad_(False)
    plain, x = module["q_proj"], torch.randn(3, 6, requires_grad=True)
    frozen = plain(x)
    assert lora.attach(module, rank=2, alpha=3) == 1
    layer = nn.init.normal_(module["q_proj"].lora_b) is not None and module["q_proj"]
    wanted = frozen + 1.5 * F.linear(F.linear(x, layer.lora_a), layer.lora_b)
    torch.testing.assert_close(layer(x), wanted)
    gradients = [
        torch.autograd.grad(out.square().sum(), (x, layer.lora_a, layer.lora_b), retain_graph=True)
        for out in (layer(x), wanted)
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with lora.disabled(module):
        assert torch.equal(layer(x), frozen)
    assert lora.merge(module) == 1 and torch.equal(module["q_proj"].bias, plain.bias)
    torch.testing.assert_close(module["q_proj"](x), wanted)


def test_a_weight_stored_in_bfloat16_is_used_in_the_dtype_of_the_input():
    """As on a CPU without bfloat16 arithmetic: the same value and gradient as with the weight converted beforehand, and no converted copy is kept."""
    torch.manual_seed(0)
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(5, 8).to(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = FrozenLinear.apply(x, weight)
    assert [t.dtype for t in saved] == [torch.bfloat16]
    assert torch.equal(out, F.linear(x, weight.float()))
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * out @ weight.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_written_out_gradients_are_autograds(dtype):
    """Of x, A and B, for inputs of two and three dimensions; bfloat16 weights and inputs leave A and B in float32."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 5, bias=False).to(dtype), rank=2, alpha=3)
    layer.weight.requires_grad_(False)
    nn.init.normal_(layer.lora_b)
    for shape in ((4, 6), (2, 3, 6)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        plain = F.linear(x, layer.weight) + 1.5 * F.linear(
            F.linear(x, layer.lora_a.to(dtype)), layer.lora_b.to(dtype)
        )
        wanted = torch.autograd.grad(plain.square().sum(), (x, layer.lora_a, layer.lora_b))
        found = torch.autograd.grad(layer(x).square().sum(), (x, layer.lora_a, layer.lora_b))
        bound = (
            {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
        )
        torch.testing.assert_close(layer(x), plain, **bound)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, **bound)
