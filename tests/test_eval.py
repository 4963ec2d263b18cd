"""Metrics against naive loops and hand-made cases; the benchmark of scenes; the command line."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as benchmarks
from extras import scenes
from vladva import VladVA


def naive_recall(sim, owner, k):
    """The definitions, one query at a time; no ties in the table."""
    texts = [
        owner[j] in sorted(range(len(sim)), key=lambda i: -sim[i][j])[:k] for j in range(len(owner))
    ]
    images = [
        any(owner[j] == i for j in sorted(range(len(owner)), key=lambda j: -sim[i][j])[:k])
        for i in range(len(sim))
    ]
    return 100 * sum(images) / len(images), 100 * sum(texts) / len(texts)


def test_recall_equals_a_naive_loop():
    """Several captions an image, as in Flickr30k."""
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    sim = torch.randn(6, 10)
    found = benchmarks.recall_at(sim, torch.eye(10), owner, ks=(1, 2, 3))
    for k in (1, 2, 3):
        images, texts = naive_recall(sim.tolist(), owner.tolist(), k)
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(images) and found["text_to_image"][
            f"R@{k}"
        ] == pytest.approx(texts)


def test_recall_of_perfect_and_of_constant_embeddings():
    assert (
        benchmarks.recall_at(torch.eye(4), torch.eye(4), torch.arange(4))["text_to_image"]["R@1"]
        == 100
    )
    constant = benchmarks.recall_at(
        torch.ones(4, 4), torch.eye(4), torch.arange(4), ks=(1, 4)
    )  # a tie counts against the model
    assert constant["text_to_image"] == constant["image_to_text"] == {"R@1": 0, "R@4": 100}


def test_negative_accuracy_is_strict():
    assert (
        benchmarks.negative_accuracy(
            torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 4.0, 3.0])
        )
        == 50
    )


def test_winoground_scores_by_hand():
    items = torch.tensor([
        [[0.9, 0.1], [0.2, 0.8]],  # all right
        [[0.9, 0.1], [0.95, 0.99]],  # texts right; caption 0 prefers image 1
        [[0.5, 0.6], [0.4, 0.7]],  # images right; image 0 prefers caption 1
        [[0.5, 0.5], [0.5, 0.5]],  # ties are wrong
    ])  # fmt: skip
    assert benchmarks.winoground_scores(items) == {"text": 50.0, "image": 50.0, "group": 25.0}


# ------------------------------------------------------------------------------------------------------ published benchmarks, in miniature


def test_caption_loss_is_the_mean_over_all_tokens_in_batches_of_any_size(random_model):
    """Not the mean of batch means: captions differ in length."""
    captioned = scenes.captioned_scenes(7, 5, 96)
    rows = [{"image": picture, "short": None, "long": long} for picture, long in captioned]
    batch = random_model.training_batch(rows)
    with torch.no_grad():
        wanted = random_model.losses(random_model.outputs(batch), batch.targets)[1].item()
    for size in (1, 2, 5):
        found = benchmarks.caption_loss(random_model, captioned, batch=size)
        assert found == {"loss": pytest.approx(wanted, rel=1e-5), "tokens": len(batch.targets)}


def write_picture(path, mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    shade = sum(path.name.encode()) * 37 % 200
    Image.new(
        mode,
        size,
        {"RGB": (shade, 90, 20), "RGBA": (shade, 9, 99, 128), "P": shade, "L": shade}[mode],
    ).save(path)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def directions(*degrees):
    """Unit vectors in the plane, so that a cosine is that of an angle between two."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1).float().numpy()


def evaluated(tmp_path, task, *flags, image_emb, text_emb, **more):
    """Results of the command on stored embeddings."""
    np.savez(tmp_path / "emb.npz", image_emb=image_emb, text_emb=text_emb, **more)
    file = tmp_path / "result.json"
    benchmarks.main(
        [
            "--task",
            task,
            "--folder",
            str(tmp_path),
            "--embeddings",
            str(tmp_path / "emb.npz"),
            "--json",
            str(file),
            *flags,
        ]
    )
    return json.loads(file.read_text())


