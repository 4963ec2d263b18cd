"""The paper's Table 4 in small."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train as training
from extras import ablation


def run(random_folder, out, *flags):
    return ablation.main(["--model", str(random_folder), "--out", str(out), *flags])


LITTLE = [
    "--steps",
    "2",
    "--eval-gallery",
    "6",
    "--eval-items",
    "2",
    "--scenes",
    "20",
    "--batch",
    "4",
]


def test_the_ablation_trains_every_row_and_goes_on_where_it_stopped(
    random_folder, tmp_path, monkeypatch, capsys
):
    """Runs that are done are read, not trained again; each row is an ordinary run."""
    names = list(ablation.ABLATION)
    monkeypatch.setattr(
        ablation, "ABLATION", {name: ablation.ABLATION[name] for name in (names[0], names[3])}
    )
    first = run(random_folder, tmp_path / "a", "--seeds", "2", "--jobs", "1", *LITTLE)
    rows = [ablation.UNTOUCHED, *ablation.ABLATION]
    assert list(first) == rows and all(
        len(values["Swap"]) == (1 if row == rows[0] else 2) for row, values in first.items()
    )
    table = (tmp_path / "a" / "ablation.md").read_text()
    assert (
        table in capsys.readouterr().out
        and [line.split("|")[1].strip() for line in table.splitlines()[2:]] == rows
    )
    assert json.loads((tmp_path / "a" / "ablation.json").read_text())["rows"] == first
    both = training.main(
        ["--model", str(random_folder), "--out", str(tmp_path / "alone"), *LITTLE, "--seed", "1"]
    )
    wanted = {
        name: values[1] for name, values in first["LoRA, soft prompts, next-token loss"].items()
    }
    assert {name: values[0] for name, values in ablation.ablated([both["after"]]).items()} == wanted
    weights = load_file(tmp_path / "a" / "1-seed-0" / "adapter.safetensors")
    assert not any("lora" in name for name in weights) and "soft_prompt.image" in weights
    for gone in ("1-seed-1/scores.json", "2-seed-0/scores.json"):
        (tmp_path / "a" / gone).unlink()
    trained, train = [], ablation.train
    monkeypatch.setattr(
        ablation, "train", lambda *a, **k: trained.append(a[0].out) or train(*a, **k)
    )
    assert (
        run(
            random_folder,
            tmp_path / "a",
            "--seeds",
            "2",
            "--jobs",
            "1",
            "--resume",
            *LITTLE,
        )
        == first
    )
    assert sorted(Path(out).name for out in trained) == ["1-seed-1", "2-seed-0"]
    with pytest.raises(SystemExit):
        run(random_folder, tmp_path / "a", *LITTLE)
    assert "another ablation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(random_folder, tmp_path / "b", *LITTLE, "--eval-gallery", "0")
    assert "on what is held out" in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_two_runs_of_the_ablation_at_a_time_give_what_one_gives(
    random_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(ablation, "ABLATION", dict(list(ablation.ABLATION.items())[3:]))
    one, two = (
        run(random_folder, tmp_path / jobs, "--seeds", "1", "--jobs", jobs, *LITTLE)
        for jobs in ("1", "2")
    )
    for row, values in one.items():
        for name, value in values.items():
            assert two[row][name] == pytest.approx(value, rel=1e-4), (
                row,
                name,
            )  # another number of threads adds up in another order
