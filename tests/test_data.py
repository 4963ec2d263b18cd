"""Files: images of any mode, preprocessing step by step, captions cut, pairs refused by line."""

import io
import json
import os
import random
import stat
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import data
from eval import BadRows, hold_out
from model import parse_config, read_json
from vladva import VladVAConfig

CONFIG = parse_config(read_json(data.TINY / "config.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.TINY, CONFIG)


# -------------------------------------------------------------------------------------- images


def gradient(size=(40, 30)):
    values = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    return Image.fromarray(values.astype(np.uint8))


def image_of_mode(mode):
    """The gradient in one of Pillow's modes, some of which only another mode converts to."""
    if mode == "I;16":
        return gradient().convert("L").convert("I").point(lambda v: v * 256).convert("I;16")
    if mode == "PA":
        return gradient().convert("P").convert("PA")
    if mode == "LAB":
        return gradient()
    return gradient().convert(mode)


MODES = "RGB RGBA L LA P PA 1 CMYK YCbCr LAB HSV I I;16 F".split()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image = data.open_image(image_of_mode(mode))
    assert image.mode == "RGB"
    assert image.size == (40, 30)
    # neither white nor black all over
    assert np.asarray(image).max() > 150
    assert np.asarray(image).min() < 60


def transparent_images(folder):
    """{name: path} of images, transparent on the left and of grey 90 on the right."""
    half = np.zeros((20, 20), np.uint8)
    half[:, 10:] = 1
    grey = Image.fromarray(90 * half)
    alpha = Image.fromarray(255 * half)
    palette = Image.fromarray(half, "P")
    palette.putpalette([10, 20, 30, 90, 90, 90])
    images = {
        "RGBA": (Image.merge("RGBA", (grey, grey, grey, alpha)), {}),
        "LA": (Image.merge("LA", (grey, alpha)), {}),
        "L": (grey, {"transparency": 0}),
        "RGB": (grey.convert("RGB"), {"transparency": (0, 0, 0)}),
        "P": (palette, {"transparency": 0}),
        "P, bytes": (palette, {"transparency": b"\0\xff"}),
    }
    paths = {}
    for name, (image, options) in images.items():
        paths[name] = folder / f"{name}.png"
        image.save(paths[name], **options)
    paths["WEBP"] = folder / "RGBA.webp"
    images["RGBA"][0].save(paths["WEBP"], lossless=True)
    paths["GIF"] = folder / "P.gif"
    palette.save(paths["GIF"], transparency=0)
    return paths


def test_what_is_transparent_becomes_white(tmp_path):
    """It was black, or any colour that lay beneath; transformers lays opened images on white."""
    for name, path in transparent_images(tmp_path).items():
        opened = Image.open(path)
        opened.load()
        for source in (path, opened):
            pixels = np.asarray(data.open_image(source))
            assert (pixels[:, :10] == 255).all() and (pixels[:, 10:] == 90).all(), name


def test_half_transparent_is_half_white():
    for mode, colour in (("RGBA", (0, 100, 200, 51)), ("RGBa", (0, 20, 40, 51))):
        image = data.open_image(Image.new(mode, (9, 9), colour))
        assert image.getpixel((4, 4)) == (204, 224, 244)  # 4/5 of 255, 1/5 of the colour
    # an opaque image keeps its bytes, with an alpha channel or without
    opaque = gradient().convert("RGB")
    for image in (opaque, opaque.convert("RGBA")):
        assert data.open_image(image).tobytes() == opaque.tobytes()


def test_sixteen_bit_greys_keep_their_upper_bits():
    image = Image.fromarray(np.array([[0, 128 << 8, 255 << 8]], dtype=np.uint16))
    assert np.asarray(data.open_image(image))[0, :, 0].tolist() == [0, 128, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    gradient().save(tmp_path / "turned.jpg", exif=exif)
    assert data.open_image(tmp_path / "turned.jpg").size == (30, 40)


def write_images(folder):
    """Two whole images, and files that cannot be decoded."""
    gradient((200, 200)).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:900])
    gradient((200, 200)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:300])
    (folder / "notes.png").write_text("these are not the pixels you are looking for")
    (folder / "empty.jpg").write_bytes(b"")


