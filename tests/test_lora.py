"""LoRA: the paper's arithmetic; fresh, disabled and merged layers.

Not here: peft's outputs (test_llava.py), adapter files (test_vladva.py).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora import LoRALinear, attach_lora, lora_disabled, lora_layers, merge_lora

ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # float32 sums of about ten products in another order


def small():
    """A module with one linear layer that LoRA takes and one that it does not."""
    torch.manual_seed(0)
    layers = {"q_proj": nn.Linear(12, 8, bias=False), "other": nn.Linear(12, 8, bias=False)}
    return nn.ModuleDict(layers)


def attach_shaken(module, rank=3, alpha=6):
    """Attach LoRA and give lora_b values that matter."""
    attach_lora(module, rank, alpha)
    for layer in lora_layers(module).values():
        nn.init.normal_(layer.lora_b)


def test_a_layer_is_w0_plus_scaled_ba():
    module = small()
    x = torch.randn(5, 12)
    weight = module["q_proj"].weight.clone()
    attach_shaken(module, rank=3, alpha=6)
    assert list(lora_layers(module)) == ["q_proj"]  # "other" is no target
    layer = module["q_proj"]
    wanted = x @ weight.T + (6 / 3) * x @ layer.lora_a.T @ layer.lora_b.T
    torch.testing.assert_close(layer(x), wanted, **ROUNDING)


def test_a_fresh_adapter_changes_nothing():
    module = small()
    x = torch.randn(5, 12)
    before = module["q_proj"](x)
    attach_lora(module, rank=3, alpha=6)
    assert torch.equal(module["q_proj"](x), before)


def test_disabled_is_the_frozen_layer_to_the_bit_and_only_inside():
    module = small()
    x = torch.randn(5, 12)
    before = module["q_proj"](x)
    attach_shaken(module)
    with lora_disabled(module):
        with lora_disabled(module):
            assert torch.equal(module["q_proj"](x), before)
        assert torch.equal(module["q_proj"](x), before)
    assert not torch.allclose(module["q_proj"](x), before)


def test_merged_equals_unmerged():
    module = small()
    x = torch.randn(5, 12)
    attach_shaken(module)
    unmerged = module["q_proj"](x)
    merge_lora(module)
    assert type(module["q_proj"]) is nn.Linear and not lora_layers(module)
    torch.testing.assert_close(module["q_proj"](x), unmerged, **ROUNDING)


def test_merging_rounds_once_to_the_dtype_of_the_weight():
    module = small().to(torch.bfloat16)
    attach_shaken(module)
    layer = module["q_proj"]
    exact = layer.weight.double() + 2.0 * layer.lora_b.double() @ layer.lora_a.double()
    merge_lora(module)
    merged = module["q_proj"].weight
    assert merged.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits, and float32 rounding of the sum before it
    torch.testing.assert_close(merged.double(), exact, atol=1e-5, rtol=2**-8)


def test_only_a_and_b_get_gradients(random_model):
    names = [name for name in random_model.trained_parameters() if "lora" in name]
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lora_a", "lora_b"}
    layers = lora_layers(random_model.lvlm)
    num_layers = random_model.lvlm.config.decoder.num_hidden_layers
    assert len(layers) == 7 * num_layers  # q, k, v, o, gate, up, down
    assert not any(layer.weight.requires_grad for layer in layers.values())


def test_the_start_depends_on_the_seed_alone():
    """Not on the random numbers used before, nor on what the weights are stored in."""

    def starts(seed, dtype=torch.float32):
        module = nn.ModuleDict({"q_proj": nn.Linear(12, 8), "k_proj": nn.Linear(12, 4)}).to(dtype)
        attach_lora(module, rank=3, alpha=6, seed=seed)
        return [layer.lora_a for layer in lora_layers(module).values()]

    first = starts(5)
    torch.manual_seed(99)
    for again in (starts(5), starts(5, torch.bfloat16)):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b) and b.dtype == torch.float32
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], starts(6)[0])


def test_lora_a_starts_in_the_range_of_peft():
    """Kaiming-uniform with a = sqrt(5): uniform in +- 1 / sqrt(in)."""
    module = nn.ModuleDict({"q_proj": nn.Linear(100, 4)})
    attach_lora(module, rank=50, alpha=6)
    lora_a = module["q_proj"].lora_a
    assert lora_a.abs().max() <= 0.1
    # the standard deviation of 5,000 uniform numbers, within four of its own
    assert lora_a.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)


def test_attaching_twice_is_refused():
    module = small()
    attach_lora(module, rank=2, alpha=2)
    with pytest.raises(ValueError, match="LoRA layers already"):
        attach_lora(module, rank=2, alpha=2)


def test_a_layer_with_bias_keeps_it():
    """W0 x + b + (alpha / R) B A x as peft; merging keeps b, and b takes no gradient."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"q_proj": nn.Linear(6, 5)}).requires_grad_(False)
    plain = module["q_proj"]
    x = torch.randn(3, 6, requires_grad=True)
    frozen = plain(x)
    attach_shaken(module, rank=2, alpha=3)
    layer = module["q_proj"]
    wanted = frozen + 1.5 * F.linear(F.linear(x, layer.lora_a), layer.lora_b)
    torch.testing.assert_close(layer(x), wanted)
    inputs = (x, layer.lora_a, layer.lora_b)
    gradients = torch.autograd.grad(layer(x).square().sum(), inputs)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), inputs, retain_graph=True)
    torch.testing.assert_close(gradients, wanted_gradients, **ROUNDING)
    with lora_disabled(module):
        assert torch.equal(layer(x), frozen)
    merge_lora(module)
    assert torch.equal(module["q_proj"].bias, plain.bias)
    assert not module["q_proj"].bias.requires_grad
    torch.testing.assert_close(module["q_proj"](x), wanted)


# of sums of about ten products: bfloat16 has 8 bits, float32 sums in another order
@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_a_and_b_stay_in_float32_whatever_the_weight_is_stored_in(dtype, bound):
    """Values and gradients of x, A and B are those of the formula in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 5, bias=False).to(dtype).requires_grad_(False)
    layer = LoRALinear(linear, rank=2, alpha=3, generator=torch.Generator())
    nn.init.normal_(layer.lora_b)
    for shape in ((4, 6), (2, 3, 6)):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        inputs = (x, layer.lora_a, layer.lora_b)
        exact = [value.detach().double().requires_grad_() for value in inputs]
        low_rank = F.linear(F.linear(exact[0], exact[1]), exact[2])
        wanted = F.linear(exact[0], layer.weight.double()) + 1.5 * low_rank
        out = layer(x)
        assert out.dtype == dtype
        tolerance = {"atol": 2 * bound, "rtol": bound, "check_dtype": False}
        torch.testing.assert_close(out.double(), wanted, **tolerance)
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32, torch.float32]
        wanted_gradients = torch.autograd.grad(wanted.square().sum(), exact)
        for gradient, wanted_gradient in zip(gradients, wanted_gradients):
            scale = wanted_gradient.abs().max()
            assert (gradient - wanted_gradient).abs().max() <= bound * scale
