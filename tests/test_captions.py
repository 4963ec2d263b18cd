"""Public caption files to pairs: each schema in miniature, what joins and what only seems to, counts by hand, and captions written by a model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import export_scenes
import numpy as np
import pytest
from PIL import Image

import data
from extras import captions, scenes

# ------------------------------------------------------------------------------------------------------ JSON in pieces


NASTY = [
    {
        "a": 'braces } ] { [ and "quotes" in a string',
        "n": -12.5e3,
        "t": [True, None, {"deep": [[]]}],
    },
    {"text": "caf\u00e9 \u6f22\u5b57 \U0001f600 \u2028", "escaped": '\\" \n \\u0041'},
    123456,
    "",
    [],
    [{"x": 1}, []],
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64, 1 << 20])
@pytest.mark.parametrize(
    "ascii", [True, False]
)  # with \u escapes, surrogate pairs among them, or characters of several bytes
def test_items_are_those_of_json_whatever_the_size_of_a_read(tmp_path, chunk, ascii):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(NASTY, ensure_ascii=ascii, indent=1), encoding="utf-8")
    assert list(captions.json_items(path, chunk)) == [(None, item) for item in NASTY]
    whole = {
        "info": {"images": [1]},
        "images": NASTY,
        "none": [],
        "version": 12,
        "annotations": [1, 2],
    }
    path.write_text("\ufeff " + json.dumps(whole, ensure_ascii=ascii) + "\n ", encoding="utf-8")
    wanted = [
        ("info", whole["info"]),
        *(("images", item) for item in NASTY),
        ("version", 12),
        ("annotations", 1),
        ("annotations", 2),
    ]
    assert list(captions.json_items(path, chunk)) == wanted


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}',
        '[{"a": 1}, {"b": "x',
        '{"a": [1, 2}',
        "[1] [2]",
        "[1, nonsense]",
        "",
        '{"a": 1} {"a": 2}',
    ],
)
def test_what_is_not_whole_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    for chunk in (1, 100):
        with pytest.raises(ValueError, match="a.json is not JSON"):
            list(captions.json_items(tmp_path / "a.json", chunk))


def test_a_value_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(captions.JsonStream, "LARGEST", 1000)
    (tmp_path / "a.json").write_text('["' + "x" * 100_000)
    with pytest.raises(ValueError, match="no whole value"):
        list(captions.json_items(tmp_path / "a.json", 100))


def test_a_large_array_is_read_in_little_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"image": f"{i}.jpg", "text": "word " * 200} for i in range(10_000)])
    )
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    count, (_, peak) = (
        sum(1 for _ in captions.json_items(path, 1 << 16)),
        tracemalloc.get_traced_memory(),
    )
    tracemalloc.stop()
    assert count == 10_000 and peak < 2_000_000


# ------------------------------------------------------------------------------------------------------ the public files in miniature

LONG = "The image shows {}. It is described here in many more words than a short caption has, so that nobody can take it for one of those, {}."


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
        "a web picture of a cat",
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
    """A folder with the files under their public names, laid out as ShareGPT4V's authors say; pictures are made by the tests that look at them."""
    files = {"llava.json": LLAVA, "share.json": SHAREGPT4V, "captions_train2017.json": COCO, "dataset_coco.json": KARPATHY,
             "dataset_flickr30k.json": FLICKR, "nocaps.json": NOCAPS, "sugarcrepe.json": SUGARCREPE}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(*arguments, out="pairs.jsonl"):
    """(what convert returns, {picture: row}) of a run."""
    counts = captions.main(["convert", *map(str, arguments), "--out", str(out)])
    rows = [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]
    assert len({row["image"] for row in rows}) == len(rows)
    return counts, {row.pop("image"): row for row in rows}


