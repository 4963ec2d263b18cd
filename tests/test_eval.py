"""Metrics against naive loops, benchmarks in miniature with numbers by hand, the command line."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import torchrun
from PIL import Image

import data
import eval as benchmarks
from extras import embeddings
from vladva import next_token_loss


def naive_recall(sim, image_of_text, k):
    """(image to text, text to image) in percent, one query at a time; no ties in the table."""
    num_images, num_texts = len(sim), len(image_of_text)
    texts_with_their_image = 0
    for j in range(num_texts):
        best_images = sorted(range(num_images), key=lambda i: -sim[i][j])[:k]
        texts_with_their_image += image_of_text[j] in best_images
    images_with_a_text = 0
    for i in range(num_images):
        best_texts = sorted(range(num_texts), key=lambda j: -sim[i][j])[:k]
        images_with_a_text += i in [image_of_text[j] for j in best_texts]
    return 100 * images_with_a_text / num_images, 100 * texts_with_their_image / num_texts


def check_recall(scores, sim, image_of_text, ks):
    for k in ks:
        by_image, by_text = naive_recall(sim.tolist(), image_of_text.tolist(), k)
        assert scores[f"image_to_text R@{k}"] == pytest.approx(by_image)
        assert scores[f"text_to_image R@{k}"] == pytest.approx(by_text)


def test_recall_equals_a_naive_loop():
    """Several captions an image, as in Flickr30k."""
    torch.manual_seed(0)
    image_of_text = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    sim = torch.randn(6, 10)
    scores = benchmarks.recall(sim, torch.eye(10), image_of_text, ks=(1, 2, 3))
    check_recall(scores, sim, image_of_text, (1, 2, 3))


def test_ranks_of_normalised_embeddings_equal_a_naive_loop():
    torch.manual_seed(0)
    image_emb = F.normalize(torch.randn(17, 8), dim=-1)
    text_emb = F.normalize(torch.randn(40, 8), dim=-1)
    image_of_text = torch.cat([torch.arange(17), torch.randint(0, 17, (23,))])
    scores = benchmarks.recall(image_emb, text_emb, image_of_text, ks=(1, 3))
    check_recall(scores, image_emb @ text_emb.T, image_of_text, (1, 3))


def test_recall_of_perfect_and_of_constant_embeddings():
    perfect = benchmarks.recall(torch.eye(4), torch.eye(4), torch.arange(4))
    assert set(perfect.values()) == {100}
    constant = benchmarks.recall(torch.ones(4, 4), torch.eye(4), torch.arange(4), ks=(1, 4))
    for direction in ("image_to_text", "text_to_image"):
        assert constant[f"{direction} R@1"] == 0  # a tie counts against the model
        assert constant[f"{direction} R@4"] == 100


def test_an_image_without_a_text_is_no_query():
    scores = benchmarks.recall(torch.eye(3), torch.eye(3)[:2], torch.arange(2), ks=(1,))
    assert scores == {"image_to_text R@1": 100, "text_to_image R@1": 100}


def test_negative_accuracy_is_strict():
    positive = torch.tensor([1.0, 2.0, 3.0, 4.0])
    negative = torch.tensor([0.0, 2.0, 4.0, 3.0])
    assert benchmarks.negative_accuracy(positive, negative) == 50


def test_winoground_scores_by_hand():
    items = [
        [[0.9, 0.1], [0.2, 0.8]],  # all right
        [[0.9, 0.1], [0.95, 0.99]],  # texts right; caption 0 prefers image 1
        [[0.5, 0.6], [0.4, 0.7]],  # images right; image 0 prefers caption 1
        [[0.5, 0.5], [0.5, 0.5]],  # ties are wrong
    ]
    scores = benchmarks.winoground_scores(torch.tensor(items))
    assert scores == {"text": 50.0, "image": 50.0, "group": 25.0}


# ------------------------------------------------------------ published benchmarks in miniature


def write_image(path, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = sum(path.name.encode()) * 37 % 200
    colours = {"RGB": (shade, 90, 20), "RGBA": (shade, 9, 99, 128), "P": shade, "L": shade}
    Image.new(mode, size, colours[mode]).save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def directions(*degrees):
    """Unit vectors in the plane, so that a cosine is that of an angle between two."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1).float().numpy()


def flags_of(tmp_path, task, *flags):
    """Flags that score stored embeddings."""
    return [
        "--task",
        task,
        "--folder",
        str(tmp_path),
        "--embeddings",
        f"{tmp_path}/emb.npz",
        *flags,
    ]


