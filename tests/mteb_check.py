"""An exported adapter in mteb against eval.py on the same files. By hand: mteb must be installed.

    python tests/mteb_check.py --adapter runs/tiny

Merges an adapter of tiny (extras/export.py), writes miniatures of COCO, SugarCrepe and Winoground
with rendered scenes, and prints eval.py's scores beside those of mteb's own tasks on
SentenceTransformer(merged); ends with 1 if two differ. Not here: the embeddings (export_check.py).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export_scenes
import mteb
import sentence_transformers
from datasets import Dataset, Image
from mteb.models import SentenceTransformerEncoderWrapper

import data
import eval as bench
from data import write_json
from extras import export, scenes
from model import read_json

SEED = 3000  # of the scenes
NUM_IMAGES = 200  # of the gallery
NUM_ITEMS = 60  # of a category of SugarCrepe, and of Winoground


def write_sugarcrepe(folder: Path) -> None:
    folder.mkdir()
    for category in sum(bench.GROUPS.values(), ()):
        rows = {}
        for i in range(NUM_ITEMS):
            scene, (true, _, false) = scenes.caption_triple(SEED, i, category)
            rows[str(i)] = {"filename": f"{category}_{i}.png"}
            rows[str(i)] |= {"caption": true, "negative_caption": false}
            scenes.render(scene).save(folder / rows[str(i)]["filename"])
        write_json(folder / f"{category}.json", rows)


def write_winoground(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for i in range(NUM_ITEMS):
        kind = scenes.WINOGROUND_KINDS[i % len(scenes.WINOGROUND_KINDS)]
        pair, captions = scenes.scene_pair(SEED, i, kind)
        row = {"id": i}
        for side in (0, 1):
            row[f"image_{side}"] = f"{i}_{side}.png"
            row[f"caption_{side}"] = captions[side]
            scenes.render(pair[side]).save(folder / row[f"image_{side}"])
        lines.append(json.dumps(row) + "\n")
    (folder / "examples.jsonl").write_text("".join(lines), encoding="utf-8")


def mteb_scores(encoder, name: str, dataset: dict) -> dict[str, float]:
    """The scores of mteb's task of that name, on other data than its own."""
    task = mteb.get_task(name)
    task.dataset = dataset
    task.data_loaded = True
    return task.evaluate(encoder, "test", encode_kwargs={"batch_size": 32})["default"]


def mteb_coco(encoder, folder: Path) -> dict[str, float]:
    images, texts, texts_of_image, image_of_text = [], [], {}, {}
    for row in read_json(folder / "dataset_coco.json")["images"]:
        if row["split"] == "test":
            image = str(row["cocoid"])
            images.append({"id": image, "image": str(folder / row["filepath"] / row["filename"])})
            texts_of_image[image] = {}
            for number, sentence in enumerate(row["sentences"]):
                text = f"{image}-{number}"
                texts.append({"id": text, "text": sentence["raw"]})
                texts_of_image[image][text] = 1
                image_of_text[text] = {image: 1}
    images = Dataset.from_list(images).cast_column("image", Image())
    texts = Dataset.from_list(texts)
    scores = {}
    for direction, name, queries, corpus, relevant_docs in (
        ("image_to_text", "MSCOCOI2TRetrieval", images, texts, texts_of_image),
        ("text_to_image", "MSCOCOT2IRetrieval", texts, images, image_of_text),
    ):
        split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant_docs}
        dataset = {"default": {"test": split | {"top_ranked": None}}}
        result = mteb_scores(encoder, name, dataset)
        # recall_at_k is the share of an image's captions, the papers count a hit of any
        for k in (1, 5, 10):
            scores[f"{direction} R@{k}"] = result[f"hit_rate_at_{k}"]
    return scores


def mteb_sugarcrepe(encoder, folder: Path) -> dict[str, float]:
    """text_acc of each category: mteb's task takes the items of all, in one file."""
    scores = {}
    for path in sorted(folder.glob("*.json")):
        rows = []
        for row in read_json(path).values():
            rows.append(row | {"images": str(folder / row["filename"])})
        dataset = Dataset.from_list(rows).cast_column("images", Image())
        scores[path.stem] = mteb_scores(encoder, "SugarCrepe", {"test": dataset})["text_acc"]
    return scores


def mteb_winoground(encoder, folder: Path) -> dict[str, float]:
    rows = []
    for line in (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append(row | {name: str(folder / row[name]) for name in ("image_0", "image_1")})
    dataset = Dataset.from_list(rows)
    for column in ("image_0", "image_1"):
        dataset = dataset.cast_column(column, Image())
    scores = mteb_scores(encoder, "Winoground", {"test": dataset})
    names = {"text": "text_acc", "image": "image_acc", "group": "accuracy"}
    return {ours: scores[theirs] for ours, theirs in names.items()}


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="folder of a training run of tiny")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        export_scenes.export(work, NUM_IMAGES, SEED)
        write_sugarcrepe(work / "sugarcrepe")
        write_winoground(work / "winoground")
        export.main(["--adapter", args.adapter, "--out", str(work / "merged")])
        model = sentence_transformers.SentenceTransformer(str(work / "merged"), device="cpu")
        encoder = SentenceTransformerEncoderWrapper(model)
        # mteb reads them from the hub; of a folder it takes only texts, without a word
        encoder.mteb_model_meta.modalities = ["text", "image"]
        rows = []
        tasks = {"coco": mteb_coco, "sugarcrepe": mteb_sugarcrepe, "winoground": mteb_winoground}
        for task, evaluate in tasks.items():
            flags = ["--task", task, "--folder", str(work / task), "--adapter", args.adapter]
            ours = bench.main(flags)["scores"]
            for name, score in evaluate(encoder, work / task).items():
                rows.append([f"{task} {name}", f"{ours[name]:.3f}", f"{100 * score:.3f}"])
    print(f"mteb {mteb.__version__}, sentence-transformers {sentence_transformers.__version__}")
    print(data.format_table(["percent", "eval.py", "mteb"], rows))
    sys.exit(any(ours != theirs for _, ours, theirs in rows))


if __name__ == "__main__":
    main()
