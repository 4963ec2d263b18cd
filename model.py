"""The LVLM, from scratch: a CLIP-ViT encoder, an MLP projector and a Llama decoder, in the shape of LLaVA-1.5.

    from model import load_lvlm
    lvlm = load_lvlm("assets/tiny")          # a folder with LLaVA-1.5's weights, in any of the layouts of PREFIXES
    hidden = lvlm.decoder(lvlm.embed(ids))   # (B, T, D), after the final norm

Everything the method (vladva.py) needs is here and nothing more: features, hidden states, logits, cached generation. Which architecture a
folder holds is decided once, in parse_config; what the two differ in is behind LVLMConfig's towers, grid, stack, positions and hub_name, and
the tower's run_weights and patches_per_token. The second one, Qwen2-VL, is extras/qwen2_vl.py. At the end stands what every script needs of
devices and of the processes that torchrun starts.

Not here: prompts, embeddings, losses (vladva.py); tokenizer and images (data.py); adapters (lora.py); dropout (LLaVA-1.5 has none).

Letters in the shape comments:
    B batch   T tokens   N image tokens   P soft-prompt tokens   D decoder width   V vocabulary   R LoRA rank
    H heads   G key-value heads (grouped-query)   K head width   S slots of the key-value cache   C vision width
"""

import importlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-ViT dimensions; a field that config.json leaves out takes transformers' CLIPVisionConfig default."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 32  # pixels, square
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"


@dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a Llama (or Qwen2) decoder; a field that config.json leaves out takes transformers' LlamaConfig default."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6  # LLaVA-1.5's config.json says 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    qkv_bias: bool = False  # Qwen2 has one on q, k and v
    rope_sections: tuple = ()  # Qwen2-VL: how many of the K / 2 rotary frequencies turn with time, row and column

    @property
    def kv_heads(self):
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self):
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class LVLMConfig:
    """What config.json of a LLaVA-1.5 folder says."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    vision_feature_layer: int = -2  # index into [embeddings, block 1, block 2, ...]
    raw: dict = field(
        default_factory=dict, compare=False, repr=False
    )  # config.json as read, written back on save
    model_type = "llava"

    def towers(self):
        """(vision tower, projector): image tokens are projector(vision(pixels))."""
        return VisionTower(self.vision, self.num_vision_blocks), Projector(
            self.vision.hidden_size, self.decoder.hidden_size
        )

    def grid(self, pixels=None):
        """(rows, columns) of image tokens of one preprocessed picture; of a rendered scene when there is none."""
        return (self.vision.image_size // self.vision.patch_size,) * 2

    def stack(self, pictures):
        """Preprocessed pictures -> what the vision tower takes, with a length and .to(device)."""
        return torch.stack(pictures)

    def positions(self, ids, grid):
        """Rotary positions of a sequence with a picture of grid = (rows, columns) image tokens, when they are not 0 .. T - 1. Here they are."""
        return None

    def hub_name(self, key):
        """Name of a parameter of LVLM -> its name in the hub's layout."""
        return to_hub(key)

    @property
    def num_image_tokens(self):
        return math.prod(self.grid())

    @property
    def num_vision_blocks(self):
        """Blocks that are run: those after the feature layer would change nothing."""
        layer, states = self.vision_feature_layer, self.vision.num_hidden_layers + 1
        if not -states <= layer < states:
            raise ValueError(
                f"vision_feature_layer is {layer}, but the vision tower has {states} hidden states: correct config.json"
            )
        return layer % states


