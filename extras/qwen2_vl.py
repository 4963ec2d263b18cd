"""Qwen2-VL, the paper's second architecture: all in which it differs from LLaVA-1.5.

    VladVA.from_pretrained("qwen2-vl-2b")  # model.ARCHITECTURES finds this file by model_type

Images keep their shape: patches of 14 x 14 pixels, 2 x 2 patches an image token. The decoder has
biases on q, k and v, a tied head, and rotary positions of three axes.

Not here: videos, sliding-window attention, Qwen2.5-VL.

Dims: n patches of all images of a batch, p numbers of a patch; the others are model.py's.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import model
from data import CLIP_MEAN, CLIP_STD, normalize_pixels, read_image_settings
from model import DecoderConfig, LVLMConfig, apply_rotary, check_supported, from_json


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

    @property
    def token_side(self) -> int:
        """Pixels a side of an image token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def image_size(self) -> int:
        """Pixels a side that scenes are rendered with: 8 x 8 image tokens (ours)."""
        return 8 * self.token_side


@dataclass(frozen=True)
class Qwen2VLDecoderConfig(DecoderConfig):
    """Decoder dimensions; these defaults are transformers' Qwen2VLTextConfig."""

    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    qkv_bias: bool = True
    mrope_section: tuple = (16, 24, 24)  # frequencies that turn with time, row and column

    def __post_init__(self):
        super().__post_init__()
        section = self.mrope_section
        half = self.head_width // 2
        if [type(size) for size in section] != [int] * 3 or sum(section) != half:
            raise ValueError(f"config.json: mrope_section is {section}, wanted 3, in sum {half}")


# -------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Patches:
    """Images of any sizes, one after another; the 4 patches of an image token are neighbours."""

    values: Tensor  # (n, p)
    grids: list[tuple[int, int]]  # (rows, columns) of image tokens of each image, on the host

    def __len__(self) -> int:
        return len(self.grids)

    def to(self, device) -> "Patches":
        return Patches(self.values.to(device), self.grids)


class PatchProcessor:
    """Qwen2-VL's preprocessing: an image keeps its shape, its sides become multiples of 28 pixels.

    Its area is kept within vladva_config's min_pixels and max_pixels, or else the folder's.
    """

    def __init__(self, folder: str | Path, lvlm_config: "Qwen2VLConfig", vladva_config):
        path, settings = read_image_settings(folder)
        vision = lvlm_config.vision
        needed = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
        needed |= {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        needed |= {"temporal_patch_size": vision.temporal_patch_size, "rescale_factor": 1 / 255}
        check_supported(settings, {name: (value,) for name, value in needed.items()}, str(path))
        mode = {"image_mode": vladva_config.image_mode}
        check_supported(mode, {"image_mode": ("crop",)}, "Qwen2-VL takes images whole")
        size = settings.get("size") or {}  # where newer files keep the budget
        check_supported(size, {}, f"{path}: size")
        fewest = vladva_config.min_pixels or settings.get("min_pixels") or size.get("shortest_edge")
        most = vladva_config.max_pixels or settings.get("max_pixels") or size.get("longest_edge")
        integers = type(fewest) is int and type(most) is int
        if not integers or max(fewest, vision.token_side**2) > most:
            wanted = f"two rising integers, the second at least {vision.token_side**2}"
            raise ValueError(f"{path}: images of {fewest!r} to {most!r} pixels, wanted {wanted}")
        self.min_pixels = fewest
        self.max_pixels = most
        self.vision = vision
        self.mode = f"{fewest} to {most} pixels"
        self.mean = np.array(settings.get("image_mean", CLIP_MEAN))
        self.std = np.array(settings.get("image_std", CLIP_STD))

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) nearest to an image's own that the budget and the patches allow."""
        if max(size) > 200 * min(size):
            raise ValueError(f"image of {size} pixels: Qwen2-VL takes no ratio of sides over 200")
        side = self.vision.token_side
        size = np.array(size)
        tokens = np.round(size / side)
        if tokens.prod() * side**2 > self.max_pixels:
            shrink = np.sqrt(size.prod() / self.max_pixels)
            tokens = np.floor(size / shrink / side).clip(min=1)
        elif tokens.prod() * side**2 < self.min_pixels:
            grow = np.sqrt(self.min_pixels / size.prod())
            tokens = np.ceil(size * grow / side)
        width, height = (tokens * side).astype(int).tolist()
        return width, height

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
        frames = self.vision.temporal_patch_size
        return patches.unsqueeze(4).expand(-1, -1, -1, -1, frames, -1, -1).flatten(3)


