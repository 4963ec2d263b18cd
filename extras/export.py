"""An adapted model for other people's software: one folder, no custom code.

    python -m extras.export --model tiny --adapter runs/tiny --out merged

The folder is a plain hub folder of its architecture (LoRA folded into the weights, each vector of a
soft prompt the embedding of an added token, the prompt strings in vladva.json) and beside that a
sentence-transformers model: SentenceTransformer("merged").encode([image, "a text"]). How to use it:
docs/export.md. Not here: the original LLaVA's weights (extras/convert_llava.py).
"""

import argparse
import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

import data
from lora import lora_layers
from model import LVLM, LVLMConfig, from_json, read_json, write_json
from vladva import VladVA, VladVAConfig, load_model

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


def save_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size="5GB") -> None:
    """Write {name in the hub's layout: tensor} as model.safetensors, or as shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    for path in folder.glob("model*.safetensors"):
        path.chmod(0o644)  # safetensors 0.8 lets nobody else read what it writes


def save_lvlm(lvlm: LVLM, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and the weights of an LVLM without adapters; load_lvlm reads them back.

    dtype None: as they are. Weights that are tied are stored once.
    """
    tensors = {}
    for name, p in lvlm.named_parameters():
        tensors[hub_key(name, lvlm.config)] = p.detach().to("cpu", dtype)
    save_weights(tensors, Path(folder))
    write_json(Path(folder) / "config.json", lvlm.config.raw)


# ------------------------------------------------------------------ soft prompts as added tokens


def prompt_ids(model: VladVA, modality: str, caption: str = "a") -> tuple[list[int], int, int]:
    """(ids of a modality's sequence with one image token, first token of the prompt, its end)."""
    if modality == "image":
        sequence = model.image_sequence(grid=(1, 1))
    else:
        sequence = model.text_sequence(caption)
    start = sequence.prompt_start
    end = start + sequence.prompt_length
    # a space between prompt and image becomes an added token too: Llama's tokenizer would read one
    # that stands between two added tokens as two
    id_to_token = model.tokenizer.inner.id_to_token
    while modality == "image" and id_to_token(sequence.input_ids[end]) in ("▁", "Ġ"):
        end += 1
    return sequence.input_ids, start, end


def spell_template(model: VladVA, modality: str, prompt: str, tokenizer) -> str:
    """The template in which a prompt of added tokens gives the ids of the trained sequence.

    Some tokenizers put a space before a text by themselves, so the spaces around it are tried.
    """
    template = getattr(model.config, f"{modality}_template")
    bare = re.sub(r" ?\{prompt\} ?", "{prompt}", template)
    captions = ("a", "The red bus.", "2 dogs", "“Ä” 犬") if modality == "text" else ("",)
    wanted = []
    for caption in captions:
        ids, start, end = prompt_ids(model, modality, caption)
        added = tokenizer.encode(prompt, add_special_tokens=False).ids
        wanted.append(ids[:start] + added + ids[end:])
    for spaced in ("{prompt}", "{prompt} ", " {prompt}", " {prompt} "):
        spelled = bare.replace("{prompt}", spaced)
        chat = model.lvlm.config.apply_chat_template(spelled)
        texts = [data.fill_template(chat, prompt, caption)[0] for caption in captions]
        if [tokenizer.encode(text).ids for text in texts] == wanted:
            return spelled
    raise ValueError(
        f"this tokenizer reads {template!r} with added tokens as other tokens than it was trained "
        "on: only a template with spaces around {prompt} can be exported"
    )


