"""The paper's second architecture, Qwen2-VL: its config, vision tower, merger, rotary positions and image processor.

model.parse_config finds this file in its registry ARCHITECTURES, by model_type; data.image_processor too.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import ImageProcessor
from model import DecoderConfig, check_supported, cos_and_sin, frequencies, quick_gelu, rotate

# The decoder is that of model.py, with a bias on q, k and v, a tied head, and rotary positions of three axes. Its vision tower takes pictures
# of any size, 14 x 14 pixels a patch, 2 x 2 patches an image token.


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    """Vision dimensions; a field that config.json leaves out takes transformers' Qwen2VLVisionConfig default."""

    depth: int = 32
    embed_dim: int = 1280
    mlp_ratio: int = 4
    num_heads: int = 16
    patch_size: int = 14  # pixels, square
    temporal_patch_size: int = 2  # frames a patch spans; a still picture is shown in each
    spatial_merge_size: int = 2  # patches a side of an image token

    @property
    def token_side(self):
        """Pixels a side of an image token."""
        return self.patch_size * self.spatial_merge_size

    @property
    def image_size(self):
        """Pixels a side that scenes are rendered with (ours: 8 x 8 image tokens; any size would do)."""
        return 8 * self.token_side


@dataclass(frozen=True)
class Qwen2VLConfig:
    """What config.json of a Qwen2-VL folder says; the same interface as LVLMConfig."""

    vision: Qwen2VLVisionConfig
    decoder: DecoderConfig
    image_token_id: int
    raw: dict = field(
        default_factory=dict, compare=False, repr=False
    )  # config.json in nested form, written back on save
    model_type = "qwen2_vl"

    def towers(self):
        return PatchTower(self.vision), PatchMerger(self.vision, self.decoder.hidden_size)

    def grid(self, pixels=None):
        return (
            (self.vision.image_size // self.vision.token_side,) * 2
            if pixels is None
            else tuple(pixels.shape[:2])
        )

    def stack(self, pictures):
        return Patches(
            torch.cat([pixels.flatten(0, 2) for pixels in pictures]),
            [self.grid(pixels) for pixels in pictures],
        )

    def positions(self, ids, grid):
        """(3, T): time, row and column of every token, from where the placeholder ids stand (after transformers' get_rope_index).

        A text token has one position on all axes; in a picture of grid = (rows, columns) image tokens time stands still while row and
        column count from the picture's start; the next text token follows the largest of all.
        """
        (rows, columns), start = grid, ids.index(self.image_token_id)
        text = lambda count: torch.arange(count).expand(3, -1)
        picture = torch.cartesian_prod(
            torch.arange(1), torch.arange(rows), torch.arange(columns)
        ).T  # (3, N)
        return torch.cat(
            [
                text(start),
                picture + start,
                text(len(ids) - start - rows * columns) + start + max(grid),
            ],
            dim=1,
        )

    def hub_name(self, key):
        return next(
            theirs + key[len(ours) :] for ours, theirs in QWEN2_VL_NAMES if key.startswith(ours)
        )


QWEN2_VL_NAMES = (
    ("vision.", "visual."),
    ("projector.", "visual.merger."),
    ("decoder.", "model."),
    ("head.", "lm_head."),
)


QWEN2_VL_TEXT = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}  # where transformers' Qwen2VLTextConfig has other defaults than Llama's


QWEN2_VL_TOP = ("architectures", "model_type", "vision_config", "torch_dtype", "dtype", "transformers_version", "quantization_config",
                "tie_word_embeddings", "image_token_id", "video_token_id", "vision_token_id", "vision_start_token_id",
                "vision_end_token_id")  # fmt: skip  # what stays outside text_config


