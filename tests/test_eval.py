"""Metrics against naive loops and hand-made cases; the benchmark of scenes; the command line."""

import json
import random

import pytest
import torch

import data
import eval as benchmarks


def naive_recall(sim, owner, k):
    """The definitions, one query at a time; no ties in the table."""
    texts = [owner[j] in sorted(range(len(sim)), key=lambda i: -sim[i][j])[:k] for j in range(len(owner))]
    images = [any(owner[j] == i for j in sorted(range(len(owner)), key=lambda j: -sim[i][j])[:k]) for i in range(len(sim))]
    return 100 * sum(images) / len(images), 100 * sum(texts) / len(texts)


def test_recall_equals_a_naive_loop():
    """Several captions an image, as in Flickr30k."""
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
    sim = torch.randn(6, 10)
    found = benchmarks.recall_at(sim, owner, ks=(1, 2, 3))
    for k in (1, 2, 3):
        images, texts = naive_recall(sim.tolist(), owner.tolist(), k)
        assert found["image_to_text"][f"R@{k}"] == pytest.approx(images) and found["text_to_image"][f"R@{k}"] == pytest.approx(texts)


def test_recall_of_perfect_and_of_constant_embeddings():
    assert benchmarks.recall_at(torch.eye(4), torch.arange(4))["text_to_image"]["R@1"] == 100
    constant = benchmarks.recall_at(torch.ones(4, 4), torch.arange(4), ks=(1, 4))  # a tie counts against the model
    assert constant["text_to_image"] == constant["image_to_text"] == {"R@1": 0, "R@4": 100}


def test_negative_accuracy_is_strict():
    assert benchmarks.negative_accuracy(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 4.0, 3.0])) == 50


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
    assert set(results["negatives"].values()) == {100.0} and set(results["groups"].values()) == {100.0}
    assert all(scores == {"text": 100, "image": 100, "group": 100} for scores in results["winoground"].values())
    assert 50 < results["ceiling"]["text_to_image"] <= 100


def test_group_means_are_plain_means_of_their_categories():
    bench = benchmarks.scene_benchmark(7, gallery=10, items=15)
    torch.manual_seed(0)
    results = benchmarks.score(bench, torch.randn(len(bench.scenes), 8), torch.randn(len(bench.texts), 8))
    swaps = [results["negatives"][c] for c in ("swap_obj", "swap_att", "swap_pos")]
    assert results["groups"]["Swap"] == pytest.approx(sum(swaps) / 3)


def test_the_ceiling_counts_captions_that_fit_several_scenes():
    bench = benchmarks.scene_benchmark(7, gallery=80, items=1)
    captions = [data.short_caption(data.make_scene(7, i), random.Random(f"captions 7 {i}")) for i in range(80)]
    fits = [sum(data.is_true(caption, scene) for scene in bench.scenes[:80]) for caption in captions]
    assert bench.ceiling["text_to_image"] == pytest.approx(100 * sum(1 / n for n in fits) / 80)


def test_long_captions_are_read_back():
    for i in range(200):
        scene = data.make_scene(0, i)
        told = benchmarks.read_caption(data.long_caption(scene, random.Random(i)))
        assert told == {thing.kind: data.POSITIONS[thing.cell] for thing in scene.things}


def test_caption_accuracy_counts_by_hand(random_model, monkeypatch):
    """Two scenes: one told right, one with every object in a wrong place and one invented."""
    scenes = [data.make_scene(3, i) for i in range(2)]
    right = " ".join(f"{thing.phrase()} {data.POSITIONS[thing.cell]}." for thing in scenes[0].things)
    wrong = " ".join(f"{thing.phrase()} {data.POSITIONS[(thing.cell + 1) % 9]}." for thing in scenes[1].things)
    absent = next(f"a {c} {s}" for c in ("red", "blue") for s in data.SHAPES if (c, s) not in {thing.kind for thing in scenes[1].things})
    answers = iter([[right, f"{wrong} {absent} center."], ["nowhere", "nowhere"]])
    monkeypatch.setattr(random_model, "generate_batch", lambda *_, **__: next(answers))
    scores = benchmarks.caption_accuracy(random_model, 3, 2)
    total = len(scenes[0].things) + len(scenes[1].things)
    assert scores["named"] == 100 and scores["placed"] == pytest.approx(100 * len(scenes[0].things) / total)
    assert scores["invented"] == pytest.approx(100 / total) and scores["where"] == 0


def test_the_command_prints_the_table_and_writes_the_same_numbers(random_folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    benchmarks.main(["--model", str(random_folder), "--gallery", "20", "--items", "5", "--json", str(file)])
    table, written = capsys.readouterr().out, json.loads(file.read_text())
    assert written["gallery"] == 20 and written["scene_seed"] == benchmarks.TEST_SEED and written["image_mode"] == "crop"
    for line in ("swap att", "Replace, mean", "image to text R@10", "pairs, relation exchanged: group"):
        assert line in table
    assert f"{written['negatives']['swap_att']:.1f}" in table
    benchmarks.main(["--model", str(random_folder), "--task", "captions", "--items", "3", "--json", str(file)])
    assert json.loads(file.read_text())["objects"] > 0


def test_bad_requests_are_one_line_and_exit_code_2(random_folder, capsys):
    for arguments, message in ((["--model", "nowhere"], "no model folder"), (["--gallery", "1"], "--gallery 1")):
        with pytest.raises(SystemExit) as stopped:
            benchmarks.main(arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        benchmarks.main(["--no-such-flag"])
