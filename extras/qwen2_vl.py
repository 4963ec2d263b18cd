"""Qwen2-VL, the paper's second architecture: all in which it differs from LLaVA-1.5.

    VladVA.from_pretrained("qwen2-vl-2b")  # model.ARCHITECTURES finds this file by model_type

Images keep their shape: patches of 14 x 14 pixels, 2 x 2 patches an image token. The decoder has
biases on q, k and v, a tied head, and rotary positions of three axes.

Not here: videos, sliding-window attention, Qwen2.5-VL.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import model
from data import channel_statistics, normalize_pixels, read_image_settings
from model import DecoderConfig, LVLMConfig, apply_rotary, check_supported, from_json, read_json

MAX_BATCH_TOKENS = 16384  # what one image takes at most in the budget of the hub's files

# The paper's words -> those of Qwen2-VL's chat template, with its default system turn.
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHAT = (
    (r"\s*ASSISTANT: ?", "<|im_end|>\n<|im_start|>assistant\n"),
    (r"^USER: ", f"{SYSTEM_TURN}<|im_start|>user\n"),
    (r" USER: ", "<|im_end|>\n<|im_start|>user\n"),
    (r"<image>\n?", "<|vision_start|><|image_pad|><|vision_end|>"),
)


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Vision dimensions; defaults are transformers' Qwen2VLVisionConfig."""

    depth: int = 32
    embed_dim: int = 1280
    mlp_ratio: int = 4
    num_heads: int = 16
    patch_size: int = 14  # pixels, square
    temporal_patch_size: int = 2  # frames of a patch; a still image fills them all
    spatial_merge_size: int = 2  # patches a side of an image token

    def __post_init__(self):
        # half of a head turns with the row, half with the column, each by pairs of channels
        if self.embed_dim % (4 * self.num_heads) or self.token_side > 1000:
            problem = f"embed_dim {self.embed_dim}, no multiple of 4 num_heads, or huge patches"
            raise ValueError(f"config.json: {problem} in {self}")

    # pixels a side of an image token
    @property
    def token_side(self) -> int:
        return self.patch_size * self.spatial_merge_size

    # pixels a side that scenes are rendered with: 8 x 8 image tokens (ours)
    @property
    def image_size(self) -> int:
        return 8 * self.token_side


@dataclass(frozen=True)
class Qwen2VLDecoderConfig(DecoderConfig):
    """Decoder dimensions; these defaults are transformers' Qwen2VLTextConfig."""

    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    qkv_bias: bool = True
    mrope_section: list = field(default_factory=[16, 24, 24].copy)  # of time, row and column

    def __post_init__(self):
        super().__post_init__()
        section = self.mrope_section
        half = self.head_dim // 2
        if [type(size) for size in section] != [int] * 3 or sum(section) != half:
            raise ValueError(f"config.json: mrope_section is {section}, wanted 3, in sum {half}")


# -------------------------------------------------------------------------------------- images


class Patches(list):
    """Images of any sizes, (rows, columns, 4, p): p numbers of 4 patches of each image token."""

    def to(self, device: str | torch.device) -> "Patches":
        return Patches(image.to(device) for image in self)


