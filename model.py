"""The LVLM, from scratch: a CLIP-ViT encoder, an MLP projector and a Llama decoder, in the shape of LLaVA-1.5.

    from model import load_lvlm
    lvlm = load_lvlm("assets/tiny")          # any folder in the layout of llava-hf/llava-1.5-7b-hf
    hidden = lvlm.decoder(lvlm.embed(ids))   # (B, T, D), after the final norm

Everything the method (vladva.py) needs is here and nothing more: features, hidden states, logits, cached generation.

Not here: prompts, embeddings, losses (vladva.py); tokenizer and images (data.py); adapters (lora.py); dropout (LLaVA-1.5 has none).

Letters in the shape comments:
    B batch   T tokens   N image tokens   P soft-prompt tokens   D decoder width   V vocabulary   R LoRA rank
    H heads   G key-value heads (grouped-query)   K head width   S slots of the key-value cache   C vision width
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

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
    """Llama dimensions; a field that config.json leaves out takes transformers' LlamaConfig default."""

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
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as read, written back on save

    @property
    def num_image_tokens(self):
        return (self.vision.image_size // self.vision.patch_size) ** 2

    @property
    def num_vision_blocks(self):
        """Blocks that are run: those after the feature layer would change nothing."""
        layer, states = self.vision_feature_layer, self.vision.num_hidden_layers + 1
        if not -states <= layer < states:
            raise ValueError(f"vision_feature_layer is {layer}, but the vision tower has {states} hidden states: correct config.json")
        return layer % states


# What this code does, by config field. Another value would silently give another model, so it is refused by name.
SUPPORTED = {
    "top": {"model_type": ("llava",), "projector_hidden_act": ("gelu",), "vision_feature_select_strategy": ("default",),
            "multimodal_projector_bias": (True,), "quantization_config": (None,)},
    "vision_config": {"model_type": ("clip_vision_model",), "hidden_act": ("quick_gelu",), "num_channels": (3,)},
    "text_config": {"model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,),
                    "rope_scaling": (None,), "quantization_config": (None,)},
}  # fmt: skip


def read_json(path):
    """The JSON object in a file; ValueError with the file's name when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: a model folder holds config.json, *.safetensors, tokenizer.json and preprocessor_config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def parse_config(raw):
    """config.json of a llava folder (a dict) -> LVLMConfig. ValueError names a missing field or one this code cannot honour."""
    sections = {"top": raw, "vision_config": raw.get("vision_config"), "text_config": raw.get("text_config")}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"config.json has no object {name!r}: wanted the layout of llava-hf/llava-1.5-7b-hf")
        for key, allowed in SUPPORTED[name].items():
            if key in section and section[key] not in allowed:
                raise ValueError(f"config.json: {name}.{key} is {section[key]!r}; this code does {' or '.join(map(repr, allowed))} only")
    image_token_id = raw.get("image_token_id", raw.get("image_token_index"))
    if image_token_id is None:
        raise ValueError("config.json has neither image_token_index nor image_token_id: it must name the id of <image>")
    text = dict(sections["text_config"])
    rope = text.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: text_config.rope_parameters.rope_type is {rope['rope_type']!r}; this code does 'default' only")
    text.setdefault("rope_theta", rope.get("rope_theta", DecoderConfig.rope_theta))
    text.setdefault("tie_word_embeddings", raw.get("tie_word_embeddings", DecoderConfig.tie_word_embeddings))
    return LVLMConfig(
        vision=VisionConfig(**{k: v for k, v in sections["vision_config"].items() if k in VisionConfig.__dataclass_fields__}),
        decoder=DecoderConfig(**{k: v for k, v in text.items() if k in DecoderConfig.__dataclass_fields__}),
        image_token_id=image_token_id,
        vision_feature_layer=raw.get("vision_feature_layer", -2),
        raw=raw,
    )


# ------------------------------------------------------------------------------------------------------ vision tower


class VisionBlock(nn.Module):
    """Pre-norm transformer block of CLIP-ViT: every patch sees every patch."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)})

    def forward(self, x):
        normed = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1 + N, K)
        x = x + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        up = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](up * torch.sigmoid(1.702 * up))  # quick-GELU


class VisionTower(nn.Module):
    """Phi_v: pixels (B, 3, height, width) -> patch features (B, N, C) of the layer that `vision_feature_layer` names."""

    def __init__(self, config, num_blocks):
        super().__init__()
        width, self.num_blocks = config.hidden_size, num_blocks
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, width)
        self.pre_layrnorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # sic: the published checkpoints spell it so
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)  # LLaVA never applies it; kept so that a save is complete

    def forward(self, pixels):
        patches = self.patch_embedding(pixels.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)  # (B, N, C)
        x = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1) + self.position_embedding.weight
        x = self.pre_layrnorm(x)
        for block in self.layers[: self.num_blocks]:
            x = block(x)
        return x[:, 1:]  # the class token is dropped


