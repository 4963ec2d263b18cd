"""Public caption files to pairs: each schema in miniature, what joins and what only seems to,
counts by hand, and captions written by a model."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import export_scenes
import pytest

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
    COCO's; 2014 and 2017 name a COCO image differently; COCO's annotations name an id; spaces at
    the ends; rows without an image."""
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
            "short": "a web image of a cat",
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
    assert "dropped by dataset_coco.json         2" in out
    forms = ("LLaVA conversations, short", "LLaVA conversations, long")
    for line, form in zip(out.splitlines(), (*forms, "COCO captions, short", "Karpathy, short")):
        assert f"({form})" in line


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
        ("a.jpg,  many   spaces \r\n", {"a.jpg": "many spaces"}),
    ],
)
def test_tables(tmp_path, text, wanted):
    (tmp_path / "cc.txt").write_text(text)
    _, rows = converted(tmp_path / "cc.txt", out=tmp_path / "pairs.jsonl")
    assert {image: row["short"] for image, row in rows.items()} == wanted


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
    (tmp_path / "in/a.txt").write_text("one\n")
    (tmp_path / "in/00000/000000001.txt").write_text("two")
    counts, rows = converted(tmp_path / "in", out=tmp_path / "pairs.jsonl")
    assert rows == {
        "in/a.jpg": {"short": "one", "long": None},
        "in/00000/000000001.JPG": {"short": "two", "long": None},
        "in/00000/000000002.png": {"short": None, "long": None},
    }
    assert counts["with none"] == 1


def test_paths_are_relative_to_the_pairs_file_and_a_side_can_be_named(public):
    (public / "runs").mkdir()
    _, rows = converted(f"long:{public / 'llava.json'}@{public / 'im@ges'}", out="runs/pairs.jsonl")
    assert list(rows) == ["../im@ges/00453/004539375.jpg", "../im@ges/00000/000000009.jpg"]
    assert all(row["short"] is None and row["long"] for row in rows.values())


def test_equal_names_in_two_folders_are_two_images(tmp_path):
    """Of COCO's the id tells; any other name, even of twelve digits, only with its folder."""
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "t.tsv").write_text(f"000000000001.jpg\t{side}\nx.jpg\t{side}\n")
    _, rows = converted(
        tmp_path / "one/t.tsv", tmp_path / "two/t.tsv", out=tmp_path / "pairs.jsonl"
    )
    assert len(rows) == 4


def test_of_two_names_of_an_image_the_one_on_the_disk_is_taken(public):
    (public / "coco/train2017").mkdir(parents=True)
    (public / "coco/train2017/000000000009.jpg").write_bytes(b"")
    _, rows = converted("dataset_coco.json@coco", "share.json")
    assert (
        "coco/train2017/000000000009.jpg" in rows
        and "coco/train2014/COCO_train2014_000000000009.jpg" not in rows
    )


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
            '{"images": [{"id": 1, "file_name": "a.jpg"}], '
            '"annotations": [{"image_id": 1, "bbox": []}]}',
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
            "what follows caption 2 is not like the others (TypeError: image ['x']",
        ),
        ("a.json", json.dumps(LLAVA)[:-40], "a.json is not valid JSON"),
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


# ------------------------------------------------------------------------------------------ lengths


@pytest.fixture(scope="module")
def tokenizer():
    return VladVA.from_pretrained("tiny").tokenizer


def tokens(tokenizer, text):
    return len(tokenizer.encode(text).ids) - 1  # without BOS


def test_a_caption_is_cut_at_a_sentence_end_or_else_a_word(tokenizer):
    sentence = "a red circle is left of a blue square."  # 10 tokens
    assert tokens(tokenizer, sentence) == 10
    assert data.truncate_caption(" ".join([sentence] * 2), "short", tokenizer) == " ".join(
        [sentence] * 2
    )
    assert data.truncate_caption(" ".join([sentence] * 3), "short", tokenizer) == " ".join(
        [sentence] * 2
    )
    assert data.truncate_caption("red " * 40 + "circle.", "short", tokenizer) == " ".join(
        ["red"] * 29
    )
    assert data.truncate_caption(" ".join([sentence] * 60), "long", tokenizer) == " ".join(
        [sentence] * 50
    )  # 500 tokens to the point
    lone = f"{sentence} {'red ' * 600}circle."
    assert (
        tokens(tokenizer, data.truncate_caption(lone, "long", tokenizer)) == 500
    )  # the sentence alone would be a short caption
    assert data.truncate_caption(
        'he said "a red circle." ' + "and " * 40, "short", tokenizer
    ).endswith('circle."')


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
    for side, limit in data.MAX_CAPTION_TOKENS.items():
        for _ in range(100):
            text = " ".join(draw.choices(words, k=draw.randint(1, 2 * limit))).strip()
            kept = data.truncate_caption(text, side, tokenizer)
            assert (
                text.startswith(kept)
                and tokens(tokenizer, kept) <= limit
                and (kept == text) == (tokens(tokenizer, text) <= limit)
            )


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
    sentence = "a red circle is left of a blue square."
    path = scene_pairs(
        tmp_path, 3, {1: {"short": " ".join([sentence] * 3), "long": " ".join([sentence] * 60)}}
    )
    rows = [data.Pairs(path, tokenizer).row(i, random.Random(0)) for i in range(3)]
    assert rows[1]["short"] == " ".join([sentence] * 2) and rows[1]["long"] == " ".join(
        [sentence] * 50
    )