# What this code does, by config field. Another value would silently give another model, so it is refused by name.
SUPPORTED = {
    "original": {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",), "mm_use_im_start_end": (False,),
                 "mm_use_im_patch_token": (False,), "image_aspect_ratio": ("pad", "square", None)},
    "top": {"model_type": ("llava", "qwen2_vl"), "projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
            "multimodal_projector_bias": (True,), "quantization_config": (None,)},
    "vision_config": {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",), "num_channels": (3,)},
    "text_config": {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
                    "rope_scaling": (None,), "quantization_config": (None,)},
    "qwen2_vl": {"quantization_config": (None,)},
    "qwen2_vl vision_config": {"hidden_act": ("quick_gelu",), "in_channels": (3,), "in_chans": (3,)},
    "qwen2_vl text_config": {"hidden_act": ("silu",), "use_sliding_window": (False,), "quantization_config": (None,)},
}  # fmt: skip


def read_json(path):
    """The JSON object in a file; ValueError with the file's name when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: a model folder holds config.json, *.safetensors, tokenizer.json and preprocessor_config.json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def check_supported(name, section):
    """ValueError naming the first field of a config section that asks for something else than SUPPORTED[name] allows."""
    for key, allowed in SUPPORTED[name].items():
        if key in section and section[key] not in allowed:
            raise ValueError(
                f"config.json: {name}.{key} is {section[key]!r}; this code does {' or '.join(map(repr, allowed))} only"
            )


def hub_config(raw, tower):
    """config.json as the original LLaVA writes it (flat, "mm_..."), and that of its CLIP folder or None -> the hub's nested form.

    Its <image> has no row in the embedding table: it takes the first id beyond.
    """
    check_supported("original", raw)
    vision = raw.get("vision_config") or (tower and (tower.get("vision_config") or tower))
    if not vision:
        raise ValueError(
            f"config.json names the vision tower {raw['mm_vision_tower']!r}, which is not here: put that CLIP folder (config.json, "
            f"preprocessor_config.json, *.safetensors) beside, as {Path(raw['mm_vision_tower']).name}"
        )
    extra = (
        "rope_scaling",
        "rope_parameters",
        "attention_bias",
        "mlp_bias",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    text = {key: raw[key] for key in (*DecoderConfig.__dataclass_fields__, *extra) if key in raw}
    return {
        "model_type": "llava",
        "image_token_index": text.get("vocab_size", DecoderConfig.vocab_size),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "quantization_config": raw.get("quantization_config"),
        "vision_config": {"model_type": "clip_vision_model", **vision},
        "text_config": {"model_type": "llama", **text},
    }


ARCHITECTURES = {"qwen2_vl": "extras.qwen2_vl"}  # model_type: the module of another architecture


def parse_config(raw):
    """config.json of a model folder (a dict) -> LVLMConfig or Qwen2VLConfig, as its model_type says.

    ValueError names a missing field or one this code cannot honour.
    """
    module = ARCHITECTURES.get(str(raw.get("model_type")))
    return importlib.import_module(module).parse_config(raw) if module else parse_llava(raw)


def parse_llava(raw):
    """parse_config for LLaVA-1.5."""
    sections = {
        "top": raw,
        "vision_config": raw.get("vision_config"),
        "text_config": raw.get("text_config"),
    }
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(
                f"config.json has no object {name!r}: wanted the layout of llava-hf/llava-1.5-7b-hf"
            )
        check_supported(name, section)
    image_token_id = raw.get("image_token_id", raw.get("image_token_index"))
    if image_token_id is None:
        raise ValueError(
            "config.json has neither image_token_index nor image_token_id: it must name the id of <image>"
        )
    if not isinstance(raw.get("vision_feature_layer", -2), int):
        raise ValueError(
            f"config.json: vision_feature_layer is {raw['vision_feature_layer']!r}; this code reads one layer, an integer"
        )
    text = dict(sections["text_config"])
    rope = text.pop("rope_parameters", None) or {}
    strange = {
        k: v
        for k, v in rope.items()
        if k not in ("rope_theta", "rope_type") or (k == "rope_type" and v != "default")
    }
    if strange:
        raise ValueError(
            f"config.json: text_config.rope_parameters asks for {strange}; this code does rope_type 'default' with a rope_theta only"
        )
    text.setdefault("rope_theta", rope.get("rope_theta", DecoderConfig.rope_theta))
    text.setdefault(
        "tie_word_embeddings", raw.get("tie_word_embeddings", DecoderConfig.tie_word_embeddings)
    )
    return LVLMConfig(
        vision=VisionConfig(
            **{
                k: v
                for k, v in sections["vision_config"].items()
                if k in VisionConfig.__dataclass_fields__
            }
        ),
        decoder=DecoderConfig(
            **{k: v for k, v in text.items() if k in DecoderConfig.__dataclass_fields__}
        ),
        image_token_id=image_token_id,
        vision_feature_layer=raw.get("vision_feature_layer", -2),
        raw=raw,
    )


def read_config(folder, tower=None):
    """LVLMConfig of a model folder; tower: the CLIP folder beside it, for the original LLaVA's layout."""
    raw = read_json(Path(folder) / "config.json")
    if "mm_vision_tower" in raw:
        raw = hub_config(raw, read_json(Path(tower) / "config.json") if tower else None)
    return parse_config(raw)


# ------------------------------------------------------------------------------------------------------ vision tower


def quick_gelu(x):
    """x sigmoid(1.702 x), the approximate GELU of both vision towers."""
    return x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    """Pre-norm transformer block of CLIP-ViT: every patch sees every patch."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, config.intermediate_size),
                "fc2": nn.Linear(config.intermediate_size, width),
            }
        )

    def forward(self, x):
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1 + N, K)
        x = x + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.layer_norm2(x))))


class VisionTower(nn.Module):
    """Phi_v: pixels (B, 3, height, width) -> patch features (B, N, C) of the layer that `vision_feature_layer` names."""

    patches_per_token = 1

    def __init__(self, config, num_blocks):
        super().__init__()
        width, self.num_blocks = config.hidden_size, num_blocks
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(
            3, width, config.patch_size, stride=config.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding(
            (config.image_size // config.patch_size) ** 2 + 1, width
        )
        self.pre_layrnorm = nn.LayerNorm(
            width, eps=config.layer_norm_eps
        )  # sic: the published checkpoints spell it so
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(
            width, eps=config.layer_norm_eps
        )  # LLaVA never applies it; kept so that a save is complete

    def forward(self, pixels):
        patches = (
            self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        )  # (B, N, C)
        x = (
            torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
            + self.position_embedding.weight
        )
        x = self.pre_layrnorm(x)
        for block in self.layers[: self.num_blocks]:
            x = block(x)
        return x[:, 1:]  # the class token is dropped

    def run_weights(self):
        """The parameters that every patch meets."""
        return [
            self.patch_embedding.weight,
            *(p for block in self.layers[: self.num_blocks] for p in block.parameters()),
        ]


class Projector(nn.Module):
    """g: vision features (B, N, C) -> decoder inputs (B, N, D); two layers with the exact (erf) GELU."""

    def __init__(self, vision_width, decoder_width):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, decoder_width)
        self.linear_2 = nn.Linear(decoder_width, decoder_width)

    def forward(self, features):
        return self.linear_2(F.gelu(self.linear_1(features)))


# ------------------------------------------------------------------------------------------------------ decoder


class FrozenLinear(torch.autograd.Function):
    """x W^T + b for frozen W (out, in) and b (out,) or None, which may be stored in another dtype than x: they are converted where they are
    used, and no copy is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class Linear(nn.Linear):
    """x W^T, without bias unless one is asked for, in the dtype of x."""

    def __init__(self, inputs, outputs, bias=False):
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x):
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 whatever the dtype of x."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return self.weight.to(x.dtype) * normed


