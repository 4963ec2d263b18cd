"""Files and scenes: pictures of any mode, preprocessing step by step, pairs refused by line, captions true and negatives false."""

import importlib.util
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from model import parse_config, read_json

SETTINGS = parse_config(read_json(data.NAMES["tiny"] / "config.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.NAMES["tiny"], SETTINGS)


# ------------------------------------------------------------------------------------------------------ pictures


def gradient(size=(40, 30)):
    x = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(x.astype(np.uint8))


@pytest.mark.parametrize(
    "mode",
    ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"],
)
def test_every_mode_becomes_rgb(mode):
    source = (
        gradient().convert("L").convert("I").point(lambda v: v * 256).convert("I;16")
        if mode == "I;16"
        else gradient().convert("P").convert("PA")
        if mode == "PA"
        else gradient().convert("RGB" if mode == "LAB" else mode)
    )
    image = data.open_image(source)
    assert image.mode == "RGB" and image.size == (40, 30)
    assert (
        np.asarray(image).max() > 150 and np.asarray(image).min() < 60
    )  # neither white nor black all over


def test_sixteen_bit_greys_keep_their_upper_bits():
    image = Image.fromarray(np.array([[0, 128 << 8, 255 << 8]], dtype=np.uint16))
    assert np.asarray(data.open_image(image))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    image, exif = gradient(), Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert data.open_image(tmp_path / "turned.jpg").size == (30, 40)


def write_broken(folder):
    gradient((200, 200)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    gradient((200, 200)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    (folder / "notes.png").write_text("these are not the pixels you are looking for")
    (folder / "empty.jpg").write_bytes(b"")


@pytest.mark.parametrize(
    "name, message",
    [
        ("cut.jpg", "cannot be decoded"),
        ("cut.png", "cannot be decoded"),
        ("notes.png", "cannot be decoded"),
        ("empty.jpg", "cannot be decoded"),
        ("no.jpg", "no such picture"),
        ("", "no such picture"),
    ],
)
def test_broken_pictures_are_named(tmp_path, name, message):
    write_broken(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        data.open_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


# ------------------------------------------------------------------------------------------------------ preprocessing


def processor(folder, mode="crop", **changes):
    raw = read_json(data.NAMES["tiny"] / "preprocessor_config.json") | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    return data.ImageProcessor(folder, SETTINGS, mode)


@pytest.mark.parametrize(
    "size, resized, box",
    [
        ((300, 200), (144, 96), (24, 0, 120, 96)),
        ((200, 301), (96, 144), (0, 24, 96, 120)),
        ((50, 50), (96, 96), (0, 0, 96, 96)),
    ],
)
def test_crop_resizes_the_short_edge_and_cuts_the_centre(tmp_path, size, resized, box):
    picture = gradient(size)
    cut = np.asarray(picture.resize(resized, Image.Resampling.BICUBIC).crop(box)) / 255
    wanted = ((cut - data.CLIP_MEAN) / data.CLIP_STD).transpose(2, 0, 1)
    torch.testing.assert_close(
        processor(tmp_path)(picture),
        torch.tensor(wanted, dtype=torch.float32),
        atol=1e-6,
        rtol=1e-6,
    )


def test_pad_keeps_the_whole_picture_on_the_mean_colour(tmp_path):
    pixels = processor(tmp_path, "pad")(Image.new("RGB", (96, 48), (255, 0, 0)))
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(data.CLIP_MEAN)) / torch.tensor(data.CLIP_STD)
    torch.testing.assert_close(pixels[:, 48, 48], red, atol=1e-5, rtol=1e-5)
    assert pixels[:, 2, 48].abs().max() < 0.02  # (122, 116, 104) is the mean up to rounding down
    assert pixels.shape == (3, 96, 96)


def test_only_the_named_steps_are_done(tmp_path):
    pixels = processor(tmp_path, do_rescale=False, do_normalize=False, do_resize=False)(
        gradient((96, 96))
    )
    assert torch.equal(
        pixels, torch.tensor(np.asarray(gradient((96, 96))).transpose(2, 0, 1).astype(np.float32))
    )


def test_preprocessing_that_does_not_fit_the_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="crop_size"):
        processor(tmp_path, crop_size={"height": 80, "width": 80})
    with pytest.raises(ValueError, match="vision tower takes 96 x 96"):
        processor(tmp_path, do_center_crop=False)(gradient((300, 200)))
    with pytest.raises(ValueError, match="'crop' or 'pad'"):
        processor(tmp_path, "squash")


# ------------------------------------------------------------------------------------------------------ tokenizer


def test_one_bos_and_scene_words_are_single_tokens(tokenizer):
    encoding = tokenizer.encode("a red circle top-left")
    assert (
        encoding.ids[0] == tokenizer.bos_id and len(encoding.ids) == 5
    )  # "a" without a blank, then one token a word


def test_captions_keep_the_papers_lengths(tokenizer):
    """Paper Sec. 3.2: short captions under 30 tokens, long ones 30 to 500 (here at most 120)."""
    rows = [
        (
            str(data.short_caption(data.make_scene(9, i), random.Random(i))),
            data.long_caption(data.make_scene(9, i), random.Random(i)),
        )
        for i in range(500)
    ]
    count = lambda text: len(tokenizer.encode(text).ids) - 1
    assert max(count(short) for short, _ in rows) < 30
    assert (
        30 <= min(count(long) for _, long in rows) and max(count(long) for _, long in rows) <= 120
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    raw = json.loads((data.NAMES["tiny"] / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["content"] = token["content"].replace("<image>", "<picture>")
    raw["model"]["vocab"] = {
        key.replace("<image>", "<picture>"): value for key, value in raw["model"]["vocab"].items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="do not belong together"):
        data.Tokenizer(tmp_path, SETTINGS)


# ------------------------------------------------------------------------------------------------------ pairs


def pairs_file(folder, *lines):
    write_broken(folder)
    path = folder / "pairs.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return path


GOOD = [
    {"image": "whole.jpg", "short": "a gradient"},
    {"image": "whole.png", "short": ["one", "two"], "long": "a long caption"},
]
BAD = {
    "missing picture": ({"image": "no.jpg", "short": "x"}, "no.jpg not found"),
    "truncated picture": ({"image": "cut.jpg", "short": "x"}, "cannot be decoded"),
    "not a picture": ({"image": "notes.png", "short": "x"}, "cannot be decoded"),
    "empty caption": ({"image": "whole.jpg", "short": " "}, "empty caption"),
    "empty caption in a list": ({"image": "whole.jpg", "short": ["a", ""]}, "empty caption"),
    "malformed line": ('{"image": "whole.jpg", "short": ', "not a JSON object"),
    "not an object": ('["whole.jpg", "x"]', "wanted"),
    "unknown key": ({"image": "whole.jpg", "short": "x", "caption": "y"}, "unknown key 'caption'"),
    "no caption": ({"image": "whole.jpg"}, "neither a short nor a long"),
    "wrong type": ({"image": "whole.jpg", "short": 3}, "wanted a caption"),
    "special token": ({"image": "whole.jpg", "short": "an <image>"}, "special token"),
}


def test_good_rows_are_read_and_null_means_absent(tmp_path, tokenizer):
    pairs = data.Pairs(
        pairs_file(tmp_path, *GOOD, {"image": "whole.png", "short": None, "long": "words"}),
        tokenizer,
    )
    assert len(pairs) == 3 and pairs.bad == []
    assert {pairs.row(1, random.Random(i))["short"] for i in range(20)} == {"one", "two"}
    assert (
        pairs.row(0, random.Random(0))["long"] is None
        and pairs.row(2, random.Random(0))["short"] is None
    )


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, tokenizer, kind):
    row, message = BAD[kind]
    with pytest.raises(data.BadRow, match=message) as error:
        data.Pairs(pairs_file(tmp_path, *GOOD, row), tokenizer)
    assert "pairs.jsonl:3: " in str(error.value)


def test_rows_beyond_the_checked_ones_show_their_faults_when_drawn(
    tmp_path, tokenizer, monkeypatch
):
    """As in a file of millions: it is opened without reading it all. Blank lines and a missing line feed at the end are no rows and no fault."""
    monkeypatch.setattr(data.Pairs, "CHECKED", 3)
    path = pairs_file(
        tmp_path, GOOD[0], "  ", GOOD[1], *GOOD, BAD["truncated picture"][0], BAD["unknown key"][0]
    )
    path.write_text(
        path.read_text(encoding="utf-8").rstrip("\n").replace("a gradient", "a\u2028gradient"),
        encoding="utf-8",
    )
    pairs = data.Pairs(path, tokenizer)
    assert len(pairs) == 6 and pairs.row(2, random.Random(0))["where"].endswith("pairs.jsonl:4")
    assert (
        pairs.row(0, random.Random(0))["short"] == "a\u2028gradient"
    )  # a line ends at a line feed only
    for index, message in ((4, "jsonl:6: .*cannot be decoded"), (5, "jsonl:7: unknown key")):
        with pytest.raises(data.BadRow, match=message):
            pairs.row(index, random.Random(0))


def test_line_starts_do_not_depend_on_the_size_of_a_read(tmp_path):
    (tmp_path / "a").write_bytes(b"one\n\nthree \xe2\x80\xa8\nlast")
    for chunk in (1, 3, 4, 100):
        assert data.line_starts(tmp_path / "a", chunk).tolist() == [0, 4, 5, 15, 19]
    (tmp_path / "empty").write_bytes(b"")
    assert data.line_starts(tmp_path / "empty").tolist() == [0]


def test_rows_held_out_are_not_trained_on(tmp_path, tokenizer):
    rows = [
        dict(GOOD[0], short=f"number {i}")
        if i % 2
        else dict(GOOD[1], short=None, long=f"number {i}")
        for i in range(20)
    ]
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    chosen = pairs.held_out(6)
    left = [pairs.row(i, random.Random(0)) for i in range(len(pairs))]
    assert len(chosen) == 6 and len(left) == 14 and all(row["short"] for row in chosen)
    assert not {row["where"] for row in chosen} & {row["where"] for row in left}


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, tokenizer):
    pairs = data.Pairs(
        pairs_file(tmp_path, *GOOD, *(row for row, _ in BAD.values())), tokenizer, "skip"
    )
    assert len(pairs) == 2 and len(pairs.bad) == len(BAD)
    with pytest.raises(ValueError, match="1 usable rows"):
        data.Pairs(pairs_file(tmp_path, GOOD[0], BAD["no caption"][0]), tokenizer, "skip")


# ------------------------------------------------------------------------------------------------------ scenes


def test_a_scene_is_decided_by_seed_and_index_alone():
    first = data.scene_row(3, 7)
    data.make_scene(1, 1), random.random()
    again = data.scene_row(3, 7)
    assert first["image"].tobytes() == again["image"].tobytes() and (
        first["short"],
        first["long"],
    ) == (again["short"], again["long"])
    assert data.scene_row(3, 8)["short"] != first["short"] and data.make_scene(
        4, 7
    ) != data.make_scene(3, 7)


def test_scenes_keep_their_promises():
    for i in range(300):
        scene = data.make_scene(0, i)
        assert 2 <= len(scene.things) <= 4
        assert (
            len({thing.kind for thing in scene.things})
            == len({thing.cell for thing in scene.things})
            == len(scene.things)
        )


def test_every_object_is_drawn_in_its_cell_in_its_colour():
    for i in range(50):
        scene = data.make_scene(0, i)
        pixels = np.asarray(data.render(scene, 192)).astype(int)
        for thing in scene.things:
            row, col = divmod(thing.cell, data.GRID)
            cell = pixels[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64].reshape(-1, 3)
            assert (np.abs(cell - data.COLOURS[thing.colour]).sum(1) < 30).mean() > 0.02
        for empty in set(range(9)) - {thing.cell for thing in scene.things}:
            row, col = divmod(empty, data.GRID)
            middle = pixels[row * 64 + 16 : row * 64 + 48, col * 64 + 16 : col * 64 + 48].reshape(
                -1, 3
            )
            assert (middle == data.BACKGROUNDS[scene.background]).all()


def test_short_captions_are_true():
    for i in range(300):
        scene = data.make_scene(0, i)
        assert data.is_true(data.short_caption(scene, random.Random(i)), scene)


def test_long_captions_name_every_object_with_its_attributes_and_place():
    for i in range(200):
        scene = data.make_scene(0, i)
        caption = data.long_caption(scene, random.Random(i))
        assert all(
            thing.phrase(("size", "texture")) in caption and data.POSITIONS[thing.cell] in caption
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
        place = words.pop() if words[-1] in data.POSITIONS else None
        match = [
            thing
            for thing in scene.things
            if list(thing.kind) == words[-2:]
            and all(word in (thing.size, thing.texture) for word in words[:-2])
        ]
        if not match or (place and data.POSITIONS[match[0].cell] != place):
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


@pytest.mark.parametrize("category", data.CATEGORIES)
def test_hard_negatives_are_false_and_differ_by_one_edit(category):
    for i in range(200):
        scene, true, false = data.hard_negative(0, i, category)
        assert reads(true, scene) and not reads(false, scene), (true, false)
        assert data.hard_negative(0, i, category) == (scene, true, false)
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


@pytest.mark.parametrize("category", data.CATEGORIES)
def test_triples_hold_two_true_captions_and_a_false_one(category):
    """After SugarCrepe++; the first and the last are hard_negative's."""
    for i in range(100):
        scene, (true, same, false) = data.caption_triple(0, i, category)
        assert (scene, true, false) == data.hard_negative(0, i, category)
        assert same != true and reads(same, scene) and not reads(false, scene)
        assert {word for word in same.split() if word in data.COLOURS} == {
            word for word in true.split() if word in data.COLOURS
        }


@pytest.mark.parametrize("kind", data.WINOGROUND_KINDS)
def test_scene_pairs_use_the_same_words_and_each_caption_fits_one_scene(kind):
    for i in range(100):
        scenes, captions = data.scene_pair(0, i, kind)
        assert [[reads(caption, scene) for scene in scenes] for caption in captions] == [
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
        scene = data.make_scene(0, i)
        ask, answer = data.question(scene, random.Random(i))
        by_name = {" ".join(thing.kind): thing for thing in scene.things}
        if ask.startswith("where"):
            assert (
                answer
                == data.POSITIONS[by_name[ask.removeprefix("where is the ").rstrip("?")].cell]
            )
        else:
            (thing,) = [
                thing for thing in scene.things if f"at the {data.POSITIONS[thing.cell]}?" in ask
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
    held_out = re.compile(r"\b(" + "|".join([*data.SIZES, *data.TEXTURES, *data.OPPOSITE]) + r")\b")
    kinds = set()
    for i in range(600):
        scene, rng = data.make_scene(0, i, counts=(2, 3, 4, 7)), random.Random(i)
        for turns in (recipe.image_turns(scene, rng), recipe.text_turns(scene, rng)):
            assert not held_out.search(" ".join(part for turn in turns for part in turn)), turns
            kinds.add(len(turns))
        if len(scene.things) < 5:
            found = set(held_out.findall(data.long_caption(scene, rng)))
            assert (
                found & set(data.SIZES)
                and found & set(data.TEXTURES)
                and found & set(data.OPPOSITE)
            )
    assert kinds == {1, 2, 3, 4}