# -------------------------------------------------------------------------------------------- check


def test_check_counts_what_was_put_in(tmp_path, capsys):
    sentence = "a red circle is left of a blue square."
    changes = {
        1: {
            "image": "0.png",
            "short": [sentence, "a ring"],
        },  # an image again, a caption that comes again
        2: {"short": None},
        3: {"long": None, "short": sentence, "generated": {"short": {"model": "m", "prompt": "p"}}},
        4: {
            "short": "There is a Red circle",
            "long": f"there is a red circle, and {'more ' * 600}",
        },
        5: {"image": "cut.png", "long": "a ring"},
        6: {"image": "no.png"},
        7: {"short": "a </s> ring"},
    }
    path = scene_pairs(tmp_path, 8, changes)
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    path.write_text(path.read_text() + '\n{"image": 3}\n')
    found = captions.main(["check", str(path)])
    wanted = {
        "rows": 8,
        "malformed rows": 1,
        "images found": 6,
        "images missing": 1,
        "images broken": 1,
        "images that come again": 1,
        "short captions that come again": 1,
        "captions with a special token": 1,
        "rows whose long caption starts with a short one": 1,
        "short captions missing": 1,
        "short captions written by a model": 1,
        "long captions missing": 1,
    }
    assert found == found | wanted
    assert sum(found["short", length] for length in captions.LENGTHS[:3]) == 8  # under 30 tokens
    assert sum(found["long", length] for length in captions.LENGTHS[:3]) == 1
    assert sum(found["long", length] for length in captions.LENGTHS[3:-1]) == 5
    assert found["long", "over 500"] == 1
    out = capsys.readouterr().out
    assert "pairs.jsonl:6: " in out and "cut.png: cannot be decoded" in out
    assert "no.png not found" in out and "pairs.jsonl:10: wanted" in out and "#" in out
    assert "pairs.jsonl:8: text holds the special token '</s>'" in out
    assert captions.main(["check", str(path), "--no-decode"])["images broken"] == 0


def test_what_check_passes_training_takes(tmp_path, tokenizer):
    """A caption with a special token ended a training run although check had found nothing."""
    changes = {0: {"short": "a </s>"}, 1: {"long": "<image>"}, 2: {"image": "no.png"}}
    changes |= {3: {"short": None, "long": None}, 4: {"short": ["a", " <s>"]}}
    path = scene_pairs(tmp_path, 7, changes)
    found = captions.main(["check", str(path)])
    assert found["captions with a special token"] == 3
    assert found["images missing"] == found["rows without a caption"] == 1
    pairs = data.Pairs(path, tokenizer)
    refused = []
    for index in range(7):
        try:
            pairs.row(index, random.Random(0))
        except data.BadRow:
            refused.append(index)
    assert refused == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "short, long, repeats",
    [
        ("A dog runs.", "a dog runs, fast", True),
        ("a dog", "the dog", False),
        ("...", "... x", False),
        ("a dog", "a doghouse", False),
        ("a dog", "a", False),
    ],
)
def test_a_short_caption_that_repeats_the_start_of_the_long_one(short, long, repeats):
    assert captions.begins_with(long, short) == repeats


# --------------------------------------------------------------------------------------------- fill


