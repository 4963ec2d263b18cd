"""Metrics against naive loops and hand-made cases; the benchmark of scenes; the command line."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import shaken
from PIL import Image

import data
import eval as benchmarks
from model import read_config
from vladva import Settings, VladVA, attention_density, output_entropy


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


def test_scores_of_an_oracle_are_the_ceiling():
    """Embeddings that say which captions are true of which scene: every category 100, retrieval at its ceiling up to ties."""
    bench = benchmarks.scene_benchmark(7, gallery=60, items=20)
    truth = {}
    for i in range(len(bench.scenes)):
        for items in bench.negatives.values():
            truth |= {(i, t): 1.0 for s, *true, _ in items if s == i for t in true}
        for items in bench.pairs.values():
            truth |= {(scenes[k], texts[k]): 1.0 for scenes, texts in items for k in (0, 1)}
    sim = torch.zeros(len(bench.scenes), len(bench.texts))
    for (i, t), value in truth.items():
        sim[i, t] = value
    sim[torch.arange(60), torch.arange(60)] = 2.0
    results = benchmarks.score(bench, sim, torch.eye(len(bench.texts)))
    assert set(results["negatives"].values()) == {100.0} and set(results["groups"].values()) == {
        100.0
    }
    assert all(
        scores == {"text": 100, "image": 100, "group": 100}
        for scores in results["winoground"].values()
    )
    assert 50 < results["ceiling"]["text_to_image"] <= 100


def test_group_means_are_plain_means_of_their_categories():
    bench = benchmarks.scene_benchmark(7, gallery=10, items=15)
    torch.manual_seed(0)
    results = benchmarks.score(
        bench, torch.randn(len(bench.scenes), 8), torch.randn(len(bench.texts), 8)
    )
    swaps = [results["negatives"][c] for c in ("swap_obj", "swap_att", "swap_pos")]
    assert results["groups"]["Swap"] == pytest.approx(sum(swaps) / 3)


def test_the_ceiling_counts_captions_that_fit_several_scenes():
    bench = benchmarks.scene_benchmark(7, gallery=80, items=1)
    captions = [
        data.short_caption(data.make_scene(7, i), random.Random(f"captions 7 {i}"))
        for i in range(80)
    ]
    fits = [
        sum(data.is_true(caption, scene) for scene in bench.scenes[:80]) for caption in captions
    ]
    assert bench.ceiling["text_to_image"] == pytest.approx(100 * sum(1 / n for n in fits) / 80)


def test_long_captions_are_read_back():
    for i in range(200):
        scene = data.make_scene(0, i)
        told = benchmarks.read_caption(data.long_caption(scene, random.Random(i)))
        assert told == {thing.kind: data.POSITIONS[thing.cell] for thing in scene.things}


def test_caption_accuracy_counts_by_hand(random_model, monkeypatch):
    """Two scenes: one told right, one with every object in a wrong place and one invented."""
    scenes = [data.make_scene(3, i) for i in range(2)]
    right = " ".join(
        f"{thing.phrase()} {data.POSITIONS[thing.cell]}." for thing in scenes[0].things
    )
    wrong = " ".join(
        f"{thing.phrase()} {data.POSITIONS[(thing.cell + 1) % 9]}." for thing in scenes[1].things
    )
    absent = next(
        f"a {c} {s}"
        for c in ("red", "blue")
        for s in data.SHAPES
        if (c, s) not in {thing.kind for thing in scenes[1].things}
    )
    answers = iter([[right, f"{wrong} {absent} center."], ["nowhere", "nowhere"]])
    monkeypatch.setattr(random_model, "generate_batch", lambda *_, **__: next(answers))
    scores = benchmarks.caption_accuracy(random_model, 3, 2)
    total = len(scenes[0].things) + len(scenes[1].things)
    assert scores["named"] == 100 and scores["placed"] == pytest.approx(
        100 * len(scenes[0].things) / total
    )
    assert scores["invented"] == pytest.approx(100 / total) and scores["where"] == 0


def test_the_command_prints_the_table_and_writes_the_same_numbers(random_folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    benchmarks.main(
        ["--model", str(random_folder), "--gallery", "20", "--items", "5", "--json", str(file)]
    )
    table, written = capsys.readouterr().out, json.loads(file.read_text())
    assert (
        written["gallery"] == 20
        and written["scene_seed"] == benchmarks.TEST_SEED
        and written["image_mode"] == "crop"
    )
    for line in (
        "swap att",
        "Replace, mean",
        "image to text R@10",
        "pairs, relation exchanged: group",
    ):
        assert line in table
    assert f"{written['negatives']['swap_att']:.1f}" in table
    benchmarks.main(
        ["--model", str(random_folder), "--task", "captions", "--items", "3", "--json", str(file)]
    )
    assert json.loads(file.read_text())["objects"] > 0


def test_bad_requests_are_one_line_and_exit_code_2(random_folder, capsys):
    for arguments, message in (
        (["--model", "nowhere"], "no model folder"),
        (["--gallery", "1"], "--gallery 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            benchmarks.main(arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        benchmarks.main(["--no-such-flag"])


# ------------------------------------------------------------------------------------------------------ published benchmarks, in miniature


def test_caption_loss_is_the_mean_over_all_tokens_in_batches_of_any_size(random_model):
    """Not the mean of batch means: captions differ in length."""
    captioned = benchmarks.captioned_scenes(7, 5, 96)
    rows = [{"image": picture, "short": None, "long": long} for picture, long in captioned]
    batch = random_model.training_batch(rows)
    with torch.no_grad():
        wanted = random_model.losses(random_model.outputs(batch), batch.targets)[1].item()
    for size in (1, 2, 5):
        found = benchmarks.caption_loss(random_model, captioned, batch=size)
        assert found == {"loss": pytest.approx(wanted, rel=1e-5), "tokens": len(batch.targets)}


@pytest.fixture(scope="module")
def adapter(random_folder, tmp_path_factory):
    """The folder of a shaken adapter of the random model."""
    folder = tmp_path_factory.mktemp("adapter")
    shaken(VladVA.from_pretrained(random_folder, settings=Settings(rank=4))).save_adapter(folder)
    return folder


def study(task, model, out, *flags):
    """The numbers that a study writes."""
    benchmarks.main(
        ["--task", task, "--model", str(model), "--items", "6", "--out", str(out), *map(str, flags)]
    )
    return json.loads((out / f"{task}.json").read_text())


@pytest.mark.parametrize("task", ["tokens", "attention", "soft-prompts", "layers"])
def test_a_study_writes_numbers_before_and_after(
    task, random_folder, adapter, tmp_path, monkeypatch, capsys
):
    """With matplotlib out of the way: the numbers are written all the same, and one line says what is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = study(task, random_folder, tmp_path, "--adapter", adapter)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))
    model = VladVA.from_pretrained(random_folder, adapter=adapter)
    pictures, captions = zip(*((data.render(s), str(data.short_caption(s, random.Random(f"captions 2000 {i}"))))
                               for i, s in enumerate(data.make_scene(2000, i) for i in range(6))))  # fmt: skip
    recall = lambda a, b: pytest.approx(
        benchmarks.recall_at(a, b, torch.arange(6))["image_to_text"]["R@1"]
    )
    if task == "tokens":
        logits = model.lvlm.head(model.text_states(list(captions)))
        assert found["measures"]["after"]["text entropy"] == pytest.approx(
            output_entropy(logits).mean().item(), rel=1e-5
        )
        best = model.tokenizer.decode([logits[1].argmax().item()])
        assert found["tokens"]["after"]["text"][1][0] == [
            best,
            pytest.approx(logits[1].softmax(-1).max().item(), rel=1e-4),
        ]
        assert found["measures"]["before"] != found["measures"]["after"]
    if task == "attention":
        after = [
            attention_density(model.summary_attention(picture))[0].mean().item()
            for picture in pictures
        ]
        assert found["density"]["after"]["entropy"] == pytest.approx(sum(after) / 6, rel=1e-5)
        assert (
            found["density"]["before"]["entropy"]
            != found["density"]["after"]["entropy"]
            < found["entropy when uniform"]
        )
    if task == "soft-prompts":
        hand = "".join(row[0] for row in found["image"]).strip()
        assert hand == Settings.image_prompt and all(
            -1 <= row[2] < 0.9999 for row in found["image"] + found["text"]
        )
    if task == "layers":
        assert found["layers"]["after"][-1]["image to text R@1"] == recall(
            model.encode_image(list(pictures)), model.encode_text(list(captions))
        )
        assert [len(rows) for rows in found["layers"].values()] == [2, 2] and {
            "Replace",
            "Swap",
            "Add",
        } < found["layers"]["before"][0].keys()


