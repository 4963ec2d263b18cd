"""The LVLM from scratch: a CLIP-ViT encoder, an MLP projector and a Llama decoder, as in LLaVA-1.5.

    from model import load_lvlm
    lvlm = load_lvlm("assets/tiny")  # a folder in the layout of llava-hf/llava-1.5-7b-hf
    inputs_embeds = lvlm.decoder.embed_tokens(input_ids)  # (B, T) -> (B, T, D)
    hidden_states = lvlm.decoder(inputs_embeds)  # (B, T, D), after the final norm

Not here: the method (vladva.py), tokenizer and images (data.py), LoRA (lora.py), Qwen2-VL (extras).

Dims: B batch, T tokens, N image tokens, P soft-prompt tokens, D decoder width, V vocabulary,
R LoRA rank, H heads, G key-value heads, K head width, S cache length, C vision width.
"""

import dataclasses
import importlib
import json
import math
import re
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ------------------------------------------------------------------------------- configuration


def parse_json(text: str | bytes, where: str | Path, kind: type = dict) -> Any:
    """The JSON object (or the other kind) in a text; ValueError names where that is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: a JSON {type(value).__name__}, wanted {kind}")
    return value


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The JSON object (or the other kind) in a file; ValueError when it is missing or broken."""
    if not Path(path).is_file():  # nor is a pipe, on which reading would wait
        raise ValueError(f"{path} is missing")
    return parse_json(Path(path).read_bytes(), path, kind)


def from_json(cls: type, raw: Any, where: str, extra: bool = False, sizes: bool = False) -> Any:
    """A dataclass from a JSON object. extra: it may hold more; sizes: no integer is below 1."""
    check_supported(raw, {}, where)
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    unknown = sorted(raw.keys() - types.keys())
    if unknown and not extra:
        raise ValueError(f"{where} has unknown fields {unknown}; known are {', '.join(types)}")
    values = {name: raw[name] for name in types if name in raw}
    for name, value in values.items():
        allowed = get_args(types[name]) or (types[name],)
        kinds = (*allowed, int) if float in allowed else allowed  # JSON writes 1.0 as 1 at times
        half = isinstance(value, str) and value != value.encode(errors="replace").decode()
        if half or not isinstance(value, kinds) or (type(value) is bool and bool not in allowed):
            raise ValueError(f"{where}: {name} is {value!r}, wanted {types[name]}")
        # NaN is neither; a million layers would take hours to be refused by the weights
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"{where}: {name} is {value}, wanted a number from 0 on")
        highest = 1000 if name in ("num_hidden_layers", "depth") else 10**7
        if sizes and type(value) is int and not 1 <= value <= highest:
            raise ValueError(f"{where}: {name} is {value}, wanted 1 to {highest}")
    return cls(**values)


# Refuses, by its name, a field that this code would silently compute wrongly.
def check_supported(section: dict, supported: dict, where: str) -> None:
    if not isinstance(section, dict):
        raise ValueError(f"{where} is {section!r:.99}, wanted a JSON object")
    for key, allowed in supported.items():
        if key in section and section[key] not in allowed:
            values = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: {key} is {section[key]!r}; this code does {values} only")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-ViT dimensions; defaults are transformers' CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224  # pixels, square
    patch_size: int = 32  # pixels, square
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"config.json: the width is no multiple of the heads in {self}")


@dataclass(frozen=True)
class DecoderConfig:
    """Llama dimensions; defaults are transformers' LlamaConfig."""

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
    qkv_bias: bool = False  # Qwen2 has one on q, k and v

    def __post_init__(self):
        heads = self.num_attention_heads
        # how a frozen dataclass fills in its fields
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // heads)
        if heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(f"config.json: the head counts and widths do not divide in {self}")


