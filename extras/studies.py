"""What the paper looks into, before and after adaptation: the numbers and figures of its analyses.

    python -m extras.studies prompts  # Figs. 2, 3 and 5: what makes a good prompt
    python -m extras.studies tokens --adapter runs/tiny  # Fig. 4: the likeliest next tokens
    python -m extras.studies attention --adapter runs/tiny  # Fig. 6: where the summary token looks
    python -m extras.studies soft-prompts --adapter runs/tiny  # Sec. 5.1: learned prompts in words
    python -m extras.studies layers --adapter runs/tiny  # Table 6: embeddings of earlier layers
    python -m extras.studies generation --adapter runs/tiny --rival runs/e5v  # Fig. 7: answers

A study prints a table and writes OUT/<study>.json. The two that are drawings in the paper, prompts
and attention, are drawn as OUT/<study>.png too, with matplotlib.

Not here: benchmarks (eval.py), Table 4 (ablation.py), the rival (e5v.py).
"""

import argparse
import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval as benchmarks
from data import format_table, say, write_json
from extras import scenes
from extras.plots import save_figure
from model import read_json
from vladva import VladVA, at_least_float32, load_model, summary_embedding

PROMPTS = benchmarks.ASSETS / "prompts.json"  # 50 pairs in words that the tiny model can read
NUM_SHOWN = 3  # images whose tokens or answers are printed
BATCH_SIZE = 32  # pairs of a forward
MAX_NEW_TOKENS = 200  # of an answer
QUERIES = ("Describe the image in detail.", "Describe the image briefly.", "What is in the image?")

# ------------------------------------------------------------------------------------ measures


def output_entropy(logits: Tensor) -> Tensor:
    """Entropy of the next token (paper Sec. 3.1, Fig. 2): (..., V) -> (...) nats, log V at most."""
    log_p = at_least_float32(logits).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cumulative_variance(emb: Tensor) -> Tensor:
    """Share of variance in the first k components (paper Fig. 3): (B, D) -> (min(B, D),)."""
    # a slow rise to 1 is a spread-out embedding
    variance = torch.linalg.svdvals((emb - emb.mean(0)).double()).square()
    if len(emb) < 2 or variance.sum() == 0:
        raise ValueError(f"no variance in {len(emb)} embeddings: 2 different ones are needed")
    return (variance.cumsum(0) / variance.sum()).to(emb.dtype)


def components_for(cumulative: Tensor, share: float = 0.9) -> int:
    """How many principal components hold `share` of the variance; of cumulative_variance."""
    return int((cumulative < share - 1e-6).sum()) + 1


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's rho of two (n,) tensors (paper Fig. 5); NaN where all of one are equal."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        # equal values share the mean of their ranks
        ranks.append((counts.cumsum(0) - counts / 2).double()[inverse])
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def attention_density(attention: Tensor, mass: float = 0.9) -> tuple[Tensor, Tensor]:
    """Entropy in nats, and least share of the N that holds `mass`, of (..., N): (...) each."""
    # the paper shows that attention gets denser (Sec. 3.4); how that is measured is ours
    p = attention.double() / attention.double().sum(-1, keepdim=True)
    largest_first = p.sort(-1, descending=True).values
    needed = 1 + (largest_first.cumsum(-1) < mass - 1e-6).sum(-1)
    return torch.special.entr(p).sum(-1), needed.double() / p.shape[-1]


