"""The images of runs: the report with its frames, and the curves of an unfinished run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval import Benchmark, Measured
from extras import plots


class HeldOut:
    """Three held-out images of one colour each, the last as a path."""

    def __init__(self, folder):
        self.images = [Image.new("RGB", (30, 20 + i), (60 * i, 0, 200)) for i in range(3)]
        self.images[2].save(folder / "2.png")
        self.images[2] = folder / "2.png"

    def __len__(self):
        return 3

    @property
    def benchmark(self):
        texts = [f"number {index} " + "and many more words " * 9 for index in range(3)]
        return Benchmark(self.images, texts, None, {})


def write_metrics(folder, steps):
    values = {"contrastive": 1.5, "next_token": 0.0, "grad_norm": 2.0, "lr": 1e-3}
    values |= {"tokens_per_s": 900.0, "peak_bytes": 5e8}
    lines = [json.dumps({"step": step} | values) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def count_pixels(image, colour):
    return int((np.asarray(image.convert("RGB")) == colour).all(-1).sum())


def test_the_report_frames_the_right_image_where_it_is_among_the_nearest(tmp_path):
    write_metrics(tmp_path, 4)
    right = torch.eye(3)
    plots.draw_report(tmp_path, HeldOut(tmp_path), Measured({}, right), Measured({}, right))
    report = Image.open(tmp_path / "report.png")
    frame = (plots.SIDE + 8) ** 2 - plots.SIDE**2
    assert report.width > 600
    assert count_pixels(report, (30, 160, 60)) == 6 * frame


def test_curves_of_a_run_are_drawn(tmp_path, capsys):
    write_metrics(tmp_path, 6)
    plots.main([str(tmp_path)])
    assert Image.open(tmp_path / "curves.png").width > 900
    assert "6 steps" in capsys.readouterr().out
    write_metrics(tmp_path, 1)
    plots.main([str(tmp_path)])


def test_a_folder_without_steps_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plots.main([str(tmp_path)])
    assert "has no steps to draw" in capsys.readouterr().err