# What this code computes, by field; another value would silently give another model.
SUPPORTED = {"projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",)}
SUPPORTED |= {"multimodal_projector_bias": (True,), "quantization_config": (None,)}
SUPPORTED_VISION = {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",)}
SUPPORTED_TEXT = {"model_type": ("llama",), "hidden_act": ("silu",), "quantization_config": (None,)}
SUPPORTED_TEXT |= {"attention_bias": (False,), "mlp_bias": (False,)}
SUPPORTED_TEXT |= {"rope_scaling": (None, {"rope_type": "default"}, {"type": "default"})}


@dataclass(frozen=True)
class LVLMConfig:
    """LLaVA-1.5: what config.json says. Another architecture is a subclass (docs/extending.md)."""

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    end_tokens: list = field(default_factory=[2].copy)  # the first ends long captions
    bos_token_id: int | None = 1  # None: sequences begin with no special token
    vision_feature_layer: int = -2  # index into [embeddings, block 1, block 2, ...]
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as read

    image_token: ClassVar[str] = "<image>"
    image_processor: ClassVar[type | None] = None  # None: data.ImageProcessor
    key_patterns: ClassVar[tuple] = (  # name in a checkpoint -> name here
        (r"^(model\.)?vision_tower\.(vision_model\.)?(embeddings\.|encoder\.)?", "vision."),
        (r"^(model\.)?multi_modal_projector\.", "projector."),
        (r"^(language_model\.)?lm_head\.", "lm_head."),
        (r"^(language_model\.model|model\.language_model)\.", "decoder."),
    )

    @classmethod
    def from_json(cls, raw: dict) -> "LVLMConfig":
        """The configuration in a config.json; ValueError names what this code cannot honour."""
        check_supported(raw, SUPPORTED, "config.json")
        check_supported(raw.get("vision_config"), SUPPORTED_VISION, "config.json vision_config")
        check_supported(raw.get("text_config"), SUPPORTED_TEXT, "config.json text_config")
        # transformers 5 writes rope_parameters, which there win over a rope_theta beside them
        rope = raw["text_config"].get("rope_parameters") or {}
        plain = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)}
        check_supported(rope, plain, "config.json rope_parameters")
        text = {"tie_word_embeddings": raw.get("tie_word_embeddings", False)}
        text |= {"bos_token_id": 1, "eos_token_id": 2} | raw["text_config"] | rope
        vision = raw["vision_config"]
        ends = text["eos_token_id"]
        fields = {
            "vision": from_json(VisionConfig, vision, "config.json vision_config", True, True),
            "decoder": from_json(DecoderConfig, text, "config.json text_config", True, True),
            "image_token_id": raw.get("image_token_id", raw.get("image_token_index")),
            "vision_feature_layer": raw.get("vision_feature_layer", -2),
            "bos_token_id": text["bos_token_id"],
            "end_tokens": ends if isinstance(ends, list) else [ends],
            "raw": raw,
        }
        return from_json(cls, fields, "config.json")

    # Phi_v from what stack_images returns to features, g, and Phi_l

    def build_vision(self) -> nn.Module:
        return VisionTower(self.vision, self.vision_feature_layer)

    def build_projector(self) -> nn.Module:
        return Projector(self.vision.hidden_size, self.decoder.hidden_size)

    def build_decoder(self) -> nn.Module:
        return Decoder(self.decoder)

    # images and templates

    def image_grid(self, pixels: Tensor | None = None) -> tuple[int, int]:
        """(rows, columns) of image tokens of one preprocessed image, or of a square one."""
        side = self.vision.image_size // self.vision.patch_size
        return side, side

    def stack_images(self, images: list) -> Any:
        """Preprocessed images -> what the vision tower takes; it has a length and `.to(device)`."""
        return torch.stack(images)

    def position_ids(self, input_ids: list[int], grid: tuple[int, int]) -> Tensor | None:
        """Rotary positions of a sequence that holds an image; None: 0 .. T - 1."""
        return None

    def apply_chat_template(self, template: str) -> str:
        """The paper's "USER: ... ASSISTANT:" in the words that this model was trained with."""
        return template


ARCHITECTURES = {"llava": LVLMConfig, "qwen2_vl": "extras.qwen2_vl.Qwen2VLConfig"}


def parse_config(raw: dict) -> LVLMConfig:
    """The configuration class that model_type names, filled from config.json (a dict)."""
    check_supported({"model_type": None} | raw, {"model_type": tuple(ARCHITECTURES)}, "config.json")
    architecture = ARCHITECTURES[raw["model_type"]]
    if isinstance(architecture, str):
        module, name = architecture.rsplit(".", 1)
        architecture = getattr(importlib.import_module(module), name)
    config = architecture.from_json(raw)
    for token in (config.image_token_id, *(config.end_tokens or [None])):
        if type(token) is not int or not 0 <= token < config.decoder.vocab_size:
            raise ValueError(f"config.json: no embedding of <image> or end token {token!r}")
    return config