def nearest_tokens(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Of each vector (P, D) the nearest row of table (V, D) by angle: ids (P,), cosines (P,)."""
    cosine = F.normalize(vectors.float(), dim=-1) @ F.normalize(table.float(), dim=-1).T  # (P, V)
    return cosine.argmax(-1), cosine.amax(-1)


# --------------------------------------------------------------------------- what is looked at


def testbed(model: VladVA, args: argparse.Namespace) -> tuple[list, list[str]]:
    """--items images with a short caption each: held-out scenes, or rows of a pairs file."""
    if args.data == "scenes":
        size = model.lvlm.config.vision.image_size
        described = [scenes.described_scene(args.seed, index) for index in range(args.items)]
        images = [scenes.render(scene, size) for scene, _ in described]
        captions = [str(caption) for _, caption in described]
    else:
        pairs = data.Pairs(args.data, model.tokenizer)
        rows = benchmarks.hold_out(pairs, args.items, benchmarks.BadRows())
        images = [row["image"] for row in rows]
        captions = [row["short"][0] for row in rows]
    if len(images) < 2:
        raise ValueError(f"{args.data} gives {len(images)} captioned rows: at least 2 are needed")
    return images, captions


def before_and_after(model: VladVA) -> Iterator[str]:
    """Yields "before", while the adapter is switched off, and then "after" if there is one."""
    with model.adapter_disabled():
        yield "before"
    if model.adapter_enabled:
        yield "after"


@torch.no_grad()
def summary_states(model: VladVA, images: list, captions: list[str]) -> dict[str, Tensor]:
    """{"image": (B, D), "text": (B, D)}: states of the summary tokens of pairs, not normalised."""
    # encode_image and encode_text would normalise them, and the next token needs their length
    device = model.lvlm.device
    image_states, text_states = [], []
    for start in range(0, len(images), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        pixels, batch = model.image_batch([data.open_image(image) for image in images[part]])
        image_states.append(model.hidden_states(batch.to(device), "image", pixels.to(device))[0])
        batch = model.text_batch(captions[part]).to(device)
        text_states.append(model.hidden_states(batch, "text")[0])
    return {"image": torch.cat(image_states), "text": torch.cat(text_states)}


@torch.no_grad()
def summary_measures(model: VladVA, states: dict[str, Tensor]) -> dict[str, Any]:
    """The paper's measures of a prompt (Sec. 3.1), of summary_states; entropy is the mean."""
    measures, emb = {}, {}
    for modality, hidden_states in states.items():
        # in parts: a row of logits is as long as the vocabulary
        entropy = [output_entropy(model.lvlm.lm_head(part)) for part in hidden_states.split(256)]
        emb[modality] = summary_embedding(hidden_states).cpu()
        measures[f"{modality} entropy"] = torch.cat(entropy).mean().item()
        measures[f"{modality} components"] = components_for(cumulative_variance(emb[modality]))
    # image i belongs to text i
    pairs = torch.arange(len(emb["image"]))
    return measures | benchmarks.recall(emb["image"], emb["text"], pairs, ks=(1,))


def say_table(rows: list[dict], *names: str) -> None:
    """Print some columns of rows, or all; numbers with two decimals."""
    lines = []
    for row in rows:
        cells = [row[name] for name in names or row]
        lines.append([cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells])
    say(format_table(list(names or row), lines))


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


# -------------------------- the studies: model, flags -> (results, what draws them if anything)


def study_prompts(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """Entropy, spread and retrieval of many pairs of hand prompts, and how they go together."""
    if model.adapter_enabled:
        raise ValueError("prompts: the soft prompts of an adapted model have replaced them")
    pairs = read_json(args.prompts, list)
    wrong = [p for p in pairs if not isinstance(p, dict) or p.keys() != {"image", "text"}]
    if wrong or len(pairs) < 2:
        raise ValueError(f'{args.prompts}: wanted two or more {{"image": ..., "text": ...}}')
    for prompt in itertools.chain(*map(dict.values, pairs)):
        try:
            model.tokenizer.validate_text(prompt)
        except ValueError as error:
            raise ValueError(f"{args.prompts}: {error}") from None
    images, captions = testbed(model, args)
    rows = []
    for pair in tqdm(pairs, "prompts", disable=None):
        prompts = {"image_prompt": pair["image"], "text_prompt": pair["text"]}
        # the same network under other words
        model.config = dataclasses.replace(model.config, **prompts)
        states = summary_states(model, images, captions)
        row = prompts | summary_measures(model, states)
        # one number a pair of prompts: the mean of both sides
        row["entropy"] = (row["image entropy"] + row["text entropy"]) / 2
        row["components"] = (row["image components"] + row["text components"]) / 2
        row["R@1"] = (row["image_to_text R@1"] + row["text_to_image R@1"]) / 2
        row["variance"] = cumulative_variance(summary_embedding(states["image"]).cpu()).tolist()
        rows.append(row)
    rows.sort(key=lambda row: row["entropy"])
    names = ("entropy", "components", "R@1")
    say_table(rows, "image_prompt", *names)
    correlations = {}
    for a, b in itertools.combinations(names, 2):
        rho = rank_correlation(torch.tensor(column(rows, a)), torch.tensor(column(rows, b)))
        # few prompts or images may give equal numbers, which have no order
        if not math.isnan(rho):
            correlations[f"{a} and {b}"] = rho
            say(f"Spearman's rho of {a} and {b}: {rho:.2f} ({len(rows)} prompt pairs)")
    return {"correlations": correlations, "prompts": rows}, draw_prompts


def draw_prompts(plt: Any, results: dict) -> Any:
    """Entropy of each pair, cumulative variance coloured by entropy, retrieval against entropy."""
    rows = results["prompts"]
    entropies = column(rows, "entropy")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 3.1), layout="constrained")
    for query, target, marker in (("image", "text", "o"), ("text", "image", "^")):
        left.plot(column(rows, f"{query} entropy"), marker, markersize=3, label=query)
        recalls = column(rows, f"{query}_to_{target} R@1")
        right.scatter(entropies, recalls, marker=marker, s=12, label=f"{query} query")
    colours = plt.cm.ScalarMappable(plt.Normalize(entropies[0], entropies[-1]), "viridis")
    for row in rows:
        middle.plot(row["variance"][:40], color=colours.to_rgba(row["entropy"]), linewidth=0.8)
    # where the components are counted
    middle.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    figure.colorbar(colours, ax=middle, label="entropy (nats)")
    rho = results["correlations"].get("entropy and R@1", math.nan)
    left.set(title="entropy of the next token (Fig. 2)", xlabel="prompt pairs", ylabel="nats")
    middle.set(title="cumulative variance, images (Fig. 3)", xlabel="principal component")
    right.set(title=f"retrieval (Fig. 5), rho = {rho:.2f}", xlabel="nats", ylabel="R@1 (percent)")
    left.legend()
    right.legend()
    return figure


