"""Compares this project with transformers on a model folder. By hand, where transformers is installed; pytest does not collect it.

python tests/reference.py assets/tiny                    # hidden states, logits, greedy text, ids, pixels
python tests/reference.py assets/tiny --adapter runs/tiny    # the merged export of an adapter, read by transformers
python tests/reference.py FOLDER [--adapter runs/mine]       # a Qwen2-VL folder: greedy text, or the merged export
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

import data
from extras import scenes
from model import read_config
from vladva import GENERATE_TEMPLATE, VladVA, collate


def pictures(side):
    return [scenes.render(scenes.make_scene(0, i), side) for i in range(4)]


@torch.no_grad()
def compare_model(folder):
    ours = VladVA.from_pretrained(folder)
    theirs, loading = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(
        f"keys missing {len(loading['missing_keys'])}, unexpected {len(loading['unexpected_keys'])}"
    )
    images = pictures(ours.lvlm.config.vision.image_size)
    pixels = torch.stack([ours.image_processor(image) for image in images])
    sequence = ours.sequence(GENERATE_TEMPLATE, ours.settings.detail_prompt)
    their_ids = tokenizer(GENERATE_TEMPLATE.format(prompt=ours.settings.detail_prompt)).input_ids
    image = their_ids.index(ours.tokenizer.image_id)
    expanded = (
        their_ids[:image]
        + [ours.tokenizer.image_id] * ours.lvlm.config.num_image_tokens
        + their_ids[image + 1 :]
    )
    print(f"token ids equal: {expanded == sequence.ids}")
    batch = collate([sequence] * len(images), ours.tokenizer.pad_id)
    hidden = ours.lvlm.decoder(ours.embeds(batch, "image", pixels))
    inputs = {
        "input_ids": batch.ids,
        "pixel_values": pixels,
        "attention_mask": torch.ones_like(batch.ids),
    }
    out = theirs(**inputs, output_hidden_states=True)
    for name, a, b in (
        ("hidden states", hidden, out.hidden_states[-1]),
        ("logits", ours.lvlm.head(hidden), out.logits),
    ):
        print(
            f"{name}: largest difference {(a - b).abs().max():.2e}, largest value {b.abs().max():.2e}"
        )
    new = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[:, batch.ids.shape[1] :]
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    print(
        f"greedy text equal: {texts == ours.generate_batch(images, [ours.settings.detail_prompt] * len(images), 16)}; e.g. {texts[0]!r}"
    )
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    wide = images[0].resize((150, 110))
    print(
        f"pixels: largest difference {(torch.tensor(processor(wide)['pixel_values'][0]) - ours.image_processor(wide)).abs().max():.2e}"
    )


@torch.no_grad()
def compare_merged(name, adapter):
    """The README's lines on a merged folder, against encode_image and encode_text with the adapter."""
    ours = VladVA.from_pretrained(name, adapter=adapter)
    images = [image.resize((130, 100)) for image in pictures(ours.lvlm.config.vision.image_size)]
    texts = ["a red circle", "a large blue square above a green ring", "2 dogs, and a cat."]
    with tempfile.TemporaryDirectory() as folder:
        ours.save_merged(folder, shard_bytes=1_000_000)
        model, loading = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        processor, prompts = (
            AutoProcessor.from_pretrained(folder),
            json.loads(Path(folder, "vladva.json").read_text()),
        )
    print(
        f"merged: keys missing {len(loading['missing_keys'])}, unexpected {len(loading['unexpected_keys'])}; prompts {prompts}"
    )

    def embed(**inputs):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        return torch.nn.functional.normalize(hidden[:, -1].float(), dim=-1)

    image_emb = torch.cat(
        [
            embed(**processor(images=image, text=prompts["image"], return_tensors="pt"))
            for image in images
        ]
    )
    text_emb = torch.cat(
        [
            embed(
                **processor.tokenizer(
                    prompts["text"].replace("{caption}", text), return_tensors="pt"
                )
            )
            for text in texts
        ]
    )
    for what, a, b in (
        ("image", image_emb, ours.encode_image(images)),
        ("text", text_emb, ours.encode_text(texts)),
    ):
        print(
            f"{what} embeddings: largest difference {(a - b).abs().max():.2e}, largest value {b.abs().max():.2e}"
        )


@torch.no_grad()
def compare_qwen(name, adapter):
    """Without an adapter greedy text, with one the merged export; tokenizer and image processor apart, for AutoProcessor wants torchvision."""
    ours, texts = (
        VladVA.from_pretrained(name, adapter=adapter),
        ["a red circle", "a large blue square above a green ring", "2 dogs, and a cat."],
    )
    images = [
        image.resize(size)
        for image, size in zip(pictures(96), ((130, 100), (70, 160), (61, 37), (224, 224)))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        if adapter:
            ours.save_merged(temporary, shard_bytes=1_000_000)
        folder = Path(temporary if adapter else name)
        model, loading = Qwen2VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        tokenizer, process = (
            transformers.AutoTokenizer.from_pretrained(folder),
            Qwen2VLImageProcessorPil.from_pretrained(folder),
        )
        prompts = json.loads((folder / "vladva.json").read_text()) if adapter else {}
    print(
        f"keys missing {len(loading['missing_keys'])}, unexpected {len(loading['unexpected_keys'])}; prompts {prompts}"
    )

    def inputs(text, image=None):
        seen = {} if image is None else dict(process(image, return_tensors="pt"))
        count = 0 if image is None else seen["image_grid_thw"].prod().item() // 4
        ids = tokenizer(
            text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt"
        ).input_ids
        return seen | {
            "input_ids": ids,
            "mm_token_type_ids": (ids == ours.tokenizer.image_id).int(),
            "attention_mask": torch.ones_like(ids),
        }

    if not adapter:
        asked = ours.tokenizer.spelled(GENERATE_TEMPLATE).format(prompt=ours.settings.detail_prompt)
        each = [inputs(asked, image) for image in images]
        told = [
            model.generate(
                **one, max_new_tokens=16, do_sample=False, eos_token_id=ours.tokenizer.eos_id
            )
            for one in each
        ]
        told = [
            tokenizer.decode(row[0, one["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            for row, one in zip(told, each)
        ]
        print(
            f"greedy text equal: {told == ours.generate_batch(images, [ours.settings.detail_prompt] * len(images), 16)}; e.g. {told[0]!r}"
        )
        return
    embed = lambda *what: torch.nn.functional.normalize(
        model(**inputs(*what), output_hidden_states=True).hidden_states[-1][:, -1], dim=-1
    )
    image_emb = torch.cat([embed(prompts["image"], image) for image in images])
    text_emb = torch.cat([embed(prompts["text"].replace("{caption}", text)) for text in texts])
    for what, a, b in (
        ("image", image_emb, ours.encode_image(images)),
        ("text", text_emb, ours.encode_text(texts)),
    ):
        print(
            f"{what} embeddings: largest difference {(a - b).abs().max():.2e}, largest value {b.abs().max():.2e}"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a model name or folder")
    parser.add_argument("--adapter", help="folder of a training run")
    args = parser.parse_args()
    print(f"transformers {transformers.__version__}")
    if read_config(data.model_folder(args.model)).model_type == "qwen2_vl":
        compare_qwen(args.model, args.adapter)
    elif args.adapter:
        compare_merged(args.model, args.adapter)
    else:
        compare_model(args.model)


if __name__ == "__main__":
    main()
