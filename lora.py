"""LoRA (Hu et al., 2021, arXiv 2106.09685): W0 x + (alpha / R) B A x, only A and B are trained.

    attach_lora(lvlm.decoder, rank=16, alpha=16)  # a fresh adapter changes nothing: B is zero
    with lora_disabled(lvlm.decoder): ...  # the frozen model, bit for bit
    merge_lora(lvlm.decoder)  # folds B A into W0; the layers are nn.Linear again

Not here: saving and loading (vladva.py), dropout, DoRA, quantised bases.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# paper Sec. 3.3: the linear layers inside Phi_l
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank update, in the names of the LoRA paper."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        self.enabled = True
        device = linear.weight.device
        # in float32, whatever the frozen weight is stored in; B A is zero at the start
        lora_a = torch.empty(rank, linear.in_features, device="cpu")
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
        self.lora_a = nn.Parameter(lora_a.to(device))  # (R, in)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)  # (B T, in)
        low_rank = F.linear(rows, self.lora_a.to(x.dtype)) * self.scale  # (B T, R)
        out = F.linear(low_rank, self.lora_b.to(x.dtype), self.bias)  # (B T, out)
        # W0 last: there a recomputed block stops; in place: no second tensor (3 % of a CPU's step)
        return out.addmm_(rows, self.weight.T).unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W0 + (alpha / R) B A, (out, in), summed in float32 and rounded once to W0's dtype."""
        update = self.scale * self.lora_b @ self.lora_a
        return (self.weight.float() + update).to(self.weight.dtype)


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """{name: layer} of the LoRA layers inside a module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoRALinear)}


def attach_lora(module: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Wrap every linear layer of the module that TARGETS names; its weights stay where they are."""
    if lora_layers(module):
        raise ValueError("this model has LoRA layers already: merge or reload it first")
    # lora_a depends on the seed alone: not on the device, nor on what ran before
    generator = torch.Generator().manual_seed(seed)
    for name, linear in list(module.named_modules()):
        if name.split(".")[-1] in TARGETS and isinstance(linear, nn.Linear):
            module.set_submodule(name, LoRALinear(linear, rank, alpha, generator))


@contextlib.contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Inside the context the LoRA layers are the frozen linears alone, bit for bit."""
    with contextlib.ExitStack() as stack:
        for layer in lora_layers(module).values():
            stack.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        yield


def merge_lora(module: nn.Module) -> None:
    """Fold every update into its weight and put plain linears back. Only reloading undoes it."""
    for name, layer in lora_layers(module).items():
        out_features, in_features = layer.weight.shape
        linear = nn.Linear(in_features, out_features, layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(layer.merged_weight(), requires_grad=False)
        linear.bias = layer.bias
        module.set_submodule(name, linear)