def add_tokens(model: VladVA) -> tuple[tokenizers.Tokenizer, dict[int, Tensor], VladVAConfig]:
    """Soft prompts -> tokens <image_prompt_0> ..., <text_prompt_0> ..., at the vocabulary's end.

    Returns the tokenizer with them, {id: embedding}, and the config that spells its prompts so.
    """
    tokenizer = tokenizers.Tokenizer.from_str(model.tokenizer.inner.to_str())
    config = model.config
    embeddings = {}
    for modality, soft_prompt in model.soft_prompts.items():
        ids, start, end = prompt_ids(model, modality)
        spaces = torch.tensor(ids[start + len(soft_prompt) : end], dtype=torch.long)
        vectors = [*soft_prompt.detach(), *model.lvlm.embed(spaces.to(model.lvlm.device))]
        names = [f"<{modality}_prompt_{i}>" for i in range(len(vectors))]
        added = [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
        tokenizer.add_special_tokens(added)
        embeddings |= {tokenizer.token_to_id(name): v for name, v in zip(names, vectors)}
        prompt = "".join(names)
        template = spell_template(model, modality, prompt, tokenizer)
        config = replace(config, **{f"{modality}_prompt": prompt, f"{modality}_template": template})
    return tokenizer, embeddings, config


def read_config(folder: str | Path) -> VladVAConfig:
    """The config with which VladVA.from_pretrained(folder, config=...) embeds as before."""
    path = Path(folder) / "vladva.json"
    return from_json(VladVAConfig, read_json(path).get("config"), str(path))


def save_merged(model: VladVA, embeddings: dict[int, Tensor], folder, max_shard_size) -> None:
    """config.json and weights, with LoRA folded in and rows for the added tokens."""
    lvlm_config = model.lvlm.config
    ids = list(embeddings)
    vocab_size = max([lvlm_config.decoder.vocab_size] + [i + 1 for i in ids])
    layers = {f"decoder.{name}.weight": x for name, x in lora_layers(model.lvlm.decoder).items()}
    tensors = {}
    for name, p in model.lvlm.named_parameters():
        if name.endswith(("lora_a", "lora_b")):
            continue
        weight = layers[name].merged_weight() if name in layers else p.detach()
        if ids and name in ("decoder.embed_tokens.weight", "lm_head.weight"):
            new_rows = weight.new_zeros(vocab_size - len(weight), weight.shape[1])
            weight = torch.cat([weight, new_rows])
            weight[ids] = 0  # an added token is not to be generated
            if name == "decoder.embed_tokens.weight":
                weight[ids] = torch.stack([embeddings[i] for i in ids]).to(weight)
        tensors[hub_key(name, lvlm_config)] = weight.to("cpu")
    save_weights(tensors, folder, max_shard_size)
    raw = json.loads(json.dumps(lvlm_config.raw))
    raw.pop("dtype", None)
    raw["torch_dtype"] = str(model.lvlm.dtype).removeprefix("torch.")
    raw.get("text_config", raw)["vocab_size"] = vocab_size
    write_json(folder / "config.json", raw)


# --------------------------------------------------------------------- what stands beside them

FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
TRANSFORMER = {  # sentence-transformers' module around the model
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": FORWARD,
        "image": FORWARD,
        "message": FORWARD | {"format": "structured"},
    },
    "module_output_name": "token_embeddings",
    "processor_kwargs": {"use_fast": False},  # Pillow's resize, as here
}
CHAT_TEMPLATE = """{%- set parts = messages[-1]["content"] -%}
{%- if parts | length != 1 -%}{{ raise_exception("an image or a text, one at a time") }}
{%- elif parts[0]["type"] == "image" -%}{{ IMAGE }}
{%- else -%}{{ BEFORE + (parts[0]["text"] | trim) + AFTER }}
{%- endif -%}
"""
CARD = """---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags: [sentence-transformers, feature-extraction, sentence-similarity, multimodal, vladva]
---
Embeddings of images and texts by {base}, adapted by VladVA (arXiv 2412.04378).

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer("path/to/this/folder")
    image_emb = model.encode(["a.jpg", "b.jpg"])  # paths
    text_emb = model.encode(["a red bus"])
    print(model.similarity(image_emb, text_emb))

vladva.json holds the prompts and the configuration of the training.{scores}

Limits: an image or a text at a time, not both; a text that holds an added token such as
`<text_prompt_0>` is read as the prompt; a text over {positions} tokens is cut.
"""


