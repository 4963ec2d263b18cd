"""Public caption files to pairs: each schema in miniature, what joins and what only seems to,
counts by hand, and captions written by a model."""

import json
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import export_scenes
import pytest
from conftest import Forked

import data
from extras import captions, scenes
from vladva import VladVA

# -------------------------------------------------------------------- the public files in miniature

LONG = (
    "The image shows {}. It is described here in many more words than a short caption has, "
    "so that nobody can take it for one of those, {}."
)


def long_caption(what):
    return LONG.format(what, what)


def conversation(name, image, answer, ask="<image>\nWhat is this photo about?"):
    return {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": ask}, {"from": "gpt", "value": answer}],
    }


LLAVA = [
    conversation(
        "004539375",
        "00453/004539375.jpg",
        "select luxury furniture 3 - inch topper",
        "Render a clear summary of the photo.\n<image>",
    ),
    conversation(
        "000000009",
        "00000/000000009.jpg",
        "a web image of a cat",
        "<image>\nGive a brief description of the image.",
    ),
]
SHAREGPT4V = [
    conversation("000000000009", "coco/train2017/000000000009.jpg", long_caption("a plate")),
    conversation(
        "000000000042",
        "coco/train2017/000000000042.jpg",
        long_caption("an evaluated dog"),
        "What is this photo about?\n<image>",
    ),
    conversation(
        "004539375", "llava/llava_pretrain/images/00453/004539375.jpg", long_caption("a mattress")
    ),
    conversation(
        "sa_1", "sam/images/sa_1.jpg", "  " + long_caption("a street") + "\n\nA second paragraph.\n"
    ),
    {
        "id": "text",
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}],
    },
]
COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 1}],
    "annotations": [  # before the images, as some writers have it
        {"image_id": 9, "id": 661611, "caption": "A plate of food. "},
        {"image_id": 9, "id": 661612, "caption": "Lunch on a table\n"},
        {"image_id": 25, "id": 1, "caption": "A giraffe."},
    ],
    "images": [
        {"id": 9, "file_name": "000000000009.jpg"},
        {"id": 25, "file_name": "000000000025.jpg"},
    ],
}


def karpathy_row(name, split, raw, **more):
    sentence = {"tokens": ["x"], "raw": raw, "imgid": 0, "sentid": 0}
    return {
        "filename": name,
        "imgid": 0,
        "split": split,
        "sentids": [0],
        "sentences": [sentence],
        **more,
    }


KARPATHY = {
    "images": [
        karpathy_row(
            "COCO_train2014_000000000009.jpg",
            "train",
            "a plate, says Karpathy",
            filepath="train2014",
            cocoid=9,
        ),
        karpathy_row(
            "COCO_val2014_000000000042.jpg", "test", "a dog", filepath="val2014", cocoid=42
        ),
        karpathy_row("COCO_val2014_000000000007.jpg", "val", "a val", filepath="val2014", cocoid=7),
        karpathy_row(
            "COCO_val2014_000000000025.jpg", "restval", "A giraffe.", filepath="val2014", cocoid=25
        ),
    ],
    "dataset": "coco",
}
FLICKR = {
    "images": [
        karpathy_row("1007129816.jpg", "test", "A man."),
        karpathy_row("keep.jpg", "train", "A dog."),
    ],
    "dataset": "flickr30k",
}
NOCAPS = {
    "images": [
        {
            "id": 9,
            "open_images_id": "0013ea2087020901",
            "file_name": "0013ea2087020901.jpg",
            "domain": "in-domain",
        }
    ],
    "annotations": [{"image_id": 9, "id": 0, "caption": "A baby."}],
}
SUGARCREPE = {"0": {"filename": "000000085329.jpg", "caption": "x", "negative_caption": "y"}}