# -------------------------------------------------------------------------------- vision tower


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation of the GELU."""
    return x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    """Pre-norm transformer block of CLIP-ViT: every patch sees every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        inner = config.intermediate_size
        projections = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.num_heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in projections})
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        heads = []  # queries, keys and values, (B, H, 1 + N, K) each
        for name in ("q_proj", "k_proj", "v_proj"):
            projected = self.self_attn[name](normed)
            heads.append(projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        attended = F.scaled_dot_product_attention(*heads)
        x = x + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.layer_norm2(x))))


class VisionTower(nn.Module):
    """Phi_v: pixels (B, 3, height, width) -> patch features (B, N, C)."""

    def __init__(self, config: VisionConfig, feature_layer: int):
        super().__init__()
        width = config.hidden_size
        patch = config.patch_size
        num_states = config.num_hidden_layers + 1
        if not -num_states <= feature_layer < num_states:
            raise ValueError(f"config.json: vision_feature_layer {feature_layer} of {num_states}")
        self.num_blocks = feature_layer % num_states
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # sic, as published
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        # never applied by LLaVA; here so that all keys of a checkpoint have their place
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        # patches and a class token, with their learned positions
        pixels = pixels.to(self.class_embedding.dtype)
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, C)
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding.weight
        x = self.pre_layrnorm(x)
        for block in self.layers[: self.num_blocks]:
            x = block(x)
        # LLaVA drops the class token
        return x[:, 1:]


class Projector(nn.Module):
    """g: vision features (B, N, C) -> decoder inputs (B, N, D), with the exact (erf) GELU."""

    def __init__(self, vision_width: int, decoder_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, decoder_width)
        self.linear_2 = nn.Linear(decoder_width, decoder_width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


# ------------------------------------------------------------------------------------- decoder


# Frequencies of `width` rotated channels, (width / 2,), in float32.
def rotary_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return theta**-exponents


def rotary_tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of angles (..., K / 2), each (..., K): channel i is paired with i + K / 2."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, K); cos and sin broadcast to (B, 1, T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens so far, by layer; row b holds its token t at position t."""

    # For decoder inputs (B, T, D), which may begin with a prefix, and `more` tokens behind them.
    # Prompts are right-padded: the first generated tokens of a row overwrite its padding, which no
    # token has seen, because a query sees only positions up to its own.
    def __init__(self, config: DecoderConfig, embeds: Tensor, prefix: Any = None, more: int = 0):
        batch_size, width = embeds.shape[:2]
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, width + more)
        self.keys = embeds.new_zeros(*shape, config.head_dim)  # (layers, B, G, S, K)
        self.values = torch.zeros_like(self.keys)
        first = 0 if prefix is None else prefix.keys.shape[3]
        if prefix is not None:
            self.keys[:, :, :, :first] = prefix.keys
            self.values[:, :, :, :first] = prefix.values
        # (B, T) of the tokens that come next; moved on before each forward
        position = torch.arange(first, width, device=embeds.device)
        self.position = position.expand(batch_size, -1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v (B, G, T, K); returns all keys and values (B, G, S, K), and what is seen."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, :, self.position] = k.transpose(1, 2)  # indexed as (B, T, G, K)
        self.values[layer][rows, :, self.position] = v.transpose(1, 2)
        positions = torch.arange(self.keys.shape[3], device=k.device)
        mask = positions <= self.position[:, None, :, None]  # (B, 1, T, S)
        return self.keys[layer], self.values[layer], mask


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(width, query_width, config.qkv_bias)
        self.k_proj = nn.Linear(width, key_width, config.qkv_bias)
        self.v_proj = nn.Linear(width, key_width, config.qkv_bias)
        self.o_proj = nn.Linear(query_width, width, bias=False)

    def project(self, x: Tensor, rotary: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, K) and keys (B, G, T, K), and values (B, G, T, K)."""
        heads = []
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            heads.append(projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        q, k, v = heads
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v

    def forward(self, x: Tensor, rotary: tuple, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, D); rotary: cos and sin, (B or 1, 1, T, K) each."""
        q, k, v = self.project(x, rotary)
        # no mask in training: sequences are right-padded, so that no real token sees the padding,
        # and the fused kernel is taken (on CUDA in bfloat16: FlashAttention); with a cache the mask
        # says which positions are seen
        mask = None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        # of the fused kernels on a GPU, FlashAttention alone lets several queries share keys
        if self.group_size > 1:
            k, v = (heads.repeat_interleave(self.group_size, dim=1) for heads in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # (B, H, T, K) -> (B, T, D)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """Pre-norm transformer block of Llama."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotary: tuple, cache: Any = None, index: Tensor = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        # no later layer mixes tokens: the last MLP runs only for the states that are wanted
        if index is not None:
            x = x.flatten(0, 1).index_select(0, index)  # (M, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Phi_l: token embeddings (B, T, D) -> hidden states after the final norm (B, T, D)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute blocks in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderBlock(config, layer) for layer in layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each (B or 1, 1, T, K), of the tokens at position_ids (B or 1, T)."""
        config = self.config
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, position_ids.device)
        return rotary_tables(position_ids[:, None, :, None].float() * frequencies, dtype)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None = None,  # (B or 1, T), Qwen2-VL: (3, B, T); None: 0 .. T - 1
        cache: KVCache | None = None,
        state_index: Tensor | None = None,
    ) -> Tensor:
        """The states at state_index, (M,) flat indices b T + t, as (M, D); None: all, (B, T, D)."""
        x = inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(position_ids, x.dtype)
        for block in self.layers:
            index = state_index if block is self.layers[-1] else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                options = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, rotary, cache, index, **options)
            else:
                x = block(x, rotary, cache, index)
        return self.norm(x)