def frequencies(width, theta, device):
    """Rotary frequencies of `width` channels, (width / 2,)."""
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def cos_and_sin(angles, dtype):
    """cos and sin of rotary angles (..., K / 2), (..., K) each: the rotate-half layout pairs channel i with i + K / 2."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotary_tables(positions, width, theta, dtype, sections=()):
    """cos and sin of the rotary angles, (..., T, K), computed in float32. positions: (..., T) integers.

    positions (3, B, T) are three axes: the first sections[0] of the frequencies turn with the first axis, and so on; (B, T, K).
    """
    angles = positions[..., None].float() * frequencies(width, theta, positions.device)
    if positions.ndim == 3:
        angles = torch.cat(
            [part[axis] for axis, part in enumerate(angles.split(sections, dim=-1))], dim=-1
        )
    return cos_and_sin(angles, dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, H, T, K); cos, sin broadcast to (B, 1, T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens seen so far, per layer. Row b holds its own tokens in slots 0 .. length_b - 1.

    Prompts are right-padded; a padding token's slot is overwritten by the row's first generated tokens before it can be seen.
    """

    def __init__(self, config, batch, slots, device, dtype):
        shape = (
            config.num_hidden_layers,
            batch,
            slots,
            config.kv_heads,
            config.head_width,
        )  # (layers, B, S, G, K)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)[:, None]

    def write(self, layer, k, v, positions):
        """Store k, v (B, G, T, K) at slots `positions` (B, T), or the first T; return all slots of this layer, (B, G, S, K) each."""
        where = torch.arange(k.shape[2], device=k.device) if positions is None else positions
        self.keys[layer][self.rows, where] = k.transpose(1, 2)
        self.values[layer][self.rows, where] = v.transpose(1, 2)
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)


