"""Exported folders against sentence-transformers and peft, which must be installed. By hand.

    python tests/export_check.py [--dtype bfloat16] [--work FOLDER]

Prints the largest differences between encode_image / encode_text and SentenceTransformer(folder) of
a merged and of an adapter-only folder, PeftModel of the latter, and an adapter that peft wrote, one
line each; in float32 more than 2e-6 ends in an error. Qwen2-VL is left out where torchvision is
missing. Not here: plain transformers on a merged folder (reference.py), what needs no other
software (test_export.py).
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import peft
import sentence_transformers
import torch
import torch.nn.functional as F
import transformers
from conftest import (
    make_folder,
    make_qwen_folder,
    qwen_config,
    random_config,
    shaken,
    write_llama_tokenizer,
)
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
from extras.export import PEFT_LAYERS, export
from model import read_json
from vladva import VladVA, VladVAConfig

TEXTS = [
    "a red circle",
    "  a large blue square above a green ring \n",
    "2 dogs, and a cat.",
    "“Ä” is 犬 🙂",
    "line one\nline two\t\"quoted\" 'it''s' {caption} {{ x }}",
    "The red bus. " * 20,
]
LIMIT = 2e-6  # of a float32 embedding's numbers; up to 8e-7 was seen
HEADER = ["", "paths", "one by one", "opened"]  # of opaque images
HEADER += ["transparent: paths", "opened", "texts", "both"]


def smooth_noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    generator = np.random.RandomState(width * height)
    coarse = generator.randint(0, 256, (height // 8 + 1, width // 8 + 1, channels))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def write_images(folder: Path) -> tuple[list[str], list[str]]:
    """Paths of opaque and of transparent images, in the forms that readers treat differently."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    alpha = smooth_noise(120, 100, channels=4)
    palette = Image.fromarray(smooth_noise(100, 90)).quantize(64)
    images = {
        "wide": smooth_noise(180, 100),
        "tall": smooth_noise(70, 150),
        "rotated": smooth_noise(140, 90),
        "grey": smooth_noise(100, 120)[:, :, 0],
        "palette": palette,
        "rgba": alpha,
        "rgba rotated": alpha,
        "grey with alpha": alpha[:, :, 2:],
        "palette, one transparent": palette,
        "palette with alphas, rotated": palette,
        "one colour transparent": alpha[:, :, :3],
    }
    transparency = {
        "palette, one transparent": 5,
        "palette with alphas, rotated": bytes(range(0, 256, 4)),
        "one colour transparent": tuple(alpha[0, 0, :3].tolist()),
    }
    paths = {}
    for name, image in images.items():
        options = {"transparency": transparency[name]} if name in transparency else {}
        if "rotated" in name:
            options["exif"] = exif
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        paths[name] = str(folder / f"{name}.png")
        image.save(paths[name], **options)
    paths = list(paths.values())
    return paths[:5], paths[5:]


def open_upright(paths: list[str]) -> list[Image.Image]:
    """As docs/export.md opens images."""
    return [ImageOps.exif_transpose(Image.open(path)) for path in paths]


def models(work: Path) -> list[tuple[str, str | Path, dict]]:
    """(name of the rows, model, fields of VladVAConfig)."""
    raw = random_config(vocab_size=32064) | {"image_token_index": 32000, "pad_token_id": 32001}
    for name in ("llama", "qwen"):
        (work / name).mkdir()
    llama = make_folder(work / "llama", raw)
    write_llama_tokenizer(llama)
    qwen = make_qwen_folder(work / "qwen", qwen_config(vocab_size=700))
    return [
        ("tiny", "tiny", {}),
        ("tiny, pad", "tiny", {"image_mode": "pad"}),
        ("tiny, LoRA alone", "tiny", {"soft_prompts": False}),
        ("Llama's words", llama, {}),
        ("Llama's words, pad", llama, {"image_mode": "pad"}),
        ("Qwen2-VL", qwen, {}),
    ]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs.float()).abs().max().item()


def compare_sentence_transformers(model: VladVA, folder: Path, opaque, transparent) -> list[float]:
    """Largest difference of each column of HEADER."""
    options = {"device": "cpu", "model_kwargs": {"dtype": model.lvlm.dtype}}
    theirs = sentence_transformers.SentenceTransformer(str(folder), **options)

    def encode(inputs):
        return theirs.encode(inputs, convert_to_tensor=True)

    image_emb = model.encode_image(opaque)
    text_emb = model.encode_text(TEXTS)
    transparent_emb = model.encode_image(transparent)
    return [
        difference(image_emb, encode(opaque)),
        difference(image_emb, torch.stack([encode(path) for path in opaque])),
        difference(image_emb, encode(open_upright(opaque))),
        difference(transparent_emb, encode(transparent)),
        difference(transparent_emb, encode(open_upright(transparent))),
        difference(text_emb, encode(TEXTS)),
        difference(torch.stack([image_emb[0], text_emb[0]]), encode([opaque[0], TEXTS[0]])),
    ]


