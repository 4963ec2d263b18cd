"""LoRA (Hu et al., 2021, arXiv 2106.09685) on every linear layer of the decoder: W0 x + b + (alpha / R) B A x, only A and B trained.

    attach(lvlm.decoder, rank=16, alpha=16)      # a fresh adapter changes nothing: B starts at zero
    with disabled(lvlm.decoder): ...             # the frozen model, bit for bit
    merge(lvlm.decoder)                          # folds B A into W0; the layers are plain nn.Linear again

Not here: dropout, DoRA, quantised bases, other target layers than the seven linears of a Llama block.
"""

import contextlib
import math

import torch
from torch import nn

from model import FrozenLinear, Linear

TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # paper Sec. 3.3: the linear layers inside Phi_l


class LoRAProduct(torch.autograd.Function):
    """x W0^T + scale x A^T B^T for a frozen W0, with the gradients of x, A and B.

    Written out because autograd would keep and pass over several tensors as large as the output; here only x and x A^T (..., R) are kept.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, scale):
        rows, a, b = x.flatten(0, -2), lora_a.to(x.dtype), lora_b.to(x.dtype)
        low, out = rows @ a.T, rows @ weight.to(x.dtype).T  # (n, R), (n, out)
        out.addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(rows, low, weight, lora_a, lora_b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        (rows, low, weight, lora_a, lora_b), grad, x_grad = (
            ctx.saved_tensors,
            grad.flatten(0, -2),
            None,
        )
        low_grad = (grad @ lora_b.to(grad.dtype)) * ctx.scale  # (n, R)
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight.to(grad.dtype)
            x_grad = x_grad.addmm_(low_grad, lora_a.to(grad.dtype)).view(ctx.shape)
        return (
            x_grad,
            None,
            (low_grad.T @ rows).to(lora_a.dtype),
            (grad.T @ low * ctx.scale).to(lora_b.dtype),
            None,
        )


class LoRALinear(nn.Module):
    """A frozen linear layer W0 (`weight`), with its `bias` if it has one, plus the low-rank update (alpha / R) B A, in the LoRA paper's names.

    lora_a: (R, in), Kaiming-uniform; lora_b: (out, R), zero. Both stay float32 and are cast to the input's dtype where they are used.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.enabled = rank, alpha, True
        device = linear.weight.device
        self.lora_a = nn.Parameter(
            torch.empty(rank, linear.in_features, device=device, dtype=torch.float32)
        )
        self.lora_b = nn.Parameter(
            torch.zeros(linear.out_features, rank, device=device, dtype=torch.float32)
        )
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @torch.no_grad()
    def folded(self):
        """W0 + (alpha / R) B A, (out, in), summed in float32 and rounded once to W0's dtype."""
        update = (self.lora_b @ self.lora_a) * (self.alpha / self.rank)
        return (self.weight.float() + update).to(self.weight.dtype)

    def forward(self, x):
        if not self.enabled:
            return FrozenLinear.apply(x, self.weight, self.bias)
        out = LoRAProduct.apply(x, self.weight, self.lora_a, self.lora_b, self.alpha / self.rank)
        return out if self.bias is None else out + self.bias.to(x.dtype)


def lora_layers(module):
    """[(name, LoRALinear), ...] inside a module."""
    return [
        (name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)
    ]


def replace_layers(module, wanted, make):
    """Replace every descendant for which wanted(attribute name, child) holds by make(child); returns how many."""
    count = 0
    for parent in list(module.modules()):
        for attribute, child in list(parent.named_children()):
            if wanted(attribute, child):
                setattr(parent, attribute, make(child))
                count += 1
    return count


def attach(module, rank, alpha, targets=TARGETS):
    """Wrap every linear layer of the module whose attribute is in `targets`; returns how many. The base weights stay where they are."""
    if rank < 1:
        raise ValueError(
            f"LoRA rank is {rank}: at least 1 is needed (train without adapters by turning LoRA off instead)"
        )
    if lora_layers(module):
        raise ValueError(
            "this model has LoRA layers already: merge or reload it before attaching new ones"
        )
    return replace_layers(
        module,
        lambda name, child: name in targets and isinstance(child, nn.Linear),
        lambda child: LoRALinear(child, rank, alpha),
    )


@contextlib.contextmanager
def disabled(module):
    """Inside the context the LoRA layers are the frozen linears alone, bit for bit."""
    layers = [layer for _, layer in lora_layers(module)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def merge(module):
    """Fold every update into its weight, in float32, and put plain linears back. There is no way back but to reload."""

    def merged(layer):
        with torch.device("meta"):
            linear = Linear(
                layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None
            )
        linear.weight, linear.bias = nn.Parameter(layer.folded(), requires_grad=False), layer.bias
        return linear

    return replace_layers(module, lambda _, child: isinstance(child, LoRALinear), merged)


def lora_state(module):
    """{"<layer>.lora_a": tensor, "<layer>.lora_b": tensor}: everything a LoRA adapter is."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in lora_layers(module)
        for part in ("lora_a", "lora_b")
    }