class Prefix:
    """Keys and values of tokens that every row of a batch begins with, computed once for one row. What follows them is not stored."""

    def __init__(self, decoder, embeds):
        """embeds: (1, S, D), the decoder inputs of those tokens."""
        self.cache = KVCache(decoder.config, 1, embeds.shape[1], embeds.device, embeds.dtype)
        decoder(embeds, self.cache)

    def write(self, layer, k, v, positions):
        """k, v (B, G, T, K) behind those of the prefix, (B, G, S + T, K) each."""
        before = (
            kept[layer].transpose(1, 2).expand(len(k), -1, -1, -1)
            for kept in (self.cache.keys, self.cache.values)
        )
        return tuple(torch.cat(both, dim=2) for both in zip(before, (k, v)))


def pick(x, rows):
    """The states x (B, T, D) at the flat indices b * T + t, (M, D); all of them as they are when rows is None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; biases on q, k and v in Qwen2 only.

    Training passes no mask, so on CUDA in bfloat16 or float16 scaled_dot_product_attention should take PyTorch's FlashAttention kernel:
    torch.profiler then shows `flash_fwd` and `flash_bwd` kernels, and inside torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION) a
    step raises if it cannot. float32 takes the memory-efficient one. Not run on a GPU here.
    """

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.width = (
            config.num_attention_heads,
            config.kv_heads,
            config.head_width,
        )
        self.q_proj = Linear(config.hidden_size, self.heads * self.width, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.width, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.width, config.qkv_bias)
        self.o_proj = Linear(self.heads * self.width, config.hidden_size)

    def project(self, x, rotary):
        """Rotated queries (B, H, T, K) and keys (B, G, T, K), and values (B, G, T, K)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *rotary), rotate(k, *rotary), v

    def weights(self, x, rotary):
        """The attention weights (B, H, T, T) that the fused kernel multiplies the values with and never shows; for figures only."""
        q, k, _ = self.project(x, rotary)
        scores = (
            q
            @ k.repeat_interleave(self.heads // self.kv_heads, dim=1).transpose(-1, -2)
            * self.width**-0.5
        )
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        return scores.float().masked_fill(unseen, -torch.inf).softmax(-1)

    def forward(self, x, rotary, cache=None, layer=None, positions=None, rows=None):
        q, k, v = self.project(x, rotary)
        grouped = self.heads != self.kv_heads
        if cache is not None:
            all_k, all_v = cache.write(layer, k, v, positions)
        if (
            positions is not None
        ):  # tokens that follow others: they see the slots up to their own position
            seen = (
                torch.arange(all_k.shape[2], device=x.device) <= positions[:, None, :, None]
            )  # (B, 1, T, S)
            attended = F.scaled_dot_product_attention(
                q, all_k, all_v, attn_mask=seen, enable_gqa=grouped
            )
        else:  # right padding needs no mask under causal attention: a real token never sees what comes after it
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(pick(attended.transpose(1, 2).flatten(2), rows))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """Pre-norm transformer block of Llama."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rotary, cache=None, layer=None, positions=None, rows=None):
        x = pick(x, rows) + self.self_attn(
            self.input_layernorm(x), rotary, cache, layer, positions, rows
        )
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Phi_l: token embeddings (B, T, D) -> hidden states after the final norm (B, T, D).

    `checkpointing` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embeds, cache=None, positions=None, rows=None, depth=None, axes=None):
        """cache: where keys and values go, and those of earlier tokens come from. positions: (B or 1, T), where each token stands in its
        row, when it follows others in the cache; otherwise they are 0 .. T - 1.

        rows: flat indices b * T + t of the states that are wanted, (M, D); what the last block does for the others after its attention is
        left out. None: all, (B, T, D). depth: how many blocks are run, 1 or more; the final norm follows when it is all of them, or None.

        axes: (3, B, T) or (B, T), rotary positions when they are not where the tokens stand.
        """
        assert depth is None or 1 <= depth <= len(self.layers), depth
        rotary, x, blocks = (
            self.rotary(embeds, positions if axes is None else axes),
            embeds,
            self.layers[:depth],
        )
        for layer, block in enumerate(blocks):
            wanted = rows if layer + 1 == len(blocks) else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, rows=wanted, use_reentrant=False)
            else:
                x = block(x, rotary, cache, layer, positions, wanted)
        return self.norm(x) if len(blocks) == len(self.layers) else x

    def rotary(self, embeds, positions=None):
        """(cos, sin), (B or 1, 1, T, K) each, for tokens at `positions` (B or 1, T) or (3, B, T), or at 0 .. T - 1."""
        where = (
            torch.arange(embeds.shape[1], device=embeds.device)[None]
            if positions is None
            else positions
        )
        cos, sin = rotary_tables(
            where,
            self.config.head_width,
            self.config.rope_theta,
            embeds.dtype,
            self.config.rope_sections,
        )
        return cos[:, None], sin[:, None]

    def attention_maps(self, embeds, axes=None):
        """Yields the attention weights of each block, (B, H, T, T), along the usual forward of embeds (B, T, D)."""
        rotary, x = self.rotary(embeds, axes), embeds
        for block in self.layers:
            yield block.self_attn.weights(block.input_layernorm(x), rotary)
            x = block(x, rotary)