def study_tokens(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """The likeliest next tokens at the summary token, and the measures, before and after."""
    images, captions = testbed(model, args)
    tokens, measures = {}, []
    for when in before_and_after(model):
        states = summary_states(model, images, captions)
        measures.append({"": when} | summary_measures(model, states))
        for modality, hidden_states in states.items():
            top = model.lvlm.lm_head(hidden_states[:NUM_SHOWN]).float().softmax(-1).topk(6)
            name = f"{when}, {modality}"
            tokens[name] = []
            for ids, shares in zip(top.indices.tolist(), top.values.tolist()):
                words = [model.tokenizer.decode([token_id]) for token_id in ids]
                tokens[name].append(list(zip(words, shares)))
                spelled = "  ".join(f"{word} {100 * p:.1f}%" for word, p in zip(words, shares))
                say(f"{name} {len(tokens[name])}: {spelled}")
    say_table(measures)
    return {"captions": captions[:NUM_SHOWN], "measures": measures, "tokens": tokens}, None


@torch.no_grad()
def summary_attention(model: VladVA, image: Any) -> Tensor:
    """Attention of the summary token to the image tokens (paper Sec. 3.4): (layers, H, N)."""
    device = model.lvlm.device
    pixels, batch = model.image_batch([data.open_image(image)])
    batch = batch.to(device)
    x = model.inputs_embeds(batch, "image", pixels.to(device))  # (1, T, D)
    last = int(batch.summary_index)
    position_ids = batch.position_ids
    if position_ids is None:
        position_ids = torch.arange(x.shape[1], device=device)[None]
    rotary = model.lvlm.decoder.rotary(position_ids, x.dtype)
    maps = []
    for block in model.lvlm.decoder.layers:
        # the fused kernel never shows its weights: here from the same queries and keys
        q, k, _ = block.self_attn.project(block.input_layernorm(x), rotary)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)[0, :, : last + 1]  # (H, T, K)
        scores = (k @ q[0, :, last, :, None])[..., 0] / math.sqrt(k.shape[-1])  # (H, T)
        # what these lack to 1 goes to the other tokens
        maps.append(scores.float().softmax(-1)[:, batch.image_token_index[1]].cpu())
        x = block(x, rotary)
    return torch.stack(maps)


