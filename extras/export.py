"""An adapted model for other people's software.

Not here: loading (model.py), adapters of this project's own format (VladVA.save_adapter).
"""

from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from model import LVLM, LVLMConfig, write_json

# ----------------------------------------------------------------- weights in the hub's layout

LLAVA_PREFIXES = (  # name here -> name in llava-hf's folders; the first that fits
    ("vision.layers.", "vision_tower.vision_model.encoder.layers."),
    ("vision.pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("vision.post_layernorm.", "vision_tower.vision_model.post_layernorm."),
    ("vision.", "vision_tower.vision_model.embeddings."),
    ("projector.", "multi_modal_projector."),
    ("decoder.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


def hub_key(name: str, config: LVLMConfig) -> str:
    """Name of a parameter of LVLM -> its name in the hub's folders; undoes model.rename_key."""
    if hasattr(config, "hub_key"):
        return config.hub_key(name)
    for prefix, theirs in LLAVA_PREFIXES:
        if name.startswith(prefix):
            return theirs + name[len(prefix) :]
    raise ValueError(f"{name} has no name in the hub's layout")


def save_weights(tensors: dict[str, Tensor], folder: str | Path, max_shard_size="5GB") -> None:
    """Write {name in the hub's layout: tensor} as model.safetensors, or as shards with an index."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    for path in Path(folder).glob("model*.safetensors"):
        path.chmod(0o644)  # safetensors 0.8 lets nobody else read what it writes


def save_lvlm(lvlm: LVLM, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights of an LVLM without adapters; load_lvlm reads them back.

    dtype None: as they are. Weights that are tied are stored once.
    """
    tensors = {}
    for name, p in lvlm.named_parameters():
        tensors[hub_key(name, lvlm.config)] = p.detach().to("cpu", dtype)
    save_weights(tensors, folder)
    write_json(Path(folder) / "config.json", lvlm.config.raw)