class LVLM(nn.Module):
    """Phi_l(g(Phi_v(image)), prompt). `lm_head` gives next-token logits, (..., D) -> (..., V)."""

    def __init__(self, config: LVLMConfig):
        super().__init__()
        self.config = config
        self.vision = config.build_vision()
        self.projector = config.build_projector()
        self.decoder = config.build_decoder()
        self.lm_head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        if config.decoder.tie_word_embeddings:
            self.lm_head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def image_features(self, pixels: Any) -> Tensor:
        """Stacked images -> image tokens g(Phi_v(x_v)), (B, N, D), or (n, D) of any sizes."""
        return self.projector(self.vision(pixels))


# ---------------------------------------------------------------------------------- generation


@torch.no_grad()
def generate(
    lvlm: LVLM,
    inputs_embeds: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    position_ids: Tensor | None = None,  # as the decoder's
) -> list[list[int]]:
    """Greedy decoding with the key-value cache: B lists of token ids, without their end tokens.

    inputs_embeds: (B, T, D), right-padded; lengths: (B,) real tokens of each row.
    """
    batch_size, width = inputs_embeds.shape[:2]
    limit = lvlm.config.decoder.max_position_embeddings
    if max_new_tokens < 1 or width + max_new_tokens > limit:
        raise ValueError(f"{width} + {max_new_tokens} new tokens: wanted 1 or more, {limit} in all")
    rows = torch.arange(batch_size, device=lengths.device)
    end_tokens = lvlm.config.end_tokens
    cache = KVCache(lvlm.config.decoder, inputs_embeds, more=max_new_tokens)

    # the prompt at once; its last real token predicts the first new one
    last = lvlm.decoder(inputs_embeds, position_ids, cache)[rows, lengths - 1]  # (B, D)
    start = lengths  # (B,) rotary position of the first new token
    if position_ids is not None:
        start = position_ids[..., rows, lengths - 1].reshape(-1, batch_size).amax(0) + 1

    # then one token at a time
    answers = lengths.new_zeros(batch_size, 0)
    for step in range(max_new_tokens):
        token = lvlm.lm_head(last).argmax(-1, keepdim=True)  # (B, 1)
        answers = torch.cat([answers, token], dim=1)
        # not at each step: the question makes the host wait for the device
        if step % 8 == 7 and torch.isin(answers, answers.new_tensor(end_tokens)).any(1).all():
            break
        cache.position = (lengths + step)[:, None]
        last = lvlm.decoder(lvlm.decoder.embed_tokens(token), (start + step)[:, None], cache)[:, 0]
    return [list(takewhile(lambda i: i not in end_tokens, row)) for row in answers.tolist()]