@pytest.fixture
def public(tmp_path, monkeypatch):
    """A folder with the files under their public names, laid out as ShareGPT4V's authors say.

    Images are made by the tests that look at them.
    """
    files = {
        "llava.json": LLAVA,
        "share.json": SHAREGPT4V,
        "captions_train2017.json": COCO,
        "dataset_coco.json": KARPATHY,
        "dataset_flickr30k.json": FLICKR,
        "nocaps.json": NOCAPS,
        "sugarcrepe.json": SUGARCREPE,
    }
    # of one image nothing says which it is
    files["torn.json"] = {"images": [*FLICKR["images"], {"split": "test", "sentences": []}]}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(*arguments, out="pairs.jsonl"):
    """(what convert returns, {image: row}) of a run."""
    counts = captions.main(["convert", *map(str, arguments), "--out", str(out)])
    rows = [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]
    assert len({row["image"] for row in rows}) == len(rows)
    return counts, {row.pop("image"): row for row in rows}


def test_short_and_long_captions_of_an_image_meet_in_one_row(public, capsys):
    """The traps: LLaVA-Pretrain's names lack the folder that ShareGPT4V's have; 000000009 is not
    COCO's; COCO's annotations name an id; spaces at the ends; rows without an image."""
    sources = (
        "short:llava.json@llava/llava_pretrain/images",
        "long:share.json",
        "short:captions_train2017.json@coco/train2017",
    )
    counts, rows = converted(*sources, "--drop", "dataset_coco.json")
    assert rows == {
        "llava/llava_pretrain/images/00453/004539375.jpg": {
            "short": "select luxury furniture 3 - inch topper",
            "long": long_caption("a mattress"),
        },
        "llava/llava_pretrain/images/00000/000000009.jpg": {
            "short": "a web image of a cat",
            "long": None,
        },
        "coco/train2017/000000000009.jpg": {
            "short": ["A plate of food.", "Lunch on a table"],
            "long": long_caption("a plate"),
        },
        "sam/images/sa_1.jpg": {
            "short": None,
            "long": long_caption("a street") + "\n\nA second paragraph.",
        },
        "coco/train2017/000000000025.jpg": {"short": "A giraffe.", "long": None},
    }
    wanted = {"images": 5, "with short and long captions": 2, "with short captions": 2}
    wanted |= {"with long captions": 1, "dropped by dataset_coco.json": 1}
    assert counts == counts | wanted
    out = capsys.readouterr().out
    assert "llava.json (short): 2 rows" in out and "share.json (long): 4 rows" in out
    assert "dropped by dataset_coco.json" in out


def test_images_of_evaluation_sets_are_dropped_and_counted(public):
    """By COCO's id in both spellings, Flickr's name and Open Images' id; nocaps's own ids count
    from 0 and name no image."""
    names = [
        "COCO_val2014_000000000042",
        "000000000007",
        "deep/1007129816",
        "0013ea2087020901",
        "9",
        "000000085329",
        "keep",
    ]
    rows = [conversation(name, f"{name}.jpg", "a caption") for name in names]
    Path("cc.json").write_text(json.dumps(rows))
    drop = [
        "--drop",
        "dataset_coco.json",
        "dataset_flickr30k.json",
        "nocaps.json",
        "sugarcrepe.json",
    ]
    counts, rows = converted("short:cc.json", *drop)
    assert list(rows) == ["9.jpg", "keep.jpg"]
    assert [counts[f"dropped by {name}"] for name in drop[1:]] == [2, 1, 1, 1]
    assert len(converted("short:cc.json", out="all.jsonl")[1]) == 7


def test_a_folder_of_images_with_texts_beside_them(tmp_path):
    """Below too; an image without a text becomes a row for `fill`; other files do not matter."""
    (tmp_path / "in/00000").mkdir(parents=True)
    for name in (
        "a.jpg",
        "00000/000000001.JPG",
        "00000/000000002.png",
        "notes.txt",
        "00000/000000001.json",
    ):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in/a.txt").write_text("one  one\n")
    (tmp_path / "in/00000/000000001.txt").write_text("two")
    counts, rows = converted(f"short:{tmp_path / 'in'}", out=tmp_path / "pairs.jsonl")
    assert rows == {
        "in/a.jpg": {"short": "one one", "long": None},
        "in/00000/000000001.JPG": {"short": "two", "long": None},
        "in/00000/000000002.png": {"short": None, "long": None},
    }
    assert counts["with no captions"] == 1