# ------------------------------------------------------------------------------------- network


class PatchBlock(nn.Module):
    """Pre-norm transformer block; every patch sees those of its own image."""

    def __init__(self, config: Qwen2VLVisionConfig):
        super().__init__()
        width = config.embed_dim
        inner = config.mlp_ratio * width
        self.num_heads = config.num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict()
        self.attn["qkv"] = nn.Linear(width, 3 * width)
        self.attn["proj"] = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], counts: list[int]) -> Tensor:
        """x: (n, C); counts: patches of each image."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, 1, self.num_heads, -1))
        q, k, v = qkv.permute(1, 2, 3, 0, 4)  # (1, H, n, K) each
        q = apply_rotary(q, *rotary).to(v.dtype)
        k = apply_rotary(k, *rotary).to(v.dtype)
        attended = []
        for image in zip(q.split(counts, 2), k.split(counts, 2), v.split(counts, 2)):
            attended.append(F.scaled_dot_product_attention(*image))
        attended = torch.cat(attended, dim=2)[0].transpose(0, 1).flatten(1)  # (n, C)
        x = x + self.attn["proj"](attended)
        return x + self.mlp["fc2"](model.quick_gelu(self.mlp["fc1"](self.norm2(x))))


class PatchTower(nn.Module):
    """Phi_v: Patches -> features of every patch, (n, C)."""

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
        x = F.linear(patches.values.to(weight.dtype), weight)
        rotary = self.rotary(patches.grids, x.device)
        counts = [rows * columns * self.merge**2 for rows, columns in patches.grids]
        for block in self.blocks:
            x = block(x, rotary, counts)
        return x

    def rotary(self, grids: list[tuple[int, int]], device) -> tuple[Tensor, Tensor]:
        """cos and sin, (n, K): half of a head turns with a patch's row, half with its column."""
        inner = torch.arange(self.merge)
        positions = []
        for rows, columns in grids:
            index = torch.cartesian_prod(torch.arange(rows), torch.arange(columns), inner, inner)
            positions.append(self.merge * index[:, :2] + index[:, 2:])
        positions = torch.cat(positions).to(device)  # (n, 2), row and column of each patch
        frequencies = model.rotary_frequencies(self.head_width // 2, 10000.0, device)  # (K / 4,)
        angles = positions[..., None].float() * frequencies  # (n, 2, K / 4)
        return model.rotary_tables(angles.flatten(1), torch.float32)


class PatchMerger(nn.Module):
    """g: patch features (n, C) -> image tokens (n / 4, D), of 4 patches side by side each."""

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

    def rotary(self, position_ids: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (B or 1, 1, T, K); position_ids: (3, B, T), or (B or 1, T) for all axes."""
        config = self.config
        device = position_ids.device
        frequencies = model.rotary_frequencies(config.head_width, config.rope_theta, device)
        axes = position_ids if position_ids.dim() == 3 else [position_ids] * 3
        angles = []
        for axis, section in zip(axes, frequencies.split(config.mrope_section)):
            angles.append(axis[:, None, :, None].float() * section)
        return model.rotary_tables(torch.cat(angles, dim=-1), dtype)


# -------------------------------------------------------------------------------- architecture

SUPPORTED_VISION = {"hidden_act": ("quick_gelu",), "in_channels": (3,), "in_chans": (3,)}
SUPPORTED_TEXT = {"hidden_act": ("silu",), "use_sliding_window": (False,)}
SUPPORTED_TEXT |= {"quantization_config": (None,)}
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHAT = (  # the paper's words -> those of Qwen2-VL's chat template, with its default system turn
    (r"\s*ASSISTANT: ?", "<|im_end|>\n<|im_start|>assistant\n"),
    (r"^USER: ", f"{SYSTEM_TURN}<|im_start|>user\n"),
    (r" USER: ", "<|im_end|>\n<|im_start|>user\n"),
    (r"<image>\n?", "<|vision_start|><|image_pad|><|vision_end|>"),
)


@dataclass(frozen=True)
class Qwen2VLConfig(LVLMConfig):
    """What config.json of a Qwen2-VL folder says, and its parts."""

    vision: Qwen2VLVisionConfig
    decoder: Qwen2VLDecoderConfig
    eos_token_id: int = 151645
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
        check_supported(text, SUPPORTED_TEXT, "config.json text_config")
        check_supported(vision, SUPPORTED_VISION, "config.json vision_config")
        check_supported(raw, {"quantization_config": (None,)}, "config.json")
        rope = vision.get("rope_parameters") or {}
        check_supported(rope, {"rope_theta": (10000.0,)}, "config.json vision rope_parameters")
        tied = bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        text = text | rope_settings(text) | {"tie_word_embeddings": tied, "qkv_bias": True}
        values = {"raw": raw, "eos_token_id": text.get("eos_token_id", cls.eos_token_id)}
        values["image_token_id"] = raw.get("image_token_id", 151655)
        values["vision"] = from_json(Qwen2VLVisionConfig, vision, "config.json vision_config", True)
        values["decoder"] = from_json(Qwen2VLDecoderConfig, text, "config.json text_config", True)
        return from_json(cls, values, "config.json")

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
        values = torch.cat([image.flatten(0, 2) for image in images])
        return Patches(values, [self.image_grid(image) for image in images])

    def position_ids(self, input_ids: list[int], grid: tuple[int, int]) -> Tensor:
        """(3, T): time, row and column of every token.

        A text token has one position on all axes. In an image time stands still, row and column
        count from its start, and the next text token follows the largest of all.
        """
        rows, columns = grid
        start = input_ids.index(self.image_token_id)
        image = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).T
        after = torch.arange(len(input_ids) - start - rows * columns).expand(3, -1)
        before = torch.arange(start).expand(3, -1)
        return torch.cat([before, image + start, after + start + max(grid)], dim=1)

    def apply_chat_template(self, template: str) -> str:
        for pattern, words in CHAT:
            template = re.sub(pattern, words, template)
        return template

    def hub_key(self, name: str) -> str:
        """Name of a parameter here -> its name in the hub's folder; undoes key_patterns."""
        part, rest = name.split(".", 1)
        names = {"vision": "visual", "projector": "visual.merger", "decoder": "model"}
        return f"{names.get(part, part)}.{rest}"


def rope_settings(text: dict) -> dict:
    """rope_theta and mrope_section of a text_config, by the precedence of transformers 5.24.

    rope_scaling goes before rope_parameters, a rope_theta in there before the one beside it.
    """
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    check_supported(rope, {}, "config.json: rope_scaling or rope_parameters")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = rope.keys() - {"rope_type", "type", "rope_theta", "mrope_section"}
    if kind not in ("default", "mrope") or unknown:
        raise ValueError(f"config.json: rotary positions {rope}; this code does plain mrope only")
    section = rope.get("mrope_section", [16, 24, 24])
    section = tuple(section) if isinstance(section, list) else section
    theta = rope.get("rope_theta", text.get("rope_theta", 1e6))
    return {"rope_theta": theta, "mrope_section": section}