def test_short_and_long_captions_of_a_picture_meet_in_one_row(public, capsys):
    """The traps: LLaVA-Pretrain's names lack the folder that ShareGPT4V's have; 000000009 is no COCO picture; 2014 and 2017 name a COCO
    picture differently; COCO's annotations name an id; blanks at the ends; rows without a picture."""
    sources = (
        "llava.json@llava/llava_pretrain/images",
        "share.json",
        "captions_train2017.json@coco/train2017",
        "dataset_coco.json@coco",
    )
    counts, rows = converted(*sources)
    assert rows == {
        "llava/llava_pretrain/images/00453/004539375.jpg": {
            "short": "select luxury furniture 3 - inch topper",
            "long": long_caption("a mattress"),
        },
        "llava/llava_pretrain/images/00000/000000009.jpg": {
            "short": "a web picture of a cat",
            "long": None,
        },
        "coco/train2017/000000000009.jpg": {
            "short": ["A plate of food.", "Lunch on a table", "a plate, says Karpathy"],
            "long": long_caption("a plate"),
        },
        "sam/images/sa_1.jpg": {
            "short": None,
            "long": long_caption("a street") + "\n\nA second paragraph.",
        },
        "coco/train2017/000000000025.jpg": {
            "short": "A giraffe.",
            "long": None,
        },  # said by both files
    }
    assert (
        counts["with both captions"],
        counts["short only"],
        counts["long only"],
        counts["dropped by dataset_coco.json"],
    ) == (2, 2, 1, 2)
    out = capsys.readouterr().out
    assert (
        "dropped: 2 pictures that dataset_coco.json evaluates on" in out
        and "5 pictures, 2 with both" in out
    )
    assert [line.split()[-6:-4] for line in out.splitlines()[2:6]] == [["conversations", "short"], ["conversations", "long"], ["captions", "short"],
                                                                       ["Karpathy", "short"]]  # fmt: skip


def test_pictures_of_evaluation_sets_are_dropped_and_counted(public):
    """By COCO's id in both spellings, Flickr's name and Open Images' id; nocaps's own ids count from 0 and are nobody's."""
    names = [
        "COCO_val2014_000000000042",
        "000000000007",
        "deep/1007129816",
        "0013ea2087020901",
        "9",
        "000000085329",
        "keep",
    ]
    Path("cc.tsv").write_text("".join(f"{name}.jpg\ta caption\n" for name in names))
    drop = [
        "--drop",
        "dataset_coco.json",
        "dataset_flickr30k.json",
        "nocaps.json",
        "sugarcrepe.json",
    ]
    counts, rows = converted("cc.tsv", *drop)
    assert list(rows) == ["9.jpg", "keep.jpg"]
    assert [counts[f"dropped by {name}"] for name in drop[1:]] == [2, 1, 1, 1]
    assert len(converted("cc.tsv", out="all.jsonl")[1]) == 7
    with pytest.raises(SystemExit):
        captions.main(["convert", "cc.tsv", "--out", "x.jsonl", "--drop", "llava.json"])


@pytest.mark.parametrize(
    "text, wanted",
    [
        (
            'a.jpg\tsays "hello, you\nsub/b.jpg\ttwo\n',
            {"a.jpg": 'says "hello, you', "sub/b.jpg": "two"},
        ),  # a quote that never ends
        ("filepath\ttitle\na.jpg\tone\n", {"a.jpg": "one"}),
        ('a.jpg,"one, two"\nb.jpg,three\n', {"a.jpg": "one, two", "b.jpg": "three"}),
        ("caption,score,image\none,.5,a.jpg\n\n", {"a.jpg": "one"}),
        ("a.jpg,  many   blanks \r\n", {"a.jpg": "many blanks"}),
    ],
)
def test_tables(tmp_path, text, wanted):
    (tmp_path / "cc.txt").write_text(text)
    _, rows = converted(tmp_path / "cc.txt", out=tmp_path / "pairs.jsonl")
    assert {image: row["short"] for image, row in rows.items()} == wanted


def test_a_folder_of_pictures_with_texts_beside_them(tmp_path):
    """Below too; a picture without a text becomes a row for `fill`; files that are no pictures do not matter."""
    (tmp_path / "in/00000").mkdir(parents=True)
    for name in (
        "a.jpg",
        "00000/000000001.JPG",
        "00000/000000002.png",
        "notes.txt",
        "00000/000000001.json",
    ):
        (tmp_path / "in" / name).write_bytes(b"")
    (tmp_path / "in/a.txt").write_text("one\n")
    (tmp_path / "in/00000/000000001.txt").write_text("two")
    counts, rows = converted(tmp_path / "in", out=tmp_path / "pairs.jsonl")
    assert rows == {"in/a.jpg": {"short": "one", "long": None}, "in/00000/000000001.JPG": {"short": "two", "long": None},
                    "in/00000/000000002.png": {"short": None, "long": None}}  # fmt: skip
    assert counts["with none"] == 1