def karpathy_row(name, split, captions, **more):
    sentences = [
        {"tokens": caption.lower().split(), "raw": caption, "imgid": 0, "sentid": 0}
        for caption in captions
    ]
    return {
        "sentids": [0],
        "imgid": 0,
        "split": split,
        "filename": name,
        "sentences": sentences,
        **more,
    }


def test_flickr30k(tmp_path):
    """Three test pictures; the captions of the second are nearest to the first, one caption is as near to two pictures (a tie)."""
    names = ["1.jpg", "2.jpg", "3.jpg"]
    rows = [
        karpathy_row(name, "test", [f"  a {name}  picture. ", f"again {name}"]) for name in names
    ]
    write(
        tmp_path / "dataset_flickr30k.json",
        {"dataset": "flickr30k", "images": [karpathy_row("0.jpg", "train", ["not read"]), *rows]},
    )
    for name in names:
        write_picture(tmp_path / "flickr30k-images" / name)
    found = evaluated(
        tmp_path,
        "flickr30k",
        image_emb=directions(0, 90, 180),
        text_emb=directions(10, 20, 30, 40, 170, 135),
    )
    # own picture nearest: captions 0, 1, 4; caption 5 lies between pictures 2 and 3. Of the pictures, 1 and 3 have a caption of theirs nearest.
    assert (
        found["scores"]["text_to_image R@1"] == pytest.approx(50)
        and found["scores"]["text_to_image R@5"] == 100
    )
    assert found["scores"]["image_to_text R@1"] == pytest.approx(200 / 3) and found["counts"] == {
        "pictures": 3,
        "captions": 6,
    }


def test_coco_with_seven_captions_and_other_file_names(tmp_path, capsys):
    """One picture has 7 captions: the first 5 count by default. Pictures lie under val2014, or under their number as in 2017."""
    first = karpathy_row(
        "COCO_val2014_000000000007.jpg",
        "test",
        [f"caption {i}" for i in range(7)],
        filepath="val2014",
        cocoid=7,
    )
    second = karpathy_row(
        "COCO_val2014_000000000012.jpg", "test", ["other"], filepath="val2014", cocoid=12
    )
    left_out = [
        karpathy_row(f"COCO_{split}.jpg", split, ["x"], filepath="train2014", cocoid=1)
        for split in ("train", "val", "restval")
    ]
    write(
        tmp_path / "annotations" / "dataset_coco.json",
        {"dataset": "coco", "images": [*left_out, first, second]},
    )
    write_picture(tmp_path / "val2014" / "COCO_val2014_000000000007.jpg")
    write_picture(tmp_path / "val2017" / "000000000012.jpg", "L")
    five = evaluated(
        tmp_path, "coco", image_emb=directions(0, 90), text_emb=directions(80, 80, 80, 80, 80, 80)
    )
    assert five["counts"]["captions"] == 6 and five["scores"]["text_to_image R@1"] == pytest.approx(
        100 / 6
    )
    seven = evaluated(
        tmp_path,
        "coco",
        "--captions",
        "0",
        image_emb=directions(0, 90),
        text_emb=directions(80, 80, 80, 80, 80, 5, 4, 80),
    )
    # picture 1 finds its caption 6; that of picture 2 ties with others. Captions 5 and 6 find picture 1, "other" finds picture 2
    assert seven["scores"]["image_to_text R@1"] == 50 and seven["scores"][
        "text_to_image R@1"
    ] == pytest.approx(300 / 8)
    assert "8 captions" in capsys.readouterr().out