class PatchProcessor:
    """Qwen2-VL's preprocessing: an image keeps its shape, but for sides of whole image tokens."""

    def __init__(self, folder: str | Path, lvlm_config: "Qwen2VLConfig", config: Any):
        self.vision = lvlm_config.vision
        # without an error, a token that the tokenizer lacks would be read letter by letter
        path = Path(folder) / "tokenizer.json"
        added = {token["content"] for token in read_json(path).get("added_tokens", [])}
        missing = set(re.findall(r"<\|\w+\|>", str(CHAT))) - added
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}, which the chat template needs")
        path, settings = read_image_settings(folder)
        steps = ("do_resize", "do_rescale", "do_normalize")
        supported = dict.fromkeys(steps, (True,)) | {"resample": (3,), "rescale_factor": (1 / 255,)}
        supported |= {"patch_size": (self.vision.patch_size,)}
        supported |= {"merge_size": (self.vision.spatial_merge_size,)}
        supported |= {"temporal_patch_size": (self.vision.temporal_patch_size,)}
        check_supported(settings, supported, str(path))
        mode = {"image_mode": config.image_mode}
        check_supported(mode, {"image_mode": ("crop",)}, "Qwen2-VL takes images whole")
        # the bounds of an image's area; newer files keep them as a size
        size = settings.get("size") or {}
        check_supported(size, {}, f"{path}: size")
        fewest = config.min_pixels or settings.get("min_pixels") or size.get("shortest_edge")
        most = config.max_pixels or settings.get("max_pixels") or size.get("longest_edge")
        least = self.vision.token_side**2
        if {type(fewest), type(most)} != {int} or fewest < 0 or max(fewest, least) > most:
            wanted = f"two rising integers, the second at least {least}"
            raise ValueError(f"{path}: images of {fewest!r} to {most!r} pixels, wanted {wanted}")
        self.min_pixels = fewest
        self.max_pixels = most
        self.mean, self.std = channel_statistics(settings, path)

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) nearest to an image's own that the budget and the patches allow."""
        side = self.vision.token_side
        size = np.array(size)
        tokens = np.round(size / side)
        # over or under the bounds: both sides by one factor, as transformers' smart_resize
        if tokens.prod() * side**2 > self.max_pixels:
            tokens = np.floor(size / np.sqrt(size.prod() / self.max_pixels) / side).clip(min=1)
        elif tokens.prod() * side**2 < self.min_pixels:
            tokens = np.ceil(size * np.sqrt(self.min_pixels / size.prod()) / side)
        return tuple((tokens * side).astype(int).tolist())

    def fit(self, image: Image.Image) -> Image.Image:
        """RGB image -> the image that the vision tower sees."""
        return image.resize(self.target_size(image.size), Image.Resampling.BICUBIC)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> (rows, columns, 4, p) float32: the patches of every image token."""
        pixels = normalize_pixels(self.fit(image), self.mean, self.std)  # (3, height, width)
        patch = (self.vision.spatial_merge_size, self.vision.patch_size)
        pixels = pixels.unflatten(2, (-1, *patch)).unflatten(1, (-1, *patch))
        # (3, rows, 2, 14, columns, 2, 14) -> (rows, columns, 4, 3, 14, 14)
        patches = pixels.permute(1, 4, 2, 5, 0, 3, 6).flatten(2, 3)
        return torch.stack([patches] * self.vision.temporal_patch_size, dim=4).flatten(3)

    def split(self, images: list[Image.Image]) -> list[slice]:
        """Parts of a batch with at most MAX_BATCH_TOKENS image tokens, padded; or of one image."""
        parts = []
        start = longest = 0
        for i, image in enumerate(images):
            tokens = math.prod(self.target_size(image.size)) // self.vision.token_side**2
            longest = max(longest, tokens)
            if i > start and longest * (i + 1 - start) > MAX_BATCH_TOKENS:
                parts.append(slice(start, i))
                start, longest = i, tokens
        return [*parts, slice(start, len(images))]


# ------------------------------------------------------------------------------------- network


class PatchBlock(nn.Module):
    """Pre-norm transformer block; every patch of an image sees every other."""

    def __init__(self, config: Qwen2VLVisionConfig):
        super().__init__()
        width = config.embed_dim
        inner = config.mlp_ratio * width
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": proj})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # (n, C)
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, 1, self.num_heads, -1))
        qkv = qkv.permute(1, 2, 3, 0, 4)  # queries, keys and values, (1, H, n, K) each
        q, k = apply_rotary(qkv[:2], *rotary).to(x.dtype)
        attended = F.scaled_dot_product_attention(q, k, qkv[2])
        x = x + self.attn["proj"](attended[0].transpose(0, 1).flatten(1))
        return x + self.mlp["fc2"](model.quick_gelu(self.mlp["fc1"](self.norm2(x))))


class PatchTower(nn.Module):
    """Phi_v: Patches -> features of the patches of all images, one after another, (-1, C)."""

    def __init__(self, config: Qwen2VLVisionConfig):
        super().__init__()
        self.merge = config.spatial_merge_size
        self.head_width = config.embed_dim // config.num_heads
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        convolution = nn.Conv3d(3, config.embed_dim, kernel, stride=kernel, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": convolution})
        self.blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.depth))

    def forward(self, patches: Patches) -> Tensor:
        # a patch fills the kernel, so the convolution is one product
        weight = self.patch_embed["proj"].weight.flatten(1)  # (C, p)
        features = []
        # image by image: none sees another, and memory is bounded by the largest
        for image in patches:
            x = F.linear(image.flatten(0, 2).to(weight.dtype), weight)  # (n, C)
            rotary = self.rotary(*image.shape[:2], x.device)
            for block in self.blocks:
                x = block(x, rotary)
            features.append(x)
        return torch.cat(features)

    def rotary(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, K): half of a head turns with a patch's row, half with its column."""
        inner = torch.arange(self.merge)
        index = torch.cartesian_prod(torch.arange(rows), torch.arange(columns), inner, inner)
        # row and column of a patch's image token, and its own within that
        positions = (self.merge * index[:, :2] + index[:, 2:]).to(device)  # (n, 2)
        frequencies = model.rotary_frequencies(self.head_width // 2, 10000.0, device)  # (K / 4,)
        angles = positions[..., None].float() * frequencies  # (n, 2, K / 4)
        return model.rotary_tables(angles.flatten(1), torch.float32)


class PatchMerger(nn.Module):
    """g: patch features (-1, C) -> image tokens (-1, D), of 4 patches side by side each."""

    def __init__(self, config: Qwen2VLVisionConfig, decoder_width: int):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        last = nn.Linear(self.width, decoder_width)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), last)

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp(self.ln_q(features).view(-1, self.width))