def test_prompts_are_measured_one_pair_at_a_time(random_folder, tmp_path):
    pairs = [
        {"image": f"{verb} the image.", "text": f"{verb} the text."}
        for verb in ("Describe", "Name", "Give", "Caption")
    ]
    write(tmp_path / "prompts.json", pairs)
    found = study("prompts", random_folder, tmp_path, "--prompts", tmp_path / "prompts.json")
    entropies = [row["entropy"] for row in found["prompts"]]
    assert entropies == sorted(entropies) and {row["image prompt"] for row in found["prompts"]} == {
        pair["image"] for pair in pairs
    }
    assert all(-1 <= c["rho"] <= 1 and 0 < c["p"] <= 1 for c in found["correlations"].values())


def test_the_committed_prompts_are_50_pairs_that_the_tiny_model_reads_word_by_word():
    pairs = json.loads(benchmarks.PROMPTS.read_text())
    tokenizer = data.Tokenizer(data.TINY, read_config(data.TINY))
    assert (
        len({pair["image"] for pair in pairs})
        == len({pair["text"] for pair in pairs})
        == len(pairs)
        == 50
    )
    for prompt in (text for pair in pairs for text in pair.values()):
        assert len(tokenizer.encode(prompt).ids) - 1 == len(re.findall(r"\w+|[^\w\s]", prompt)), (
            prompt
        )