def test_nocaps_is_the_mean_of_its_domains(tmp_path):
    """Inside its own domain every picture is found; among all, those of the second domain are not."""
    domains = [
        "in-domain",
        "in-domain",
        "near-domain",
        "near-domain",
        "out-of-domain",
        "out-of-domain",
    ]
    images = [
        {
            "id": i,
            "open_images_id": f"{i}",
            "file_name": f"{i}.jpg",
            "domain": d,
            "width": 4,
            "height": 4,
        }
        for i, d in enumerate(domains)
    ]
    notes = [
        {"image_id": i, "id": i, "caption": f"picture {i}"} for i in reversed(range(6))
    ]  # in another order than the pictures
    write(
        tmp_path / "nocaps_val_4500_captions.json",
        {"licenses": [], "info": {}, "images": images, "annotations": notes},
    )
    for i in range(6):
        write_picture(tmp_path / "val" / f"{i}.jpg")
    emb = directions(0, 90, 0, 90, 180, 270)
    found = evaluated(tmp_path, "nocaps", image_emb=emb, text_emb=emb)
    assert found["scores"]["text_to_image R@1"] == 100 and found["counts"] == {
        "in-domain": 2,
        "near-domain": 2,
        "out-domain": 2,
    }
    assert found["scores"]["out-domain image_to_text R@1"] == 100
    assert found["scores"]["whole gallery text_to_image R@1"] == pytest.approx(
        100 / 3
    )  # 0 and 2, 1 and 3 tie
    for row in images:
        del row["domain"]
    write(tmp_path / "nocaps_val_4500_captions.json", {"images": images, "annotations": notes})
    assert "has no 'domain'" in refusal(tmp_path, "nocaps")


def refusal(tmp_path, task, *flags):
    """The message with which the command refuses stored embeddings or the benchmark's files."""
    words = [
        "--task",
        task,
        "--folder",
        str(tmp_path),
        "--embeddings",
        str(tmp_path / "emb.npz"),
        *flags,
    ]
    with pytest.raises(ValueError) as error:
        benchmarks.run_published(benchmarks.command_line().parse_args(words))
    return str(error.value)


def sugarcrepe_files(tmp_path, categories, as_list=False, **fields):
    for number, category in enumerate(categories):
        rows = [
            {"filename": "000000000001.jpg", **fields, "negative_caption": f"false {category}"}
        ] * 2
        write(
            tmp_path / "data" / f"{category}.json",
            rows if as_list else {str(i): row for i, row in zip((number, number + 5), rows)},
        )
    write_picture(tmp_path / "val2017" / "000000000001.jpg")


def test_sugarcrepe_with_gaps_in_its_keys_and_stray_blanks(tmp_path):
    """7 files, of which swap_obj has a gap in its keys; blanks around the true captions are taken away; a tie is wrong."""
    categories = [c for members in benchmarks.SUGARCREPE.values() for c in members]
    sugarcrepe_files(tmp_path, categories, caption="  a true \t caption. ")
    rows = {"0": {"filename": "000000000001.jpg", "caption": "x", "negative_caption": "y"},
            "245": {"filename": "000000000001.jpg", "caption": "x", "negative_caption": "x "}}  # fmt: skip
    write(tmp_path / "data" / "swap_obj.json", rows)
    benchmark = benchmarks.sugarcrepe(
        benchmarks.Folder(tmp_path, "sugarcrepe", benchmarks.clean_text), None
    )
    assert (
        benchmark.texts[0] == "a true caption."
        and "x " not in benchmark.texts
        and len(benchmark.images) == 1
    )
    falses = [text for text in benchmark.texts if text.startswith("false")]
    angle = {"a true caption.": 20, "x": 5, "y": 7} | {
        text: 10 if "add" in text else 30 for text in falses
    }
    found = evaluated(
        tmp_path,
        "sugarcrepe",
        image_emb=directions(0),
        text_emb=directions(*(angle[text] for text in benchmark.texts)),
    )
    scores = found["scores"]
    assert (
        scores["swap_obj"] == 50
        and scores["swap_att"] == 100
        and scores["Swap"] == 75
        and scores["Replace"] == 100
        and scores["Add"] == 0
    )
    assert found["counts"]["swap_obj"] == 2


