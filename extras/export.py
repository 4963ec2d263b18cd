"""An adapted model for other people's software: one folder, no custom code.

    python -m extras.export --model tiny --adapter runs/tiny --out merged [--adapter-only]

The folder is a plain hub folder of its architecture (LoRA folded into the weights, each vector of a
soft prompt the embedding of an added token, the prompt strings in vladva.json) and beside that a
sentence-transformers model: SentenceTransformer("merged").encode([image, "a text"]). --adapter-only
leaves out the base's weights and is in peft's format; --adapter takes such a folder everywhere,
whoever trained it. How to use them: docs/export.md.
Not here: the original LLaVA's weights (extras/convert_llava.py).
"""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

import data
from data import write_json
from lora import lora_layers
from model import LVLM, LVLMConfig, from_json, parse_json, read_json, read_tensors, rename_key
from vladva import VladVA, VladVAConfig, load_model

LLAVA_PATTERNS = (  # name here -> name in llava-hf's folders
    (r"^vision\.layers\.", "vision_tower.vision_model.encoder.layers."),
    (r"^vision\.(pre_layrnorm|post_layernorm)\.", r"vision_tower.vision_model.\1."),
    (r"^vision\.", "vision_tower.vision_model.embeddings."),
    (r"^projector\.", "multi_modal_projector."),
    (r"^decoder\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
)


def hub_key(name: str, config: LVLMConfig) -> str:
    """Name of a parameter of LVLM -> its name in the hub's folders; undoes model.rename_key."""
    if hasattr(config, "hub_key"):
        return config.hub_key(name)
    return rename_key(name, LLAVA_PATTERNS)


def save_weights(tensors: dict[str, Tensor], folder: Path, **options) -> None:
    """Write {name in the hub's layout: tensor} as model.safetensors, or as shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_torch_state_dict(tensors, folder, **options)
    except SafetensorError as error:  # a full disk
        raise OSError(f"{folder}: the weights could not be written ({error})") from None
    # safetensors 0.8 lets nobody else read what it writes
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def save_lvlm(
    lvlm: LVLM, folder: str | Path, dtype: torch.dtype = None, added: dict = None, **options
) -> None:
    """Write config.json and weights, in dtype (None: as they are); model.load_lvlm reads them.

    LoRA is folded in. added: {id: embedding} of tokens that add_tokens added.
    """
    folder = Path(folder)
    config = lvlm.config
    ids = list(added or ())
    vocab_size = max([config.decoder.vocab_size] + [i + 1 for i in ids])
    layers = lora_layers(lvlm)
    tensors = {}
    for name, p in lvlm.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            continue
        layer = layers.get(name.removesuffix(".weight"))
        weight = layer.merged_weight() if layer else p.detach()
        if ids and name in ("decoder.embed_tokens.weight", "lm_head.weight"):
            weight = F.pad(weight, (0, 0, 0, vocab_size - len(weight)))  # a copy in any case
            # an added token is not to be generated
            weight[ids] = 0
            if name == "decoder.embed_tokens.weight":
                weight[ids] = torch.stack([added[i] for i in ids]).to(weight)
        tensors[hub_key(name, config)] = weight.to("cpu", dtype)
    save_weights(tensors, folder, **options)
    raw = json.loads(json.dumps(config.raw))
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(dtype or lvlm.dtype).removeprefix("torch.")
    raw.get("text_config", raw)["vocab_size"] = vocab_size
    write_json(folder / "config.json", raw)


# ------------------------------------------------------------------ soft prompts as added tokens


def split_ids(model: VladVA, modality: str, caption: str = "a") -> tuple[list, list, list]:
    """Ids of a modality's sequence with one image token: before its prompt, of it, behind it."""
    sequence = model.text_sequence(caption)
    if modality == "image":
        sequence = model.image_sequence(grid=(1, 1))
    ids = sequence.input_ids
    start = sequence.prompt_start
    end = start + sequence.prompt_length
    # a space between prompt and image becomes an added token too: Llama's tokenizer would read one
    # that stands between two added tokens as two
    while modality == "image" and model.tokenizer.inner.id_to_token(ids[end]) in ("▁", "Ġ"):
        end += 1
    return ids[:start], ids[start:end], ids[end:]


def spell_template(model: VladVA, modality: str, prompt: str, tokenizer) -> str:
    """The template in which a prompt of added tokens gives the ids of the trained sequence."""
    template = getattr(model.config, f"{modality}_template")
    added = tokenizer.encode(prompt, add_special_tokens=False).ids
    # the space that a tokenizer puts before a word depends on the word: several captions
    captions = ("a", "The red bus.", "2 dogs", "“Ä” 犬")
    parts = [split_ids(model, modality, caption) for caption in captions]
    wanted = [before + added + behind for before, _, behind in parts]
    # some tokenizers put a space there by themselves, so those around the prompt are tried
    for spaced in ("{prompt}", "{prompt} ", " {prompt}", " {prompt} "):
        spelled = re.sub(r" ?\{prompt\} ?", spaced, template)
        chat = model.lvlm.config.apply_chat_template(spelled)
        texts = [data.fill_template(chat, prompt, caption)[0] for caption in captions]
        if [tokenizer.encode(text).ids for text in texts] == wanted:
            return spelled
    problem = f"with added tokens {template!r} is read as other tokens than it was trained on"
    raise ValueError(f"{problem}: only with spaces around {{prompt}} can it be exported")


def add_tokens(model: VladVA) -> tuple[tokenizers.Tokenizer, dict[int, Tensor], VladVAConfig]:
    """Soft prompts -> tokenizer with added tokens, {id: embedding}, config that spells them so."""
    tokenizer = tokenizers.Tokenizer.from_str(model.tokenizer.inner.to_str())
    config = model.config
    embeddings = {}
    for modality, soft_prompt in model.soft_prompts.items():
        # behind the trained vectors come the spaces, which are as they were
        prompt_ids = torch.tensor(split_ids(model, modality)[1], device=model.lvlm.device)
        spaces = model.lvlm.decoder.embed_tokens(prompt_ids[len(soft_prompt) :])
        vectors = torch.cat([soft_prompt.detach(), spaces])  # (tokens of the prompt, D)
        names = [f"<{modality}_prompt_{i}>" for i in range(len(vectors))]
        tokenizer.add_special_tokens(names)
        embeddings |= zip(map(tokenizer.token_to_id, names), vectors)
        prompt = "".join(names)
        template = spell_template(model, modality, prompt, tokenizer)
        config = replace(config, **{f"{modality}_prompt": prompt, f"{modality}_template": template})
    return tokenizer, embeddings, config


# ------------------------------------------------------------------------------- peft's format

# the second "model." is that of the class with a head, LlavaForConditionalGeneration for one
PEFT_PREFIX = "base_model.model.model.language_model."
PEFT_ROWS = f"{PEFT_PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
PEFT_LAYERS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# an adapter trained elsewhere may come from a class without that head, or an older transformers
PEFT_LORA = r"base_model(?:\.model|\.language_model)*\.(layers\.\d+\..+)\.lora_([AB])\.weight"
# fields of adapter_config.json that say nothing of what a trained adapter computes
PEFT_IGNORED = """r lora_alpha target_modules exclude_modules trainable_token_indices lora_dropout
base_model_name_or_path revision task_type auto_mapping peft_version inference_mode megatron_core
qalora_group_size""".split()


def save_peft_adapter(model: VladVA, embeddings: dict[int, Tensor], folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors: LoRA, and rows for the added tokens."""
    ids = list(embeddings)
    base = data.MODELS.get(model.name, model.name)
    adapter_config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        "r": model.config.lora_rank,
        "lora_alpha": model.config.lora_alpha,
        # peft's word for no layer, where soft prompts alone were trained
        "target_modules": PEFT_LAYERS if model.config.lora else "dummy-target-modules",
    }
    groups = model.parameter_groups()
    tensors = {}
    for name, p in groups["lora"].items():
        layer, part = name.removeprefix("lvlm.decoder.").rsplit(".lora_", 1)
        tensors[f"{PEFT_PREFIX}{layer}.lora_{part.upper()}.weight"] = p.detach().cpu()
    if ids:
        adapter_config["trainable_token_indices"] = {"embed_tokens": ids}
        tensors[PEFT_ROWS] = torch.stack([embeddings[i].float() for i in ids]).cpu()
    # for the way back: peft's format has no place for these
    about = {"config": asdict(model.config)}
    about["soft_prompts"] = {name: len(p) for name, p in model.soft_prompts.items()}
    about["loss_parameters"] = {name: p.item() for name, p in groups["loss_parameters"].items()}
    options = {"filename_pattern": "adapter_model{suffix}.safetensors"}
    save_weights(tensors, folder, **options, metadata={"adapter": json.dumps(about)})
    write_json(folder / "adapter_config.json", adapter_config)


def read_peft_adapter(folder: str | Path) -> tuple[dict[str, Tensor], VladVAConfig]:
    """For data.read_adapter: tensors and config of an adapter in peft's format.

    One that save_peft_adapter wrote comes back bit for bit. Another brings LoRA alone and gets the
    paper's hand prompts; load_adapter_state refuses it if it is more than LoRA on our layers.
    """
    raw = read_json(Path(folder) / "adapter_config.json")
    # all else must be off: DoRA, rsLoRA, ranks by layer, ways to start that change the base, ...
    plain = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}
    for name in raw.keys() - set(PEFT_IGNORED):
        if raw[name] not in (None, False, {}, [], plain.get(name)):
            raise ValueError(f"{folder}: {name} is {raw[name]!r}; this code does plain LoRA only")
    values = {"lora_rank": raw.get("r"), "lora_alpha": raw.get("lora_alpha"), "soft_prompts": False}
    path = Path(folder) / "adapter_model.safetensors"
    theirs, metadata = read_tensors(path)
    tensors = {}
    for key, tensor in theirs.items():
        match = re.fullmatch(PEFT_LORA, key)
        name = f"lvlm.decoder.{match[1]}.lora_{match[2].lower()}" if match else key
        tensors[name] = tensor.float()
    if "adapter" in metadata:
        about = parse_json(metadata["adapter"], folder)
        values = about["config"]
        rows = tensors.pop(PEFT_ROWS, None)
        # the image prompt's rows, then spaces, then the text prompt's
        for modality, length in about["soft_prompts"].items():
            part = rows[:length] if modality == "image" else rows[-length:]
            tensors[f"soft_prompts.{modality}"] = part.clone()
        tensors |= {name: torch.tensor(x) for name, x in about["loss_parameters"].items()}
    return tensors, from_json(VladVAConfig, values, str(path))


# --------------------------------------------------------------------- what stands beside them

FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
MESSAGE = FORWARD | {"format": "structured"}
TRANSFORMER = {  # sentence-transformers' module around the model
    "transformer_task": "feature-extraction",
    "modality_config": {"text": FORWARD, "image": FORWARD, "message": MESSAGE},
    "module_output_name": "token_embeddings",
    "processor_kwargs": {"use_fast": False},  # Pillow's resize, as here
}
TEMPLATES = data.TINY.parent / "export"  # the chat template and the model card


# Tokenizer and image processor, as transformers reads them.
def save_processors(model: VladVA, tokenizer, config: VladVAConfig, folder: Path) -> None:
    lvlm_config = model.lvlm.config
    eos = lvlm_config.end_tokens[0]
    data.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    # transformers' Llama class would rebuild the tokenizer from its vocabulary, with other ids
    # beside added tokens; this one takes tokenizer.json as it is
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": lvlm_config.decoder.max_position_embeddings,
        "eos_token": tokenizer.id_to_token(eos),
        "pad_token": tokenizer.id_to_token(lvlm_config.raw.get("pad_token_id") or eos),
    }
    write_json(folder / "tokenizer_config.json", described)
    _, settings = data.read_image_settings(data.model_folder(model.name))
    for key in ("min_pixels", "max_pixels"):
        if getattr(config, key):
            settings[key] = getattr(config, key)  # goes before "size"
    if lvlm_config.raw["model_type"] == "llava":
        processor = {"processor_class": "LlavaProcessor"}
        processor["patch_size"] = lvlm_config.vision.patch_size
        # it counts the class token, and then leaves it out
        processor |= {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        write_json(folder / "processor_config.json", processor)
        if config.image_mode == "pad":
            settings |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    write_json(folder / "preprocessor_config.json", settings)


def save_prompts(model: VladVA, config: VladVAConfig, folder: Path) -> None:
    """vladva.json, the same strings as a chat template, and sentence-transformers' modules."""
    prompts = {}
    for modality in ("image", "text"):
        template = model.lvlm.config.apply_chat_template(getattr(config, f"{modality}_template"))
        prompts[modality] = template.replace("{prompt}", getattr(config, f"{modality}_prompt"))
    write_json(folder / "vladva.json", prompts | {"config": asdict(config)})
    # Jinja reads JSON's strings
    strings = [prompts["image"], *prompts["text"].split("{caption}")]
    template = (TEMPLATES / "chat_template.jinja").read_text(encoding="utf-8")
    template = template.replace("PROMPTS", json.dumps(strings, ensure_ascii=False))
    data.write_text(folder / "chat_template.jinja", template)
    modules = []
    for index, name in enumerate(("Transformer", "Pooling", "Normalize")):
        path = f"{index}_{name}" if index else ""
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": kind})
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", TRANSFORMER)
    pooling = {"embedding_dimension": model.lvlm.config.decoder.hidden_size}
    write_json(folder / "1_Pooling" / "config.json", pooling | {"pooling_mode": "lasttoken"})
    write_json(folder / "2_Normalize" / "config.json", {})


# README.md; scores: what a run's scores.json holds.
def model_card(model: VladVA, scores: dict | None) -> str:
    table = ""
    if scores:
        table = "\n\n| held out | before | after |\n|---|---|---|"
        try:
            before = scores["before"]["scores"]
            for name, after in scores["after"]["scores"].items():
                table += f"\n| {name} | {before[name]:.1f} | {after:.1f} |"
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"scores.json is not that of a run ({error!r:.99})") from None
    repo = data.MODELS.get(model.name, model.name)
    base = Path(repo).name if Path(repo).is_dir() else repo
    positions = model.lvlm.config.decoder.max_position_embeddings
    card = (TEMPLATES / "card.md").read_text(encoding="utf-8")
    return card.format(base=base, scores=table, positions=positions)


def check_empty(folder: str | Path) -> None:
    """ValueError when the folder holds a model already."""
    for name in ("config.json", "adapter_config.json", "adapter.safetensors"):
        if (Path(folder) / name).exists():
            raise ValueError(f"{folder} holds {name} already: choose another folder")


def export(
    model: VladVA,
    folder: str | Path,
    scores: dict | None = None,
    max_shard_size: int | str = "5GB",
    adapter_only: bool = False,
) -> None:
    """Write an adapted model as a folder that others read; the model itself stays as it is."""
    folder = Path(folder)
    check_empty(folder)
    if not model.adapter_enabled:
        raise ValueError("there is no adapter to export: load one, or train one with train.py")
    tokenizer, embeddings, config = add_tokens(model)
    # without weights of its own the folder can only change rows that the base has
    spare = model.lvlm.config.decoder.vocab_size - min(embeddings, default=0)
    if adapter_only and len(embeddings) > spare:
        problem = f"{model.name} has {spare} spare embeddings, the soft prompts need"
        raise ValueError(f"{problem} {len(embeddings)}: export it without --adapter-only")
    card = model_card(model, scores)
    # config.json is written last: what a full disk leaves is no model, and may be written again
    folder.mkdir(parents=True, exist_ok=True)
    save_processors(model, tokenizer, config, folder)
    save_prompts(model, config, folder)
    data.write_text(folder / "README.md", card)
    if adapter_only:
        save_peft_adapter(model, embeddings, folder)
    else:
        save_lvlm(model.lvlm, folder, added=embeddings, max_shard_size=max_shard_size)


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser(prog="extras.export", description="An adapter for others.")
    data.add_model_flags(parser)
    parser.add_argument("--out", required=True, help="folder to write; it may not hold a model")
    only_help = "peft's format, without the base's weights (default: merged into them)"
    parser.add_argument("--adapter-only", action="store_true", help=only_help)
    args = parser.parse_args(argv)
    # before a model is loaded, which takes a while
    check_empty(args.out)
    if args.adapter is None:
        raise ValueError("there is no adapter to export: --adapter wants a training run's folder")
    path = Path(args.adapter) / "scores.json"
    scores = read_json(path) if path.exists() else None
    export(load_model(args), args.out, scores, adapter_only=args.adapter_only)
    print(f"written: {args.out}, for transformers and sentence-transformers (docs/export.md)")


if __name__ == "__main__":
    main()
