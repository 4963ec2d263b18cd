"""Files and scenes: pictures of any mode, preprocessing step by step, pairs refused by line, captions true and negatives false."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from extras import scenes
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
            str(scenes.short_caption(scenes.make_scene(9, i), random.Random(i))),
            scenes.long_caption(scenes.make_scene(9, i), random.Random(i)),
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