def test_sugarcrepe_pp_by_hand(tmp_path):
    """ITT wants both true captions nearer to the picture than the false one; TOT wants them nearer to each other than either to it."""
    categories = [*benchmarks.SUGARCREPE["Replace"], *benchmarks.SUGARCREPE["Swap"]]
    sugarcrepe_files(tmp_path, categories, as_list=True, caption="first", caption2="second")
    write(
        tmp_path / "data" / "swap_att.json",
        [
            {
                "filename": "000000000001.jpg",
                "caption": "third",
                "caption2": "second",
                "negative_caption": "far",
            }
        ],
    )
    angles = {"first": 10, "second": 20, "third": -5, "far": 27} | {
        f"false {c}": 18 for c in categories
    }
    benchmark = benchmarks.sugarcrepe_pp(
        benchmarks.Folder(tmp_path, "sugarcrepe_pp", benchmarks.clean_text), None
    )
    found = evaluated(
        tmp_path,
        "sugarcrepe_pp",
        image_emb=directions(0),
        text_emb=directions(*(angles[text] for text in benchmark.texts)),
    )["scores"]
    assert (
        found["replace_obj ITT"] == 0 and found["replace_obj TOT"] == 0
    )  # 18 is nearer than 20; 18 is nearer to 20 than 10 is
    assert (
        found["swap_att ITT"] == 100 and found["swap_att TOT"] == 0
    )  # s(second, far) beats s(third, second)
    assert found["Swap ITT"] == 50
    write(
        tmp_path / "data" / "swap_obj.json",
        [{"filename": "000000000001.jpg", "caption": "a", "negative_caption": "b"}],
    )
    assert "swap_obj.json has no 'caption2'" in refusal(tmp_path, "sugarcrepe_pp")


def test_winoground_reads_rgba_pictures(tmp_path, random_folder):
    """400 rows have names without an ending; some pictures have an alpha channel or a palette. Here 2 rows, also through a real model."""
    rows = [
        {
            "id": i,
            "image_0": f"ex_{i}_img_0",
            "image_1": f"ex_{i}_img_1",
            "caption_0": "a red circle ",
            "caption_1": "a blue square",
            "tag": "",
        }
        for i in (0, 1)
    ]
    write(tmp_path / "examples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for name, mode in (
        ("ex_0_img_0", "RGBA"),
        ("ex_0_img_1", "P"),
        ("ex_1_img_0", "RGB"),
        ("ex_1_img_1", "L"),
    ):
        write_picture(tmp_path / "images" / f"{name}.png", mode)
    # item 0: all right; item 1: both captions nearer to the second picture, and either picture nearer to its own caption
    found = evaluated(
        tmp_path,
        "winoground",
        image_emb=directions(0, 90, 0, 90),
        text_emb=directions(5, 80, 50, 80),
    )
    assert found["scores"] == {"text": 100.0, "image": 50.0, "group": 50.0}
    benchmarks.main(
        [
            "--task",
            "winoground",
            "--folder",
            str(tmp_path),
            "--model",
            str(random_folder),
            "--workers",
            "1",
            "--json",
            str(tmp_path / "m.json"),
        ]
    )
    assert set(json.loads((tmp_path / "m.json").read_text())["scores"]) == {
        "text",
        "image",
        "group",
    }


def test_imagenet_with_two_classes_of_one_name(tmp_path):
    """Classes go by the place of their folder; the prompts of a class are averaged after normalisation."""
    classes = tmp_path / "classes.json"
    write(
        classes,
        {
            "classnames": ["missile", "tench", "missile"],
            "templates": ["a {}.", "the {}.", "one {}."],
        },
    )
    for folder, names in (("n01", ["a.JPEG", "b.JPEG"]), ("n02", ["c.JPEG"]), ("n03", ["d.JPEG"])):
        for name in names:
            write_picture(tmp_path / "val" / folder / name)
    emb = {
        "image_emb": directions(0, 60, 90, 200),
        "text_emb": directions(0, 80, 180, 20, 100, 220, 10, 90, 200),
    }
    flags = ["--classes", str(classes), "--templates", "all"]
    found = evaluated(
        tmp_path, "imagenet", *flags, **emb
    )  # class directions 10, 90 and 200 degrees: the second picture is taken for a tench
    assert found["scores"]["top-1"] == 75 and found["counts"] == {
        "pictures": 4,
        "classes": 3,
        "templates": 3,
    }
    write_picture(tmp_path / "val" / "n04" / "e.JPEG")
    assert "4 class folders" in refusal(tmp_path, "imagenet", *flags)