def test_paths_are_relative_to_the_pairs_file_and_a_side_can_be_named(public):
    (public / "runs").mkdir()
    _, rows = converted(f"long:{public / 'llava.json'}@{public / 'im@ges'}", out="runs/pairs.jsonl")
    assert list(rows) == ["../im@ges/00453/004539375.jpg", "../im@ges/00000/000000009.jpg"]
    assert all(row["short"] is None and row["long"] for row in rows.values())


def test_equal_names_in_two_folders_are_two_pictures(tmp_path):
    """Of COCO's the id tells; any other name, even of twelve digits, only with its folder."""
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "t.tsv").write_text(f"000000000001.jpg\t{side}\nx.jpg\t{side}\n")
    _, rows = converted(
        tmp_path / "one/t.tsv", tmp_path / "two/t.tsv", out=tmp_path / "pairs.jsonl"
    )
    assert len(rows) == 4


def test_of_two_names_of_a_picture_the_one_on_the_disk_is_taken(public):
    (public / "coco/train2017").mkdir(parents=True)
    (public / "coco/train2017/000000000009.jpg").write_bytes(b"")
    _, rows = converted("dataset_coco.json@coco", "share.json")
    assert (
        "coco/train2017/000000000009.jpg" in rows
        and "coco/train2014/COCO_train2014_000000000009.jpg" not in rows
    )