# ----------------------------------------------------------------------------- loading weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IGNORED_KEYS = ("embeddings.position_ids", "rotary_emb.inv_freq")  # recomputed; old files hold them


# Checkpoints name the same weights in several ways; none fits: the key as it is.
def rename_key(key: str, key_patterns: tuple) -> str:
    for pattern, prefix in key_patterns:
        key = re.sub(pattern, prefix, key)
    return key


# Memory-mapped: nothing is read before a tensor is asked for.
def open_safetensors(path: Path) -> safe_open:
    if not Path(path).is_file():
        raise ValueError(f"{path} not found")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a small safetensors file, finite floats, and its metadata."""
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    for name, tensor in tensors.items():
        check_finite(tensor, f"{path}: {name}")
    return tensors, metadata


def check_finite(tensor: Tensor, where: str) -> None:
    """ValueError for what would give no embedding: integers, packed numbers, NaN, infinity."""
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"{where} is {tensor.dtype} or not finite, wanted finite floats")


# Those that the index names, or the single file of a small model; nothing outside the folder.
def shard_files(folder: Path) -> list[Path]:
    index = Path(folder) / "model.safetensors.index.json"
    raw = read_json(index) if index.exists() else {"weight_map": {"all": "model.safetensors"}}
    weight_map = raw.get("weight_map")
    check_supported(weight_map, {}, f"{index}: weight_map")
    return [Path(folder) / Path(name).name for name in sorted({*map(str, weight_map.values())})]


def check_shapes(tensors: dict[str, Tensor], wanted: dict[str, Tensor], problem: str) -> None:
    """Compare {name: tensor} of a file with the model's; one ValueError lists all that differs."""
    problems = []
    for name in sorted(tensors.keys() | wanted.keys()):
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif name not in wanted:
            problems.append(f"{name} is unexpected")
        elif tensors[name].shape != wanted[name].shape:
            problems.append(f"{name} is {[*tensors[name].shape]}, wanted {[*wanted[name].shape]}")
    if problems:
        raise ValueError(f"{problem}: {len(problems)} tensors differ: {'; '.join(problems[:12])}")


def load_lvlm(
    folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, shard: bool = False
) -> LVLM:
    """The LVLM in a model folder, frozen. dtype None: float32, or bfloat16 if large or on CUDA."""
    # shard: the decoder's blocks stay in their files, memory-mapped
    config = parse_config(read_json(Path(folder) / "config.json"))
    with torch.device("meta"):  # shapes without memory
        lvlm = LVLM(config)
    if dtype is None:
        large = sum(p.numel() for p in lvlm.parameters()) > 3e9
        dtype = torch.bfloat16 if large or torch.device(device).type == "cuda" else torch.float32
    keys = []
    for path in shard_files(folder):
        keys += [(path, k) for k in open_safetensors(path).keys() if not k.endswith(IGNORED_KEYS)]
    # each tensor is copied once, from the memory-mapped file to its place
    state = {}
    for path, key in tqdm(keys, "loading weights", leave=False, disable=None):
        name = rename_key(key, config.key_patterns)
        if name in state:
            raise ValueError(f"{path}: {key} is there twice, under two names")
        # opened anew for each tensor: pages of an open file would count as memory of this process
        with open_safetensors(path) as file:
            tensor = file.get_tensor(key)
            check_finite(tensor, f"{path}: {key}")
            if shard and name.startswith("decoder.layers."):
                state[name] = open_safetensors(path).get_tensor(key)  # no page of it is read yet
            else:
                state[name] = tensor.to(device=device, dtype=dtype, copy=True)
    # some tied checkpoints store the shared weight twice
    if config.decoder.tie_word_embeddings and "decoder.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["decoder.embed_tokens.weight"]
    # all keys and shapes are compared, and what differs is listed, before anything runs
    check_shapes(state, lvlm.state_dict(), f"the weights of {folder} do not fit its config.json")
    lvlm.load_state_dict(state, assign=True)
    if config.decoder.tie_word_embeddings:
        lvlm.lm_head.weight = lvlm.decoder.embed_tokens.weight
    return lvlm.requires_grad_(False).eval()
