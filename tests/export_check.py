"""Exported folders against sentence-transformers, which must be installed. By hand.

    python tests/export_check.py [--work FOLDER]

Prints the largest differences between encode_image / encode_text and SentenceTransformer(folder) in
float32, one line a model. Not here: plain transformers on a folder (reference.py), what needs no
other software (test_export.py). Qwen2-VL is left out where torchvision is missing.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import sentence_transformers
import torch
import transformers
from conftest import (
    make_folder,
    make_qwen_folder,
    qwen_config,
    random_config,
    shaken,
    write_llama_tokenizer,
)
from PIL import Image

import data
from extras.export import export
from vladva import VladVA, VladVAConfig

TEXTS = [
    "a red circle",
    "  a large blue square above a green ring \n",
    "2 dogs, and a cat.",
    "“Ä” is 犬 🙂",
    "line one\nline two\t\"quoted\" 'it''s' {caption} {{ x }}",
    "The red bus. " * 20,
]


def smooth_noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    generator = np.random.RandomState(width * height)
    coarse = generator.randint(0, 256, (height // 8 + 1, width // 8 + 1, channels))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def write_images(folder: Path) -> dict[str, Path]:
    """{kind: file} of images in the forms that readers treat differently."""
    images = {}
    images["wide"] = Image.fromarray(smooth_noise(180, 100))
    images["tall"] = Image.fromarray(smooth_noise(70, 150))
    images["palette"] = Image.fromarray(smooth_noise(100, 90)).quantize(64)
    images["grey"] = Image.fromarray(smooth_noise(100, 120)[:, :, 0])
    images["rotated"] = Image.fromarray(smooth_noise(140, 90))
    images["transparent"] = Image.fromarray(smooth_noise(120, 100, channels=4))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    files = {}
    for kind, image in images.items():
        files[kind] = folder / f"{kind}.png"
        image.save(files[kind], exif=exif if kind == "rotated" else Image.Exif())
    return files


def llama_folder(folder: Path) -> Path:
    """A random LLaVA with Llama's vocabulary."""
    raw = random_config(vocab_size=32064) | {"image_token_index": 32000, "pad_token_id": 32001}
    make_folder(folder, raw)
    write_llama_tokenizer(folder)
    return folder


def models(work: Path) -> dict[str, tuple[str | Path, str]]:
    """{name of the row: (model, image mode)}."""
    for name in ("llama", "qwen"):
        (work / name).mkdir()
    llama = llama_folder(work / "llama")
    rows = {"tiny": ("tiny", "crop"), "tiny, pad": ("tiny", "pad")}
    rows |= {"Llama's words": (llama, "crop"), "Llama's words, pad": (llama, "pad")}
    rows["Qwen2-VL"] = (make_qwen_folder(work / "qwen", qwen_config()), "crop")
    return rows


@torch.no_grad()
def compare(model: VladVA, folder: Path, files: dict[str, Path]) -> list[str]:
    """Largest differences, of files in a batch, one by one, opened images, texts, both at once."""
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")

    def encode(inputs):
        return theirs.encode(inputs, convert_to_tensor=True)

    paths = [str(path) for path in files.values()]
    image_emb = model.encode_image(paths)
    text_emb = model.encode_text(TEXTS)
    opened = []
    for path in paths:
        opened.append(Image.open(path))
        opened[-1].load()
    of_files = image_emb - encode(paths)
    one_by_one = image_emb - torch.stack([encode(path) for path in paths])
    of_opened = image_emb - encode(opened)
    both = torch.stack([image_emb[0], text_emb[0]]) - encode([paths[0], TEXTS[0]])
    kinds = list(files)
    plain = [kind not in ("rotated", "transparent") for kind in kinds]
    differences = [of_files, one_by_one, of_opened[plain]]
    differences += [of_opened[kinds.index("rotated")], of_opened[kinds.index("transparent")]]
    differences += [text_emb - encode(TEXTS), both]
    return [f"{difference.abs().max():.1e}" for difference in differences]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", help="folder for the models (default: a temporary one)")
    args = parser.parse_args(argv)
    versions = (torch.__version__, transformers.__version__, sentence_transformers.__version__)
    print("torch {}, transformers {}, sentence-transformers {}".format(*versions))
    work = Path(args.work or tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    images = write_images(work)
    rows = []
    for name, (source, image_mode) in models(work).items():
        config = VladVAConfig(image_mode=image_mode)
        model = shaken(VladVA.from_pretrained(source, dtype=torch.float32, config=config))
        folder = work / f"merged {name}"
        export(model, folder, max_shard_size=1_000_000)
        try:
            rows.append([name, *compare(model, folder, images)])
        except ImportError as error:  # Qwen2-VL's video processor wants torchvision
            print(f"{name} left out: {str(error).splitlines()[0]}")
    header = ["", "files", "one by one", "opened", "rotated", "transparent", "texts", "both"]
    print(data.format_table(header, rows))
    if args.work is None:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