def evaluate(tmp_path, task, *flags, **arrays):
    """Results of the command on stored embeddings."""
    np.savez(tmp_path / "emb.npz", **arrays)
    file = tmp_path / "result.json"
    results = benchmarks.main(flags_of(tmp_path, task, "--json", str(file), *flags))
    assert json.loads(file.read_text()) == results
    return results


def refusal(capsys, tmp_path, task, *flags):
    """The one line with which the command refuses stored embeddings or the benchmark's files."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(flags_of(tmp_path, task, *flags))
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.count("\n") == 1
    return err


def read(tmp_path, task, *flags):
    """The benchmark as the command reads it."""
    parser = benchmarks.build_parser()
    return benchmarks.read_benchmark(parser.parse_args(flags_of(tmp_path, task, *flags)))


def karpathy_row(name, split, captions, **more):
    sentences = []
    for caption in captions:
        tokens = caption.lower().split()
        sentences.append({"tokens": tokens, "raw": caption, "imgid": 0, "sentid": 0})
    row = {"sentids": [0], "imgid": 0, "split": split, "filename": name, "sentences": sentences}
    return row | more


def test_flickr30k(tmp_path):
    """Two captions an image; one of them is as near to two images (a tie)."""
    names = ["1.jpg", "2.jpg", "3.jpg"]
    rows = [karpathy_row("0.jpg", "train", ["not read"])]
    for name in names:
        rows.append(karpathy_row(name, "test", [f"  a {name}  image. ", f"again {name}"]))
        write_image(tmp_path / "flickr30k-images" / name)
    write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": rows})
    image_emb = directions(0, 90, 180)
    text_emb = directions(10, 20, 30, 40, 170, 135)
    results = evaluate(tmp_path, "flickr30k", image_emb=image_emb, text_emb=text_emb)
    scores = results["scores"]
    # own image nearest: captions 0, 1, 4; caption 5 lies between images 2 and 3
    assert scores["text_to_image R@1"] == pytest.approx(50)
    assert scores["text_to_image R@5"] == 100
    # of the images, 1 and 3 have a caption of theirs nearest
    assert scores["image_to_text R@1"] == pytest.approx(200 / 3)
    assert results["counts"] == {"images": 3, "captions": 6}
    assert read(tmp_path, "flickr30k").texts[0] == "a 1.jpg image."


def test_coco_with_seven_captions_and_other_file_names(tmp_path, capsys):
    """One image has 7 captions: the first 5 count by default.

    Images lie under val2014, or under their number as in 2017.
    """
    names = ["COCO_val2014_000000000007.jpg", "COCO_val2014_000000000012.jpg"]
    rows = []
    for split in ("train", "val", "restval"):
        path = {"filepath": "train2014", "cocoid": 1}
        rows.append(karpathy_row(f"COCO_{split}.jpg", split, ["x"], **path))
    seven = [f"caption {i}" for i in range(7)]
    rows.append(karpathy_row(names[0], "test", seven, filepath="val2014", cocoid=7))
    rows.append(karpathy_row(names[1], "test", ["other"], filepath="val2014", cocoid=12))
    write(tmp_path / "annotations" / "dataset_coco.json", {"dataset": "coco", "images": rows})
    write_image(tmp_path / "val2014" / names[0])
    write_image(tmp_path / "val2017" / "000000000012.jpg", "L")
    image_emb = directions(0, 90)

    text_emb = directions(80, 80, 80, 80, 80, 80)
    five = evaluate(tmp_path, "coco", image_emb=image_emb, text_emb=text_emb)
    assert five["counts"]["captions"] == 6
    assert five["scores"]["text_to_image R@1"] == pytest.approx(100 / 6)

    text_emb = directions(80, 80, 80, 80, 80, 5, 4, 80)
    flags = ["--captions", "0"]
    all_of_them = evaluate(tmp_path, "coco", *flags, image_emb=image_emb, text_emb=text_emb)
    # image 1 finds its caption 6; that of image 2 ties with others
    assert all_of_them["scores"]["image_to_text R@1"] == 50
    # captions 5 and 6 find image 1, "other" finds image 2
    assert all_of_them["scores"]["text_to_image R@1"] == pytest.approx(300 / 8)
    assert "8 captions" in capsys.readouterr().out


def test_nocaps_is_the_mean_of_its_domains(tmp_path, capsys):
    """Inside its own domain every image is found; among all, those of the second are not."""
    domains = ["in-domain", "near-domain", "out-of-domain"]
    images = []
    for i in range(6):
        name = {"open_images_id": f"{i}", "file_name": f"{i}.jpg", "width": 4, "height": 4}
        images.append({"id": i, "domain": domains[i // 2], **name})
        write_image(tmp_path / "val" / f"{i}.jpg")
    captions = []  # in another order than the images
    for i in reversed(range(6)):
        captions.append({"image_id": i, "id": i, "caption": f"image {i}"})
    file = tmp_path / "nocaps_val_4500_captions.json"
    write(file, {"licenses": [], "info": {}, "images": images, "annotations": captions})
    emb = directions(0, 90, 0, 90, 180, 270)
    results = evaluate(tmp_path, "nocaps", image_emb=emb, text_emb=emb)
    scores, counts = results["scores"], results["counts"]
    assert scores["text_to_image R@1"] == 100
    assert "6 images, 6 captions, 2 in-domain" in capsys.readouterr().out
    assert [counts[f"{domain}-domain"] for domain in ("in", "near", "out")] == [2, 2, 2]
    assert scores["out-domain image_to_text R@1"] == 100
    # 0 and 2, 1 and 3 tie
    assert scores["whole gallery text_to_image R@1"] == pytest.approx(100 / 3)
    # an image may have as many captions as it likes, 10 in the published file: all of them count
    captions += [captions[0] | {"caption": f"again {i}"} for i in range(9)]
    write(file, {"images": images, "annotations": captions})
    assert len(read(tmp_path, "nocaps").texts) == 15
    assert len(read(tmp_path, "nocaps", "--captions", "2").texts) == 7
    for row in images:
        del row["domain"]
    write(file, {"images": images, "annotations": captions})
    assert "KeyError: 'domain'" in refusal(capsys, tmp_path, "nocaps")


def test_all_captions_of_nocaps_count_by_default(tmp_path):
    """It has ten of an image, of which only five were read."""
    images = []
    captions = []
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        images.append({"id": i, "domain": domain, "file_name": f"{i}.jpg"})
        write_image(tmp_path / f"{i}.jpg")
        for n in range(10):
            captions.append({"image_id": i, "id": 10 * i + n, "caption": f"caption {n} of {i}"})
    file = tmp_path / "nocaps_val_4500_captions.json"
    write(file, {"images": images, "annotations": captions})
    assert read(tmp_path, "nocaps").counts["captions"] == 30
    assert read(tmp_path, "nocaps", "--captions", "0").counts["captions"] == 30
    assert read(tmp_path, "nocaps", "--captions", "5").counts["captions"] == 15


def sugarcrepe_files(tmp_path, categories, as_list=False, **fields):
    """Two equal rows a category; their keys have a gap between them."""
    for number, category in enumerate(categories):
        row = {"filename": "000000000001.jpg", **fields, "negative_caption": f"false {category}"}
        rows = [row, row] if as_list else {str(number): row, str(number + 5): row}
        write(tmp_path / "data" / f"{category}.json", rows)
    write_image(tmp_path / "val2017" / "000000000001.jpg")


def all_categories(*groups):
    return [category for group in groups for category in benchmarks.GROUPS[group]]


def test_sugarcrepe_with_gaps_in_its_keys_and_stray_spaces(tmp_path):
    """Spaces around the true captions are taken away; a tie is wrong."""
    sugarcrepe_files(tmp_path, all_categories(*benchmarks.GROUPS), caption="  a true \t caption. ")
    row = {"filename": "000000000001.jpg", "caption": "x", "negative_caption": "y"}
    rows = {"0": row, "245": row | {"negative_caption": "x "}}
    write(tmp_path / "data" / "swap_obj.json", rows)
    benchmark = read(tmp_path, "sugarcrepe")
    assert benchmark.texts[0] == "a true caption."
    assert "x " not in benchmark.texts
    assert len(benchmark.images) == 1
    angles = {"a true caption.": 20, "x": 5, "y": 7}
    for text in benchmark.texts:
        if text.startswith("false"):
            angles[text] = 10 if "add" in text else 30
    text_emb = directions(*(angles[text] for text in benchmark.texts))
    results = evaluate(tmp_path, "sugarcrepe", image_emb=directions(0), text_emb=text_emb)
    scores = results["scores"]
    assert scores["swap_obj"] == 50
    assert scores["swap_att"] == 100
    assert scores["Swap"] == 75
    assert scores["Replace"] == 100
    assert scores["Add"] == 0
    assert results["counts"]["swap_obj"] == 2


def test_sugarcrepe_pp_by_hand(tmp_path, capsys):
    """ITT: both true captions are nearer to the image than the false one.

    TOT: they are nearer to each other than either is to the false one.
    """
    categories = all_categories("Replace", "Swap")
    sugarcrepe_files(tmp_path, categories, as_list=True, caption="first", caption2="second")
    row = {"filename": "000000000001.jpg", "caption": "third", "caption2": "second"}
    write(tmp_path / "data" / "swap_att.json", [row | {"negative_caption": "far"}])
    angles = {"first": 10, "second": 20, "third": -5, "far": 27}
    angles |= {f"false {category}": 18 for category in categories}
    benchmark = read(tmp_path, "sugarcrepe_pp")
    text_emb = directions(*(angles[text] for text in benchmark.texts))
    results = evaluate(tmp_path, "sugarcrepe_pp", image_emb=directions(0), text_emb=text_emb)
    scores = results["scores"]
    # 18 is nearer than 20; 18 is nearer to 20 than 10 is
    assert scores["replace_obj ITT"] == 0
    assert scores["replace_obj TOT"] == 0
    # s(second, far) beats s(third, second)
    assert scores["swap_att ITT"] == 100
    assert scores["swap_att TOT"] == 0
    assert scores["Swap ITT"] == 50
    row = {"filename": "000000000001.jpg", "caption": "a", "negative_caption": "b"}
    write(tmp_path / "data" / "swap_obj.json", [row])
    assert "KeyError: 'caption2'" in refusal(capsys, tmp_path, "sugarcrepe_pp")


def test_winoground_reads_images_with_an_alpha_channel_or_a_palette(tmp_path, random_folder):
    """Its rows have names without an ending. By hand, and through a real model."""
    lines = []
    for i in (0, 1):
        names = {"image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1"}
        captions = {"caption_0": "a red circle ", "caption_1": "a blue square"}
        lines.append(json.dumps({"id": i, "tag": "", **names, **captions}) + "\n")
    write(tmp_path / "examples.jsonl", "".join(lines))
    modes = {"ex_0_img_0": "RGBA", "ex_0_img_1": "P", "ex_1_img_0": "RGB", "ex_1_img_1": "L"}
    for name, mode in modes.items():
        write_image(tmp_path / "images" / f"{name}.png", mode)
    # item 0: all right; item 1: both captions are nearer to the second image, and either image
    # is nearer to its own caption
    image_emb, text_emb = directions(0, 90, 0, 90), directions(5, 80, 50, 80)
    results = evaluate(tmp_path, "winoground", image_emb=image_emb, text_emb=text_emb)
    assert results["scores"] == {"text": 100.0, "image": 50.0, "group": 50.0}
    flags = ["--task", "winoground", "--folder", str(tmp_path), "--model", str(random_folder)]
    assert set(benchmarks.main(flags)["scores"]) == {"text", "image", "group"}


def test_imagenet_with_two_classes_of_one_name(tmp_path, capsys):
    """Classes go by the place of their folder; the prompts of a class are averaged."""
    classes = tmp_path / "classes.json"
    names = ["missile", "tench", "missile"]
    write(classes, {"classnames": names, "templates": ["a {}.", "the {}.", "one {}."]})
    for name in ("n01/a.JPEG", "n01/b.JPEG", "n02/c.JPEG", "n03/d.JPEG"):
        write_image(tmp_path / "val" / name)
    image_emb = directions(0, 60, 90, 200)
    text_emb = directions(0, 80, 180, 20, 100, 220, 10, 90, 200)
    flags = ["--classes", str(classes), "--templates", "all"]
    results = evaluate(tmp_path, "imagenet", *flags, image_emb=image_emb, text_emb=text_emb)
    # class directions 10, 90 and 200 degrees: the second image is taken for a tench
    assert results["scores"]["top-1"] == 75
    assert results["counts"] == {"images": 4, "classes": 3, "templates": 3}
    # with equal prompts the two classes tie: the first is taken, as argmax does
    text_emb = directions(0, 80, 0, 20, 100, 20, 10, 90, 10)
    image_emb = directions(0, 10, 90, 10)
    results = evaluate(tmp_path, "imagenet", *flags, image_emb=image_emb, text_emb=text_emb)
    assert results["scores"] == {"top-1": 75, "top-5": 100}
    assert "of classes that tie, the first" in capsys.readouterr().out
    write_image(tmp_path / "val" / "n04" / "e.JPEG")
    assert "4 class folders" in refusal(capsys, tmp_path, "imagenet", *flags)


# ------------------------------------------------------------------- a benchmark of one's own


def read_mine(folder, args):
    """The reader that docs/extending.md shows: a list of {"image": ..., "caption": ...}."""
    rows = folder.json("mine.json")
    images = [folder.image(row["image"]) for row in rows]
    return benchmarks.retrieval(images, [[row["caption"]] for row in rows])


def test_a_benchmark_that_a_user_adds_runs_without_a_table_of_the_paper(
    tmp_path, random_folder, monkeypatch, capsys
):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "mine", (read_mine, "example.org"))
    rows = []
    for i in range(3):
        rows.append({"image": f"{i}.jpg", "caption": f"image {i}"})
        write_image(tmp_path / f"{i}.jpg")
    write(tmp_path / "mine.json", rows)
    results = evaluate(tmp_path, "mine", image_emb=np.eye(3), text_emb=np.eye(3))
    assert set(results["scores"].values()) == {100.0}
    assert results["counts"] == {"images": 3, "captions": 3}
    assert "no such row" in capsys.readouterr().out
    # beside a model that the paper has, there is still no table to compare with
    table = benchmarks.comparison_table("mine", results["scores"], "VladVA (LLaVA-1.5-7B)")
    assert "no such row" in table
    flags = ["--task", "mine", "--folder", str(tmp_path), "--model", str(random_folder)]
    assert benchmarks.main(flags)["counts"] == results["counts"]
    (tmp_path / "2.jpg").unlink()
    err = refusal(capsys, tmp_path, "mine")
    assert "image 2.jpg not found" in err
    assert "mine is published at example.org" in err


# --------------------------------------------------------------------------- files that do not fit


@pytest.mark.parametrize("task", sorted(benchmarks.BENCHMARKS))
def test_an_empty_folder_is_one_line_with_the_place_of_publication(task, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        err = refusal(capsys, folder, task)
        assert benchmarks.BENCHMARKS[task][1] in err
        assert "not found" in err or "no such folder" in err or "class folders" in err


def test_a_missing_image_is_named(tmp_path, capsys):
    write(tmp_path / "dataset_flickr30k.json", {"images": [karpathy_row("1.jpg", "test", ["a"])]})
    assert "image 1.jpg not found" in refusal(capsys, tmp_path, "flickr30k")


KARPATHY_FILE = "dataset_flickr30k.json"


@pytest.mark.parametrize(
    "task, name, text, message",
    [
        ("flickr30k", KARPATHY_FILE, '{"images": [{"split": "test"}]}', "KeyError: 'filename'"),
        ("flickr30k", KARPATHY_FILE, "[1]", "TypeError"),
        (
            "flickr30k",
            KARPATHY_FILE,
            '{"images": []}',
            "no images, or no captions, of the test split",
        ),
        ("flickr30k", KARPATHY_FILE, "{", "dataset_flickr30k.json"),
        ("winoground", "examples.jsonl", '{"id": 0}\n{"id":', "KeyError: 'image_0'"),
        ("winoground", "examples.jsonl", '{"id":', "not valid JSON"),
        ("sugarcrepe", "replace_obj.json", '{"0": {"caption": "x"}}', "'negative_caption'"),
        ("flickr30k", KARPATHY_FILE, '{"images": %s}' % ("[" * 10**5), "dataset_flickr30k.json"),
    ],
)
def test_files_in_another_format_are_refused(tmp_path, capsys, task, name, text, message):
    write(tmp_path / name, text)
    assert message in refusal(capsys, tmp_path, task)


def test_a_file_names_only_images_in_its_folder_or_in_the_one_that_is_named(tmp_path, capsys):
    """ "..", an absolute name or a link would have read any image of the disk."""
    folder = tmp_path / "benchmark"
    write_image(tmp_path / "outside.jpg")
    folder.mkdir()
    (folder / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    for name in ("../outside.jpg", str(tmp_path / "outside.jpg"), "link.jpg"):
        write(folder / KARPATHY_FILE, {"images": [karpathy_row(name, "test", ["a"])]})
        assert f"{name!r} is not in {folder}: --images" in refusal(capsys, folder, "flickr30k")
        benchmark = read(folder, "flickr30k", "--images", str(tmp_path))
        assert benchmark.images[0].resolve() == tmp_path / "outside.jpg"


def write_flickr(tmp_path, same_images=True):
    """Three images, two captions each; the third is a copy of the first."""
    rows = []
    for name in ("1.jpg", "2.jpg", "copy.jpg"):
        write_image(tmp_path / name)
        rows.append(karpathy_row(name, "test", [f"a red circle {name[0]}", "a blue square"]))
    if same_images:
        (tmp_path / "copy.jpg").write_bytes((tmp_path / "1.jpg").read_bytes())
    write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": rows})


def test_a_broken_image_is_one_line(tmp_path, random_folder, capsys):
    write_flickr(tmp_path)
    (tmp_path / "2.jpg").write_text("no image")
    flags = ["--task", "flickr30k", "--folder", str(tmp_path), "--model", str(random_folder)]
    with pytest.raises(SystemExit):
        benchmarks.main(flags)
    err = capsys.readouterr().err
    assert "2.jpg" in err
    assert "cannot be decoded" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------------------------- embeddings


def test_two_processes_score_as_one(tmp_path, random_folder):
    """torchrun splits images and texts of odd number; rank 0 alone prints and writes."""
    write_flickr(tmp_path)
    model = ["--folder", str(tmp_path), "--model", str(random_folder)]
    flags = ["--task", "flickr30k", *model, "--json"]
    process = torchrun("eval.py", *flags, tmp_path / "two.json")
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert out.count("3 images, 6 captions") == 1
    benchmarks.main([*flags, f"{tmp_path}/one.json"])
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_saved_embeddings_score_the_same_and_refuse_another_benchmark(
    tmp_path, random_folder, capsys
):
    """Images that differ: between two alike rounding decides, as rows are normalised once more."""
    write_flickr(tmp_path, same_images=False)
    file = tmp_path / "emb.npz"
    flags = ["--task", "flickr30k", "--folder", str(tmp_path)]
    model = ["--model", str(random_folder), "--save-embeddings", str(file)]
    scores = benchmarks.main([*flags, *model])["scores"]
    assert benchmarks.main([*flags, "--embeddings", str(file)])["scores"] == scores
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for changes, message in (
        ({"texts": arrays["texts"][::-1]}, "another order"),
        ({"text_emb": arrays["text_emb"][:3]}, "wanted (6, D)"),
        ({"image_emb": arrays["image_emb"] * np.nan}, "finite"),
    ):
        np.savez(file, **arrays | changes)
        assert message in refusal(capsys, tmp_path, "flickr30k")
    file.write_text("not an archive")
    assert "cannot be used as embeddings" in refusal(capsys, tmp_path, "flickr30k")


BROKEN_EMBEDDINGS = {  # kind: (arrays instead of the whole ones, what is said of them)
    "one vector": ({"image_emb": np.ones(3)}, "image_emb is float64 (3,), wanted (3, D)"),
    "complex": ({"image_emb": np.ones((3, 4), complex)}, "image_emb is complex128"),
    "texts": ({"text_emb": np.full((6, 4), "a")}, "text_emb is <U1"),
    "objects": ({"text_emb": np.full((6, 4), None)}, "cannot be used as embeddings (Object arrays"),
    "no width": ({"text_emb": np.ones((6, 0))}, "wanted (6, D) finite numbers"),
    "other widths": ({"text_emb": np.ones((6, 5))}, "image_emb is (3, 4), text_emb (6, 5)"),
    "a row of zeros": ({"text_emb": np.ones((6, 4)) * [[0]] + 0.0}, "not all 0"),
    "two rows of zeros": ({"text_emb": np.eye(6, 4)}, "not all 0"),
    "infinite": ({"text_emb": np.full((6, 4), np.inf)}, "finite numbers"),
    "short names": ({"images": ["1.jpg", "2.jpg"]}, "its images are not the benchmark's"),
    "too large": ({"image_emb": np.zeros((3, 200_000), np.int8)}, "image_emb has over 394,240"),
}


@pytest.mark.parametrize("kind", BROKEN_EMBEDDINGS)
def test_embeddings_that_do_not_fit_are_one_line(tmp_path, capsys, kind):
    write_flickr(tmp_path)
    changes, message = BROKEN_EMBEDDINGS[kind]
    np.savez(
        tmp_path / "emb.npz",
        **{"image_emb": np.ones((3, 4)), "text_emb": np.ones((6, 4))} | changes,
    )
    assert message in refusal(capsys, tmp_path, "flickr30k")


def test_a_file_that_is_no_whole_archive_is_one_line(tmp_path, capsys):
    write_flickr(tmp_path)
    file = tmp_path / "emb.npz"
    np.savez(file, image_emb=np.ones((3, 4)), text_emb=np.ones((6, 4)))
    whole = file.read_bytes()
    for number, content in enumerate(
        [whole[: len(whole) // 2], whole.replace(b"descr", b"d\0scr"), b""]
    ):
        file.write_bytes(content)
        assert "cannot be used as embeddings" in refusal(capsys, tmp_path, "flickr30k"), number
    with open(file, "wb") as npy:
        np.save(npy, np.ones((3, 4)))
    assert "cannot be used as embeddings" in refusal(capsys, tmp_path, "flickr30k")
    # on a pipe reading would wait
    file.unlink()
    os.mkfifo(file)
    assert "cannot be used as embeddings (no such file)" in refusal(capsys, tmp_path, "flickr30k")


@pytest.mark.parametrize("caption", [" ", "a </s> b", "\ud800"])
def test_a_caption_that_is_none_is_named_with_its_folder(tmp_path, random_folder, capsys, caption):
    """Before the images, which take hours, are encoded."""
    write_image(tmp_path / "1.jpg")
    write(tmp_path / KARPATHY_FILE, {"images": [karpathy_row("1.jpg", "test", [caption])]})
    (tmp_path / "1.jpg").write_text("no image")
    flags = ["--task", "flickr30k", "--folder", str(tmp_path), "--model", str(random_folder)]
    with pytest.raises(SystemExit):
        benchmarks.main(flags)
    err = capsys.readouterr().err
    assert str(tmp_path) in err and "1.jpg" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [{"task": "x"}, {"task": [1]}, {"scores": None}, {"scores": {"a": "x"}}, {"scores": {"a": []}}],
)
def test_a_result_of_another_kind_is_refused(tmp_path, capsys, change):
    """It ended in a traceback, or was left out of the tables without a word."""
    write(tmp_path / "result.json", {"task": "coco", "scores": {"a": 5.0}} | change)
    with pytest.raises(SystemExit):
        benchmarks.main(["--task", "paper", str(tmp_path / "result.json")])
    printed, err = capsys.readouterr()
    assert "result.json" in err and err.count("\n") == 1 and not printed


def test_embeddings_of_any_magnitude_are_normalised_and_others_in_the_file_are_not_read(tmp_path):
    """Squares of 1e200 are infinite, and 1e200 itself is in float32."""
    write_flickr(tmp_path)
    benchmark = read(tmp_path, "flickr30k")
    emb = np.random.default_rng(0).normal(size=(6, 4))
    expected = F.normalize(torch.from_numpy(emb), dim=-1).float()
    for scale in (1e-200, 1.0, 1e200):
        np.savez(tmp_path / "emb.npz", image_emb=scale * emb[:3], text_emb=scale * emb)
        with zipfile.ZipFile(tmp_path / "emb.npz", "a") as archive:
            archive.writestr("other.npy", "no array")
        image_emb, text_emb = embeddings.load(str(tmp_path / "emb.npz"), benchmark)
        assert text_emb.dtype == torch.float32
        torch.testing.assert_close(text_emb, expected)
        torch.testing.assert_close(image_emb, expected[:3])


def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path, random_folder, monkeypatch, capsys
):
    """An hour of encoding used to end with "No such file or directory"."""
    write_flickr(tmp_path)
    monkeypatch.setattr(benchmarks, "embed_benchmark", lambda *args: pytest.fail("encoded"))
    flags = ["--task", "flickr30k", "--folder", str(tmp_path), "--model", str(random_folder)]
    for flag in ("--json", "--save-embeddings"):
        for path in (tmp_path, tmp_path / "absent" / "o.json", tmp_path / ("x" * 300)):
            with pytest.raises(SystemExit) as stopped:
                benchmarks.main([*flags, flag, str(path)])
            assert stopped.value.code == 2
            assert str(path) in capsys.readouterr().err
    assert "--captions is -1" in refusal(capsys, tmp_path, "flickr30k", "--captions", "-1")


# --------------------------------------------------------------- rows that are kept for measuring

CAPTIONS = ["a red circle. ", "a small blue square is above a red circle. ", "there are circles. "]


def held_out_rows(tmp_path):
    """Five rows as data.Pairs.hold_out gives them; the last has no long caption."""
    rows = []
    for i in range(5):
        write_image(tmp_path / f"{i}.png", size=(20 + 9 * i, 40))
        long = None if i == 4 else CAPTIONS[i % 3] * (i + 2)
        rows.append({"image": tmp_path / f"{i}.png", "short": [f"number {i}", "x"], "long": long})
    return rows


def test_caption_loss_is_the_mean_over_all_tokens_in_batches_of_any_size(random_model, tmp_path):
    """Not the mean of batch means: captions differ in length."""
    rows = held_out_rows(tmp_path)[:4]
    images = [row["image"] for row in rows]
    captions = [row["long"] for row in rows]
    opened = [dict(row, image=data.open_image(row["image"]), short=None) for row in rows]
    batch = random_model.training_batch(opened)
    with torch.no_grad():
        _, states = random_model.embed_batch(batch)
        targets = batch.caption_targets
        expected = next_token_loss(states, targets, random_model.lvlm.lm_head.weight).item()
    for size in (1, 2, 4):
        loss = benchmarks.mean_caption_loss(random_model, images, captions, batch_size=size)
        assert loss == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


def test_held_out_pairs_are_measured_as_the_benchmarks_are(random_model, tmp_path):
    rows = held_out_rows(tmp_path)
    held_out = benchmarks.HeldOutPairs(rows)
    measured = held_out.measure(random_model)
    image_emb = random_model.encode_image([row["image"] for row in rows])
    text_emb = random_model.encode_text([f"number {i}" for i in range(5)])
    assert measured.scores == benchmarks.recall(image_emb, text_emb, torch.arange(5))
    torch.testing.assert_close(measured.sim, image_emb @ text_emb.T)
    described = rows[:4]
    captions = [row["long"] for row in described]
    images = [row["image"] for row in described]
    loss = benchmarks.mean_caption_loss(random_model, images, captions)
    assert measured.caption_loss == pytest.approx(loss)
    assert len(held_out) == 5
    assert held_out.benchmark.texts[2] == "number 2"
    assert held_out.chance["text_to_image R@1"] == pytest.approx(20)
    assert held_out.chance["image_to_text R@10"] == 100


def test_the_table_of_a_run_shows_the_scores_that_chance_names():
    sim = torch.zeros(2, 2)
    before = benchmarks.Measured({"a_b R@1": 12.34, "hidden": 1.0}, sim, 3.5)
    after = benchmarks.Measured({"a_b R@1": 56.0, "hidden": 2.0}, sim, 1.25)
    chance = {"a_b R@1": 5.0}
    table = benchmarks.score_table({"before": before, "after": after}, chance).splitlines()
    assert table[0].split() == ["percent", "chance", "before", "after"]
    assert table[2].split() == ["a", "b", "R@1", "5.0", "12.3", "56.0"]
    assert table[3].split()[-2:] == ["3.500", "1.250"]
    assert len(table) == 4
    without_loss = benchmarks.Measured(after.scores, sim)
    assert len(benchmarks.score_table({"after": without_loss}, chance).splitlines()) == 3


# --------------------------------------------------------------------------- the paper's tables


def test_the_papers_tables_stand_beside_results(tmp_path, capsys):
    scores = {"text": 20.0, "image": 11.3}
    result = {"task": "winoground", "paper_row": "LLaVA-1.5-7B", "scores": scores}
    write(tmp_path / "r.json", result)
    benchmarks.main(["--task", "paper", str(tmp_path / "r.json")])
    out = capsys.readouterr().out
    assert out.count("not run") > 100
    assert out.count("below") == 1
    table = out[out.index("winoground") :].split("imagenet")[0].splitlines()
    (row,) = [line.split() for line in table if line.startswith("LLaVA-1.5-7B")]
    assert row[-1] == "below"
    compared = {line.split()[0]: line.split()[1:] for line in table if "+0.0" in line}
    assert compared == {"image": ["11.3", "11.3", "+0.0"]}
    (group,) = [line.split() for line in table if line.startswith("group ")]
    assert group[1] == group[3] == "-"


def test_scores_stand_beside_a_row_of_the_paper():
    table = benchmarks.comparison_table("coco", {}, "VladVA (LLaVA-1.5-7B)").splitlines()
    (row,) = [line for line in table if line.startswith("text to image R@1 ")]
    assert row.split()[-3:] == ["-", "59.0", "-"]
    assert "no such row" in benchmarks.comparison_table("coco", {"x": 1.0}, None)


def test_stored_embeddings_can_be_set_beside_a_row_of_the_paper(tmp_path, capsys):
    write_flickr(tmp_path)
    arrays = {"image_emb": directions(0, 90, 180), "text_emb": directions(0, 0, 90, 90, 180, 180)}
    results = evaluate(tmp_path, "flickr30k", "--row", "CLIP (ViT-L)", **arrays)
    assert results["paper_row"] == "CLIP (ViT-L)"
    assert "paper: CLIP (ViT-L)" in capsys.readouterr().out
    assert "is no row" in refusal(capsys, tmp_path, "flickr30k", "--row", "clip")


def test_every_flag_says_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmarks.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "None" not in out