def place(embeds, vectors, slots):
    """A copy of embeds (B, T, D) in which row b holds vectors (n, D) or (B, n, D) from slot slots[b] on. slots: (B,) integers."""
    count = vectors.shape[-2]
    columns = slots[:, None] + torch.arange(count, device=embeds.device)  # (B, n)
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    return embeds.index_put(
        (rows, columns), vectors.to(embeds.dtype).expand(len(embeds), count, -1)
    )


def place_image(embeds, features, places):
    """A copy of embeds (B, T, D) with all image tokens, (B, N, D) or (n, D), in their places. places: (2, n), row and slot of each in order."""
    return embeds.index_put(tuple(places), features.flatten(0, -2).to(embeds.dtype))


class LVLM(nn.Module):
    """Phi_l(g(Phi_v(image)), prompt) of either architecture. `head` gives next-token logits; it shares the embedding's weight when tied."""

    def __init__(self, config):
        super().__init__()
        self.config, self.wider = (
            config,
            None,
        )  # dtype of the decoder's arithmetic; None: that of the weights
        self.vision, self.projector = config.towers()
        self.decoder = Decoder(config.decoder)
        self.head = Linear(config.decoder.hidden_size, config.decoder.vocab_size)
        if config.decoder.tie_word_embeddings:
            self.head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self):
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.decoder.embed_tokens.weight.dtype

    @property
    def compute_dtype(self):
        return self.wider or self.dtype

    def embed(self, ids):
        """Token ids (B, T) -> decoder inputs (B, T, D), in the dtype that the decoder computes in."""
        return self.decoder.embed_tokens(ids).to(self.compute_dtype)

    def image_features(self, pixels):
        """Pixels as the image processor stacks them, (B, 3, height, width) or Patches -> image tokens g(Phi_v(x_v)), (B, N, D) or (n, D)."""
        return self.projector(self.vision(pixels))


# ------------------------------------------------------------------------------------------------------ generation


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: greedily at temperature 0, otherwise from softmax(logits / temperature) cut to `top_p` of its mass."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # the same seed, model and batch give the same text

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature}, top-p {self.top_p}: wanted 0 or more, and above 0 up to 1"
            )


GREEDY = Sampling()


