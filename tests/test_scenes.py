"""The scenes: what their captions promise, the benchmark made of them, and captions read back."""

import importlib.util
import json
import random
import re

import numpy as np
import pytest
import torch

import data
import eval as benchmarks
from extras import scenes

# ------------------------------------------------------------------------------------------------------ scenes


def test_a_scene_is_decided_by_seed_and_index_alone():
    first = scenes.scene_row(3, 7)
    scenes.make_scene(1, 1), random.random()
    again = scenes.scene_row(3, 7)
    assert first["image"].tobytes() == again["image"].tobytes() and (
        first["short"],
        first["long"],
    ) == (again["short"], again["long"])
    assert scenes.scene_row(3, 8)["short"] != first["short"] and scenes.make_scene(
        4, 7
    ) != scenes.make_scene(3, 7)


def test_scenes_keep_their_promises():
    for i in range(300):
        scene = scenes.make_scene(0, i)
        assert 2 <= len(scene.things) <= 4
        assert (
            len({thing.kind for thing in scene.things})
            == len({thing.cell for thing in scene.things})
            == len(scene.things)
        )


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
            middle = pixels[row * 64 + 16 : row * 64 + 48, col * 64 + 16 : col * 64 + 48].reshape(
                -1, 3
            )
            assert (middle == scenes.BACKGROUNDS[scene.background]).all()


def test_short_captions_are_true():
    for i in range(300):
        scene = scenes.make_scene(0, i)
        assert scenes.is_true(scenes.short_caption(scene, random.Random(i)), scene)


def test_long_captions_name_every_object_with_its_attributes_and_place():
    for i in range(200):
        scene = scenes.make_scene(0, i)
        caption = scenes.long_caption(scene, random.Random(i))
        assert all(
            thing.phrase(("size", "texture")) in caption and scenes.POSITIONS[thing.cell] in caption
            for thing in scene.things
        )
        assert scene.background in caption


def reads(text, scene):
    """An independent reading of a short caption by its words: is it true of the scene?"""
    text = (
        text.removeprefix("a picture of ")
        .removeprefix("an image of ")
        .removeprefix("there is ")
        .removeprefix("the image shows ")
    )
    text, _, background = text.partition(" on a ")
    if background and background.split()[0] != scene.background:
        return False
    found = []
    for word in ("left of", "right of", "above", "below"):
        text = text.replace(f" {word} ", f" | {word} | ")
    text = text.replace(", ", " ; ").replace(" and ", " ; ")
    relation = [part.strip() for part in text.split("|")][1] if "|" in text else None
    for phrase in text.replace(f"| {relation} |", ";").split(";"):
        words = phrase.split()[1:]
        place = words.pop() if words[-1] in scenes.POSITIONS else None
        match = [
            thing
            for thing in scene.things
            if list(thing.kind) == words[-2:]
            and all(word in (thing.size, thing.texture) for word in words[:-2])
        ]
        if not match or (place and scenes.POSITIONS[match[0].cell] != place):
            return False
        found.append(divmod(match[0].cell, 3))
    (row_a, col_a), (row_b, col_b) = found[:2]
    return (
        relation is None
        or {
            "left of": col_a < col_b,
            "right of": col_a > col_b,
            "above": row_a < row_b,
            "below": row_a > row_b,
        }[relation]
    )


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_hard_negatives_are_false_and_differ_by_one_edit(category):
    for i in range(200):
        scene, true, false = scenes.hard_negative(0, i, category)
        assert reads(true, scene) and not reads(false, scene), (true, false)
        assert scenes.hard_negative(0, i, category) == (scene, true, false)
        gained = len(false.split()) - len(true.split())
        if category.startswith("replace"):
            assert (
                sum(a != b for a, b in zip(true.split(), false.split())) <= 2 and gained == 0
            )  # "a red" -> "an orange" is two words
        if category.startswith("swap"):
            assert sorted(
                word for word in true.replace(",", "").split() if word not in ("a", "an")
            ) == sorted(word for word in false.replace(",", "").split() if word not in ("a", "an"))
        if category.startswith("add"):
            assert gained > 0


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_triples_hold_two_true_captions_and_a_false_one(category):
    """After SugarCrepe++; the first and the last are hard_negative's."""
    for i in range(100):
        scene, (true, same, false) = scenes.caption_triple(0, i, category)
        assert (scene, true, false) == scenes.hard_negative(0, i, category)
        assert same != true and reads(same, scene) and not reads(false, scene)
        assert {word for word in same.split() if word in scenes.COLOURS} == {
            word for word in true.split() if word in scenes.COLOURS
        }


@pytest.mark.parametrize("kind", scenes.WINOGROUND_KINDS)
def test_scene_pairs_use_the_same_words_and_each_caption_fits_one_scene(kind):
    for i in range(100):
        two, captions = scenes.scene_pair(0, i, kind)
        assert [[reads(caption, scene) for scene in two] for caption in captions] == [
            [True, False],
            [False, True],
        ]
        words = [
            sorted(word for word in caption.split() if word not in ("a", "an"))
            for caption in captions
        ]
        assert words[0] == words[1]


def test_questions_are_answered_right():
    for i in range(300):
        scene = scenes.make_scene(0, i)
        ask, answer = scenes.question(scene, random.Random(i))
        by_name = {" ".join(thing.kind): thing for thing in scene.things}
        if ask.startswith("where"):
            assert (
                answer
                == scenes.POSITIONS[by_name[ask.removeprefix("where is the ").rstrip("?")].cell]
            )
        else:
            (thing,) = [
                thing for thing in scene.things if f"at the {scenes.POSITIONS[thing.cell]}?" in ask
            ]
            assert answer == thing.phrase(("size", "texture"))