def test_the_metrics_equal_a_naive_loop_in_blocks_of_any_size():
    torch.manual_seed(0)
    image_emb, text_emb = (
        torch.nn.functional.normalize(torch.randn(17, 8), dim=-1),
        torch.nn.functional.normalize(torch.randn(40, 8), dim=-1),
    )
    owner = torch.cat([torch.arange(17), torch.randint(0, 17, (23,))])
    whole = benchmarks.recall_at(image_emb, text_emb, owner, ks=(1, 3))
    for k in (1, 3):
        images, texts = naive_recall((image_emb @ text_emb.T).tolist(), owner.tolist(), k)
        assert whole["image_to_text"][f"R@{k}"] == pytest.approx(images) and whole["text_to_image"][
            f"R@{k}"
        ] == pytest.approx(texts)
    for block in (1, 7, 40):
        assert benchmarks.recall_at(image_emb, text_emb, owner, ks=(1, 3), block=block) == whole


@pytest.mark.parametrize("task", sorted(benchmarks.LOADERS))
def test_an_empty_folder_is_one_line_with_the_place_of_publication(task, tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit) as stopped:
            benchmarks.main(["--task", task, "--folder", str(folder)])
        err = capsys.readouterr().err
        assert (
            stopped.value.code == 2
            and err.count("\n") == 1
            and benchmarks.PUBLISHED[task] in err
            and ("not found" in err or "no such" in err or "no folder" in err)
        )


def test_a_missing_picture_is_named(tmp_path):
    write(tmp_path / "dataset_flickr30k.json", {"images": [karpathy_row("1.jpg", "test", ["a"])]})
    assert "picture 1.jpg not found" in refusal(tmp_path, "flickr30k")


@pytest.mark.parametrize("task, name, text, message", [
    ("flickr30k", "dataset_flickr30k.json", '{"images": [{"split": "test"}]}', "KeyError: 'filename'"),
    ("flickr30k", "dataset_flickr30k.json", '[1]', "has no 'images'"),
    ("flickr30k", "dataset_flickr30k.json", '{"images": []}', "no row of split 'test'"),
    ("winoground", "examples.jsonl", '{"id": 0}\n{"id":', "examples.jsonl:2 is not JSON"),
    ("sugarcrepe", "replace_obj.json", '{"0": {"caption": "x"}}', "'filename'"),
])  # fmt: skip
def test_files_in_another_format_are_refused(tmp_path, task, name, text, message):
    write(tmp_path / name, text)
    assert message in refusal(tmp_path, task)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_picture_is_one_line(tmp_path, random_folder, capsys, workers):
    flickr(tmp_path)
    (tmp_path / "2.jpg").write_text("no picture")
    with pytest.raises(SystemExit):
        benchmarks.main(
            [
                "--task",
                "flickr30k",
                "--folder",
                str(tmp_path),
                "--model",
                str(random_folder),
                "--workers",
                workers,
            ]
        )
    err = capsys.readouterr().err
    assert (
        "2.jpg" in err
        and "cannot be decoded" in err
        and "Traceback" not in err
        and err.count("\n") == 1
    )


def flickr(tmp_path):
    for name in ("1.jpg", "2.jpg", "copy.jpg"):
        write_picture(tmp_path / name)
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "1.jpg").read_bytes())
    rows = [
        karpathy_row(name, "test", [f"a red circle {name[0]}", "a blue square"])
        for name in ("1.jpg", "2.jpg", "copy.jpg")
    ]
    write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": rows})


def test_embeddings_are_cached_by_content(tmp_path, random_folder, monkeypatch):
    """The same bytes under two names are embedded once; a second run embeds nothing; another model has a cache of its own."""
    flickr(tmp_path)
    counts = []
    for name in ("encode_image", "encode_text"):
        own = getattr(VladVA, name)
        monkeypatch.setattr(
            VladVA,
            name,
            lambda self, items, own=own, **more: (
                counts.append(len(items)) or own(self, items, **more)
            ),
        )
    flags = [
        "--task",
        "flickr30k",
        "--folder",
        str(tmp_path),
        "--model",
        str(random_folder),
        "--cache",
        str(tmp_path / "cache"),
    ]
    benchmarks.main([*flags, "--json", str(tmp_path / "a.json")])
    first, counts[:] = list(counts), []
    benchmarks.main([*flags, "--json", str(tmp_path / "b.json")])
    assert first == [2, 4] and counts == []
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    benchmarks.main([*flags, "--dtype", "bfloat16"])
    assert counts == [2, 4]