def test_pictures_whose_hashes_meet_stay_apart(public, monkeypatch):
    monkeypatch.setattr(
        captions.hashlib,
        "blake2b",
        lambda *_, **__: type("Hash", (), {"digest": lambda self: bytes(8)})(),
    )
    _, rows = converted("llava.json@llava/llava_pretrain/images", "share.json")
    assert len(rows) == 5 and rows["llava/llava_pretrain/images/00453/004539375.jpg"][
        "long"
    ] == long_caption("a mattress")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.json",
            '[{"image": "a.jpg", "label": 3}]',
            "is none of: LLaVA conversations ('conversations' in the rows)",
        ),
        (
            "a.json",
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "bbox": []}]}',
            "is none of",
        ),
        (
            "a.json",
            json.dumps([*LLAVA, {"id": "3", "image": "x.jpg", "conversations": []}]),
            "follows caption 2 is not like the others (IndexError",
        ),
        (
            "a.json",
            json.dumps([*LLAVA, conversation("3", ["x"], "y")]),
            "what follows caption 2 is not like the others (TypeError: picture ['x']",
        ),
        ("a.json", json.dumps(LLAVA)[:-40], "a.json is not JSON"),
        (
            "a.tsv",
            "a caption\thttp://x.org/a.jpg\n",
            "a.tsv:1: 'http://x.org/a.jpg' is an address",
        ),  # CC3M as it is published
        ("a.csv", "image,caption\na.jpg,A man, a dog\n", "a.csv:2: 3 columns, wanted 2"),
        ("a.csv", "a.jpg\n", "a.csv:1: 1 columns"),
    ],
)
def test_a_file_in_another_form_is_one_line_and_nothing_is_written(
    tmp_path, capsys, name, content, message
):
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        captions.main(["convert", str(tmp_path / name), "--out", str(tmp_path / "pairs.jsonl")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["convert", "no.json", "--out", "x.jsonl"],
            "no.json: no such file or folder; a SOURCE is",
        ),
        (["convert", "llava.json", "--out", "there.jsonl"], "there.jsonl is there already"),
        (["convert", "llava.json", "--out", "no/x.jsonl"], "no/x.jsonl could not be written"),
        (["check", "no.jsonl"], "no.jsonl not found"),
        (["check", "there.jsonl", "--picture", "there.jsonl"], "there.jsonl is there already"),
        (["check", "there.jsonl", "--workers", "0"], "--workers 0"),
        (["fill", "there.jsonl", "--out", "there.jsonl"], "there.jsonl is there already"),
        (["fill", "there.jsonl", "--out", "x.jsonl", "--batch", "0"], "--batch 0"),
        (["fill", "there.jsonl", "--out", "x.jsonl"], "there.jsonl:1: not a JSON object"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(public, arguments, message, capsys):
    Path("there.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit) as stopped:
        captions.main(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1
    assert Path("there.jsonl").read_text() == "mine\n" and not Path("x.jsonl").exists()


# ------------------------------------------------------------------------------------------------------ lengths


@pytest.fixture(scope="module")
def tokenizer():
    return captions.open_tokenizer("tiny")


def tokens(tokenizer, text):
    return len(tokenizer.encode(text).ids) - 1  # without BOS


def test_a_caption_is_cut_at_a_sentence_end_or_else_a_word(tokenizer):
    sentence = "a red circle is left of a blue square."  # 10 tokens
    assert tokens(tokenizer, sentence) == 10
    assert data.cut(" ".join([sentence] * 2), "short", tokenizer) == " ".join([sentence] * 2)
    assert data.cut(" ".join([sentence] * 3), "short", tokenizer) == " ".join([sentence] * 2)
    assert data.cut("red " * 40 + "circle.", "short", tokenizer) == " ".join(["red"] * 29)
    assert data.cut(" ".join([sentence] * 60), "long", tokenizer) == " ".join(
        [sentence] * 50
    )  # 500 tokens to the point
    lone = f"{sentence} {'red ' * 600}circle."
    assert (
        tokens(tokenizer, data.cut(lone, "long", tokenizer)) == 500
    )  # the sentence alone would be a short caption
    assert data.cut('he said "a red circle." ' + "and " * 40, "short", tokenizer).endswith(
        'circle."'
    )


def test_what_is_cut_is_a_beginning_within_the_limits(tokenizer):
    draw, words = (
        random.Random(0),
        [
            "a",
            "red",
            "circle.",
            "caf\u00e9",
            "\u6f22\u5b57",
            "3.5",
            "U.S.",
            "\n\n",
            "wow!",
            "(left)",
            "\U0001f600",
        ],
    )
    for side, limits in data.LIMITS.items():
        for _ in range(100):
            text = " ".join(draw.choices(words, k=draw.randint(1, 2 * limits[-1])))
            kept = data.cut(text, side, tokenizer)
            assert (
                text.startswith(kept)
                and tokens(tokenizer, kept) <= limits[-1]
                and (kept == text) == (tokens(tokenizer, text) <= limits[-1])
            )


def scene_pairs(folder, count, changes=()):
    """A pairs file of scenes, pictures beside it; changes: {index: what its row says otherwise}."""
    rows = []
    for i in range(count):
        row = scenes.scene_row(3, i)
        row["image"].save(folder / f"{i}.png")
        rows.append({**row, "image": f"{i}.png", **dict(changes).get(i, {})})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_rows_are_cut_and_say_how_often(tmp_path, tokenizer):
    sentence = "a red circle is left of a blue square."
    path = scene_pairs(
        tmp_path, 3, {1: {"short": " ".join([sentence] * 3), "long": " ".join([sentence] * 60)}}
    )
    rows = [data.Pairs(path, tokenizer).row(i, random.Random(0)) for i in range(3)]
    assert [row["cut"] for row in rows] == [0, 2, 0]
    assert rows[1]["short"] == " ".join([sentence] * 2) and rows[1]["long"] == " ".join(
        [sentence] * 50
    )


def test_the_index_of_a_large_file_is_mapped_from_the_disk_and_follows_the_file(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(data, "INDEXED", 100)
    path = scene_pairs(tmp_path, 5)
    first, again = data.Pairs(path, tokenizer), data.Pairs(path, tokenizer)
    kept = again.starts
    while isinstance(kept.base, np.ndarray):
        kept = kept.base
    assert (tmp_path / "pairs.jsonl.index.npy").is_file() and isinstance(kept, np.memmap)
    assert again.starts.tolist() == first.starts.tolist() == data.line_starts(path).tolist()
    path.write_text("\n" + path.read_text())
    assert (
        data.Pairs(path, tokenizer).starts.tolist()
        == data.line_starts(path).tolist()
        != first.starts.tolist()
    )
    assert [file.name for file in tmp_path.glob("*.partial")] == []


# ------------------------------------------------------------------------------------------------------ check


def test_check_counts_what_was_put_in(tmp_path, capsys):
    sentence = "a red circle is left of a blue square."
    changes = {
        1: {
            "image": "0.png",
            "short": [sentence, "a ring"],
        },  # a picture again, a caption that comes again below
        2: {"short": None},
        3: {"long": None, "short": sentence, "generated": {"short": {"model": "m", "prompt": "p"}}},
        4: {
            "short": "There is a Red circle",
            "long": f"there is a red circle, and {'more ' * 600}",
        },
        5: {"image": "cut.png", "long": "a ring"},
        6: {"image": "no.png"},
    }
    path = scene_pairs(tmp_path, 8, changes)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    path.write_text(path.read_text() + '\n{"image": 3}\n')
    found = captions.main(
        ["check", str(path), "--picture", str(tmp_path / "lengths.png"), "--workers", "2"]
    )
    assert found == found | {
        "rows": 8, "malformed rows": 1, "pictures found": 6, "pictures missing": 1, "pictures broken": 1,
        "pictures that come again": 1, "short captions that come again": 1, "rows whose long caption starts with a short one": 1,
        "short captions under 30 tokens": 8, "short captions missing": 1, "short captions written by a model": 1,
        "long captions under 30 tokens": 1, "long captions 30 to 500": 5, "long captions over 500": 1, "long captions missing": 1,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert (
        "pairs.jsonl:6: " in out
        and "cut.png: cannot be decoded" in out
        and "no.png not found" in out
        and "pairs.jsonl:10: wanted" in out
    )
    assert Image.open(tmp_path / "lengths.png").size == (900, 320) and "#" in out
    assert captions.main(["check", str(path), "--no-decode"])["pictures broken"] == 0


@pytest.mark.parametrize("short, long, repeats", [("A dog runs.", "a dog runs, fast", True), ("a dog", "the dog", False), ("...", "... x", False),
                                                  ("a dog", "a doghouse", False), ("a dog", "a", False)])  # fmt: skip
def test_a_short_caption_that_repeats_the_start_of_the_long_one(short, long, repeats):
    assert captions.begins_with(long, short) == repeats


# ------------------------------------------------------------------------------------------------------ fill


def started(*arguments, ranks=1):
    """python -m extras.captions fill in processes of its own, one thread each."""
    launcher = (
        [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            f"--master-port={random.randint(20000, 60000)}",
        ]
        if ranks > 1
        else []
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        *launcher,
        "-m",
        "extras.captions",
        "fill",
        *map(str, arguments),
    ]
    return subprocess.Popen(
        command,
        cwd=data.TINY.parents[1],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """(pairs file in which captions are missing, its filled form): 12 rows, 6 short and 5 long captions missing, a blank line between."""
    folder = tmp_path_factory.mktemp("lacking")
    no_short, no_long = (
        {i: {side: None} for i in rows}
        for side, rows in (("short", range(0, 12, 2)), ("long", (1, 3, 5, 7)))
    )
    path = scene_pairs(
        folder, 12, no_short | no_long | {4: {"short": None, "long": None}, 6: {"short": []}}
    )
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], "  ", *lines[5:]]) + "\n")
    assert "12 rows; tiny wrote 6 short and 5 long captions" in finished(
        started(path, "--out", folder / "whole.jsonl", "--batch", "2")
    )
    return path, folder / "whole.jsonl"


def test_fill_writes_what_is_missing_and_says_who_wrote_it(lacking, tokenizer):
    """One row each, in order; what was there is untouched; training takes the result."""
    before, after = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path in lacking
    )
    prompts = {
        "short": "Provide a brief description of the image.",
        "long": "Describe the image in detail.",
    }
    for row, was in zip(after, before, strict=True):
        missing = [side for side in data.LIMITS if not was[side]]
        assert row.pop("generated", {}) == {
            side: {"model": "tiny", "prompt": prompts[side]} for side in missing
        }
        assert all(
            row[side] and tokens(tokenizer, row[side]) <= data.LIMITS[side][-1] for side in missing
        )
        assert {k: v for k, v in row.items() if k not in missing} == {
            k: v for k, v in was.items() if k not in missing
        }
    assert (
        len(data.Pairs(lacking[1], tokenizer)) == 12 and not Path(f"{lacking[1]}.progress").exists()
    )
    with pytest.raises(data.BadRow, match="jsonl:5: neither a short nor a long caption"):
        data.Pairs(lacking[0], tokenizer)


def test_fill_killed_and_started_again_gives_the_same_file(lacking, capsys):
    """What a kill leaves of a line is dropped. Another number of processes may go on, other flags are refused, OUT is there only at the end."""
    path, whole = lacking
    out = whole.with_name("killed.jsonl")
    progress, flags = (
        Path(f"{out}.progress") / "rank-0000.jsonl",
        [path, "--out", out, "--batch", "2"],
    )
    process = started(*flags)
    while process.poll() is None and not (
        progress.is_file() and progress.read_bytes().count(b"\n") >= 2
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -9 and not out.exists()
    done = progress.read_bytes().count(b"\n")
    assert 2 <= done < 6
    first, *others = progress.read_bytes().splitlines(keepends=True)
    half = b'{"batch": 5, "captions": [{"te'
    progress.write_bytes(first + half)
    progress.with_name("rank-0001.jsonl").write_bytes(b"".join(others) + half)
    with pytest.raises(SystemExit):
        captions.main(["fill", *map(str, flags[:-1]), "3"])
    assert "batch was 2, not 3): go on with its flags, or delete it" in capsys.readouterr().err
    assert f"{done} of 6 batches of 2 are done" in finished(started(*flags))
    assert out.read_bytes() == whole.read_bytes() and not progress.parent.exists()


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="the device that is always full is Linux's"
)
def test_a_full_disk_stops_fill_in_one_line():
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(ValueError, match="/dev/full: .*No space left.*; the same command goes on"),
    ):
        captions.append_line(file, {"batch": 0})


def test_fill_by_two_processes_gives_the_same_file(lacking):
    path, whole = lacking
    out = whole.with_name("two.jsonl")
    finished(started(path, "--out", out, "--batch", "2", ranks=2))
    assert out.read_bytes() == whole.read_bytes()


def test_a_broken_picture_stops_fill_or_is_left_out_and_listed(lacking):
    """In a process of its own. After the stop, the same command with "skip" goes on."""
    path, whole = lacking
    folder = whole.parent / "broken"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("*.jsonl*", "broken"))
    (folder / "2.png").write_bytes(b"no picture")
    (folder / "pairs.jsonl").write_text(path.read_text())
    flags = [folder / "pairs.jsonl", "--out", folder / "sub.jsonl", "--batch", "2"]
    stopped = started(*flags)
    err = stopped.communicate()[1]
    assert (
        stopped.returncode == 2
        and err.count("error:") == 1
        and "pairs.jsonl:3: " in err
        and "Traceback" not in err
    )
    assert "1 bad rows are left out" in finished(started(*flags, "--on-bad-data", "skip"))
    kept = [
        json.loads(line)["image"]
        for line in (folder / "sub.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert kept == [f"{i}.png" for i in range(12) if i != 2]
    assert "2.png: cannot be decoded" in (folder / "sub.jsonl.bad_rows.txt").read_text()


def test_the_filled_file_may_lie_in_another_folder(lacking, tmp_path, tokenizer):
    captions.main(
        ["fill", str(lacking[1]), "--out", str(tmp_path / "sub.jsonl")]
    )  # nothing is missing
    assert len(data.Pairs(tmp_path / "sub.jsonl", tokenizer)) == 12


def test_the_scenes_as_public_files_become_pairs(tmp_path, monkeypatch):
    """The walk-through of docs/data.md in small, up to what is missing."""
    parts = export_scenes.export(tmp_path, unit=2)
    monkeypatch.chdir(tmp_path)
    sources = ["llava/llava_pretrain/blip_laion_cc_sbu_558k.json@llava/llava_pretrain/images", "share-captioner_coco_lcs_sam_1246k_1107.json",
               "coco/captions_train2017.json@coco/train2017", "openimages"]  # fmt: skip
    counts, _ = converted(*sources, "--drop", "coco/dataset_coco.json")
    wanted = {"with both captions": parts["llava"] + parts["coco"], "short only": parts["llava_alone"], "long only": parts["sam"],
              "with none": parts["openimages"], "dropped by coco/dataset_coco.json": parts["coco_test"]}  # fmt: skip
    assert counts == counts | wanted
    found = captions.main(["check", "pairs.jsonl"])
    assert found["pictures found"] == found["rows"] == sum(parts.values()) - parts["coco_test"]
    assert (found["short captions missing"], found["long captions missing"]) == (4, 4)