def test_what_is_held_out_of_pre_training_is_in_no_conversation_and_in_every_long_caption(
    monkeypatch,
):
    """Sizes, textures, relations: the long captions of the adaptation say them, the tiny model's recipe never does."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the recipe sets it when it is imported
    spec = importlib.util.spec_from_file_location("make_tiny", data.TINY.parent / "make_tiny.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    held_out = re.compile(
        r"\b(" + "|".join([*scenes.SIZES, *scenes.TEXTURES, *scenes.OPPOSITE]) + r")\b"
    )
    kinds = set()
    for i in range(600):
        scene, rng = scenes.make_scene(0, i, counts=(2, 3, 4, 7)), random.Random(i)
        for turns in (recipe.image_turns(scene, rng), recipe.text_turns(scene, rng)):
            assert not held_out.search(" ".join(part for turn in turns for part in turn)), turns
            kinds.add(len(turns))
        if len(scene.things) < 5:
            found = set(held_out.findall(scenes.long_caption(scene, rng)))
            assert (
                found & set(scenes.SIZES)
                and found & set(scenes.TEXTURES)
                and found & set(scenes.OPPOSITE)
            )
    assert kinds == {1, 2, 3, 4}


# ------------------------------------------------------------------------------------------------------ the benchmark


def test_scores_of_an_oracle_are_the_ceiling():
    """Embeddings that say which captions are true of which scene: every category 100, retrieval at its ceiling up to ties."""
    bench = scenes.scene_benchmark(7, gallery=60, items=20)
    truth = {}
    for i in range(len(bench.scenes)):
        for items in bench.negatives.values():
            truth |= {(i, t): 1.0 for s, *true, _ in items if s == i for t in true}
        for items in bench.pairs.values():
            truth |= {(two[k], texts[k]): 1.0 for two, texts in items for k in (0, 1)}
    sim = torch.zeros(len(bench.scenes), len(bench.texts))
    for (i, t), value in truth.items():
        sim[i, t] = value
    sim[torch.arange(60), torch.arange(60)] = 2.0
    results = scenes.score(bench, sim, torch.eye(len(bench.texts)))
    assert set(results["negatives"].values()) == {100.0} and set(results["groups"].values()) == {
        100.0
    }
    assert all(
        scores == {"text": 100, "image": 100, "group": 100}
        for scores in results["winoground"].values()
    )
    assert 50 < results["ceiling"]["text_to_image"] <= 100


def test_group_means_are_plain_means_of_their_categories():
    bench = scenes.scene_benchmark(7, gallery=10, items=15)
    torch.manual_seed(0)
    results = scenes.score(
        bench, torch.randn(len(bench.scenes), 8), torch.randn(len(bench.texts), 8)
    )
    swaps = [results["negatives"][c] for c in ("swap_obj", "swap_att", "swap_pos")]
    assert results["groups"]["Swap"] == pytest.approx(sum(swaps) / 3)


def test_the_ceiling_counts_captions_that_fit_several_scenes():
    bench = scenes.scene_benchmark(7, gallery=80, items=1)
    captions = [
        scenes.short_caption(scenes.make_scene(7, i), random.Random(f"captions 7 {i}"))
        for i in range(80)
    ]
    fits = [
        sum(scenes.is_true(caption, scene) for scene in bench.scenes[:80]) for caption in captions
    ]
    assert bench.ceiling["text_to_image"] == pytest.approx(100 * sum(1 / n for n in fits) / 80)


def test_long_captions_are_read_back():
    for i in range(200):
        scene = scenes.make_scene(0, i)
        told = scenes.read_caption(scenes.long_caption(scene, random.Random(i)))
        assert told == {thing.kind: scenes.POSITIONS[thing.cell] for thing in scene.things}


def test_caption_accuracy_counts_by_hand(random_model, monkeypatch):
    """Two scenes: one told right, one with every object in a wrong place and one invented."""
    two = [scenes.make_scene(3, i) for i in range(2)]
    right = " ".join(f"{thing.phrase()} {scenes.POSITIONS[thing.cell]}." for thing in two[0].things)
    wrong = " ".join(
        f"{thing.phrase()} {scenes.POSITIONS[(thing.cell + 1) % 9]}." for thing in two[1].things
    )
    absent = next(
        f"a {c} {s}"
        for c in ("red", "blue")
        for s in scenes.SHAPES
        if (c, s) not in {thing.kind for thing in two[1].things}
    )
    answers = iter([[right, f"{wrong} {absent} center."], ["nowhere", "nowhere"]])
    monkeypatch.setattr(random_model, "generate_batch", lambda *_, **__: next(answers))
    scores = scenes.caption_accuracy(random_model, 3, 2)
    total = len(two[0].things) + len(two[1].things)
    assert scores["named"] == 100 and scores["placed"] == pytest.approx(
        100 * len(two[0].things) / total
    )
    assert scores["invented"] == pytest.approx(100 / total) and scores["where"] == 0


def test_the_command_prints_the_table_and_writes_the_same_numbers(random_folder, tmp_path, capsys):
    file = tmp_path / "scores.json"
    scenes.main(
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
    scenes.main(
        ["--model", str(random_folder), "--task", "captions", "--items", "3", "--json", str(file)]
    )
    assert json.loads(file.read_text())["objects"] > 0


def test_bad_requests_are_one_line_and_exit_code_2(random_folder, capsys):
    for arguments, message in (
        (["--model", "nowhere"], "no model folder"),
        (["--gallery", "1"], "--gallery 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            scenes.main(arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    with pytest.raises(SystemExit):
        scenes.main(["--no-such-flag"])
