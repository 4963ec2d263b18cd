"""The original LLaVA's published weights -> a folder in the hub's layout, once.

    python -m extras.convert_llava SOURCE OUT  # then: train.py --model OUT --image-mode pad ...

SOURCE holds config.json, pytorch_model*.bin or safetensors, and a tokenizer.json, which the
original lacks: take Llama 2's or llava-hf's. The folder of CLIP, its vision tower, lies beside it.
Pickles (.bin) are read here and nowhere else, without running code from them.

Not here: LLaVA-1.6; adapters (extras/export.py).
"""

import pickle
import tempfile
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import data
import model

# What LLaVA-1.5 is, by field; another value would silently give another model.
SUPPORTED = {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",)}
SUPPORTED |= {"mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,)}
SUPPORTED |= {"image_aspect_ratio": ("pad", "square", None)}
PATTERNS = (  # name in SOURCE or in the CLIP folder -> name in the hub's layout
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^(model\.vision_tower\.vision_tower\.)?vision_model\.", "vision_tower.vision_model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", "language_model.model."),
)
IGNORED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # CLIP's rest


def read_weights(folder: Path) -> dict[str, Tensor]:
    """{name in the hub's layout: tensor} of a folder's .bin files, or else of its safetensors."""
    tensors = {}
    for path in sorted(folder.glob("pytorch_model*.bin")) or model.shard_files(folder):
        try:
            if not path.is_file():  # as a pipe, on which reading would wait
                raise EOFError("not a file")
            if path.suffix == ".bin":
                part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                part = load_file(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError) as error:
            raise ValueError(f"{path} is broken, or more than tensors: {error!s:.90}") from None
        for key, tensor in part.items():
            if key.startswith(IGNORED) or key.endswith(model.IGNORED_KEYS):
                continue
            # integers are a quantised model's weights: as floats they would mean nothing
            if not tensor.is_floating_point():
                raise ValueError(f"{path}: {key} is {tensor.dtype}, wanted plain floats")
            tensors[model.rename_key(key, PATTERNS)] = tensor
    return tensors


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


def convert(source: Path, out: Path) -> None:
    """Write OUT whole, or not at all; all names and shapes are compared before."""
    # config.json names the hub id of CLIP; its folder lies beside the original's
    raw = model.read_json(source / "config.json")
    clip = source.parent / Path(raw["mm_vision_tower"]).name
    config = model.parse_config(hub_config(raw, model.read_json(clip / "config.json")))
    settings = model.read_json(clip / "preprocessor_config.json")
    # <image> and <pad> follow the words, as in the configuration above
    path = source / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: take Llama 2's or llava-hf's")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer ({error})") from None
    tokenizer.add_special_tokens(["<image>", "<pad>"])
    if tokenizer.token_to_id("<image>") != config.image_token_id:
        raise ValueError(f"{path} has other than the {config.image_token_id} ids of config.json")
    # a vision tower in SOURCE, which some originals have trained, goes before CLIP's
    tensors = read_weights(clip) | read_weights(source)
    # a new token's row is the mean of the others: never the largest logit
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weight = tensors.get(name)
        if weight is not None and len(weight) == config.image_token_id:
            new_rows = weight.float().mean(0).expand(config.decoder.vocab_size - len(weight), -1)
            tensors[name] = torch.cat([weight, new_rows.to(weight.dtype)])
    # one list of all that is missing, unexpected or of another shape
    with torch.device("meta"):
        wanted = dict(model.LVLM(config).named_parameters())
    renamed = {model.rename_key(name, config.key_patterns): t for name, t in tensors.items()}
    model.check_shapes(renamed, wanted, f"the weights of {source} do not fit its config.json")
    # written aside and renamed, so that a full disk or a kill leaves no half of a model
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as aside:
        folder = Path(aside) / "model"
        folder.mkdir()
        data.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        data.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        data.write_json(folder / "preprocessor_config.json", settings)
        data.write_json(folder / "config.json", config.raw)
        folder.rename(out)


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("python -m extras.convert_llava", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the original, CLIP's folder beside it")
    parser.add_argument("out", type=Path, help="folder to write; it may not exist yet")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise ValueError(f"{args.out} exists already: choose another folder")
    try:
        convert(args.source, args.out)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{args.source} holds no original LLaVA: {error!r}") from None
    print(f"written: {args.out}; the original pads images: use --image-mode pad")


if __name__ == "__main__":
    main()
