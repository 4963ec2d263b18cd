"""The scenes: what their captions promise, the benchmark made of them, and a model's own words."""

import hashlib
import importlib.util
import json
import random
import re

import numpy as np
import pytest
import torch

import data
from extras import scenes
from train import TrainConfig

# ------------------------------------------------------------------------------------------ scenes


@pytest.fixture
def recipe(monkeypatch):
    """assets/make_tiny.py as a module."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the recipe sets it when it is imported
    spec = importlib.util.spec_from_file_location("make_tiny", data.TINY.parent / "make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_scene_is_decided_by_seed_and_index_alone():
    first = scenes.scene_row(3, 7)
    scenes.make_scene(1, 1)
    random.random()
    again = scenes.scene_row(3, 7)
    assert first["image"].tobytes() == again["image"].tobytes()
    assert (first["short"], first["long"]) == (again["short"], again["long"])
    assert scenes.scene_row(3, 8)["short"] != first["short"]
    assert scenes.make_scene(4, 7) != scenes.make_scene(3, 7)


def test_the_random_streams_never_change():
    """The tiny weights and all recorded tables come of these; a rewrite must not touch them."""
    row = scenes.scene_row(0, 5)
    digest = hashlib.sha256()
    digest.update(row["image"].tobytes())
    texts = [row["short"], row["long"]]
    for category in scenes.CATEGORIES:
        texts += scenes.caption_triple(0, 5, category)[1]
    for kind in scenes.WINOGROUND_KINDS:
        texts += scenes.scene_pair(0, 5, kind)[1]
    digest.update("\n".join(texts).encode())
    assert digest.hexdigest()[:16] == "8ae6e8ca0a529ef5"


def test_scenes_keep_their_promises():
    for i in range(300):
        scene = scenes.make_scene(0, i)
        assert 2 <= len(scene.things) <= 4
        kinds = {thing.kind for thing in scene.things}
        cells = {thing.cell for thing in scene.things}
        assert len(kinds) == len(cells) == len(scene.things)


def test_every_object_is_drawn_in_its_cell_in_its_colour():
    for i in range(50):
        scene = scenes.make_scene(0, i)
        pixels = np.asarray(scenes.render(scene, 192)).astype(int)
        for thing in scene.things:
            row, col = divmod(thing.cell, scenes.GRID)
            cell = pixels[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64].reshape(-1, 3)
            assert (np.abs(cell - scenes.COLOURS[thing.colour]).sum(1) < 30).mean() > 0.02
        for empty in set(range(9)) - {thing.cell for thing in scene.things}:
            row, col = divmod(empty, scenes.GRID)
            top, left = row * 64 + 16, col * 64 + 16
            middle = pixels[top : top + 32, left : left + 32].reshape(-1, 3)
            assert (middle == scenes.BACKGROUNDS[scene.background]).all()


def test_short_captions_are_true():
    for i in range(300):
        scene = scenes.make_scene(0, i)
        assert scenes.is_true(scenes.short_caption(scene, random.Random(i)), scene)


def test_long_captions_name_every_object_with_its_attributes_and_place():
    for i in range(200):
        scene = scenes.make_scene(0, i)
        caption = scenes.long_caption(scene, random.Random(i))
        for thing in scene.things:
            assert thing.phrase(("size", "texture")) in caption
            assert scenes.POSITIONS[thing.cell] in caption
        assert scene.background in caption


def reads(text, scene):
    """An independent reading of a short caption by its words: is it true of the scene?"""
    for opening in ("a picture of ", "an image of ", "there is ", "the image shows "):
        text = text.removeprefix(opening)
    text, _, background = text.partition(" on a ")
    if background and background.split()[0] != scene.background:
        return False
    cells = []
    for word in ("left of", "right of", "above", "below"):
        text = text.replace(f" {word} ", f" | {word} | ")
    text = text.replace(", ", " ; ").replace(" and ", " ; ")
    relation = [part.strip() for part in text.split("|")][1] if "|" in text else None
    for phrase in text.replace(f"| {relation} |", ";").split(";"):
        words = phrase.split()[1:]
        place = words.pop() if words[-1] in scenes.POSITIONS else None
        *attributes, colour, shape = words
        match = [thing for thing in scene.things if thing.kind == (colour, shape)]
        if not match or not set(attributes) <= {match[0].size, match[0].texture}:
            return False
        if place and scenes.POSITIONS[match[0].cell] != place:
            return False
        cells.append(divmod(match[0].cell, 3))
    (row_a, col_a), (row_b, col_b) = cells[:2]
    truths = {
        None: True,
        "left of": col_a < col_b,
        "right of": col_a > col_b,
        "above": row_a < row_b,
        "below": row_a > row_b,
    }
    return truths[relation]


def content_words(caption):
    """The words of a caption in alphabetical order, without articles and commas."""
    words = caption.replace(",", "").split()
    return sorted(word for word in words if word not in ("a", "an"))


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_hard_negatives_are_false_and_differ_by_one_edit(category):
    for i in range(200):
        scene, (true, _, false) = scenes.caption_triple(0, i, category)
        assert reads(true, scene) and not reads(false, scene), (true, false)
        gained = len(false.split()) - len(true.split())
        if category.startswith("replace"):
            # "a red" -> "an orange" is two words
            changed = sum(a != b for a, b in zip(true.split(), false.split()))
            assert changed <= 2 and gained == 0
        if category.startswith("swap"):
            assert content_words(true) == content_words(false)
        if category.startswith("add"):
            assert gained > 0


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_triples_hold_two_true_captions_and_a_false_one(category):
    """After SugarCrepe++; an item is decided by seed, index and category alone."""
    for i in range(100):
        scene, (true, same, false) = scenes.caption_triple(0, i, category)
        assert scenes.caption_triple(0, i, category) == (scene, (true, same, false))
        assert same != true and reads(same, scene) and not reads(false, scene)
        colours = [{w for w in text.split() if w in scenes.COLOURS} for text in (true, same)]
        assert colours[0] == colours[1]


@pytest.mark.parametrize("kind", scenes.WINOGROUND_KINDS)
def test_scene_pairs_use_the_same_words_and_each_caption_fits_one_scene(kind):
    for i in range(100):
        (scene, mirrored), (first, second) = scenes.scene_pair(0, i, kind)
        assert reads(first, scene) and not reads(first, mirrored)
        assert reads(second, mirrored) and not reads(second, scene)
        assert content_words(first) == content_words(second)


def test_questions_are_answered_right(recipe):
    for i in range(300):
        scene = scenes.make_scene(0, i)
        ask, answer = recipe.question(scene, random.Random(i), scenes.ATTRIBUTES)
        if ask.startswith("where"):
            name = ask.removeprefix("where is the ").rstrip("?")
            (thing,) = [thing for thing in scene.things if " ".join(thing.kind) == name]
            assert answer == scenes.POSITIONS[thing.cell]
        else:
            place = ask.removeprefix("what is at the ").rstrip("?")
            (thing,) = [t for t in scene.things if scenes.POSITIONS[t.cell] == place]
            assert answer == thing.phrase(("size", "texture"))


def test_what_is_held_out_of_pre_training_is_in_no_conversation_and_in_every_long_caption(recipe):
    """Sizes, textures, relations: the adaptation's long captions say them, the recipe never."""
    words = "|".join([*scenes.SIZES, *scenes.TEXTURES, *scenes.OPPOSITE])
    held_out = re.compile(rf"\b({words})\b")
    num_turns = set()
    for i in range(600):
        scene = scenes.make_scene(0, i, counts=(2, 3, 4, 7))
        rng = random.Random(i)
        for turns in (recipe.image_turns(scene, rng), recipe.text_turns(scene, rng)):
            text = " ".join(" ".join(turn) for turn in turns)
            assert not held_out.search(text), turns
            num_turns.add(len(turns))
        if len(scene.things) < 5:
            present = set(held_out.findall(scenes.long_caption(scene, rng)))
            for values in (scenes.SIZES, scenes.TEXTURES, scenes.OPPOSITE):
                assert present & set(values)
    assert num_turns == {1, 2, 3, 4}


