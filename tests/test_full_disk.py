"""A disk that is full, at each file that a run or an export writes: one line, nothing lost.

What is written aside fails at its fsync, what is appended to goes to /dev/full, and a limit on the
size of files stands for the disk where another library writes. Not here: captions (test_captions).
"""

import builtins
import json
import os
import resource

import pytest
import torch
from test_train import names, steps_written, with_bad_lines, write_pairs

import data
import train as training
from extras import export

FLAGS = "--steps 4 --save-every 2 --holdout 4 --batch-size 6 --lora-rank 4".split()
WRITTEN = ("config.json", "metrics.jsonl", "bad_rows.txt", "step-000002", "step-000004")
WRITTEN += ("adapter.safetensors", "scores.json", "report.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two would wait for each other at every small product, where other processes are at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fill_disk(monkeypatch, name):
    """From now on no file whose path holds `name` can be written."""
    fsync, open_file = os.fsync, builtins.open

    def full_fsync(number):
        if name in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        fsync(number)

    def full_open(path, mode="r", *args, **options):
        full = "a" in mode and name in str(path)
        return open_file("/dev/full" if full else path, mode, *args, **options)

    monkeypatch.setattr(os, "fsync", full_fsync)
    for module in (data, training):
        monkeypatch.setattr(module, "open", full_open, raising=False)


def facts(out):
    """What two runs must have in common: bytes, names of files, losses."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    files = {name: (out / name).read_bytes() for name in ("adapter.safetensors", "scores.json")}
    files["bad_rows.txt"] = (out / "bad_rows.txt").read_text().splitlines()
    losses = [line["loss"] for line in metrics]
    return files, names(out.rglob("*")), steps_written(out), losses


def refusal(capsys, main, flags):
    """(what was printed, the line on stderr) of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    printed, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("left out: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    return printed, lines[0]


@pytest.fixture(scope="module")
def whole(random_folder, tmp_path_factory):
    """(flags, folder) of a run with two bad rows that was not interrupted."""
    folder = tmp_path_factory.mktemp("disk")
    path = with_bad_lines(write_pairs(folder), folder / "bad", 2)
    flags = ["--model", str(random_folder), "--data", str(path), *FLAGS]
    training.main([*flags, "--out", str(folder / "run")])
    return flags, folder / "run"


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_on_a_full_disk_goes_on_to_the_same_bytes(name, whole, tmp_path, monkeypatch, capsys):
    flags, finished = whole
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, name)
        printed, err = refusal(capsys, training.main, [*flags, "--out", out])
    assert "No space left" in err and str(out) in err
    # what was measured is said, though it could not be written
    assert ("percent" in printed) == (name in ("scores.json", "report.png"))
    assert not list(out.rglob("*.partial"))
    # a full disk leaves the beginning of a line
    for appended in {name} & {"metrics.jsonl", "bad_rows.txt"}:
        with open(out / appended, "a") as file:
            file.write('{"half a li')
    started = (out / "config.json").exists()
    assert started == (name != "config.json")
    training.main(["--out", str(out), "--resume"] if started else [*flags, "--out", str(out)])
    assert facts(out) == facts(finished)
    # what is written anew and cannot be stays as it was
    if name in ("scores.json", "report.png"):
        (out / name).write_bytes(b"before")
        fill_disk(monkeypatch, name)
        refusal(capsys, training.main, ["--out", out, "--resume"])
        assert (out / name).read_bytes() == b"before"


@pytest.mark.parametrize("name", ["tokenizer.json", "vladva.json", "README.md", "model", "config"])
def test_an_export_to_a_full_disk_can_be_written_again(name, whole, tmp_path, monkeypatch, capsys):
    """config.json stood there before the rest, and the same command was refused from then on."""
    flags, adapter = whole
    flags = [*flags[:2], "--adapter", adapter, "--out"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        if name == "model":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        else:
            fill_disk(patch, f"out/{name}")
        try:
            _, err = refusal(capsys, export.main, [*flags, tmp_path / "out"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in err and str(tmp_path / "out") in err
    for folder in ("out", "other"):
        export.main([str(flag) for flag in (*flags, tmp_path / folder)])
    assert names((tmp_path / "out").rglob("*")) == names((tmp_path / "other").rglob("*"))
    for path in (tmp_path / "other").rglob("*.*"):
        if path.is_file():
            written = tmp_path / "out" / path.relative_to(tmp_path / "other")
            assert written.read_bytes() == path.read_bytes()