@torch.no_grad()
def compare_network(model, network, prompts: dict, processor, opaque, transparent) -> list[float]:
    """The same with the lines of docs/export.md for transformers; nan where there is no such."""

    def embed(inputs):
        return F.normalize(network(**inputs).last_hidden_state[:, -1].float(), dim=-1)

    def embed_images(paths):
        rows = []
        for image in open_upright(paths):
            rows.append(embed(processor(images=image, text=prompts["image"], return_tensors="pt")))
        return torch.cat(rows)

    rows = []
    for text in TEXTS:
        text = prompts["text"].replace("{caption}", text.strip())
        rows.append(embed(processor.tokenizer(text, return_tensors="pt")))
    text_emb = torch.cat(rows)
    nan = float("nan")
    return [
        *(nan, nan, difference(model.encode_image(opaque), embed_images(opaque))),
        *(nan, difference(model.encode_image(transparent), embed_images(transparent))),
        *(difference(model.encode_text(TEXTS), text_emb), nan),
    ]


def load_base(source: str | Path, dtype: torch.dtype):
    return AutoModelForImageTextToText.from_pretrained(data.model_folder(source), dtype=dtype)


def train_with_peft(base, folder: Path):
    """The base with a random adapter, which is saved as peft saves it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=PEFT_LAYERS)
    network = peft.get_peft_model(base, config)
    torch.manual_seed(2)
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    network.save_pretrained(folder)
    return network.get_base_model().model


def rows_of(name: str, source, fields: dict, dtype: torch.dtype, work: Path, images) -> list[list]:
    """[name, differences] of each folder that one model gives."""
    config = VladVAConfig(**fields)
    model = shaken(VladVA.from_pretrained(source, dtype=dtype, config=config))
    merged = work / f"merged {name}"
    export(model, merged, max_shard_size=1_000_000)
    rows = [[f"{name}: merged", *compare_sentence_transformers(model, merged, *images)]]
    small = work / f"small {name}"
    try:
        export(model, small, adapter_only=True)
    except ValueError as error:
        print(f"{name}, adapter-only: {error}")
        return rows
    rows.append([f"{name}: adapter-only", *compare_sentence_transformers(model, small, *images)])
    processor = AutoProcessor.from_pretrained(small, use_fast=False)
    prompts = read_json(small / "vladva.json")
    network = peft.PeftModel.from_pretrained(load_base(source, dtype), small)
    network = network.get_base_model().model
    differences = compare_network(model, network, prompts, processor, *images)
    rows.append([f"{name}: read by peft", *differences])
    # the way back: an adapter that peft made, with the hand prompts of the paper
    theirs = work / f"theirs {name}"
    network = train_with_peft(load_base(source, dtype), theirs)
    ours = VladVA.from_pretrained(source, theirs, dtype=dtype)
    # which says nothing of the images' form
    ours.image_processor = model.image_processor
    prompts = {}
    for modality in ("image", "text"):
        template = getattr(ours.config, f"{modality}_template")
        template = ours.lvlm.config.apply_chat_template(template)
        prompts[modality] = template.replace("{prompt}", getattr(ours.config, f"{modality}_prompt"))
    differences = compare_network(ours, network, prompts, processor, *images)
    rows.append([f"{name}: made by peft", *differences])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--work", help="folder for the models (default: a temporary one)")
    args = parser.parse_args(argv)
    libraries = (torch, transformers, sentence_transformers, peft)
    print(", ".join(f"{library.__name__} {library.__version__}" for library in libraries))
    transformers.logging.set_verbosity_error()
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    images = write_images(work)
    rows = []
    for name, source, fields in models(work):
        try:
            rows += rows_of(name, source, fields, getattr(torch, args.dtype), work, images)
        except ImportError as error:  # Qwen2-VL's video processor wants torchvision
            print(f"{name} left out: {str(error).splitlines()[0]}")
    cells = []
    for name, *values in rows:
        cells.append([name, *map("{:.1e}".format, values)])
    print(data.format_table(HEADER, cells).replace("nan", "  -"))
    if args.work is None:
        shutil.rmtree(work)
    # a path is opened by the other side, which treats transparency in several ways
    values = np.array([row[1:] for row in rows])
    if args.dtype == "float32" and np.nanmax(np.delete(values, 3, axis=1)) > LIMIT:
        sys.exit(f"more than {LIMIT} in float32")


if __name__ == "__main__":
    main()