def test_with_sizes_taught_images_still_hold_textures_out_and_texts_nothing(recipe):
    """--teach-sizes: a size that an answer speaks of is right."""
    held_out = re.compile(rf"\b({'|'.join([*scenes.TEXTURES, *scenes.OPPOSITE])})\b")
    about_images, about_texts = [], []
    for i in range(400):
        scene = scenes.make_scene(0, i, counts=(2, 3, 4, 7))
        rng = random.Random(i)
        turns = recipe.image_turns(scene, rng, ("size",))
        about_images += [" ".join(turn) for turn in turns]
        about_texts += [" ".join(turn) for turn in recipe.text_turns(scene, rng, ("size",))]
        for ask, answer in turns:
            for thing in scene.things:
                name = " ".join(thing.kind)
                assert ask != f"what size is the {name}?" or answer == thing.size
                for size in set(scenes.SIZES) - {thing.size}:
                    assert f"{size} {name}" not in answer
    assert not held_out.search(" ".join(about_images))
    for values in (scenes.TEXTURES, scenes.OPPOSITE):
        assert set(values) <= set(re.findall(r"left of|right of|\w+", " ".join(about_texts)))
    for texts in (about_images, about_texts):
        assert set(scenes.SIZES) <= set(" ".join(texts).replace(",", "").split())
    vocabulary = recipe.make_tokenizer(("size",)).get_vocab()
    assert {"Ġsize", "Ġeach"} <= vocabulary.keys()