def started(*arguments, ranks=1):
    """python -m extras.captions fill in processes of its own, one thread each."""
    launcher = []
    if ranks > 1:
        port = f"--master-port={random.randint(20000, 60000)}"
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", port]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "extras.captions", "fill", *map(str, arguments)],
        cwd=data.TINY.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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
    path.write_text("\n".join([*lines[:5], "  ", *lines[5:]]) + "\n")
    out = finished(started(path, "--out", folder / "whole.jsonl", "--batch-size", "2"))
    assert "6 short captions" in out and "5 long captions" in out and "12 rows" in out
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
        missing = [side for side in data.MAX_CAPTION_TOKENS if not was[side]]
        assert row.pop("generated", {}) == {
            side: {"model": "tiny", "prompt": prompts[side]} for side in missing
        }
        assert all(
            row[side] and tokens(tokenizer, row[side]) <= data.MAX_CAPTION_TOKENS[side]
            for side in missing
        )
        assert {k: v for k, v in row.items() if k not in missing} == {
            k: v for k, v in was.items() if k not in missing
        }
    pairs = data.Pairs(lacking[1], tokenizer)
    for index in range(12):
        pairs.row(index, random.Random(0))
    assert len(pairs) == 12 and list(lacking[1].parent.glob("*.part-*")) == []
    with pytest.raises(data.BadRow, match="jsonl:5: neither a short nor a long caption"):
        data.Pairs(lacking[0], tokenizer).parse(4)


def test_fill_killed_and_started_again_gives_the_same_file(lacking, capsys):
    """What a kill leaves of a line is dropped, other flags are refused, OUT is there only at the
    end."""
    path, whole = lacking
    out = whole.with_name("killed.jsonl")
    part = Path(f"{out}.part-0")
    flags = [path, "--out", out, "--batch-size", "2"]
    process = started(*flags)
    while process.poll() is None and not (part.is_file() and part.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -9 and not out.exists()
    lines = part.read_bytes().split(b"\n")
    done = len(lines) - 2  # but for the settings and what follows the last line feed
    assert 2 <= done < 6
    part.write_bytes(b"\n".join(lines[:-1]) + b'\n{"rows": [{"te')
    with pytest.raises(SystemExit):
        captions.main(["fill", *map(str, flags[:-1]), "3"])
    assert '"batch_size": 2' in capsys.readouterr().err
    assert f"{6 - done} of 6 chunks are left" in finished(started(*flags))
    assert out.read_bytes() == whole.read_bytes() and not part.exists()


def test_fill_by_two_processes_gives_the_same_file(lacking):
    path, whole = lacking
    out = whole.with_name("two.jsonl")
    finished(started(path, "--out", out, "--batch-size", "2", ranks=2))
    assert out.read_bytes() == whole.read_bytes()


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
    assert "2 bad rows left out" in streams.out
    assert streams.err.count("pairs.jsonl:3: ") == streams.err.count("pairs.jsonl:14: ") == 1
    out = Path(flags[2])
    images = [json.loads(line)["image"] for line in out.read_text("utf-8").splitlines()]
    assert images == [f"{i}.png" for i in range(12) if i != 2]
    first, second = Path(f"{out}.bad_rows.txt").read_text().splitlines()
    assert "2.png: cannot be decoded" in first and "jsonl:14: not a JSON object" in second


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
    assert "3 of 6 chunks are left" in capsys.readouterr().out
    rows = Path(flags[2]).read_text("utf-8").splitlines()
    whole = lacking[1].read_text("utf-8").splitlines()
    assert rows == [row for i, row in enumerate(whole) if i not in (3, 4, 5)]


def test_the_filled_file_may_lie_in_another_folder(lacking, tmp_path, tokenizer):
    captions.main(
        ["fill", str(lacking[1]), "--out", str(tmp_path / "sub.jsonl")]
    )  # nothing is missing
    assert len(data.Pairs(tmp_path / "sub.jsonl", tokenizer)) == 12


def test_the_scenes_as_public_files_become_pairs(tmp_path, monkeypatch):
    """The walk-through of docs/data.md in small, up to what is missing."""
    parts = export_scenes.export(tmp_path, unit=2)
    monkeypatch.chdir(tmp_path)
    sources = [
        "llava/llava_pretrain/blip_laion_cc_sbu_558k.json@llava/llava_pretrain/images",
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "coco/captions_train2017.json@coco/train2017",
        "openimages",
    ]
    counts, _ = converted(*sources, "--drop", "coco/dataset_coco.json")
    wanted = {
        "with both captions": parts["llava"] + parts["coco"],
        "short only": parts["llava_alone"],
        "long only": parts["sam"],
        "with none": parts["openimages"],
        "dropped by coco/dataset_coco.json": parts["coco_test"],
    }
    assert counts == counts | wanted
    found = captions.main(["check", "pairs.jsonl"])
    assert found["images found"] == found["rows"] == sum(parts.values()) - parts["coco_test"]
    assert (found["short captions missing"], found["long captions missing"]) == (4, 4)