class Projector(nn.Module):
    """g: vision features (B, N, C) -> decoder inputs (B, N, D); two layers with the exact (erf) GELU."""

    def __init__(self, vision_width, decoder_width):
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, decoder_width)
        self.linear_2 = nn.Linear(decoder_width, decoder_width)

    def forward(self, features):
        return self.linear_2(F.gelu(self.linear_1(features)))


# ------------------------------------------------------------------------------------------------------ decoder


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 whatever the dtype of x."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float() if x.dtype != torch.float64 else x
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_tables(positions, width, theta, dtype):
    """cos and sin of the rotary angles, (..., T, K), computed in float32. positions: (..., T) integers."""
    frequencies = theta ** -(torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)  # (K / 2,)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)  # the rotate-half layout pairs channel i with i + K / 2
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, H, T, K); cos, sin broadcast to (B, 1, T, K)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class KVCache:
    """Keys and values of the tokens seen so far, per layer. Row b holds its own tokens in slots 0 .. length_b - 1.

    Prompts are right-padded; a padding token's slot is overwritten by the row's first generated tokens before it can be seen.
    """

    def __init__(self, config, batch, slots, device, dtype):
        shape = (config.num_hidden_layers, batch, slots, config.kv_heads, config.head_width)  # (layers, B, S, G, K)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)[:, None]

    def write(self, layer, k, v, positions):
        """Store k, v (B, G, T, K) at slots `positions` (B, T); return all slots of this layer, (B, G, S, K) each."""
        self.keys[layer][self.rows, positions] = k.transpose(1, 2)
        self.values[layer][self.rows, positions] = v.transpose(1, 2)
        return self.keys[layer].transpose(1, 2), self.values[layer].transpose(1, 2)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, no biases."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.kv_heads, config.head_width
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def forward(self, x, rotary, cache=None, layer=None, positions=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)  # (B, H, T, K), (B, G, T, K)
        grouped = self.heads != self.kv_heads
        if cache is not None:
            all_k, all_v = cache.write(layer, k, v, positions)
        if cache is not None and x.shape[1] == 1:  # one new token a row: it sees the slots up to its own position
            seen = torch.arange(all_k.shape[2], device=x.device) <= positions[:, None, :, None]  # (B, 1, 1, S)
            attended = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=seen, enable_gqa=grouped)
        else:  # right padding needs no mask under causal attention: a real token never sees what comes after it
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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

    def forward(self, x, rotary, cache=None, layer=None, positions=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache, layer, positions)
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

    def forward(self, embeds, cache=None, positions=None):
        """positions: (B, T), where each token stands in its row; only with a cache, otherwise 0 .. T - 1."""
        where = torch.arange(embeds.shape[1], device=embeds.device)[None] if positions is None else positions
        cos, sin = rotary_tables(where, self.config.head_width, self.config.rope_theta, embeds.dtype)
        rotary = cos[:, None], sin[:, None]  # (B or 1, 1, T, K)
        x = embeds
        for layer, block in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary, cache, layer, positions)
        return self.norm(x)


def place(embeds, vectors, slots):
    """A copy of embeds (B, T, D) in which row b holds vectors (n, D) or (B, n, D) from slot slots[b] on. slots: (B,) integers."""
    count = vectors.shape[-2]
    columns = slots[:, None] + torch.arange(count, device=embeds.device)  # (B, n)
    rows = torch.arange(len(embeds), device=embeds.device)[:, None]
    return embeds.index_put((rows, columns), vectors.to(embeds.dtype).expand(len(embeds), count, -1))


