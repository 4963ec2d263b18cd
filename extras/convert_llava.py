"""The original LLaVA's published weights -> a folder in the hub's layout, once.

    python -m extras.convert_llava SOURCE OUT
    python train.py --model OUT --image-mode pad ...

SOURCE: flat config.json, pytorch_model-*.bin or safetensors, tokenizer.json. The CLIP folder that
config.json names lies in SOURCE, beside it, at the path that is named, or in the hub's cache.
Pickles (.bin) are read here and nowhere else, without running code from them, and memory-mapped.
"""

import argparse
import pickle
import shutil
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor

import data
import model
from extras.export import check_empty, save_weights

SUPPORTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "image_aspect_ratio": ("pad", "square", None),
}
PATTERNS = (  # name in SOURCE or in the CLIP folder -> name in the hub's layout
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model\.vision_tower\.vision_tower\.)?vision_model\.", "vision_tower.vision_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", "language_model.model."),
)
VOCABULARY = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
REST_OF_CLIP = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")


def clip_folder(source: Path, name: str) -> Path:
    """The CLIP folder that config.json names; ValueError says where to put it."""
    beside = source.parent / Path(name).name
    for folder in (source / Path(name).name, beside, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise ValueError(
            f"the vision tower {name} is not here: put its folder at {beside}"
        ) from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """{name in the hub's layout: tensor} of a folder's .bin or safetensors files."""
    index = folder / "pytorch_model.bin.index.json"
    names = model.read_json(index)["weight_map"].values() if index.exists() else []
    paths = [folder / name for name in sorted(set(names)) or ["pytorch_model.bin"]]
    if not all(path.is_file() for path in paths):
        paths = model.shard_files(folder)
    tensors = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with model.open_safetensors(path) as shard:
                tensors |= {key: shard.get_tensor(key) for key in shard.keys()}
            continue
        try:
            tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{path} is broken, or holds more than tensors: {reason}") from None
    renamed = {}
    for key, tensor in tensors.items():
        if not key.startswith(REST_OF_CLIP) and not key.endswith(model.IGNORED_KEYS):
            renamed[model.rename_key(key, PATTERNS)] = tensor
    return renamed


def hub_config(raw: dict, clip: dict) -> dict:
    """The original's config.json, which is flat, and the CLIP folder's -> the hub's nested form."""
    model.check_supported(raw, SUPPORTED, "config.json")
    text = {key: value for key, value in raw.items() if "mm_" not in key}
    vocab_size = raw.get("vocab_size", 32000)
    # <image> and <pad> follow, and unused rows up to a multiple of 64, as llava-hf has them
    text |= {"model_type": "llama", "vocab_size": (vocab_size + 2 + 63) // 64 * 64}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": vocab_size,
        "pad_token_id": vocab_size + 1,
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_config": {"model_type": "clip_vision_model"} | clip.get("vision_config", clip),
        "text_config": text,
    }


def add_rows(weight: Tensor, vocab_size: int) -> Tensor:
    """The weight with more rows, each the mean of the others: never the largest logit."""
    mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(vocab_size - len(weight), -1)])


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="extras.convert_llava", description="To hub layout.")
    parser.add_argument("source", type=Path, help="folder of the original LLaVA-1.5")
    parser.add_argument("out", type=Path, help="folder to write; it may not hold a model")
    args = parser.parse_args(argv)
    check_empty(args.out)
    raw = model.read_json(args.source / "config.json")
    if "mm_vision_tower" not in raw:
        raise ValueError(f"{args.source}/config.json names no mm_vision_tower: no original LLaVA")
    tower = clip_folder(args.source, raw["mm_vision_tower"])
    config = model.parse_config(hub_config(raw, model.read_json(tower / "config.json")))

    path = args.source / "tokenizer.json"
    model.read_json(path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    for token in ("<image>", "<pad>"):
        tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    if tokenizer.token_to_id("<image>") != config.image_token_id:
        raise ValueError(f"{path} has other than the {config.image_token_id} ids of config.json")

    # all names and shapes are compared before anything is written
    tensors = read_weights(args.source)
    if not any(name.startswith("vision_tower.") for name in tensors):
        tensors = read_weights(tower) | tensors
    for name in VOCABULARY:
        if name in tensors:
            tensors[name] = add_rows(tensors[name], config.decoder.vocab_size)
    shapes = {model.rename_key(name, config.key_patterns): t.shape for name, t in tensors.items()}
    with torch.device("meta"):
        lvlm = model.LVLM(config)
    wanted = {name: p.shape for name, p in lvlm.named_parameters()}
    model.check_shapes(shapes, wanted, f"the weights of {args.source} do not fit its config.json")
    dtype = tensors["language_model.model.norm.weight"].dtype
    save_weights({name: tensor.to(dtype) for name, tensor in tensors.items()}, args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    shutil.copy(tower / "preprocessor_config.json", args.out)
    model.write_json(args.out / "config.json", config.raw | {"torch_dtype": str(dtype)[6:]})
    print(f"written: {args.out}; the original pads images: use --image-mode pad")


if __name__ == "__main__":
    main()