def parse_qwen2_vl(raw):
    """parse_config for Qwen2-VL: the hub's flat form, or the nested one of transformers 4.52 and later."""
    if "text_config" not in raw:
        text = {
            "model_type": "qwen2_vl_text",
            **{key: value for key, value in raw.items() if key not in QWEN2_VL_TOP},
        }
        raw = {key: raw[key] for key in QWEN2_VL_TOP if key in raw} | {"text_config": text}
    check_supported("qwen2_vl", raw)
    for name in ("vision_config", "text_config"):
        section = raw.get(name) or {}
        if not section.get("model_type", "qwen2_vl").startswith("qwen2_vl"):
            raise ValueError(
                f"config.json: top.model_type is 'qwen2_vl', but {name}.model_type is {section['model_type']!r}"
            )
        check_supported(f"qwen2_vl {name}", section)
    if not isinstance(raw.get("vision_config"), dict) or raw.get("image_token_id") is None:
        raise ValueError(
            "config.json has no vision_config or no image_token_id: wanted the layout of Qwen/Qwen2-VL-2B-Instruct"
        )
    text = {**QWEN2_VL_TEXT, **raw["text_config"]}
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings", False) or text.get(
        "tie_word_embeddings", False
    )  # either place, by version
    decoder = DecoderConfig(
        **{k: v for k, v in text.items() if k in DecoderConfig.__dataclass_fields__}
        | qwen2_vl_rope(text),
        qkv_bias=True,
    )
    if sum(decoder.rope_sections) != decoder.head_width // 2:
        raise ValueError(
            f"config.json: mrope_section is {decoder.rope_sections}, but a head has {decoder.head_width // 2} rotary frequencies"
        )
    vision = {
        k: v
        for k, v in raw["vision_config"].items()
        if k in Qwen2VLVisionConfig.__dataclass_fields__
    }
    return Qwen2VLConfig(Qwen2VLVisionConfig(**vision), decoder, raw["image_token_id"], raw)


def qwen2_vl_rope(text):
    """{"rope_theta", "rope_sections"} of a text_config: the hub's rope_theta and rope_scaling, or transformers 5's rope_parameters."""
    rope = {
        "rope_theta": text.get("rope_theta", 1e6),
        "mrope_section": [16, 24, 24],
    }  # transformers' defaults
    rope |= text.get("rope_scaling") or text.get("rope_parameters") or {}
    kinds = {rope.pop(key) for key in ("type", "rope_type") if key in rope}
    theta, sections = rope.pop("rope_theta"), tuple(rope.pop("mrope_section"))
    if rope or kinds - {"mrope", "default"} or len(sections) != 3:
        raise ValueError(
            f"config.json: rotary positions {sorted(kinds)} {sections} {rope}; this code does mrope with three sections only"
        )
    return {"rope_theta": theta, "rope_sections": sections}


@dataclass(frozen=True)
class Patches:
    """Pictures of any sizes, one after another. An image token's 2 x 2 patches are neighbours; grids stay on the host."""

    values: torch.Tensor  # (n, 3 * frames * side * side) patches of all pictures
    grids: list  # [(rows, columns) of image tokens of each picture]

    def __len__(self):
        return len(self.grids)

    def to(self, device):
        return Patches(self.values.to(device), self.grids)


class PatchBlock(nn.Module):
    """Pre-norm transformer block; every patch sees those of its own picture."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.embed_dim, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, config.mlp_ratio * width),
                "fc2": nn.Linear(config.mlp_ratio * width, width),
            }
        )

    def forward(self, x, rotary, counts):
        """x: (n, C); counts: patches of each picture."""
        q, k, v = (
            self.attn["qkv"](self.norm1(x))
            .unflatten(-1, (3, 1, self.heads, -1))
            .permute(1, 2, 3, 0, 4)
        )  # (1, H, n, K) each
        q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        pictures = zip(*(each.split(counts, dim=2) for each in (q, k, v)))
        attended = torch.cat(
            [F.scaled_dot_product_attention(*picture) for picture in pictures], dim=2
        )
        x = x + self.attn["proj"](attended[0].transpose(0, 1).flatten(1))
        return x + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.norm2(x))))


class PatchTower(nn.Module):
    """Phi_v of Qwen2-VL: Patches -> features of every patch (n, C). After transformers' modeling_qwen2_vl; changed: still pictures only."""

    def __init__(self, config):
        super().__init__()
        self.merge, self.head_width = (
            config.spatial_merge_size,
            config.embed_dim // config.num_heads,
        )
        self.patches_per_token = self.merge**2
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv3d(3, config.embed_dim, kernel, stride=kernel, bias=False)}
        )
        self.blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.depth))

    def forward(self, patches):
        weight = self.patch_embed["proj"].weight.flatten(
            1
        )  # a patch fills the kernel, so the convolution is one product
        x = F.linear(patches.values.to(weight.dtype), weight)
        rotary = self.rotary(patches.grids, x.device)
        counts = [rows * columns * self.patches_per_token for rows, columns in patches.grids]
        for block in self.blocks:
            x = block(x, rotary, counts)
        return x

    def rotary(self, grids, device):
        """cos and sin, (n, K) each: half of a head's channels turn with the patch's row, half with its column."""
        inside = torch.arange(self.merge)
        each = [
            torch.cartesian_prod(torch.arange(rows), torch.arange(columns), inside, inside)
            for rows, columns in grids
        ]
        positions = torch.cat([self.merge * where[:, :2] + where[:, 2:] for where in each]).to(
            device
        )  # (n, 2)
        angles = positions[..., None].float() * frequencies(
            self.head_width // 2, 10000.0, device
        )  # (n, 2, K / 4)
        return cos_and_sin(angles.flatten(1), torch.float32)

    def run_weights(self):
        """The parameters that every patch meets."""
        return list(self.parameters())