class LVLM(nn.Module):
    """A LLaVA-1.5: Phi_l(g(Phi_v(image)), prompt). `head` gives next-token logits; it shares the embedding's weight when tied."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision, config.num_vision_blocks)
        self.projector = Projector(config.vision.hidden_size, config.decoder.hidden_size)
        self.decoder = Decoder(config.decoder)
        self.head = nn.Linear(config.decoder.hidden_size, config.decoder.vocab_size, bias=False)
        if config.decoder.tie_word_embeddings:
            self.head.weight = self.decoder.embed_tokens.weight

    @property
    def device(self):
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.decoder.embed_tokens.weight.dtype

    def embed(self, ids):
        """Token ids (B, T) -> decoder inputs (B, T, D)."""
        return self.decoder.embed_tokens(ids)

    def image_features(self, pixels):
        """Pixels (B, 3, height, width), normalised -> image tokens g(Phi_v(x_v)), (B, N, D)."""
        return self.projector(self.vision(pixels))


# ------------------------------------------------------------------------------------------------------ generation


@torch.no_grad()
def generate(lvlm, embeds, lengths, eos_id, max_new_tokens):
    """Greedy decoding of a batch with the key-value cache.

    embeds: (B, T, D) right-padded decoder inputs; lengths: (B,) real tokens per row. Returns a list of B lists of token ids, each
    ending before its first `eos_id`.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    batch, width = embeds.shape[:2]
    slots = width + max_new_tokens
    limit = lvlm.config.decoder.max_position_embeddings
    if slots > limit:
        raise ValueError(f"prompt of {width} tokens + {max_new_tokens} new ones exceed the model's {limit} positions: ask for fewer")
    cache = KVCache(lvlm.config.decoder, batch, slots, embeds.device, embeds.dtype)
    positions = torch.arange(width, device=embeds.device).expand(batch, -1)
    hidden = lvlm.decoder(embeds, cache, positions)
    last = hidden[torch.arange(batch, device=embeds.device), lengths - 1]  # (B, D)
    produced, done = [], torch.zeros(batch, dtype=torch.bool, device=embeds.device)
    for step in range(max_new_tokens):
        token = lvlm.head(last).argmax(-1)  # (B,)
        produced.append(token)
        done |= token == eos_id
        if step + 1 == max_new_tokens or done.all():
            break
        last = lvlm.decoder(lvlm.embed(token[:, None]), cache, (lengths + step)[:, None])[:, 0]
    rows = torch.stack(produced, dim=1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


# ------------------------------------------------------------------------------------------------------ weights on disk

# Prefix in the folder -> prefix here, first match wins (the layout of llava-hf/llava-1.5-7b-hf).
PREFIXES = (
    ("language_model.model.", "decoder."),
    ("language_model.lm_head.", "head."),
    ("multi_modal_projector.", "projector."),
    ("vision_tower.vision_model.embeddings.", "vision."),
    ("vision_tower.vision_model.encoder.", "vision."),
    ("vision_tower.vision_model.", "vision."),
)
IGNORED_SUFFIXES = ("embeddings.position_ids", "rotary_emb.inv_freq")  # tables that old checkpoints carry and that are recomputed


def to_ours(key):
    """Name of a stored tensor -> its name in LVLM, or None when no layout knows it."""
    return next((ours + key[len(theirs) :] for theirs, ours in PREFIXES if key.startswith(theirs)), None)


def to_hub(key):
    """Name of a parameter of LVLM -> its name in the hub's layout."""
    if key.startswith("vision."):
        part = "encoder." if key.startswith("vision.layers.") else "" if "layrnorm" in key or "post_layernorm" in key else "embeddings."
        return f"vision_tower.vision_model.{part}{key[len('vision.') :]}"
    return next(theirs + key[len(ours) :] for theirs, ours in PREFIXES if key.startswith(ours))


def shard_files(folder):
    """The safetensors files of a folder: those its index names, or the single model.safetensors."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        wanted = f"every shard of {index.name}" if index.exists() else "model.safetensors or its index"
        raise ValueError(f"{folder}: {', '.join(missing)} not found; wanted {wanted}")
    return [folder / name for name in names]


def open_shard(path):
    """A memory-mapped safetensors file; ValueError when it is truncated or something else."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): truncated download, or another format") from None


def check_keys(found, wanted):
    """Compare {name: shape} of a checkpoint with that of the model; one ValueError lists everything that differs."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    mismatched = [
        f"{k} {tuple(found[k])}, wanted {tuple(wanted[k])}" for k in sorted(found.keys() & wanted.keys()) if tuple(found[k]) != tuple(wanted[k])
    ]
    problems = [f"{len(names)} {what}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)) if names]  # fmt: skip
    if problems:
        raise ValueError("the weights do not fit config.json: " + "; ".join(problems))


def load_weights(lvlm, folder, device, dtype):
    """Copy every tensor of the folder's shards to its place, device and dtype, one at a time; strict on keys and shapes."""
    wanted = {name: p.shape for name, p in lvlm.named_parameters()}
    shards = [open_shard(path) for path in shard_files(folder)]
    found = {}  # our name -> (shard, stored name)
    for shard in shards:
        for stored in shard.keys():
            if not stored.endswith(IGNORED_SUFFIXES):
                found[to_ours(stored) or stored] = (shard, stored)
    if lvlm.config.decoder.tie_word_embeddings:
        found.pop("head.weight", None)  # some tied checkpoints store the shared weight twice
    check_keys({name: shard.get_slice(stored).get_shape() for name, (shard, stored) in found.items()}, wanted)
    state = {name: shard.get_tensor(stored).to(device=device, dtype=dtype) for name, (shard, stored) in found.items()}
    if lvlm.config.decoder.tie_word_embeddings:
        state["head.weight"] = state["decoder.embed_tokens.weight"]
    lvlm.load_state_dict(state, assign=True)
    if lvlm.config.decoder.tie_word_embeddings:
        lvlm.head.weight = lvlm.decoder.embed_tokens.weight


def load_lvlm(folder, device="cpu", dtype=torch.float32):
    """The LVLM in a folder of the hub's LLaVA layout, frozen, on one device in one dtype."""
    config = parse_config(read_json(Path(folder) / "config.json"))
    with torch.device("meta"):
        lvlm = LVLM(config)
    load_weights(lvlm, folder, device, dtype)
    return lvlm.requires_grad_(False).eval()


def save_lvlm(lvlm, folder, dtype):
    """Write config.json and model.safetensors in the hub's layout; load_lvlm and transformers read them back."""
    save_weights(dict(lvlm.named_parameters()), lvlm.config.raw, folder, dtype)


def save_weights(tensors, raw_config, folder, dtype):
    """Write tensors under this project's names, and a config.json, as a folder in the hub's layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
    hub = {to_hub(name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