def study_attention(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """How dense the summary token's attention to the image tokens is, and maps of some heads."""
    images, _ = testbed(model, args)
    names = ("entropy", "share of patches with 90 %", "mass on the image")
    density, first = [], {}
    for when in before_and_after(model):
        total = torch.zeros(3, dtype=torch.double)
        for image in tqdm(images, f"attention {when}", leave=False, disable=None):
            weights = summary_attention(model, image)
            measures = (*attention_density(weights), weights.sum(-1).double())
            total += torch.stack([measure.mean() for measure in measures])
            first.setdefault(when, weights)
        means = (total / len(images)).tolist()
        density.append({"mean over heads": when, **dict(zip(names, means))})
    say_table(density)
    # of four layers, the head that looks at the first image most before adaptation
    mass = first["before"].sum(-1)  # (layers, H)
    last = len(mass) - 1
    grid = model.lvlm.config.image_grid(model.image_processor(data.open_image(images[0])))
    maps = {}
    for when, weights in first.items():
        for layer in sorted({0, last // 3, 2 * last // 3, last}):
            head = int(mass[layer].argmax())
            name = f"{when}: layer {layer + 1}, head {head + 1}"
            maps[name] = weights[layer, head].unflatten(0, grid).tolist()
    # what the entropies are to be compared with
    uniform = math.log(math.prod(grid))
    say(f"entropy of a uniform map: {uniform:.2f}")
    results = {"entropy when uniform": uniform, "density": density, "maps": maps}
    image = model.image_processor.fit(data.open_image(images[0]))
    return results, functools.partial(draw_attention, image)


def draw_attention(image: Image, plt: Any, results: dict) -> Any:
    """A row before and one after, a column a head: its map over the greyed image."""
    num_rows = len(results["density"])
    size = {"figsize": (9.5, 2.5 * num_rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(num_rows, len(results["maps"]) // num_rows, **size)
    extent = (0, image.width, image.height, 0)
    for axis, (name, weights) in zip(axes.flatten(), results["maps"].items()):
        axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        # a map has a value an image token, however many pixels that is
        axis.imshow(weights, cmap="inferno", alpha=0.65, extent=extent, vmin=0)
        share = attention_density(torch.tensor(weights).flatten())[1].item()
        axis.set_title(f"{name}\n90 % in {100 * share:.0f} % of patches")
        axis.axis("off")
    return figure


def study_soft_prompts(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """Each learned vector as the nearest token, with its cosine."""
    if not model.soft_prompts:
        raise ValueError("no soft prompts to decode: --adapter wants a run that trained them")
    decode = model.tokenizer.inner.decode
    results = {}
    for modality, vectors in model.soft_prompts.items():
        results[modality] = []
        ids, cosines = nearest_tokens(vectors.detach(), model.lvlm.decoder.embed_tokens.weight)
        # beside the token of the hand prompt that each vector started from
        for hand, near, cosine in zip(model.hand_prompt_ids(modality), ids, cosines):
            # special tokens too
            row = {"prompt": decode([hand], False), "nearest token": decode([int(near)], False)}
            results[modality].append(row | {"cosine": cosine.item()})
        say_table(results[modality])
    return results, None


def study_layers(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """Scores of embeddings from every layer, before and after."""
    if args.data == "scenes":
        size = model.lvlm.config.vision.image_size
        benchmark = scenes.scene_benchmark(args.seed, args.items, min(args.items, 200), size)
    else:
        images, captions = testbed(model, args)
        benchmark = benchmarks.retrieval(images, [[caption] for caption in captions])
    names = ("image_to_text R@1", "text_to_image R@1", *benchmarks.GROUPS)
    decoder = model.lvlm.decoder
    rows = []
    # from the last layer to the first, because what is cut off does not come back
    for number in range(len(decoder.layers), 0, -1):
        decoder.layers = decoder.layers[:number]
        for when in before_and_after(model):
            scores = benchmark.score(*benchmarks.embed_benchmark(model, benchmark))
            scores = {name: scores[name] for name in names if name in scores}
            rows.append({"layer": str(number), "adaptation": when} | scores)
        # the paper does not say; here only the last layer has the final norm
        decoder.norm = nn.Identity()
    say_table(rows)
    return {"layers": rows}, None


def study_generation(model: VladVA, args: argparse.Namespace) -> tuple[dict, Callable | None]:
    """Answers before adaptation, after it, and of --rival."""
    images = testbed(model, args)[0][:NUM_SHOWN]
    # every image with every question
    repeated_images, questions = zip(*itertools.product(images, QUERIES))
    # "before" is the untouched model: switched off, an adapter leaves it bit for bit
    answers = {}
    for when in before_and_after(model):
        answers[when] = model.generate_batch(repeated_images, questions, MAX_NEW_TOKENS)
    if args.rival:
        del model  # two of them may not fit the device
        rival = load_model(argparse.Namespace(**vars(args) | {"adapter": args.rival}))
        answers["rival"] = rival.generate_batch(repeated_images, questions, MAX_NEW_TOKENS)
    for index, question in enumerate(questions):
        say(f"\nimage {index // len(QUERIES) + 1}: {question}")
        for name, texts in answers.items():
            say(f"  {name}: {texts[index]}")
    return {"questions": questions, "answers": answers}, None


# -------------------------------------------------------------------------------- command line

STUDIES = {
    "prompts": study_prompts,
    "tokens": study_tokens,
    "attention": study_attention,
    "soft-prompts": study_soft_prompts,
    "layers": study_layers,
    "generation": study_generation,
}


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("python -m extras.studies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("study", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    data.add_model_flags(parser)
    add("--rival", help="for generation: folder of a second run (default: no rival)")
    add("--data", default="scenes", help="scenes, or a file of caption pairs (default: scenes)")
    add("--prompts", default=str(PROMPTS), help="for prompts: a JSON file (default: 50 of ours)")
    add("--items", type=int, default=500, help="how many images to look at (default: 500)")
    add("--seed", type=int, default=scenes.TEST_SEED, help="of the scenes (default: %(default)s)")
    add("--out", default="runs/analysis", help="folder to write (default: runs/analysis)")
    args = parser.parse_args(argv)
    if args.items < 2:
        raise ValueError(f"--items {args.items}: at least 2 are needed")
    model = load_model(args)
    # a folder that cannot be made is refused before the work, which a failed start does not leave
    out = Path(args.out)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    for folder in new:
        folder.rmdir()
    if not new and not os.access(out, os.W_OK):
        raise ValueError(f"--out {out} cannot be written to: choose another folder")
    results, draw = STUDIES[args.study](model, args)
    out.mkdir(parents=True, exist_ok=True)
    # with the flags that it was run with
    write_json(out / f"{args.study}.json", vars(args) | results)
    say(f"written: {out / args.study}.json")
    if draw is not None:
        save_figure(out / f"{args.study}.png", draw, results)


if __name__ == "__main__":
    main()