def next_token(logits, sampling, generator):
    """logits (B, V) -> token ids (B,). Top-p keeps the likeliest tokens until their mass reaches top_p, at least one."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p, token = (logits.float() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= sampling.top_p, 0.0)
    return token.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


@torch.no_grad()
def generate(lvlm, embeds, lengths, eos_id, max_new_tokens, sampling=GREEDY, axes=None):
    """Decoding of a batch with the key-value cache.

    embeds: (B, T, D) right-padded decoder inputs; lengths: (B,) real tokens per row; axes: their rotary positions (3, B, T) when they are
    not 0 .. T - 1. Returns a list of B lists of token ids, each ending before its first `eos_id`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    batch, width = embeds.shape[:2]
    slots = width + max_new_tokens
    limit = lvlm.config.decoder.max_position_embeddings
    if slots > limit:
        raise ValueError(
            f"prompt of {width} tokens + {max_new_tokens} new ones exceed the model's {limit} positions: ask for fewer"
        )
    cache = KVCache(lvlm.config.decoder, batch, slots, embeds.device, embeds.dtype)
    generator = torch.Generator(embeds.device).manual_seed(sampling.seed)
    last = lvlm.decoder(
        embeds,
        cache,
        rows=torch.arange(batch, device=embeds.device) * width + lengths - 1,
        axes=axes,
    )  # (B, D)
    follow = (
        lengths if axes is None else axes.amax(0).gather(1, lengths[:, None] - 1)[:, 0] + 1
    )  # (B,) rotary position of the first new token
    produced, done = [], torch.zeros(batch, dtype=torch.bool, device=embeds.device)
    for step in range(max_new_tokens):
        token = next_token(lvlm.head(last), sampling, generator)  # (B,)
        produced.append(token)
        done |= token == eos_id
        if step + 1 == max_new_tokens or done.all():
            break
        last = lvlm.decoder(
            lvlm.embed(token[:, None]),
            cache,
            (lengths + step)[:, None],
            axes=(follow + step)[:, None],
        )[:, 0]
    rows = torch.stack(produced, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


# ------------------------------------------------------------------------------------------------------ weights on disk

# Prefix in a folder -> prefix here, first match wins. The same weights circulate under several names; a save uses the hub's.
VISION_ROOTS = ("vision_tower.vision_model.", "vision_tower.",  # llava-hf; transformers 5 leaves "vision_model." out
                "model.vision_tower.vision_tower.vision_model.",  # the original LLaVA, tower inside
                "model.vision_tower.vision_model.", "model.vision_tower.",  # transformers 4.52 and later; 5
                "vision_model.")  # fmt: skip  # a CLIP folder beside the original LLaVA
PREFIXES = (
    ("language_model.model.", "decoder."),  # llava-hf
    ("language_model.lm_head.", "head."),
    ("multi_modal_projector.", "projector."),
    *(
        (root + theirs, ours)
        for root in ("visual.", "model.visual.")
        for theirs, ours in (("merger.", "projector."), ("", "vision."))
    ),  # Qwen2-VL
    ("model.language_model.", "decoder."),  # transformers 4.52 and later
    ("model.multi_modal_projector.", "projector."),
    ("lm_head.", "head."),
    ("model.mm_projector.0.", "projector.linear_1."),  # the original LLaVA
    ("model.mm_projector.2.", "projector.linear_2."),
    *(
        (root + part, "vision.")
        for root in VISION_ROOTS
        for part in ("embeddings.", "encoder.", "")
    ),
    ("model.", "decoder."),  # the original LLaVA; Qwen2-VL
)
IGNORED_SUFFIXES = (
    "embeddings.position_ids",
    "rotary_emb.inv_freq",
)  # tables that old checkpoints carry and that are recomputed
IGNORED_PREFIXES = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
)  # the rest of a CLIP folder
FLOATS = ("F64", "F32", "F16", "BF16")  # stored dtypes that can be read as they are


def to_ours(key):
    """Name of a stored tensor -> its name in LVLM, or None when no layout knows it."""
    return next(
        (ours + key[len(theirs) :] for theirs, ours in PREFIXES if key.startswith(theirs)), None
    )


def to_hub(key):
    """Name of a parameter of a LLaVA -> its name in the hub's layout."""
    if key.startswith("vision."):
        part = (
            "encoder."
            if key.startswith("vision.layers.")
            else ""
            if "layrnorm" in key or "post_layernorm" in key
            else "embeddings."
        )
        return f"vision_tower.vision_model.{part}{key[len('vision.') :]}"
    return next(theirs + key[len(ours) :] for theirs, ours in PREFIXES if key.startswith(ours))