# ----------------------------------------------------------------------------------- the benchmark


def test_an_oracle_scores_100_in_all_categories():
    """Its embeddings say which captions are true of which scene."""
    bench = scenes.scene_benchmark(7, 60, 20, 96)
    sim = torch.zeros(len(bench.images), len(bench.texts))
    for i, scene in enumerate(bench.images.scenes):
        for t, text in enumerate(bench.texts):
            sim[i, t] = float(reads(text, scene))
    sim[torch.arange(60), torch.arange(60)] = 2.0
    scores = bench.score(sim, torch.eye(len(bench.texts)))
    for name, value in scores.items():
        if "TOT" not in name:  # the oracle's texts lie at right angles to one another
            assert value == 100, name
    assert {f"pairs {kind} group" for kind in scenes.WINOGROUND_KINDS} <= scores.keys()
    assert {*scenes.CATEGORIES, *scenes.GROUPS, "Swap ITT", "swap_pos TOT"} <= scores.keys()


def test_group_means_are_plain_means_of_their_categories():
    bench = scenes.scene_benchmark(7, 10, 15, 96)
    torch.manual_seed(0)
    scores = bench.score(torch.randn(len(bench.images), 8), torch.randn(len(bench.texts), 8))
    for suffix in ("", " ITT", " TOT"):
        swaps = [scores[category + suffix] for category in ("swap_obj", "swap_att", "swap_pos")]
        assert scores["Swap" + suffix] == pytest.approx(sum(swaps) / 3)


def test_scenes_of_a_benchmark_are_rendered_when_they_are_indexed():
    """A gallery of 1,000 with its items holds some 7,000 images: 2 GB at 336 pixels a side."""
    bench = scenes.scene_benchmark(7, 4, 2, 64)
    assert bench.images[3].size == (64, 64)
    assert bench.images[3].tobytes() == scenes.render(scenes.make_scene(7, 3), 64).tobytes()


def test_a_run_holds_out_as_many_scenes_as_it_says_and_measures_them(random_model):
    config = TrainConfig(holdout=6, num_scenes=40, seed=3, eval_seed=7)
    rows, held_out = scenes.open_scenes(config, random_model)
    assert len(rows) == 40 and rows.row(1, None)["where"] == "scene 1"
    assert len(held_out) == 6
    side = random_model.lvlm.config.vision.image_size
    image = scenes.render(scenes.make_scene(7, 2), side)
    assert held_out.benchmark.images[2].tobytes() == image.tobytes()
    assert held_out.benchmark.texts[2] == str(scenes.described_scene(7, 2)[1])
    measured = held_out.measure(random_model)
    assert measured.sim.shape == (6, 6) and measured.caption_loss > 0
    assert held_out.chance.keys() <= measured.scores.keys()
    assert held_out.chance["image_to_text R@1"] == pytest.approx(100 / 6)
    assert held_out.chance["image_to_text R@10"] == 100
    assert held_out.chance["Swap"] == 50
    assert held_out.chance["pairs colour group"] == pytest.approx(100 / 6)
    assert len(scenes.open_scenes(TrainConfig(holdout=0), random_model)[1]) == 0