def test_two_processes_score_as_one(tmp_path, random_folder):
    """torchrun splits pictures and texts of odd number; rank 0 alone prints and writes."""
    flickr(tmp_path)
    flags = [
        "eval.py",
        "--task",
        "flickr30k",
        "--folder",
        tmp_path,
        "--model",
        random_folder,
        "--cache",
        tmp_path / "cache",
        "--json",
    ]
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        f"--master-port={random.randint(20000, 60000)}",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *torchrun, *map(str, flags), str(tmp_path / "two.json")]
    done = subprocess.run(
        command, cwd=data.TINY.parents[1], env=env, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0 and done.stdout.count("3 pictures, 6 captions") == 1, done.stderr
    shutil.rmtree(tmp_path / "cache")
    benchmarks.main([*map(str, flags[1:]), str(tmp_path / "one.json")])
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_saved_embeddings_score_the_same_and_refuse_another_benchmark(tmp_path, random_folder):
    """Pictures that differ: between two alike rounding decides, and rows are normalised once more when they are read."""
    flickr(tmp_path)
    for number, name in enumerate(("1.jpg", "2.jpg", "copy.jpg")):
        scenes.render(scenes.make_scene(5, number)).save(tmp_path / name)
    file = tmp_path / "emb.npz"
    flags = ["--task", "flickr30k", "--folder", str(tmp_path), "--json", str(tmp_path / "r.json")]
    benchmarks.main([*flags, "--model", str(random_folder), "--save-embeddings", str(file)])
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    benchmarks.main([*flags, "--embeddings", str(file)])
    assert json.loads((tmp_path / "r.json").read_text())["scores"] == scores
    with np.load(file) as stored:
        parts = {name: stored[name] for name in stored.files}
    for change, message in (({"texts": parts["texts"][::-1]}, "another order"), ({"text_emb": parts["text_emb"][:3]}, "wanted (6, D)"),
                            ({"image_emb": parts["image_emb"] * np.nan}, "finite")):  # fmt: skip
        np.savez(file, **parts | change)
        assert message in refusal(tmp_path, "flickr30k")
    file.write_text("not an archive")
    assert "cannot be read as .npz" in refusal(tmp_path, "flickr30k")


def test_the_papers_tables_stand_beside_results(tmp_path, capsys):
    result = {
        "task": "winoground",
        "paper_row": "LLaVA-1.5-7B",
        "scores": {"text": 20.0, "image": 11.3},
    }
    write(tmp_path / "r.json", result)
    benchmarks.main(["--task", "paper", str(tmp_path / "r.json")])
    out = capsys.readouterr().out
    block = out[out.index("LLaVA-1.5-7B", out.index("Table 8: winoground")) :].splitlines()
    assert (
        block[0].endswith("below")
        and block[1].split() == ["ours", "20.0", "11.3", "-"]
        and block[2].split()[2:] == ["+0.0", "-"]
    )
    assert (
        out.count("not run") > 100
        and benchmarks.paper_row("coco", "VladVA (LLaVA-1.5-7B)")[1]["text_to_image R@1"] == 59.0
    )
    assert benchmarks.paper_row("coco", None) == (None, {})
    assert [
        benchmarks.paper_name(model, "runs/x") for model in ("llava-hf/llava-1.5-7b-hf", "tiny")
    ] == ["VladVA (LLaVA-1.5-7B)", None]
    assert benchmarks.paper_name("llava-1.5-13b", None) == "LLaVA-1.5-13B"
    assert (
        benchmarks.paper_name("qwen2-vl-2b", None)
        == benchmarks.paper_name("Qwen/Qwen2-VL-2B-Instruct", None)
        == "Qwen2-VL-2B"
    )


def test_stored_embeddings_can_be_set_beside_a_row_of_the_paper(tmp_path, capsys):
    flickr(tmp_path)
    emb = {"image_emb": directions(0, 90, 180), "text_emb": directions(0, 0, 90, 90, 180, 180)}
    assert (
        evaluated(tmp_path, "flickr30k", "--row", "CLIP (ViT-L)", **emb)["paper_row"]
        == "CLIP (ViT-L)"
    )
    assert "paper: CLIP (ViT-L)" in capsys.readouterr().out
    assert "is no row" in refusal(tmp_path, "flickr30k", "--row", "clip")