@pytest.mark.filterwarnings(
    "ignore:Glyph|constrained_layout"
)  # a random model says what no font has
def test_generation_shows_every_model_and_that_switched_off_is_the_base(
    random_folder, adapter, tmp_path, capsys
):
    found = study("generation", random_folder, tmp_path, "--adapter", adapter, "--rival", adapter)
    assert found["adapter off equals base"] and set(found["answers"]) == {
        "base",
        "adapter",
        "adapter off",
        "rival",
    }
    assert found["answers"]["rival"] == found["answers"]["adapter"] != found["answers"]["base"]
    assert "adapter off: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "task", ["prompts", "tokens", "attention", "soft-prompts", "layers", "generation"]
)
@pytest.mark.filterwarnings("ignore:Glyph|constrained_layout")
def test_studies_draw_their_pictures(task, random_folder, adapter, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is an extra")
    write(
        tmp_path / "prompts.json",
        [{"image": f"{verb} it.", "text": f"{verb} it."} for verb in ("Describe", "Name", "Give")],
    )
    adapted = [] if task == "prompts" else ["--adapter", adapter]
    study(task, random_folder, tmp_path, "--prompts", tmp_path / "prompts.json", *adapted)
    assert Image.open(tmp_path / f"{task}.png").width > 500


def test_studies_take_a_pairs_file_and_refuse_what_they_cannot_do(
    random_folder, adapter, tmp_path, capsys
):
    rows = []
    for i in range(4):
        data.render(data.make_scene(3, i)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "short": f"a red circle {i}"})
    write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows)))
    assert (
        study("layers", random_folder, tmp_path, "--data", tmp_path / "pairs.jsonl")["pictures"]
        == 4
    )
    write(tmp_path / "prompts.json", [{"image": "Describe it."}] * 3)
    refused = {
        "no soft prompts to decode": ["--task", "soft-prompts"],
        "adapted model": ["--task", "prompts", "--adapter", str(adapter)],
        "wanted a list of two or more": [
            "--task",
            "prompts",
            "--prompts",
            str(tmp_path / "prompts.json"),
        ],
        "at least 2 are needed": [
            "--task",
            "tokens",
            "--data",
            str(tmp_path / "pairs.jsonl"),
            "--items",
            "1",
        ],
    }
    for message, flags in refused.items():
        with pytest.raises(SystemExit) as stopped:
            benchmarks.main([*flags, "--model", str(random_folder), "--out", str(tmp_path)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


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
        data.render(data.make_scene(5, number)).save(tmp_path / name)
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
