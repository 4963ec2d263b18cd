"""Rendered scenes as the public files have their data: their names, folders and forms.

    python tests/export_scenes.py FOLDER [--unit 100] [--seed 0]

To walk through docs/data.md with. Of every `unit` images there are 5 of LLaVA-Pretrain (short
captions) that ShareGPT4V describes too (long), 1 that it does not, 2 of COCO (both, two short ones
each), 1 of SAM (long) and 1 of Open Images (no caption). COCO's evaluation images, 1 more, are
there twice: in Karpathy's test split under their names of 2014, and among those of 2017 that
ShareGPT4V describes, as in the real files.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import command, write_json
from extras import scenes

UNITS = {"llava": 5, "llava_alone": 1, "coco": 2, "sam": 1, "openimages": 1, "coco_test": 1}
SUMMARY = "Render a clear and concise summary of the photo.\n<image>"


def conversation(name: str, image: str, ask: str, answer: str) -> dict:
    turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def save(image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def karpathy_row(index: int, captions: list[str], test: bool) -> dict:
    """A row of Karpathy's file; of an evaluation image it has one caption."""
    sentences = []
    for text in captions[: 1 if test else 2]:
        sentences.append({"raw": text, "tokens": text.split()})
    return {
        "filepath": "val2014",
        "filename": f"COCO_val2014_{index:012d}.jpg",
        "cocoid": index,
        "split": "test" if test else "restval",
        "imgid": index,
        "sentences": sentences,
    }


def export(folder: str | Path, unit: int = 100, seed: int = 0) -> dict[str, int]:
    """Write everything; returns how many images each part has."""
    folder = Path(folder)
    llava, share, karpathy, images, annotations = [], [], [], [], []
    index = 0
    for part, units in UNITS.items():
        for _ in range(units * unit):
            row = scenes.scene_row(seed, index)
            index += 1
            if part.startswith("llava"):
                name = f"{index // 10000:05d}/{index:09d}.jpg"
                llava.append(conversation(f"{index:09d}", name, SUMMARY, row["short"]))
                path = f"llava/llava_pretrain/images/{name}"
            elif part.startswith("coco"):
                path = f"coco/train2017/{index:012d}.jpg"
                captions = [row["short"], f"{row['short'].capitalize()}."]
                karpathy.append(karpathy_row(index, captions, part == "coco_test"))
                images.append({"id": index, "file_name": f"{index:012d}.jpg"})
                for i, text in enumerate(captions):
                    number = 2 * index + i
                    annotations.append({"image_id": index, "id": number, "caption": text + " "})
                if part == "coco_test":
                    save(row["image"], folder / "coco" / "val2014" / karpathy[-1]["filename"])
            elif part == "sam":
                path = f"sam/images/sa_{index}.jpg"
            else:
                path = f"openimages/{index:016x}.jpg"
            save(row["image"], folder / path)
            if part in ("llava", "coco", "sam", "coco_test"):
                ask = "<image>\nWhat is this photo about?"
                share.append(conversation(Path(path).stem, path, ask, row["long"]))
    coco = {"info": {"year": 2017}, "images": images, "annotations": annotations}
    write_json(folder / "llava/llava_pretrain/blip_laion_cc_sbu_558k.json", llava)
    write_json(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", share)
    write_json(folder / "coco/captions_train2017.json", coco)
    write_json(folder / "coco/dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    return {part: units * unit for part, units in UNITS.items()}


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where the files go")
    parser.add_argument("--unit", type=int, default=100, help="see above (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    args = parser.parse_args(argv)
    print(json.dumps(export(args.folder, args.unit, args.seed)))


if __name__ == "__main__":
    main()