def test_paths_are_relative_to_the_pairs_file_and_its_images_may_have_a_folder(public):
    (public / "runs").mkdir()
    _, rows = converted(f"long:{public / 'llava.json'}@{public / 'im@ges'}", out="runs/pairs.jsonl")
    assert list(rows) == ["../im@ges/00453/004539375.jpg", "../im@ges/00000/000000009.jpg"]
    assert all(row["short"] is None and row["long"] for row in rows.values())


def test_equal_names_in_two_folders_are_two_images(public):
    _, rows = converted("short:llava.json@one", "short:llava.json@two")
    assert len(rows) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"image": "a.jpg", "label": 3}]', "what follows caption 0 (KeyError: 'conversations')"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}], '
            '"annotations": [{"image_id": 1, "bbox": []}]}',
            "what follows caption 0 (KeyError: 'caption') is not as published: wanted LLaVA's",
        ),
        (
            json.dumps([*LLAVA, {"id": "3", "image": "x.jpg", "conversations": []}]),
            "what follows caption 2 (IndexError",
        ),
        (
            json.dumps([*LLAVA, conversation("3", ["x"], "y")]),
            "what follows caption 2 (TypeError: image ['x']",
        ),
        (json.dumps(LLAVA)[:-40], "a.json: not valid JSON"),
        ("[" * 100_000, "a.json: not valid JSON"),
        ("a.jpg\ta caption\n", "a.json: not valid JSON"),
        ("[]", "a.json holds no images"),
    ],
)
def test_a_file_in_another_form_is_one_line_and_nothing_is_written(
    tmp_path, capsys, content, message
):
    source = tmp_path / "a.json"
    source.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        captions.main(["convert", f"short:{source}", "--out", str(tmp_path / "pairs.jsonl")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["convert", "long:no.json", "--out", "x.jsonl"],
            "no SOURCE long:no.json: wanted short: or long:, a file or folder",
        ),
        (["convert", "llava.json", "--out", "x.jsonl"], "no SOURCE llava.json: wanted short:"),
        (["convert", "short:llava.json", "--out", "there.jsonl"], "there.jsonl is there already"),
        (["convert", "short:llava.json", "--out", "no/x.jsonl"], "or its folder is not"),
        (
            ["convert", "short:llava.json", "--out", "x.jsonl", "--drop", "llava.json"],
            "llava.json: wanted a list of images, all with 'filename'",
        ),
        (
            ["convert", "short:llava.json", "--out", "x.jsonl", "--drop", "torn.json"],
            "torn.json: wanted a list of images, all with 'filename'",
        ),
        (["check", "no.jsonl"], "no.jsonl not found"),
        (["fill", "there.jsonl", "--out", "there.jsonl"], "there.jsonl is there already"),
        (["fill", "there.jsonl", "--out", "x.jsonl", "--batch-size", "0"], "--batch-size 0"),
        (["fill", "no.jsonl", "--out", "x.jsonl"], "no.jsonl not found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(public, arguments, message, capsys):
    Path("there.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit) as stopped:
        captions.main(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert Path("there.jsonl").read_text() == "mine\n" and not Path("x.jsonl").exists()


def test_half_a_character_in_a_caption_is_written_as_a_question_mark(tmp_path):
    """JSON may hold half a surrogate pair, which no file of text can: convert ended at the last
    row, without an output."""
    (tmp_path / "a.json").write_text(json.dumps([conversation("1", "a.jpg", "a \ud800 b")]))
    _, rows = converted(f"short:{tmp_path / 'a.json'}", out=tmp_path / "pairs.jsonl")
    assert rows == {"a.jpg": {"short": "a ? b", "long": None}}


def test_an_output_is_not_written_through_a_link(public):
    """A link named OUT.partial, laid by somebody else, had its target emptied and overwritten."""
    Path("mine.txt").write_text("mine")
    Path("pairs.jsonl.partial").symlink_to("mine.txt")
    _, rows = converted("short:llava.json")
    assert len(rows) == 2 and Path("mine.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------ lengths

SENTENCE = "a red circle is left of a blue square."  # 10 tokens


@pytest.fixture(scope="module")
def tokenizer():
    return VladVA.from_pretrained("tiny").tokenizer


def tokens(tokenizer, text):
    return len(tokenizer.encode(text).ids) - 1  # without BOS


def sentences(count):
    return " ".join([SENTENCE] * count)


def test_a_caption_is_cut_at_a_sentence_end_or_else_a_word(tokenizer):
    assert tokens(tokenizer, SENTENCE) == 10
    assert data.truncate_caption(sentences(2), "short", tokenizer) == sentences(2)
    assert data.truncate_caption(sentences(3), "short", tokenizer) == sentences(2)
    words = " ".join(["red"] * 29)
    assert data.truncate_caption("red " * 40 + "circle.", "short", tokenizer) == words
    # 500 tokens to the point
    assert data.truncate_caption(sentences(60), "long", tokenizer) == sentences(50)
    # the sentence alone would be a short caption
    lone = data.truncate_caption(f"{SENTENCE} {'red ' * 600}circle.", "long", tokenizer)
    assert tokens(tokenizer, lone) == 500
    quoted = 'he said "a red circle." ' + "and " * 40
    assert data.truncate_caption(quoted, "short", tokenizer).endswith('circle."')


def test_a_caption_that_is_one_word_is_cut_in_its_middle(tokenizer):
    word = "red" * 400
    cut = data.truncate_caption(word, "short", tokenizer)
    assert word.startswith(cut) and 0 < tokens(tokenizer, cut) <= 29


def test_what_is_cut_is_a_beginning_within_the_limits(tokenizer):
    rng = random.Random(0)
    words = ["a", "red", "circle.", "caf\u00e9", "\u6f22\u5b57", "3.5", "U.S.", "\n\n", "wow!"]
    words += ["(left)", "\U0001f600"]
    for side, limit in data.MAX_CAPTION_TOKENS.items():
        for _ in range(100):
            text = " ".join(rng.choices(words, k=rng.randint(1, 2 * limit))).strip()
            cut = data.truncate_caption(text, side, tokenizer)
            assert text.startswith(cut) and tokens(tokenizer, cut) <= limit
            assert (cut == text) == (tokens(tokenizer, text) <= limit)


def scene_pairs(folder, count, changes=()):
    """A pairs file of scenes, images beside it; changes: {index: what its row says otherwise}."""
    rows = []
    for i in range(count):
        row = scenes.scene_row(3, i)
        row["image"].save(folder / f"{i}.png")
        rows.append({**row, "image": f"{i}.png", **dict(changes).get(i, {})})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_rows_are_truncated(tmp_path, tokenizer):
    path = scene_pairs(tmp_path, 3, {1: {"short": sentences(3), "long": sentences(60)}})
    row = data.Pairs(path, tokenizer).row(1, random.Random(0))
    assert (row["short"], row["long"]) == (sentences(2), sentences(50))


# -------------------------------------------------------------------------------------------- check


def test_check_counts_what_was_put_in(tmp_path, capsys):
    changes = {
        1: {"image": "0.png", "short": [SENTENCE, "a ring"]},
        2: {"short": None},
        3: {"long": None, "short": SENTENCE, "generated": {"short": {"model": "m", "prompt": "p"}}},
        4: {"long": f"there is a red circle, and {'more ' * 600}"},
        5: {"image": "cut.png", "long": "a ring"},
        6: {"image": "no.png"},
        7: {"short": "a </s> ring"},
        8: {"long": "a ring"},
    }
    path = scene_pairs(tmp_path, 9, changes)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    path.write_text(path.read_text() + '\n{"image": 3}\n')
    counts = captions.main(["check", str(path)])
    wanted = {
        "rows": 10,
        "rows that training leaves out": 4,
        "short captions missing": 1,
        "short captions written by a model": 1,
        "long captions missing": 1,
        "short captions of 1 to 29 tokens": 6,
        "long captions under 30 tokens": 1,
        "long captions of 30 to 500 tokens": 3,
        "long captions over 500 tokens, cut in training": 1,
    }
    assert counts == counts | wanted
    out = capsys.readouterr().out
    assert "pairs.jsonl:6: " in out and "cut.png: cannot be decoded" in out
    assert "no.png: no such image file" in out and "pairs.jsonl:11: wanted" in out
    assert "pairs.jsonl:8: text holds the special token '</s>'" in out


BROKEN_LINES = [  # lines that are no usable row
    "[" * 100_000,
    '{"image": "0.png", "short": "a", "generated": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
    '{"image": "0.png", "short": "a", "generated": ' + "9" * 5000 + "}",
    json.dumps({"image": "n" * 300, "short": "a"}),
    json.dumps({"image": "0.png\0", "short": "a"}),
    json.dumps({"image": "0.png", "short": "half \ud800 a character"}),
    json.dumps({"image": "\ud800.png", "short": "a"}),
    json.dumps({"image": "0.png", "\ud800": "a"}),
    json.dumps({"image": "0.png", "short": "a" * 2_000_000}),
    "  ",
]


def test_what_check_passes_training_takes(tmp_path, tokenizer):
    """A caption with a special token ended a training run although check had said nothing."""
    changes = {0: {"short": "a </s>"}, 1: {"long": "<image>"}, 2: {"image": "no.png"}}
    changes |= {3: {"short": None, "long": None}, 4: {"short": ["a", " <s>"]}}
    path = scene_pairs(tmp_path, 7, changes)
    path.write_text(path.read_text() + "\n".join(BROKEN_LINES))
    counts = captions.main(["check", str(path)])
    pairs = data.Pairs(path, tokenizer)
    refused = []
    for index in range(len(pairs)):
        try:
            pairs.row(index, random.Random(0))
        except data.BadRow:
            refused.append(index)
    assert refused == [0, 1, 2, 3, 4, *range(7, len(pairs))]
    assert counts["rows"] == 17 and counts["rows that training leaves out"] == 15


def test_check_names_ten_rows_in_a_line_each(tmp_path, capsys):
    path = scene_pairs(tmp_path, 1)
    path.write_text(path.read_text() + "\n".join(BROKEN_LINES * 2))
    captions.main(["check", str(path)])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith(f"{path}:")]
    assert len(lines) == 10 and max(map(len, lines)) <= 300


# --------------------------------------------------------------------------------------------- fill


def start_fill(*flags, ranks=1):
    return Forked(captions.main, ["fill", *map(str, flags)], ranks=ranks)


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """(pairs file in which captions are missing, its filled form): 12 rows.

    6 short and 5 long captions are missing; an empty line lies between.
    """
    folder = tmp_path_factory.mktemp("lacking")
    changes = {}
    for i in range(0, 12, 2):
        changes[i] = {"short": None}
    for i in range(1, 8, 2):
        changes[i] = {"long": None}
    changes[4]["long"] = None
    changes[6]["short"] = []
    path = scene_pairs(folder, 12, changes)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    out, _ = start_fill(path, "--out", folder / "whole.jsonl", "--batch-size", "2").finish()
    assert "12 of 12 rows are left" in out and "whole.jsonl is written, 0 bad rows" in out
    return path, folder / "whole.jsonl"


def test_fill_writes_what_is_missing_and_says_who_wrote_it(lacking, tokenizer):
    """One row each, in order; what was there is untouched; training takes the result."""
    before, after = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in lacking
    )
    for row, was in zip(after, before, strict=True):
        missing = [side for side in data.MAX_CAPTION_TOKENS if not was[side]]
        writers = {side: {"model": "tiny", "prompt": captions.PROMPTS[side]} for side in missing}
        assert row.pop("generated", {}) == writers
        for side in missing:
            limit = data.MAX_CAPTION_TOKENS[side]
            assert row[side] and tokens(tokenizer, row[side]) <= limit
        for name in row.keys() - missing:
            assert row[name] == was[name]
    pairs = data.Pairs(lacking[1], tokenizer)
    for index in range(12):
        pairs.row(index, random.Random(0))
    assert len(pairs) == 12 and list(lacking[1].parent.glob("*.part*")) == []
    with pytest.raises(data.BadRow, match="jsonl:5: neither a short nor a long caption"):
        data.Pairs(lacking[0], tokenizer).parse(4)


def test_fill_killed_and_started_again_by_two_processes_gives_the_same_file(lacking, capsys):
    """What a kill leaves of a line is dropped, another model's settings are refused, OUT is there
    only at the end. Each process had a file of its own: with another number of processes the run
    could not go on."""
    path, whole = lacking
    out = whole.with_name("killed.jsonl")
    part = Path(f"{out}.part")
    flags = [path, "--out", out, "--batch-size", "2"]
    process = start_fill(*flags)
    while process.running() and not (part.is_file() and part.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.kill(signal.SIGKILL)
    assert process.join()[0] == -9 and not out.exists()
    lines = part.read_bytes().split(b"\n")
    done = len(lines) - 2  # but for the settings and what follows the last line feed
    assert 2 <= done < 12
    part.write_bytes(b"\n".join(lines[:-1]) + b'\n{"image": "te')
    with pytest.raises(SystemExit):
        captions.main(["fill", *map(str, flags), "--dtype", "bfloat16"])
    err = capsys.readouterr().err
    assert "killed.jsonl.part is of a run with" in err and "delete it to start anew" in err
    assert f"{12 - done} of 12 rows are left" in start_fill(*flags, ranks=2).finish()[0]
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


def test_fill_on_a_full_disk_ends_in_one_line_and_goes_on_later(lacking, capsys):
    """A limit on the size of files stands for the disk: the file that is appended to reaches it."""
    path, whole = lacking
    out = whole.with_name("full.jsonl")
    flags = ["fill", str(path), "--out", str(out), "--batch-size", "2"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            captions.main(flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert Path(f"{out}.part").stat().st_size == 1500 and not out.exists()
    captions.main(flags)
    assert "12 of 12 rows are left" not in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


def test_fill_does_not_write_through_a_link(lacking, tmp_path, capsys):
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    (tmp_path / "x.jsonl.part").symlink_to(target)
    with pytest.raises(SystemExit):
        captions.main(["fill", str(lacking[0]), "--out", str(tmp_path / "x.jsonl")])
    assert "x.jsonl.part is a link, and not written through" in capsys.readouterr().err
    assert target.read_text() == "mine"


def with_broken_images(lacking, name, broken):
    """A copy of the folder of `lacking` in which some images are broken; returns fill's flags."""
    path, whole = lacking
    folder = whole.parent / name
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("*.jsonl*", "broken*"))
    for index in broken:
        (folder / f"{index}.png").write_bytes(b"no image")
    (folder / "pairs.jsonl").write_text(path.read_text() + "mine\n")
    return [str(folder / "pairs.jsonl"), "--out", str(folder / "sub.jsonl"), "--batch-size", "2"]


def test_bad_rows_are_left_out_and_listed(lacking, capsys):
    """A row with a broken image, and a line that is no row: each is named once."""
    flags = with_broken_images(lacking, "broken", [2])
    captions.main(["fill", *flags])
    streams = capsys.readouterr()
    assert "sub.jsonl is written, 2 bad rows left out" in streams.out
    assert streams.err.count("pairs.jsonl:3: ") == streams.err.count("pairs.jsonl:14: ") == 1
    out = Path(flags[2])
    images = [json.loads(line)["image"] for line in out.read_text("utf-8").splitlines()]
    assert images == [f"{i}.png" for i in range(12) if i != 2]
    first, second = Path(f"{out}.bad_rows.txt").read_text().splitlines()
    assert "2.png: cannot be decoded" in first and "jsonl:14: not valid JSON" in second


def test_too_many_bad_rows_end_fill_and_what_is_done_stays(lacking, capsys):
    """More than 3 and more than 1 %. With the images mended, the same command goes on."""
    flags = with_broken_images(lacking, "broken-too", [3, 4, 5, 6])
    folder = Path(flags[0]).parent
    with pytest.raises(SystemExit) as stopped:
        captions.main(["fill", *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: 4 of 8 rows cannot be used")
    assert not Path(flags[2]).exists()
    for index in range(3, 7):
        shutil.copy(lacking[0].parent / f"{index}.png", folder)
    captions.main(["fill", *flags])
    assert "7 of 13 rows are left" in capsys.readouterr().out
    rows = Path(flags[2]).read_text("utf-8").splitlines()
    whole = lacking[1].read_text("utf-8").splitlines()
    assert rows == [row for i, row in enumerate(whole) if i not in (3, 4, 5)]


def test_fill_leaves_out_what_training_would(tmp_path, capsys):
    """Lines of every kind that is no row; and a caption, of a row that lacks one, with </s>."""
    path = scene_pairs(tmp_path, 300, {0: {"short": "a </s>", "long": None}})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], BROKEN_LINES[5], BROKEN_LINES[0], *lines[2:]]))
    captions.main(["fill", str(path), "--out", str(tmp_path / "sub.jsonl"), "--batch-size", "400"])
    rows = (tmp_path / "sub.jsonl").read_text().splitlines()
    assert [json.loads(row)["image"] for row in rows] == [f"{i}.png" for i in range(1, 300)]
    bad = (tmp_path / "sub.jsonl.bad_rows.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in bad] == ["1", "3", "4"]
    assert capsys.readouterr().err.count("left out: ") == 3


def test_the_filled_file_may_lie_in_another_folder(lacking, tmp_path, tokenizer):
    out = tmp_path / "sub.jsonl"
    captions.main(["fill", str(lacking[1]), "--out", str(out)])  # nothing is missing
    pairs = data.Pairs(out, tokenizer, lacking[1].parent)
    assert len(pairs) == 12 and pairs.parse(0)["image"].is_file()


def test_the_scenes_as_public_files_become_pairs(tmp_path, monkeypatch):
    """The walk-through of docs/data.md in small, up to what is missing."""
    parts = export_scenes.export(tmp_path, unit=2)
    monkeypatch.chdir(tmp_path)
    sources = [
        "short:llava/llava_pretrain/blip_laion_cc_sbu_558k.json@llava/llava_pretrain/images",
        "long:share-captioner_coco_lcs_sam_1246k_1107.json",
        "short:coco/captions_train2017.json@coco/train2017",
        "short:openimages",
    ]
    counts, _ = converted(*sources, "--drop", "coco/dataset_coco.json")
    wanted = {
        "with short and long captions": parts["llava"] + parts["coco"],
        "with short captions": parts["llava_alone"],
        "with long captions": parts["sam"],
        "with no captions": parts["openimages"],
        "dropped by coco/dataset_coco.json": parts["coco_test"],
    }
    assert counts == counts | wanted
    counts = captions.main(["check", "pairs.jsonl"])
    assert counts["rows"] == sum(parts.values()) - parts["coco_test"]
    assert counts["rows that training leaves out"] == parts["openimages"]
    assert (counts["short captions missing"], counts["long captions missing"]) == (4, 4)
