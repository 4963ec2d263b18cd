"""Rendered scenes as the public files have their data: names, folders and forms of the real ones, to walk through docs/data.md with.

    python tests/export_scenes.py FOLDER [--unit 100] [--seed 0]

Of every `unit` pictures there are 5 of LLaVA-Pretrain (short captions) that ShareGPT4V describes too (long), 1 that it does not, 2 of COCO
(both, two short ones each), 1 of SAM (long) and 1 of Open Images (no caption). COCO's evaluation pictures, 1 more, are there twice: in
Karpathy's test split under their names of 2014, and among those of 2017 that ShareGPT4V describes, as in the real files.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import scenes
from model import write_json

PARTS = {
    "llava": 5,
    "llava_alone": 1,
    "coco": 2,
    "sam": 1,
    "openimages": 1,
    "coco_test": 1,
}  # units of each


def conversation(name, image, ask, answer):
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}],
    }


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=95)


def export(folder, unit=100, seed=0):
    """Write everything; returns how many pictures each part has."""
    folder, index = Path(folder), 0
    llava, share, karpathy, coco = (
        [],
        [],
        [],
        {"info": {"year": 2017}, "images": [], "annotations": []},
    )
    for part, units in PARTS.items():
        for _ in range(units * unit):
            row, index = scenes.scene_row(seed, index), index + 1
            if part.startswith("llava"):
                name = f"{index // 10000:05d}/{index:09d}.jpg"
                llava.append(
                    conversation(
                        f"{index:09d}",
                        name,
                        "Render a clear and concise summary of the photo.\n<image>",
                        row["short"],
                    )
                )
                image = f"llava/llava_pretrain/images/{name}"
            elif part.startswith("coco"):
                image, test = f"coco/train2017/{index:012d}.jpg", part == "coco_test"
                raw = [row["short"], f"{row['short'].capitalize()}."]
                old = {
                    "filepath": "val2014",
                    "filename": f"COCO_val2014_{index:012d}.jpg",
                    "cocoid": index,
                    "split": "test" if test else "restval",
                }
                karpathy.append(
                    old
                    | {
                        "imgid": index,
                        "sentences": [
                            {"raw": text, "tokens": text.split()}
                            for text in raw[: 1 if test else 2]
                        ],
                    }
                )
                coco["images"].append({"id": index, "file_name": f"{index:012d}.jpg"})
                coco["annotations"] += [
                    {"image_id": index, "id": 2 * index + i, "caption": text + " "}
                    for i, text in enumerate(raw)
                ]
                if test:
                    save(row["image"], folder / "coco" / "val2014" / old["filename"])
            else:
                image = (
                    f"sam/images/sa_{index}.jpg"
                    if part == "sam"
                    else f"openimages/{index:016x}.jpg"
                )
            save(row["image"], folder / image)
            if part in ("llava", "coco", "sam", "coco_test"):
                share.append(
                    conversation(
                        Path(image).stem, image, "<image>\nWhat is this photo about?", row["long"]
                    )
                )
    write_json(folder / "llava/llava_pretrain/blip_laion_cc_sbu_558k.json", llava)
    write_json(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", share)
    write_json(folder / "coco/captions_train2017.json", coco)
    write_json(folder / "coco/dataset_coco.json", {"images": karpathy, "dataset": "coco"})
    return {part: units * unit for part, units in PARTS.items()}


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--unit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(json.dumps(export(args.folder, args.unit, args.seed)))


if __name__ == "__main__":
    main()