BROKEN_IMAGES = {
    "cut.jpg": "cannot be decoded",
    "cut.png": "cannot be decoded",
    "notes.png": "cannot be decoded",
    "empty.jpg": "cannot be decoded",
    "no.jpg": "no such image",
    "": "no such image",
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_a_broken_image_is_named(tmp_path, name):
    write_images(tmp_path)
    with pytest.raises(ValueError, match=BROKEN_IMAGES[name]) as error:
        data.open_image(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_an_image_of_gigabytes_is_refused_before_it_is_decoded(tmp_path):
    """A file of 467 bytes, 1 x 200,000 pixels, took 8.5 GB when its shorter side was enlarged."""
    for size, message in (
        ((1, 200_000), "200,000 x 1 pixels"),
        ((8001, 8000), "over 64,000,000"),
    ):
        Image.new("1", size).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match=f"large.png.*{message}"):
            data.open_image(tmp_path / "large.png")
    with pytest.raises(ValueError, match="201 x 1 pixels: .* 200:1"):
        data.open_image(Image.new("L", (1, 201)))
    # "pad" would make a square of its longer side
    Image.new("L", (12_000, 60)).save(tmp_path / "long.png")
    assert data.open_image(tmp_path / "long.png").size == (10_000, 50)


def test_only_regular_files_of_pixels_are_opened(tmp_path):
    """Pillow starts Ghostscript for an EPS of any name; reading from a pipe waits for ever."""
    gradient().save(tmp_path / "drawing.jpg", format="EPS")
    with pytest.raises(ValueError, match="drawing.jpg: cannot be decoded"):
        data.open_image(tmp_path / "drawing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="pipe.jpg: no such image file"):
        data.open_image(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_whatever_is_broken_in_a_file_is_a_value_error_with_its_name(tmp_path, kind):
    """Pillow raises a dozen kinds of errors: a broken EXIF block alone gave four of them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = io.BytesIO()
    gradient().save(whole, format=kind, exif=exif)
    rng = random.Random(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            broken = bytearray(whole.getvalue())
            for _ in range(rng.choice((1, 2, 8))):
                broken[rng.randrange(min(300, len(broken)))] = rng.randrange(256)
            (tmp_path / "broken").write_bytes(broken)
            try:
                assert data.open_image(tmp_path / "broken").mode == "RGB"
            except ValueError as error:
                assert str(tmp_path / "broken") in str(error)


def test_a_long_text_names_no_image():
    """A caption of 300 characters used to be a file name too long."""
    assert not data.names_image("a red circle " * 25)
    assert not data.names_image("a\0b")
    assert data.names_image("A.JPG")
    assert data.names_image(__file__)


# ------------------------------------------------------------------------------- preprocessing


def processor(folder, image_mode="crop", pixels=None, **changes):
    raw = read_json(data.TINY / "preprocessor_config.json") | changes
    (folder / "preprocessor_config.json").write_text(json.dumps(raw))
    config = VladVAConfig(image_mode=image_mode, max_pixels=pixels)
    return data.ImageProcessor(folder, CONFIG, config)


@pytest.mark.parametrize(
    "size, resized, box",
    [
        ((300, 200), (144, 96), (24, 0, 120, 96)),
        ((200, 301), (96, 144), (0, 24, 96, 120)),
        ((50, 50), (96, 96), (0, 0, 96, 96)),
    ],
)
def test_crop_resizes_the_short_edge_and_cuts_the_centre(tmp_path, size, resized, box):
    image = gradient(size)
    cut = np.asarray(image.resize(resized, Image.Resampling.BICUBIC).crop(box)) / 255
    expected = ((cut - data.CLIP_MEAN) / data.CLIP_STD).transpose(2, 0, 1)
    # 1e-6: float32 against float64
    torch.testing.assert_close(
        processor(tmp_path)(image),
        torch.tensor(expected, dtype=torch.float32),
        atol=1e-6,
        rtol=1e-6,
    )


def test_pad_keeps_the_whole_image_on_the_mean_colour(tmp_path):
    pixels = processor(tmp_path, "pad")(Image.new("RGB", (96, 48), (255, 0, 0)))
    red = (torch.tensor([1.0, 0, 0]) - torch.tensor(data.CLIP_MEAN)) / torch.tensor(data.CLIP_STD)
    torch.testing.assert_close(pixels[:, 48, 48], red, atol=1e-5, rtol=1e-5)
    assert pixels[:, 2, 48].abs().max() < 0.02  # (122, 116, 104) is the mean up to rounding down
    assert pixels.shape == (3, 96, 96)


def test_mean_and_deviation_are_the_folders(tmp_path):
    image_processor = processor(tmp_path, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    pixels = image_processor(gradient((96, 96)))
    expected = (np.asarray(gradient((96, 96))).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    assert np.abs(pixels.numpy() - expected).max() < 1e-6  # float32 against float64


def test_settings_are_read_from_the_file_of_transformers_5_too(tmp_path):
    settings = read_json(data.TINY / "preprocessor_config.json")
    raw = json.dumps({"image_processor": settings, "processor_class": "LlavaProcessor"})
    (tmp_path / "processor_config.json").write_text(raw)
    path, found = data.read_image_settings(tmp_path)
    assert path.name == "processor_config.json"
    assert found == settings
    (tmp_path / "processor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="processor_config.json"):
        data.ImageProcessor(tmp_path, CONFIG, VladVAConfig())


def test_preprocessing_that_this_code_does_not_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="crop_size"):
        processor(tmp_path, crop_size={"height": 80, "width": 80})
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        with pytest.raises(ValueError, match=step):
            processor(tmp_path, **{step: False})
    with pytest.raises(ValueError, match="'crop' or 'pad'"):
        processor(tmp_path, "squash")
    with pytest.raises(ValueError, match="no pixel budget"):
        processor(tmp_path, pixels=1000)


# ----------------------------------------------------------------------------------- tokenizer


def test_a_text_begins_with_one_special_token_and_its_words_are_single_tokens(tokenizer):
    ids = tokenizer.encode("a red circle top-left").ids
    assert ids[0] == CONFIG.bos_token_id
    assert len(ids) == 5  # the first word has no space before it, the others take theirs along
    assert tokenizer.decode(ids) == "a red circle top-left"


@pytest.mark.parametrize("text", ["", "  ", None, "an <image> in it"])
def test_a_text_without_words_or_with_a_special_token_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="empty text|special token '<image>'"):
        tokenizer.validate_text(text)
    assert tokenizer.validate_text(" a red circle\n") == "a red circle"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    raw = (data.TINY / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(raw.replace("<image>", "<picture>"))
    with pytest.raises(ValueError, match="tokenizer.json .*<image>"):
        data.Tokenizer(tmp_path, CONFIG)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        data.Tokenizer(tmp_path, CONFIG)


# ------------------------------------------------------------------------- captions that are long

SENTENCE = "a red circle is above a small blue square. "  # 10 tokens


@pytest.mark.parametrize("side", ["short", "long"])
def test_a_caption_over_the_papers_length_ends_with_a_sentence_or_a_word(tokenizer, side):
    """Paper Sec. 3.2: short captions have under 30 tokens, long ones 30 to 500."""
    limit = data.MAX_CAPTION_TOKENS[side]

    def count(text):
        return len(tokenizer.encode(text).ids) - 1  # without the first, special one

    assert count(SENTENCE.strip()) == 10
    text = (SENTENCE * (limit // 10)).strip()
    assert data.truncate_caption(text, side, tokenizer) == text
    # sentences: as many as fit
    assert data.truncate_caption(f"{text} {SENTENCE * 2}", side, tokenizer) == text
    # no sentence ends: as many words as fit
    words = data.truncate_caption("red circle " * limit, side, tokenizer)
    assert words == " ".join(["red circle"] * limit)[: len(words)]
    assert limit - 1 <= count(words) <= limit
    assert words.endswith(("red", "circle"))


def test_a_long_caption_is_not_cut_below_30_tokens_for_the_sake_of_a_sentence(tokenizer):
    text = SENTENCE + "red circle " * 500
    cut = data.truncate_caption(text, "long", tokenizer)
    assert text.startswith(cut)
    assert len(tokenizer.encode(cut).ids) > 490


def test_spaces_around_a_caption_do_not_move_the_place_where_it_is_cut(tokenizer):
    """Tokens were counted in the stripped text, and the cut was made in the other one."""
    text = SENTENCE * 3
    expected = data.truncate_caption(text.strip(), "short", tokenizer)
    assert expected == (SENTENCE * 2).strip()
    for spaced in (" " * 30 + text, "\n" + text + "\t ", text + " " * 30):
        assert data.truncate_caption(spaced, "short", tokenizer) == expected
    assert data.truncate_caption("  a red circle ", "short", tokenizer) == "a red circle"


# --------------------------------------------------------------------------------------- pairs


def pairs_file(folder, *rows):
    write_images(folder)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = [
    {"image": "whole.jpg", "short": "a gradient"},
    {"image": "whole.png", "short": ["one", "two"], "long": "a long caption"},
]
BAD = {  # kind: (row, what is said of it)
    "missing image": ({"image": "no.jpg", "short": "x"}, "no.jpg: no such image"),
    "truncated image": ({"image": "cut.jpg", "short": "x"}, "cannot be decoded"),
    "not an image": ({"image": "notes.png", "short": "x"}, "cannot be decoded"),
    "empty caption": ({"image": "whole.jpg", "short": " "}, "empty caption"),
    "empty caption in a list": ({"image": "whole.jpg", "short": ["a", ""]}, "empty caption"),
    "empty long caption": ({"image": "whole.jpg", "short": "a", "long": ""}, "empty caption"),
    "malformed line": ('{"image": "whole.jpg", "short": ', "not valid JSON"),
    "not an object": ('["whole.jpg", "x"]', "wanted"),
    "no image": ({"short": "x"}, "wanted"),
    "unknown key": ({"image": "whole.jpg", "short": "x", "caption": "y"}, "unknown keys"),
    "no caption": ({"image": "whole.jpg"}, "neither a short nor a long"),
    "wrong type": ({"image": "whole.jpg", "short": 3}, "caption"),
    "wrong type in a list": ({"image": "whole.jpg", "short": ["a", 3]}, "caption"),
    "wrong type of long": ({"image": "whole.jpg", "long": 3}, "caption"),
    "special token": ({"image": "whole.jpg", "short": "an <image>"}, "special token"),
    "generated": ({"image": "whole.jpg", "short": "x", "generated": "y"}, "generated is 'y'"),
    "nested": ('{"image": "whole.jpg", "short": %s}' % ("[" * 10**5), "not valid JSON"),
    "nested caption": ({"image": "whole.jpg", "short": [[[["x"]]]]}, "caption"),
    "5,000 digits": ('{"image": "whole.jpg", "short": %s}' % ("9" * 5000), "not valid JSON"),
    "half a character": ({"image": "whole.jpg", "short": "a \ud800 b"}, "surrogates"),
    "half a character in a name": ({"image": "\ud800.jpg", "short": "x"}, "surrogates"),
    "a byte that is no text": ({"image": "\udc80.jpg", "short": "x"}, "no such image"),
    "name too long": ({"image": "x" * 300 + ".jpg", "short": "x"}, "no such image"),
    "NUL in a name": ({"image": "a\0.jpg", "short": "x"}, "null byte"),
    "long line": ({"image": "whole.jpg", "short": "x" * 2**20}, "bytes, wanted at most 1,048,576"),
    "absolute name": ({"image": "/etc/hostname", "short": "x"}, "'/etc/hostname' is not in "),
    "name that leads out": ({"image": "../whole.jpg", "short": "x"}, "'../whole.jpg' is not in "),
}


def test_good_rows_are_read_and_null_means_absent(tmp_path, tokenizer):
    rows = [*GOOD, {"image": "whole.png", "short": None, "long": "words"}]
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    assert len(pairs) == 3
    assert {pairs.row(1, random.Random(i))["short"] for i in range(20)} == {"one", "two"}
    assert pairs.row(0, random.Random(0))["long"] is None
    assert pairs.row(2, random.Random(0))["short"] is None
    row = pairs.row(1, random.Random(0))
    assert row["image"].size == (200, 200)
    assert row["long"] == "a long caption"
    assert row["where"] == f"{tmp_path}/pairs.jsonl:2"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, tokenizer, kind):
    row, message = BAD[kind]
    pairs = data.Pairs(pairs_file(tmp_path, *GOOD, row), tokenizer)
    with pytest.raises(data.BadRow, match=message) as error:
        pairs.row(2, random.Random(0))
    assert "pairs.jsonl:3: " in str(error.value)


def test_images_are_read_only_below_the_folder_of_the_file_or_the_one_that_is_named(
    tmp_path, tokenizer
):
    """Names are data of whoever wrote the file: "..", and links, could name any image of a disk."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "link.jpg").symlink_to(tmp_path / "whole.jpg")
    rows = [{"image": name, "short": "x"} for name in ("link.jpg", "../whole.jpg", "whole.jpg")]
    path = pairs_file(folder, *rows)
    write_images(tmp_path)
    pairs = data.Pairs(path, tokenizer)
    for index in (0, 1):
        with pytest.raises(data.BadRow, match=rf"jsonl:{index + 1}: .* --images"):
            pairs.row(index, random.Random(0))
    assert pairs.row(2, random.Random(0))["short"] == "x"
    pairs = data.Pairs(path, tokenizer, images=str(tmp_path))
    for index in range(3):
        assert pairs.row(index, random.Random(0))["short"] == "x"


def test_empty_lines_and_a_missing_line_feed_at_the_end_are_no_rows_and_no_fault(
    tmp_path, tokenizer
):
    path = pairs_file(tmp_path, GOOD[0], "", GOOD[1], BAD["unknown key"][0])
    text = path.read_text(encoding="utf-8").rstrip("\n")
    path.write_text(text.replace("a gradient", "a\u2028gradient"), encoding="utf-8")
    pairs = data.Pairs(path, tokenizer)
    assert len(pairs) == 3
    assert pairs.row(1, random.Random(0))["where"].endswith("pairs.jsonl:3")
    # a line ends at a line feed only
    assert pairs.row(0, random.Random(0))["short"] == "a\u2028gradient"
    with pytest.raises(data.BadRow, match="jsonl:4: unknown key"):
        pairs.row(2, random.Random(0))


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"one\n\nthree \xe2\x80\xa8\nlast")
    assert data.Pairs(tmp_path / "a", None).starts.tolist() == [0, 4, 5, 15, 19]
    (tmp_path / "empty").write_bytes(b"")
    assert data.Pairs(tmp_path / "empty", None).starts.tolist() == [0]


def test_captions_of_a_file_over_the_papers_lengths_are_truncated(tmp_path, tokenizer):
    rows = [dict(GOOD[0], short=SENTENCE * 5), dict(GOOD[0], long=SENTENCE * 60), GOOD[0]]
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    read = [pairs.row(index, random.Random(0)) for index in range(3)]
    assert read[0]["short"] == (SENTENCE * 2).strip()
    assert read[1]["long"] == (SENTENCE * 50).strip()
    assert read[2]["short"] == GOOD[0]["short"]


# ------------------------------------------------------------------------ rows kept for measuring


def test_rows_held_out_are_not_trained_on(tmp_path, tokenizer):
    rows = []
    for i in range(20):
        without_short = {"image": "whole.png", "long": f"number {i}"}
        rows.append({"image": "whole.jpg", "short": f"number {i}"} if i % 2 else without_short)
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    held_out = hold_out(pairs, 6, BadRows())
    left = [pairs.row(i, random.Random(0)) for i in range(len(pairs))]
    assert len(held_out) == 6
    assert len(left) == 14
    assert all(row["short"] for row in held_out)
    assert not {row["where"] for row in held_out} & {row["where"] for row in left}


def test_captions_of_held_out_rows_are_truncated_as_those_of_training_are(tmp_path, tokenizer):
    """They used to be measured in full, on lengths that the model never saw in training."""
    row = {"image": "whole.jpg", "short": SENTENCE * 5, "long": SENTENCE * 60}
    pairs = data.Pairs(pairs_file(tmp_path, *[row] * 4), tokenizer)
    held_out = hold_out(pairs, 2, BadRows())
    for row in held_out:
        assert row["short"] == [(SENTENCE * 2).strip()]
        assert row["long"] == (SENTENCE * 50).strip()


def test_a_bad_row_is_not_held_out_and_is_named(tmp_path, tokenizer, capsys):
    """The next usable one takes its place."""
    rows = [GOOD[0]] * 6 + [BAD["truncated image"][0], BAD["no caption"][0]]
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    bad_rows = BadRows()
    held_out = hold_out(pairs, 6, bad_rows)
    assert len(held_out) == 6
    assert len(pairs) == 2
    err = capsys.readouterr().err
    assert len(bad_rows.messages) == err.count("left out: ")
    for message in bad_rows.messages:
        assert f"left out: {message}\n" in err


def test_too_many_bad_rows_among_those_to_hold_out_end_the_run(tmp_path, tokenizer):
    rows = [GOOD[0]] * 6 + [BAD["malformed line"][0]] * 6
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    with pytest.raises(ValueError, match=r"4 of \d+ rows cannot be used; the last: .*jsonl:"):
        hold_out(pairs, 6, BadRows())


def test_a_file_without_short_captions_is_not_read_to_its_end_for_rows_to_hold_out(
    tmp_path, tokenizer, monkeypatch
):
    rows = [{"image": "whole.jpg", "long": f"number {i}"} for i in range(100)]
    pairs = data.Pairs(pairs_file(tmp_path, *rows), tokenizer)
    tried = []
    parse = pairs.parse
    monkeypatch.setattr(pairs, "parse", lambda index: tried.append(index) or parse(index))
    assert hold_out(pairs, 2, BadRows()) == []
    assert len(set(tried)) == 40
    assert len(pairs) == 100


# ------------------------------------------------------------------- the rule for unusable rows


def test_more_than_3_and_more_than_1_percent_of_bad_rows_are_too_many():
    bad_rows = BadRows()
    for number in range(51):
        bad_rows.add([f"pairs.jsonl:{number}: broken"])
        count = number + 1
        if count <= 3:
            assert bad_rows.problem(1) is None
        else:
            assert bad_rows.problem(100 * count) is None
            message = f"{count} of {100 * count - 1} rows cannot be used; the last: pairs.jsonl:"
            assert bad_rows.problem(100 * count - 1) == f"{message}{number}: broken"


def test_a_bad_row_is_named_once_and_listed_once_even_after_a_restart(tmp_path, capsys):
    path = tmp_path / "bad_rows.txt"
    bad_rows = BadRows()
    bad_rows.add(["held out: broken"])  # before the run has a folder
    assert not path.exists()
    bad_rows.write_to(path)
    bad_rows.add(["a:1: broken", "a:2:\nbroken"])
    bad_rows.add(["a:1: broken"])  # an epoch later
    lines = ["held out: broken", "a:1: broken", "a:2: broken"]
    assert path.read_text().splitlines() == lines
    assert capsys.readouterr().err.splitlines() == [f"left out: {line}" for line in lines]
    again = BadRows()
    again.write_to(path)
    again.add(["a:2: broken", "a:9: broken"])
    assert path.read_text().splitlines() == [*lines, "a:9: broken"]
    assert capsys.readouterr().err == "left out: a:9: broken\n"
    assert again.messages == [*lines, "a:9: broken"]


def test_a_bad_row_with_a_name_that_is_no_text_is_listed(tmp_path, capsys):
    bad_rows = BadRows()
    bad_rows.write_to(tmp_path / "bad_rows.txt")
    bad_rows.add(["a:1: \udc80.jpg: no such image file", "b" * 10**6])
    assert (tmp_path / "bad_rows.txt").read_text().startswith(r"a:1: \udc80.jpg: no such")
    assert (tmp_path / "bad_rows.txt").stat().st_size < 1000


# ---------------------------------------------------------------------------------- small tools

ERRORS = {  # what a command may end with: the line on stderr, the exit code
    ValueError("--lr is -1:\n wanted more"): ("error: --lr is -1: wanted more", 2),
    OSError(28, "No space left on device"): ("error: [Errno 28] No space left on device", 2),
    MemoryError(): ("error: out of memory", 2),
    RecursionError("too deep"): ("error: too deep", 2),
    torch.cuda.OutOfMemoryError("CUDA out of memory."): ("error: CUDA out of memory.", 2),
    KeyboardInterrupt(): ("interrupted", 130),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_command_ends_in_one_line_and_an_exit_code(capsys, error):
    @data.command
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stopped:
        main([])
    assert (capsys.readouterr().err, stopped.value.code) == (
        f"{ERRORS[error][0]}\n",
        ERRORS[error][1],
    )


def test_warnings_of_libraries_are_shown_only_where_they_were_asked_for(capsys, monkeypatch):
    @data.command
    def main(argv=None):
        warnings.warn("corrupt EXIF data", stacklevel=1)
        return 1

    monkeypatch.setattr(warnings, "showwarning", lambda *args: print("shown", file=sys.stderr))
    for asked_for in (False, True):
        with warnings.catch_warnings():
            warnings.resetwarnings()
            if asked_for:
                warnings.simplefilter("default")  # as python -W default
            assert main([]) == 1
        assert bool(capsys.readouterr().err) == asked_for


def test_a_file_is_not_written_through_a_link_that_somebody_made(tmp_path):
    (tmp_path / "victim").write_text("as it was")
    (tmp_path / "a.safetensors.partial").symlink_to(tmp_path / "victim")
    data.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert (tmp_path / "victim").read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "victim"]


def test_others_can_read_a_file_of_tensors(tmp_path):
    """A run of one account could not be evaluated by another: safetensors 0.8 writes mode 0600."""
    data.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_a_file_of_tensors_is_there_whole_or_not_at_all(tmp_path):
    data.write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(OSError, match="could not be written"):
        data.write_tensors(tmp_path / "absent" / "b.safetensors", {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_table_is_aligned():
    table = data.format_table(["", "R@1"], [["text to image", "5.0"], ["x", "100.0"]])
    assert table.splitlines() == [
        "                 R@1",
        "--------------------",
        "text to image    5.0",
        "x              100.0",
    ]