def shard_files(folder):
    """The safetensors files of a folder: those its index names, or the single model.safetensors."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(read_json(index).get("weight_map", {}).values()))
        if index.exists()
        else ["model.safetensors"]
    )
    missing = [name for name in names if not (folder / name).exists()]
    pickles = [
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))
    ]
    if missing and pickles:
        raise ValueError(
            f"{folder}: {', '.join(missing)} not found, and {pickles[0]} is a pickle, which could run any code: convert it to safetensors"
        )
    if missing or not names:
        wanted = (
            f"every shard of {index.name}" if index.exists() else "model.safetensors or its index"
        )
        raise ValueError(
            f"{folder}: {', '.join(missing) or 'weight_map'} not found; wanted {wanted}"
        )
    return [folder / name for name in names]


def open_shard(path):
    """A memory-mapped safetensors file; ValueError when it is truncated or something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): truncated download, or another format such as a pickle"
        ) from None


def check_keys(found, wanted):
    """Compare {name: shape} of a checkpoint with that of the model; one ValueError lists everything that differs."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    mismatched = [
        f"{k} {tuple(found[k])}, wanted {tuple(wanted[k])}"
        for k in sorted(found.keys() & wanted.keys())
        if tuple(found[k]) != tuple(wanted[k])
    ]
    problems = [f"{len(names)} {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)) if names]  # fmt: skip
    if problems:
        raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: which file, under which name, of which shape."""

    path: Path
    name: str
    shape: tuple


def stored_tensors(paths):
    """{name here: Stored} of every tensor in some safetensors files; a name that no layout knows stays as it is."""
    found = {}
    for path in paths:
        shard = open_shard(path)
        for name in shard.keys():
            if name.endswith(IGNORED_SUFFIXES) or name.startswith(IGNORED_PREFIXES):
                continue
            ours, header = to_ours(name) or name, shard.get_slice(name)
            if ours in found:
                raise ValueError(
                    f"{path}: {name} is the same weight as {found[ours].name} of {found[ours].path.name}: remove one of the two"
                )
            if header.get_dtype() not in FLOATS:
                raise ValueError(
                    f"{path}: {name} is stored as {header.get_dtype()}; this code reads {', '.join(FLOATS)} only, nothing quantised"
                )
            found[ours] = Stored(path, name, tuple(header.get_shape()))
    return found


def load_weights(lvlm, folder, device, dtype, tower=None):
    """Copy every tensor to its place, device and dtype, one at a time; strict on keys and shapes.

    A shard is mapped anew for each tensor and let go after it: pages that were read would otherwise count as memory of this process,
    up to the size of the file.
    """
    found, tied = stored_tensors(shard_files(folder)), lvlm.config.decoder.tie_word_embeddings
    if tower and not any(name.startswith("vision.") for name in found):
        found |= stored_tensors(shard_files(tower))
    if tied:
        found.pop("head.weight", None)  # some tied checkpoints store the shared weight twice
    wanted = {
        found[name].name if name in found else lvlm.config.hub_name(name): p.shape
        for name, p in lvlm.named_parameters()
    }
    try:
        check_keys({stored.name: stored.shape for stored in found.values()}, wanted)
    except ValueError as error:
        raise ValueError(f"the weights of {folder} do not fit its config.json: {error}") from None
    state = {}
    for name, stored in tqdm(found.items(), desc="loading weights", leave=False, disable=None):
        with open_shard(stored.path) as shard:
            state[name] = shard.get_tensor(stored.name).to(device=device, dtype=dtype, copy=True)
    if tied:
        state["head.weight"] = state["decoder.embed_tokens.weight"]
    lvlm.load_state_dict(state, assign=True)
    if tied:
        lvlm.head.weight = lvlm.decoder.embed_tokens.weight