def save_processors(model: VladVA, tokenizer, config: VladVAConfig, folder: Path) -> None:
    """Tokenizer and image processor, as transformers reads them."""
    lvlm_config = model.lvlm.config
    eos = lvlm_config.eos_token_id
    tokenizer.save(str(folder / "tokenizer.json"))
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
    settings = dict(settings)
    for key in ("min_pixels", "max_pixels"):
        if getattr(config, key):
            settings[key] = getattr(config, key)  # goes before "size"
    if lvlm_config.raw["model_type"] == "llava":
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": lvlm_config.vision.patch_size,
            "num_additional_image_tokens": 1,  # the class token
            "vision_feature_select_strategy": "default",
        }
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
    about = {"image_mode": config.image_mode, "config": dataclasses.asdict(config)}
    write_json(folder / "vladva.json", prompts | about)
    before, after = prompts["text"].split("{caption}")
    template = CHAT_TEMPLATE
    for name, text in (("IMAGE", prompts["image"]), ("BEFORE", before), ("AFTER", after)):
        template = template.replace(name, json.dumps(text, ensure_ascii=False), 1)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    modules = []
    for index, name in enumerate(("Transformer", "Pooling", "Normalize")):
        path = f"{index}_{name}" if index else ""
        module = {"idx": index, "name": str(index), "path": path}
        modules.append(module | {"type": f"sentence_transformers.models.{name}"})
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", TRANSFORMER)
    width = model.lvlm.config.decoder.hidden_size
    pooling = {"embedding_dimension": width, "pooling_mode": "lasttoken"}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "2_Normalize" / "config.json", {})


def save_card(model: VladVA, folder: Path, scores: dict | None) -> None:
    """README.md; scores: what a run's scores.json holds."""
    table = ""
    if scores:
        table = "\n\n| held out | before | after |\n|---|---|---|"
        before = scores["before"]["scores"]
        for name, after in scores["after"]["scores"].items():
            table += f"\n| {name} | {before[name]:.1f} | {after:.1f} |"
    repo = data.MODELS.get(model.name, model.name)
    base = Path(repo).name if Path(repo).is_dir() else repo
    positions = model.lvlm.config.decoder.max_position_embeddings
    text = CARD.format(base=base, scores=table, positions=positions)
    (folder / "README.md").write_text(text, encoding="utf-8")


def check_empty(folder: str | Path) -> None:
    """ValueError when the folder holds a model already."""
    for name in ("config.json", "adapter_config.json", "adapter.safetensors"):
        if (Path(folder) / name).exists():
            raise ValueError(f"{folder} holds {name} already: choose another folder")


def export(
    model: VladVA, folder: str | Path, scores: dict | None = None, max_shard_size="5GB"
) -> None:
    """Write an adapted model as a folder that others read; the model itself stays as it is."""
    folder = Path(folder)
    check_empty(folder)
    if not model.adapted:
        raise ValueError("there is no adapter to merge: load one, or train one with train.py")
    tokenizer, embeddings, config = add_tokens(model)
    save_merged(model, embeddings, folder, max_shard_size)
    save_processors(model, tokenizer, config, folder)
    save_prompts(model, config, folder)
    save_card(model, folder, scores)


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="extras.export", description="Merge an adapter.")
    data.add_model_flags(parser)
    parser.add_argument("--out", required=True, help="folder to write; it may not hold a model")
    args = parser.parse_args(argv)
    check_empty(args.out)
    if args.adapter is None:
        raise ValueError("there is no adapter to merge: --adapter wants a training run's folder")
    path = Path(args.adapter) / "scores.json"
    scores = read_json(path) if path.exists() else None
    export(load_model(args), args.out, scores)
    print(f"written: {args.out}, for transformers and sentence-transformers (docs/export.md)")


if __name__ == "__main__":
    main()
