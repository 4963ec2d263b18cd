"""Images of runs: the report of train.py, the curves of a run; and how figures are saved.

    python -m extras.plots runs/mine  # the curves of a run, finished or not, into OUT/curves.png

Not here: what the figures of the studies and of the ablation show (studies.py, ablation.py).
"""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
from data import say
from eval import Measured
from model import parse_json

INK = (40, 40, 40)
NUM_QUERIES = 6  # captions in the report
NUM_NEAREST = 5  # images beside each of them
SIDE = 72  # pixels of such an image

CURVES = {  # key of metrics.jsonl: what stands above its curve
    "contrastive": "contrastive loss (nats, Eq. 1)",
    "next_token": "next-token loss (nats a token, Eq. 2)",
    "grad_norm": "gradient norm",
    "lr": "learning rate of LoRA",
    "tokens_per_s": "tokens a second",
    "peak_bytes": "peak memory (bytes)",
}


def read_metrics(out: str | Path) -> list[dict]:
    """The lines of OUT/metrics.jsonl; ValueError when there are none."""
    path = Path(out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not lines:
        raise ValueError(f"{path} has no steps to draw: wanted the folder of a run")
    metrics = []
    for number, line in enumerate(lines, start=1):
        values = parse_json(line, f"{path}:{number}")
        for name in ("step", *CURVES):
            value = values.get(name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{path}:{number}: {name} is {value!r:.99}, wanted a number")
        metrics.append(values)
    return metrics


# ---------------------------------------------------------------------------------- the report


def draw_report(out: str | Path, held_out, before: Measured, after: Measured) -> None:
    """Write OUT/report.png.

    The first held-out captions with the images nearest to them before and after, the right one in a
    green frame, and below them the two losses over the steps.
    """
    metrics = read_metrics(out)
    num_queries = min(NUM_QUERIES, len(held_out))
    half_width = NUM_NEAREST * (SIDE + 8) + 24
    curves_top = 56 + num_queries * (SIDE + 34)
    page = Image.new("RGB", (2 * half_width + 16, curves_top + 182), "white")
    halves = (("before: the untouched LVLM", before), ("after: VladVA", after))
    for half, (title, measured) in enumerate(halves):
        left = 16 + half * half_width
        ImageDraw.Draw(page).text((left, 10), title, INK, ImageFont.load_default(15))
        for query in range(num_queries):
            top = 40 + query * (SIDE + 34)
            draw_nearest(page, (left, top), held_out, query, measured)
    for half, name in enumerate(("contrastive", "next_token")):
        left = 56 + half * half_width
        box = (left, curves_top + 24, left + half_width - 90, curves_top + 150)
        draw_curve(page, box, metrics, name)
    data.write_whole(Path(out) / "report.png", lambda partial: page.save(partial, "PNG"))


def draw_nearest(page, corner: tuple[int, int], held_out, query: int, measured: Measured) -> None:
    """One caption and the images nearest to it. corner: (left, top) in pixels."""
    left, top = corner
    pen = ImageDraw.Draw(page)
    caption = textwrap.shorten(held_out.benchmark.texts[query], 66, placeholder=" ...")
    pen.text((left, top), caption, INK, ImageFont.load_default(12))
    scores = measured.sim[:, query]  # (images,)
    nearest = scores.topk(min(NUM_NEAREST, len(scores))).indices.tolist()
    for place, index in enumerate(nearest):
        x, y = left + place * (SIDE + 8), top + 18
        if index == query:
            pen.rectangle((x - 4, y - 4, x + SIDE + 3, y + SIDE + 3), fill=(30, 160, 60))
        image = data.open_image(held_out.benchmark.images[index])
        page.paste(ImageOps.pad(image, (SIDE, SIDE), color="white"), (x, y))


# ---------------------------------------------------------------------------------- the curves


def draw_curves(out: str | Path) -> None:
    """Draw the metrics of a run, finished or not, into OUT/curves.png."""
    metrics = read_metrics(out)
    page = Image.new("RGB", (1040, 3 * 210), "white")
    for number, name in enumerate(CURVES):
        left = 70 + 520 * (number % 2)
        top = 40 + 210 * (number // 2)
        draw_curve(page, (left, top, left + 420, top + 130), metrics, name)
    data.write_whole(Path(out) / "curves.png", lambda partial: page.save(partial, "PNG"))
    say(f"written: {out}/curves.png, {len(metrics)} steps; the last: {metrics[-1]}")


def draw_curve(page, box: tuple[int, int, int, int], metrics: list[dict], name: str) -> None:
    """One metric over the steps, from 0. box: (left, top, right, bottom) of the axes, in pixels."""
    left, top, right, bottom = box
    values = [line[name] for line in metrics]
    highest = max(values) * 1.05 or 1.0
    pen, small = ImageDraw.Draw(page), ImageFont.load_default(12)
    pen.text((left, top - 24), CURVES[name], INK, ImageFont.load_default(15))
    pen.line((left, top, left, bottom, right, bottom), fill=INK)
    for level in (0.0, highest / 2, highest):
        y = bottom - (bottom - top) * level / highest
        pen.text((left - 6, y), f"{level:.3g}", INK, small, anchor="rm")
        pen.line((left - 3, y, left, y), fill=INK)
    points = []
    for index, value in enumerate(values):
        x = left + (right - left) * index / max(1, len(values) - 1)
        points.append((x, bottom - (bottom - top) * value / highest))
    pen.line(points if len(points) > 1 else points * 2, fill=(200, 60, 40), width=2)
    pen.text((left, bottom + 6), f"step {metrics[0]['step']}", INK, small)
    pen.text((right, bottom + 6), f"step {metrics[-1]['step']}", INK, small, anchor="ra")


def save_figure(path: Path, draw: Callable, *args) -> None:
    """Save the figure draw(pyplot, *args); without matplotlib one line says what is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        say(f"{path} not drawn: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = draw(pyplot, *args)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    say(f"written: {path}")


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("python -m extras.plots", description="The curves of a run: curves.png.")
    parser.add_argument("out", metavar="OUT", help="folder of the run, finished or not")
    draw_curves(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
