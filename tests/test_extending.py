"""docs/extending.md: its code as printed, and that it is short."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import eval as benchmarks
import model as networks
import train
import vladva

PAGE = Path(__file__).resolve().parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Runs a block of the page and returns its names; the tables it adds to are put back."""
    for table in (vladva.LOSSES, benchmarks.BENCHMARKS, networks.ARCHITECTURES):
        for key in ("sigmoid", "mine", "llava_llama3"):
            monkeypatch.setitem(table, key, None)  # which undoes what the page's code puts there
            del table[key]

    def run(file):
        path = tmp_path / file
        path.write_text(dict(BLOCKS)[file], encoding="utf-8")
        return runpy.run_path(str(path), run_name="example")

    return run


def test_each_example_has_at_most_25_lines_of_code():
    assert [name for name, _ in BLOCKS] == ["sigmoid_loss.py", "my_benchmark.py", "llama3.py"]
    for name, code in BLOCKS:
        lines = [line for line in code.splitlines() if line.strip()]
        assert len(lines) <= 25, (name, len(lines))


def test_the_loss_of_the_page_trains_and_its_parameters_are_saved_and_move(
    example, random_folder, tmp_path
):
    sigmoid_loss = example("sigmoid_loss.py")["sigmoid_loss"]
    flags = ["--model", str(random_folder), "--out", str(tmp_path / "run"), "--loss", "sigmoid"]
    train.main([*flags, "--steps", "3", "--batch-size", "4", "--holdout", "0", "--lora-rank", "4"])
    saved = load_file(tmp_path / "run" / "adapter.safetensors")
    assert saved["loss_parameters.bias"] != -10  # it starts there
    model = vladva.VladVA.from_pretrained(random_folder, adapter=tmp_path / "run")
    image_emb = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    loss = sigmoid_loss(model, vladva.Embeddings(image_emb, image_emb, image_emb[:0]))
    scale = model.loss_parameters["log_scale"].exp()
    by_hand = 0.0
    for i in range(3):
        for j in range(3):
            logit = scale * (image_emb[i] @ image_emb[j]) + model.loss_parameters["bias"]
            by_hand += torch.nn.functional.softplus(-logit if i == j else logit)
    assert loss.item() == pytest.approx(by_hand.item() / 3, rel=1e-5)  # float32 sums


def test_the_benchmark_of_the_page_scores_a_folder(example, random_folder, tmp_path, capsys):
    example("my_benchmark.py")
    lines = []
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"number {i}", "a picture"]}))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    flags = ["--task", "mine", "--folder", str(tmp_path), "--model", str(random_folder)]
    results = benchmarks.main(flags)
    assert results["counts"] == {"images": 3, "captions": 6}
    assert "text to image R@1" in capsys.readouterr().out
    (tmp_path / "1.png").unlink()
    with pytest.raises(SystemExit):
        benchmarks.main(flags)
    assert "published at example.org/mine" in capsys.readouterr().err


def test_the_architecture_of_the_page_is_made_loaded_and_trained(example, tmp_path):
    names = example("llama3.py")
    names["random_folder"](tmp_path / "model")
    lvlm = networks.load_lvlm(tmp_path / "model")
    assert lvlm.config.decoder.head_dim == 48 and lvlm.config.decoder.rope_theta == 500000
    assert lvlm.decoder.layers[0].self_attn.q_proj.weight.shape == (4 * 48, 128)
    flags = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--steps", "2"]
    train.main([*flags, "--batch-size", "4", "--holdout", "0"])
    model = vladva.VladVA.from_pretrained(tmp_path / "model", adapter=tmp_path / "run")
    assert model.encode_text(["a red circle"]).isfinite().all()