def test_caption_accuracy_of_true_captions_is_100(random_model, monkeypatch):
    """All wordings of a long caption are read, and relations are not taken for positions."""
    captions, answers = [], []
    for i in range(100):
        scene = scenes.make_scene(0, i)
        captions.append(scenes.long_caption(scene, random.Random(i)))
        target = random.Random(f"where 0 {i}").choice(scene.things)
        answers.append(scenes.POSITIONS[target.cell])
    replies = iter([captions, answers])
    monkeypatch.setattr(random_model, "generate_batch", lambda *_: next(replies))
    scores = scenes.caption_accuracy(random_model, 0, 100)
    assert (scores["named"], scores["placed"], scores["where"]) == (100, 100, 100)
    for name in scenes.ATTRIBUTES:
        assert scores[f"{name} said"] == scores[f"{name} right"] == 100


def test_caption_accuracy_counts_by_hand(random_model, monkeypatch):
    """Three scenes: one is described right, one with all objects misplaced, one in relations."""
    first, second, third = (scenes.make_scene(3, i) for i in range(3))
    right, wrong = [], []
    for thing in first.things:
        size = scenes.replace(thing, size="large", texture="plain").phrase(["size"])
        right.append(f"{size} {scenes.POSITIONS[thing.cell]}.")
    for thing in second.things:
        wrong.append(f"{thing.phrase()} {scenes.POSITIONS[(thing.cell + 1) % 9]}.")
        # what comes second about an object does not count
        wrong.append(f"{thing.phrase()} {scenes.POSITIONS[thing.cell]}.")
    a, b = third.things[:2]
    related = f"the {' '.join(a.kind)} is above the {' '.join(b.kind)}."
    replies = iter([[" ".join(right), " ".join(wrong), related], ["nowhere"] * 3])
    monkeypatch.setattr(random_model, "generate_batch", lambda *_: next(replies))
    scores = scenes.caption_accuracy(random_model, 3, 3)
    described = len(first.things) + len(second.things)
    total = described + len(third.things)
    assert scores["objects"] == total and scores["where"] == 0
    assert scores["named"] == pytest.approx(100 * described / total)
    assert scores["placed"] == pytest.approx(100 * len(first.things) / total)
    # sizes were said of the first scene's objects alone
    large = [thing.size == "large" for thing in first.things]
    assert 0 < sum(large) < len(large)
    assert scores["size said"] == pytest.approx(100 * len(large) / described)
    assert scores["size right"] == pytest.approx(100 * sum(large) / len(large))
    assert scores["texture said"] == 0 and "texture right" not in scores


def test_the_command_prints_the_table_and_writes_the_same_numbers(random_folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    flags = ["--model", str(random_folder), "--json", str(file)]
    scenes.main([*flags, "--holdout", "10"])
    table = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["counts"] == {"scenes": 10, "items a category": 5}
    assert written["seed"] == scenes.TEST_SEED == TrainConfig().eval_seed
    assert {*scenes.CATEGORIES, "Swap TOT", "pairs colour text"} <= written["scores"].keys()
    # the table has a run's rows, the file all scores
    rows = table.splitlines()[2:]
    for name in scenes.HeldOutScenes(1, 10, 32).chance:
        (row,) = [row for row in rows if row.startswith(name.replace("_", " ") + "  ")]
        assert row.endswith(f" {written['scores'][name]:.1f}")
    scenes.main([*flags, "--task", "captions", "--holdout", "3"])
    assert json.loads(file.read_text())["objects"] > 0
    assert "\nplaced " in capsys.readouterr().out


def test_bad_requests_are_one_line_and_exit_code_2(random_folder, capsys):
    for arguments, message in (
        (["--model", "nowhere"], "no model"),
        (["--holdout", "1"], "--holdout 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            scenes.main(arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        scenes.main(["--no-such-flag"])