def wider_dtype(device, dtype):
    """float32 for half-precision weights on a CPU without half-precision arithmetic, otherwise None.

    There, a product in bfloat16 is many times slower than converting the weight and multiplying in float32.
    """
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    able = torch.cpu.get_capabilities()
    native = any(
        able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")
    )  # bf16: as ARM calls it
    return None if native and dtype == torch.bfloat16 else torch.float32


def load_lvlm(folder, device="cpu", dtype=torch.float32, tower=None):
    """The LVLM in a model folder, frozen, on one device in one dtype. tower: the CLIP folder that the original LLaVA's layout needs."""
    with torch.device("meta"):
        lvlm = LVLM(read_config(folder, tower))
    load_weights(lvlm, folder, device, dtype, tower)
    lvlm.wider = wider_dtype(device, dtype)
    return lvlm.requires_grad_(False).eval()


def save_lvlm(lvlm, folder, dtype):
    """Write config.json and the weights in the hub's layout; load_lvlm and transformers read them back."""
    save_weights(lvlm.named_parameters(), lvlm.config.raw, folder, dtype)


def save_weights(named, raw_config, folder, dtype, shard_bytes=5_000_000_000):
    """Write (name here, tensor) pairs, taken one at a time, and a config.json as a folder in the hub's layout.

    One model.safetensors, or shards of at most shard_bytes (a larger tensor has one of its own) with their index.
    """
    folder, parts, shard, hub_name = Path(folder), [], {}, parse_config(raw_config).hub_name
    folder.mkdir(parents=True, exist_ok=True)

    def flush():
        parts.append(
            (
                folder / f"shard-{len(parts)}.partial",
                {name: tensor.nbytes for name, tensor in shard.items()},
            )
        )
        save_file(shard, parts[-1][0], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in named:
        stored = tensor.detach().to("cpu", dtype).contiguous()
        if shard and stored.nbytes + sum(t.nbytes for t in shard.values()) > shard_bytes:
            flush()
        shard[hub_name(name)] = stored
    flush()
    names = (
        [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
        if len(parts) > 1
        else ["model.safetensors"]
    )
    for (part, _), name in zip(parts, names):
        part.replace(folder / name)
    if len(parts) > 1:
        total = sum(sum(sizes.values()) for _, sizes in parts)
        weight_map = {key: name for (_, sizes), name in zip(parts, names) for key in sizes}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    write_json(folder / "config.json", raw_config)


def write_json(path, value):
    """The value as indented JSON, one line feed at the end."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(path, tensors, metadata=None):
    """A safetensors file that is there whole or not at all: written aside, flushed to the disk, renamed. OSError when the disk is full."""
    partial = Path(f"{path}.partial")
    try:
        save_file(tensors, partial, metadata)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from None


# ------------------------------------------------------------------------------------------------------ devices and processes (torchrun)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name):
    """The device asked for, or the first CUDA device, or the CPU."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {chosen} is not usable here: {str(error).splitlines()[0]}"
        ) from None
    return chosen


def free_bytes(device):
    """Memory that is free on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")  # Linux: what can be had without swapping
    if meminfo.exists():
        return 1024 * int(
            next(
                line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")
            ).split()[1]
        )
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ranks():
    """(this process, how many) among those that torchrun started; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_ranks(device):
    """Join the other processes when torchrun started this one; returns the device of this process, cuda:<local rank> for cuda."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    cuda = torch.device(device).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return device


def wait_for_ranks():
    """Go on when every process has come here."""
    if ranks()[1] > 1:
        dist.barrier()


def sum_over_ranks(tensor):
    """The sum of a tensor over all processes, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows):
    """(rows of every process (sum of n, ...), in rank order; where those of this one begin). rows: (n, ...), n may differ."""
    rank, count = ranks()
    if count == 1:
        return rows, 0
    sizes = torch.zeros(count, dtype=torch.long, device=rows.device)
    sizes[rank] = len(rows)
    sizes = sum_over_ranks(sizes).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]), sum(sizes[:rank])


def encode_over_ranks(encode, items):
    """encode(items), (B, D), with the work split over the processes; every process gets all rows, each once, in the order of the items."""
    rank, count = ranks()
    rows, _ = gather_rows(encode(items[rank::count]))
    out = torch.empty_like(rows)
    out[[i for r in range(count) for i in range(r, len(items), count)]] = rows
    return out