class Qwen2VLDecoder(model.Decoder):
    """Phi_l with rotary positions of three axes: time, row and column."""

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, 1, T, K); position_ids: (3, B, T), or (B or 1, T) for all axes."""
        width, theta = self.config.head_dim, self.config.rope_theta
        frequencies = model.rotary_frequencies(width, theta, position_ids.device)
        axes = position_ids if position_ids.dim() == 3 else [position_ids] * 3
        angles = []
        for axis, section in zip(axes, frequencies.split(self.config.mrope_section)):
            angles.append(axis[:, None, :, None].float() * section)
        return model.rotary_tables(torch.cat(angles, dim=-1), dtype)


# -------------------------------------------------------------------------------- architecture

# What this code computes, by field; another value would silently give another model.
SUPPORTED_VISION = {"hidden_act": ("quick_gelu",), "in_channels": (3,), "in_chans": (3,)}
SUPPORTED_TEXT = {"hidden_act": ("silu",), "use_sliding_window": (False,)}
SUPPORTED_TEXT |= {"quantization_config": (None,)}
SUPPORTED_ROPE = dict.fromkeys(("rope_type", "type"), ("default", "mrope"))
SUPPORTED_ROPE |= {"partial_rotary_factor": (1.0,)}


@dataclass(frozen=True)
class Qwen2VLConfig(LVLMConfig):
    """What config.json of a Qwen2-VL folder says, and its parts."""

    vision: Qwen2VLVisionConfig
    decoder: Qwen2VLDecoderConfig
    end_tokens: list = field(default_factory=[151645].copy)
    bos_token_id: int | None = None  # config.json names one that the tokenizer never adds

    image_token: ClassVar[str] = "<|image_pad|>"
    image_processor: ClassVar[type | None] = PatchProcessor
    key_patterns: ClassVar[tuple] = (  # the hub's names, and those of transformers 4.52 and later
        (r"^(model\.)?visual\.merger\.", "projector."),
        (r"^(model\.)?visual\.", "vision."),
        (r"^model\.(language_model\.)?", "decoder."),
    )

    @classmethod
    def from_json(cls, raw: dict) -> "Qwen2VLConfig":
        """Of the hub's flat config.json, or of the nested one of transformers 4.52 and later."""
        text = raw.get("text_config", raw)
        vision = raw.get("vision_config")
        check_supported(raw, {"quantization_config": (None,)}, "config.json")
        check_supported(text, SUPPORTED_TEXT, "config.json text_config")
        check_supported(vision, SUPPORTED_VISION, "config.json vision_config")
        rope = vision.get("rope_parameters") or {}
        check_supported(rope, {"rope_theta": (10000.0,)}, "config.json vision rope_parameters")
        # as in transformers 5.24: rope_scaling goes before rope_parameters, and what stands in
        # either before a rope_theta beside it
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        check_supported(rope, SUPPORTED_ROPE, "config.json: rotary positions")
        tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        text = text | rope | {"tie_word_embeddings": tied, "qkv_bias": True}
        ends = text.get("eos_token_id", 151645)
        fields = {
            "vision": from_json(Qwen2VLVisionConfig, vision, "config.json: vision", True, True),
            "decoder": from_json(Qwen2VLDecoderConfig, text, "config.json text_config", True, True),
            "image_token_id": raw.get("image_token_id", 151655),
            "end_tokens": ends if isinstance(ends, list) else [ends],
            "raw": raw,
        }
        return from_json(cls, fields, "config.json")

    def build_vision(self) -> nn.Module:
        return PatchTower(self.vision)

    def build_projector(self) -> nn.Module:
        return PatchMerger(self.vision, self.decoder.hidden_size)

    def build_decoder(self) -> nn.Module:
        return Qwen2VLDecoder(self.decoder)

    def image_grid(self, pixels: Tensor | None = None) -> tuple[int, int]:
        side = self.vision.image_size // self.vision.token_side
        return (side, side) if pixels is None else tuple(pixels.shape[:2])

    def stack_images(self, images: list[Tensor]) -> Patches:
        return Patches(images)

    def position_ids(self, input_ids: list[int], grid: tuple[int, int]) -> Tensor:
        """(3, T): time, row and column of every token; those of a text token are equal."""
        rows, columns = grid
        start = input_ids.index(self.image_token_id)
        before = torch.arange(start).expand(3, -1)
        # in an image time stands still, row and column count from its start
        image = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T
        # the next text token follows the largest of all
        after = torch.arange(len(input_ids) - start - rows * columns).expand(3, -1)
        return torch.cat([before, image + start, after + start + max(grid)], dim=1)

    def apply_chat_template(self, template: str) -> str:
        for pattern, words in CHAT:
            template = re.sub(pattern, words, template)
        return template

    # name of a parameter here -> its name in the hub's folder; undoes key_patterns
    def hub_key(self, name: str) -> str:
        part, rest = name.split(".", 1)
        names = {"vision": "visual", "projector": "visual.merger", "decoder": "model"}
        return f"{names.get(part, part)}.{rest}"
