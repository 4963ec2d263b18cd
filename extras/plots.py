"""Pictures of runs: the report, the curves, and matplotlib figures.

python -m extras.plots runs/mine                          # draw the curves of a run, finished or not
"""

import argparse
import json
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data import command, say

# ------------------------------------------------------------------------------------------------------ the report


QUERIES, SHOWN, THUMB, INK = (
    6,
    5,
    72,
    (40, 40, 40),
)  # of the picture: captions, pictures a caption, pixels a picture, colour of text


def draw_report(held_out, before, after, metrics):
    """A picture: the first held-out captions with the pictures nearest to them before and after (the right one framed), and the losses."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    queries = min(QUERIES, len(before.sim)) if before else 0
    row, half = THUMB + 34, SHOWN * (THUMB + 8) + 24
    page = Image.new("RGB", (2 * half + 16, 48 + queries * row + 190), "white")
    pen = ImageDraw.Draw(page)
    for x, title, measured in (
        ((16, "before: the untouched LVLM", before), (16 + half, "after: VladVA", after))
        if before
        else ()
    ):
        pen.text((x, 10), title, INK, font)
        for q in range(queries):
            y = 40 + q * row
            pen.text(
                (x, y), textwrap.shorten(held_out.caption(q), 66, placeholder=" ..."), INK, small
            )
            best = measured.sim[:, q].topk(min(SHOWN, len(measured.sim))).indices.tolist()
            for n, index in enumerate(best):
                left, top = x + n * (THUMB + 8), y + 18
                if index == q:
                    pen.rectangle(
                        (left - 4, top - 4, left + THUMB + 3, top + THUMB + 3), fill=(30, 160, 60)
                    )
                page.paste(held_out.picture(index, THUMB), (left, top))
    y = 56 + queries * row
    for x, name, title in (
        (56, "contrastive", "contrastive loss (nats, Eq. 1)"),
        (56 + half, "next_token", "next-token loss (nats a token, Eq. 2)"),
    ):
        draw_curve(
            pen,
            (x, y + 24, x + half - 90, y + 150),
            [m[name] for m in metrics],
            title,
            (font, small),
        )
    return page


# ------------------------------------------------------------------------------------------------------ curves


CURVES = {"contrastive": "contrastive loss (nats, Eq. 1)", "next_token": "next-token loss (nats a token, Eq. 2)", "grad_norm": "gradient norm",
          "lr": "learning rate of LoRA", "tokens_per_s": "tokens a second", "matmul_share": "share of the device's matrix-product rate"}  # fmt: skip


def read_metrics(out):
    """The lines of OUT/metrics.jsonl; ValueError when there are none."""
    path = Path(out) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        raise ValueError(f"{path} has no steps to draw: wanted the folder of a run")
    return [json.loads(line) for line in lines]


def plot(out):
    """Draw the curves of a run, finished or not, into OUT/curves.png."""
    metrics, page = read_metrics(out), Image.new("RGB", (1040, 3 * 210), "white")
    for n, (name, title) in enumerate(CURVES.items()):
        x, y = 70 + 520 * (n % 2), 40 + 210 * (n // 2)
        draw_curve(
            ImageDraw.Draw(page),
            (x, y, x + 420, y + 130),
            [m[name] for m in metrics],
            title,
            (ImageFont.load_default(15), ImageFont.load_default(12)),
        )
    page.save(Path(out) / "curves.png")
    say(f"written: {out}/curves.png, {len(metrics)} steps; the last: {metrics[-1]}")


def draw_curve(pen, box, values, title, fonts):
    """One curve over the steps, with the axes' ends labelled. box: (left, top, right, bottom) in pixels."""
    left, top, right, bottom = box
    high = max(values) * 1.05 or 1.0
    pen.text((left, top - 24), title, INK, fonts[0])
    pen.line((left, top, left, bottom, right, bottom), fill=INK)
    for level in (0.0, high / 2, high):
        y = bottom - (bottom - top) * level / high
        pen.text((left - 6, y), f"{level:.3g}", INK, fonts[1], anchor="rm")
        pen.line((left - 3, y, left, y), fill=INK)
    points = [
        (
            left + (right - left) * i / max(1, len(values) - 1),
            bottom - (bottom - top) * value / high,
        )
        for i, value in enumerate(values)
    ]
    pen.line(points if len(points) > 1 else points * 2, fill=(200, 60, 40), width=2)
    pen.text((left, bottom + 6), "step 1", INK, fonts[1])
    pen.text((right, bottom + 6), f"step {len(values)}", INK, fonts[1], anchor="ra")


# ------------------------------------------------------------------------------------------------------ figures


def save_picture(path, draw):
    """Save the matplotlib figure that draw(pyplot) makes; without matplotlib, one line that says how to get it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return say(
            f"{path} not drawn: matplotlib is not installed (pip install matplotlib); the numbers are in {Path(path).with_suffix('.json')}"
        )
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = draw(pyplot)
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    say(f"written: {path}")


# ------------------------------------------------------------------------------------------------------ command line


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.plots", description="Draw the curves of a run."
    )
    parser.add_argument("out", metavar="OUT", help="folder of the run")
    return plot(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