class PatchMerger(nn.Module):
    """g of Qwen2-VL: features of patches (n, C) -> image tokens (n / 4, D), the 2 x 2 patches of each side by side."""

    def __init__(self, config, decoder_width):
        super().__init__()
        self.count = config.spatial_merge_size**2
        width = config.embed_dim * self.count
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, decoder_width)
        )

    def forward(self, features):
        return self.mlp(self.ln_q(features).unflatten(0, (-1, self.count)).flatten(1))


class PatchProcessor(ImageProcessor):
    """Qwen2-VL's preprocessing: a picture keeps its shape, its sides become multiples of an image token's (28 pixels). After transformers'
    image_processing_qwen2_vl; changed: still pictures only.

    budget: (fewest, most) pixels after the resize; None: what preprocessor_config.json says (min_pixels and max_pixels, or the size of
    newer files). The paper states no pixel budget.
    """

    def __init__(self, folder, config, mode, tower=None, budget=(None, None)):
        path, self.vision = Path(folder) / "preprocessor_config.json", config.vision
        self.read_steps(path)
        if mode != "crop":
            raise ValueError(
                f"image mode is {mode!r}, but Qwen2-VL takes pictures whole, in their own shape: leave it out"
            )
        vision, size = config.vision, self.raw.get("size") or {}
        known = (
            self.raw.get("min_pixels", size.get("shortest_edge")),
            self.raw.get("max_pixels", size.get("longest_edge")),
        )
        self.fewest, self.most = (
            own if given is None else given for own, given in zip(known, budget)
        )
        if (
            not (self.fewest and self.most)
            or not vision.token_side**2 <= self.most >= self.fewest > 0
        ):
            raise ValueError(
                f"pictures of {self.fewest} to {self.most} pixels ({path}, --min-pixels, --max-pixels): wanted two rising numbers, the second at "
                f"least {vision.token_side**2}"
            )
        fixed = {"do_resize": True, "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
                 "merge_size": vision.spatial_merge_size}  # fmt: skip
        strange = {
            name: self.raw[name]
            for name, wanted in fixed.items()
            if self.raw.get(name, wanted) != wanted
        }
        if strange:
            raise ValueError(f"{path} says {strange}, but the vision tower needs {fixed}")
        self.raw = self.raw | {"min_pixels": self.fewest, "max_pixels": self.most}
        self.mode, self.largest = (
            f"{self.fewest} to {self.most} pixels",
            (math.isqrt(self.most) // vision.token_side,) * 2,
        )  # a square's

    def target(self, image):
        """(width, height) nearest to the picture's own, multiples of an image token's side, their product within the budget."""
        side, area = self.vision.token_side, image.width * image.height
        if max(image.size) > 200 * min(image.size):
            raise ValueError(
                f"picture of {image.width} x {image.height}: Qwen2-VL takes no side over 200 times the other"
            )
        size = [round(edge / side) * side for edge in image.size]
        if math.prod(size) > self.most:
            size = [
                max(1, math.floor(edge / math.sqrt(area / self.most) / side)) * side
                for edge in image.size
            ]
        elif math.prod(size) < self.fewest:
            size = [
                math.ceil(edge * math.sqrt(self.fewest / area) / side) * side for edge in image.size
            ]
        return tuple(size)

    def fitted(self, image):
        return image.resize(self.target(image), self.resample)

    def __call__(self, image):
        """RGB picture -> (rows, columns, 4, numbers of a patch) float32: of every image token its 2 x 2 patches, each in two equal frames."""
        pixels, vision = self.normalised(self.fitted(image)), self.vision
        inside = (vision.spatial_merge_size, vision.patch_size)
        tokens = pixels.unflatten(2, (-1, *inside)).unflatten(
            1, (-1, *inside)
        )  # (3, rows, m, side, columns, m, side)
        patches = tokens.permute(1, 4, 2, 5, 0, 3, 6).flatten(
            2, 3
        )  # (rows, columns, 4, 3, side, side)
        return (
            patches.unsqueeze(4)
            .expand(-1, -1, -1, -1, vision.temporal_patch_size, -1, -1)
            .flatten(3)
        )


parse_config, image_processor = (
    parse_qwen2_vl,
    PatchProcessor,
)  # what model.py and data.py ask an architecture for
