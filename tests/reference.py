"""This project against transformers, which must be installed, on a model folder. By hand.

    python tests/reference.py assets/tiny                      # states, logits, words, ids, pixels
    python tests/reference.py assets/tiny --adapter runs/tiny  # the lines of docs/export.md
    python tests/reference.py FOLDER [--adapter runs/mine]     # Qwen2-VL: greedy words, or the same

Qwen2-VL with --adapter wants torchvision, for AutoProcessor. Not here: sentence-transformers
(export_check.py), the outputs that the tests compare with (record.py).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from PIL import ImageOps
from transformers import AutoModel, AutoProcessor, AutoTokenizer

import data
from extras import scenes
from extras.export import export
from model import read_json
from vladva import GENERATE_TEMPLATE, VladVA

SIZES = ((130, 100), (70, 160), (61, 37), (224, 224))
TEXTS = ("a red circle", " a large blue square above a green ring\n", "2 dogs, and a cat.")


def scene_images(side: int, sizes=None) -> list:
    """Four rendered scenes, all square or of the given sizes."""
    images = [scenes.render(scenes.make_scene(0, i), side) for i in range(4)]
    if sizes:
        images = [image.resize(size) for image, size in zip(images, sizes)]
    return images


def print_difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    difference = (ours - theirs).abs().max()
    print(f"{name}: largest difference {difference:.2e}, largest value {theirs.abs().max():.2e}")


def print_keys(loading: dict) -> None:
    missing = len(loading["missing_keys"])
    print(f"keys missing {missing}, unexpected {len(loading['unexpected_keys'])}")


@torch.no_grad()
def compare_llava(folder: Path) -> None:
    """Token ids, hidden states, logits, greedy words and pixels of a LLaVA."""
    ours = VladVA.from_pretrained(folder, dtype=torch.float32)
    theirs, loading = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    print_keys(loading)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = scene_images(ours.lvlm.config.vision.image_size)
    pixels = torch.stack([ours.image_processor(image) for image in images])
    prompt = ours.config.detail_prompt
    sequence = ours.sequence(GENERATE_TEMPLATE, prompt)
    batch = data.collate([sequence] * len(images), ours.tokenizer)

    # their tokenizer reads one image token, which their processor would repeat
    their_ids = tokenizer(GENERATE_TEMPLATE.format(prompt=prompt)).input_ids
    image_token_id = ours.lvlm.config.image_token_id
    start = their_ids.index(image_token_id)
    repeated = [image_token_id] * sequence.input_ids.count(image_token_id)
    expanded = their_ids[:start] + repeated + their_ids[start + 1 :]
    print(f"token ids equal: {expanded == sequence.input_ids}")

    hidden_states = ours.lvlm.decoder(ours.inputs_embeds(batch, "generate", pixels))
    mask = torch.ones_like(batch.input_ids)
    inputs = {"input_ids": batch.input_ids, "pixel_values": pixels, "attention_mask": mask}
    out = theirs(**inputs, output_hidden_states=True)
    print_difference("hidden states", hidden_states, out.hidden_states[-1])
    print_difference("logits", ours.lvlm.lm_head(hidden_states), out.logits)

    new = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = new[:, batch.input_ids.shape[1] :]
    words = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    equal = words == ours.generate_batch(images, [prompt] * len(images), 16)
    print(f"greedy words equal: {equal}; e.g. {words[0]!r}")

    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    wide = images[0].resize((150, 110))
    their_pixels = processor(wide, return_tensors="pt")["pixel_values"][0]
    print_difference("pixels", ours.image_processor(wide), their_pixels)


@torch.no_grad()
def compare_qwen(folder: Path) -> None:
    """Greedy words of a Qwen2-VL; tokenizer and image processor apart, without torchvision."""
    ours = VladVA.from_pretrained(folder, dtype=torch.float32)
    theirs, loading = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    print_keys(loading)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    process = transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)
    lvlm_config = ours.lvlm.config
    prompt = ours.config.detail_prompt
    text = lvlm_config.apply_chat_template(GENERATE_TEMPLATE).format(prompt=prompt)
    images = scene_images(96, SIZES)
    words = []
    for image in images:
        inputs = dict(process(image, return_tensors="pt"))
        count = inputs["image_grid_thw"].prod().item() // 4
        image_token = lvlm_config.image_token
        repeated = text.replace(image_token, image_token * count)
        ids = tokenizer(repeated, return_tensors="pt").input_ids
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["mm_token_type_ids"] = (ids == lvlm_config.image_token_id).int()
        eos = lvlm_config.end_tokens
        new = theirs.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=eos)
        new = new[0, ids.shape[1] :]
        words.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    equal = words == ours.generate_batch(images, [prompt] * len(images), 16)
    print(f"greedy words equal: {equal}; e.g. {words[0]!r}")


@torch.no_grad()
def compare_merged(name: str, adapter: str) -> None:
    """The lines of docs/export.md on a merged folder, against encode_image and encode_text."""
    ours = VladVA.from_pretrained(name, adapter=adapter, dtype=torch.float32)
    images = scene_images(96, SIZES)
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/merged"
        export(ours, folder, max_shard_size=1_000_000)
        model = AutoModel.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder, use_fast=False)
        prompts = json.loads(Path(folder, "vladva.json").read_text(encoding="utf-8"))

    def embed(inputs):
        return F.normalize(model(**inputs).last_hidden_state[:, -1].float(), dim=-1)

    def embed_image(image):
        image = ImageOps.exif_transpose(image)
        return embed(processor(images=image, text=prompts["image"], return_tensors="pt"))

    def embed_text(text):
        text = prompts["text"].replace("{caption}", text.strip())
        return embed(processor.tokenizer(text, return_tensors="pt"))

    image_emb = torch.cat([embed_image(image) for image in images])
    text_emb = torch.cat([embed_text(text) for text in TEXTS])
    print(f"prompts {prompts['image']!r}, {prompts['text']!r}")
    print_difference("image embeddings", ours.encode_image(images), image_emb)
    print_difference("text embeddings", ours.encode_text(list(TEXTS)), text_emb)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model name or folder")
    parser.add_argument("--adapter", help="folder of a training run (default: none)")
    args = parser.parse_args(argv)
    print(f"transformers {transformers.__version__}")
    folder = data.model_folder(args.model)
    if args.adapter:
        compare_merged(args.model, args.adapter)
    elif read_json(folder / "config.json")["model_type"] == "qwen2_vl":
        compare_qwen(folder)
    else:
        compare_llava(folder)


if __name__ == "__main__":
    main()
