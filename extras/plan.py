"""Memory and arithmetic of a training step at full size, counted from the shapes.

    python -m extras.plan  # prints the tables of docs/scaling.md and writes them there

The models are on the meta device, where tensors have shapes and no numbers: torch counts the
operations of a real step of train.backward there, and the memory follows from what a block keeps.

Not here: measurements. train.py writes the peak memory and the speed of a run to metrics.jsonl.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
from data import Batch, TrainingBatch
from model import LVLM, DecoderConfig, LVLMConfig, VisionConfig
from train import HEAD_CHUNK, TrainConfig, backward, cuda_mode
from vladva import VladVA, VladVAConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
CLIP = VisionConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)  # ViT-L/14
DECODERS = {  # Vicuna's vocabulary and widths
    "7B": DecoderConfig(32064, 4096, 11008, num_hidden_layers=32, num_attention_heads=32),
    "13B": DecoderConfig(32064, 5120, 13824, num_hidden_layers=40, num_attention_heads=40),
}
# tokens of the templates without image and captions, and of a hand prompt (Llama's tokenizer)
IMAGE_TEMPLATE, DETAIL_TEMPLATE, TEXT_TEMPLATE, PROMPT = 21, 15, 19, 10
SHORT, LONG, LONGEST = 12, 200, 500  # tokens of captions: assumed means, and the paper's limit
CARDS = {"24 GB": 24e9, "80 GB": 80e9}
USABLE = 0.95  # of a card's memory; the rest is room for CUDA itself and the allocator's holes
# LoRALinear multiplies in place, which torch does not count by itself: (M, K) by (K, N)
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * math.prod(a) * b[1]}
CAUSAL_BLOCK = 128  # FlashAttention leaves out blocks of so many tokens that the mask hides


def default_mode(memory: float) -> TrainConfig:
    """How train.py trains 7B and 13B on a card of so many bytes, unless a flag says otherwise."""
    return TrainConfig(gradient_caching=True, **cuda_mode(memory))


ALL_KEPT = default_mode(CARDS["80 GB"])
CUDA_DEFAULT = default_mode(CARDS["24 GB"])


def meta_model(decoder: DecoderConfig) -> VladVA:
    """LLaVA-1.5 in bfloat16 with its adapters, on the meta device."""
    with torch.device("meta"):
        lvlm = LVLM(LVLMConfig(CLIP, decoder, image_token_id=32000)).to(torch.bfloat16)
        lvlm.requires_grad_(False)
        model = VladVA(lvlm, None, None, VladVAConfig(soft_prompts=False), "meta")
        model.attach()
        for modality in ("image", "text"):
            model.soft_prompts[modality] = nn.Parameter(torch.empty(PROMPT, decoder.hidden_size))
    return model


def meta_batch(model: VladVA, num_pairs: int, long: int) -> TrainingBatch:
    """`num_pairs` pairs whose long captions have `long` tokens, as shapes alone."""
    rows, columns = model.lvlm.config.image_grid()
    prefix = IMAGE_TEMPLATE + rows * columns
    with torch.device("meta"):
        images = meta_sequences(num_pairs, prefix, rows * columns, DETAIL_TEMPLATE, long + 1)
        texts = meta_sequences(num_pairs, TEXT_TEMPLATE + SHORT, 0, 0, 0)
        pixels = torch.empty(num_pairs, 3, CLIP.image_size, CLIP.image_size)
        return TrainingBatch(pixels, images, texts, torch.empty(num_pairs, dtype=torch.long), None)


def meta_sequences(count: int, prefix: int, image: int, question: int, caption: int) -> Batch:
    """`count` sequences of prefix (with its image tokens), question and caption tokens."""
    input_ids = torch.empty(count, prefix + question + caption, dtype=torch.long)
    one_each = torch.empty(count, dtype=torch.long)
    image_token_index = torch.empty(2, count * image, dtype=torch.long)
    captions = torch.empty(count * caption, dtype=torch.long)
    spans = (one_each, one_each, image_token_index, captions, captions)
    return Batch(input_ids, *spans, prefix_width=prefix, position_ids=None)


def step_flops(model: VladVA, micro_batches: list[TrainingBatch], config: TrainConfig) -> int:
    """Operations of one step, counted by torch, without what a fused kernel's causal mask skips."""
    model.lvlm.decoder.gradient_checkpointing = config.gradient_checkpointing
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        backward(model, micro_batches, config.gradient_caching)
    scores = counter.get_flop_counts()["Decoder"][torch.ops.aten.bmm]
    # of the shortest image sequence: longer ones skip more
    skipped = (1 - CAUSAL_BLOCK / micro_batches[0].images.prefix_width) / 2
    return counter.get_total_flops() - int(scores * skipped)


def activation_bytes(config: DecoderConfig, num_tokens: int, checkpointing: bool, itemsize: int):
    """The most memory that the decoder's graph of `num_tokens` tokens takes before it is gone.

    In numbers a token: a block keeps 12 D + 4 I (I: width of its MLP), or its input of D if it is
    recomputed; the block whose gradient is being computed takes 12 D + 6 I.
    """
    width, inner = config.hidden_size, config.intermediate_size
    kept = width if checkpointing else 12 * width + 4 * inner
    numbers = config.num_hidden_layers * kept + 12 * width + 6 * inner
    return numbers * num_tokens * itemsize


def weight_bytes(model: VladVA, num_cards: int) -> float:
    """Frozen weights on one of the cards that share them (--shard), or on one alone."""
    blocks = model.lvlm.decoder.layers
    sharded = sum(p.nbytes for p in blocks.parameters() if not p.requires_grad)
    whole = sum(p.nbytes for p in model.parameters() if not p.requires_grad) - sharded
    # with others, the block that runs and the next one are whole for their time
    gathered = 2 * sharded / len(blocks) if num_cards > 1 else 0
    return whole + sharded / num_cards + gathered


def step_bytes(
    model: VladVA, batch: TrainingBatch, config: TrainConfig, num_cards: int = 1
) -> dict[str, float]:
    """Memory of a step with gradient caching whose largest micro-batch is `batch`, by purpose."""
    decoder, itemsize = model.lvlm.config.decoder, model.lvlm.dtype.itemsize
    graph = (batch.num_tokens, config.gradient_checkpointing, itemsize)
    rows = min(HEAD_CHUNK, len(batch.caption_targets))
    return {
        "weights": weight_bytes(model, num_cards),
        "adapter": 4 * sum(p.nbytes for p in model.trained_parameters().values()),
        "activations": activation_bytes(decoder, *graph),
        # they and their gradient, in the model's dtype; they, softmax and gradient in float32
        "logits": (2 * itemsize + 3 * 4) * decoder.vocab_size * rows,
    }


def largest_micro_batch(model: VladVA, memory: float, config: TrainConfig, num_cards: int) -> int:
    """Pairs with the longest captions that fit together into a card's memory, at most 256."""
    for count in range(1, 257):
        needed = step_bytes(model, meta_batch(model, count, LONGEST), config, num_cards)
        if sum(needed.values()) > memory * USABLE:
            return count - 1
    return 256


def size_rows(model: VladVA) -> dict[str, str]:
    """{what: how much} of a model."""
    mean, longest = meta_batch(model, 1, LONG), meta_batch(model, 1, LONGEST)
    needed = step_bytes(
        model, meta_batch(model, CUDA_DEFAULT.micro_batch_size, LONGEST), CUDA_DEFAULT
    )
    rows = {
        "frozen weights, bfloat16": gigabytes(needed["weights"]),
        "trained parameters": f"{sum(p.numel() for p in model.trained_parameters().values()):,}",
        "they, their gradients and AdamW's moments, float32": gigabytes(needed["adapter"]),
        f"logits of {HEAD_CHUNK:,} tokens": gigabytes(needed["logits"]),
    }
    graphs = {
        f"graph of a pair, long caption of {LONG} tokens": (mean, ALL_KEPT),
        f"... of {LONGEST} tokens": (longest, ALL_KEPT),
        f"... of {LONGEST} tokens, gradient checkpointing": (longest, CUDA_DEFAULT),
    }
    for label, (batch, config) in graphs.items():
        rows[label] = gigabytes(step_bytes(model, batch, config)["activations"])
    steps = {
        "arithmetic of a pair": replace(ALL_KEPT, gradient_caching=False),
        "... on 80 GB cards: gradient caching": ALL_KEPT,
        "... on smaller ones: gradient caching and checkpointing": CUDA_DEFAULT,
    }
    for label, config in steps.items():
        flops = step_flops(model, [mean], config)
        rows[label] = f"{flops / 1e12:.1f} TFLOP"
        if config is ALL_KEPT:
            days = 8.1e6 * flops / 100e12 / 86400
    rows["8.1 million pairs on 80 GB cards, at 100 TFLOPS"] = f"{days:.0f} days"
    return rows


def card_row(model: VladVA, memory: float, num_cards: int = 1) -> list[str]:
    """The default on a card, the memory that it takes and leaves, and the largest micro-batch."""
    config = default_mode(memory)
    batch = meta_batch(model, config.micro_batch_size, LONGEST)
    needed = sum(step_bytes(model, batch, config, num_cards).values())
    mode = f"{config.micro_batch_size}{', recomputed' * config.gradient_checkpointing}"
    room = gigabytes(memory - needed) if needed < memory else "none"
    largest = largest_micro_batch(model, memory, config, num_cards)
    return [mode, gigabytes(needed), room, str(largest or "none")]


def plan() -> str:
    """The tables, in Markdown."""
    columns, cards = {}, []
    for name, decoder in DECODERS.items():
        model = meta_model(decoder)
        columns[name] = size_rows(model)
        for card, memory in CARDS.items():
            cards.append([name, card, *card_row(model, memory)])
        shared = card_row(model, CARDS["24 GB"], num_cards=8)
        cards.append([name, "each of 8 x 24 GB, --shard", *shared])
    sizes = [[label, *(columns[name][label] for name in columns)] for label in columns["7B"]]
    header = ("", "card", "default micro-batch", "memory needed", "room", "largest micro-batch")
    return markdown([["", *columns], *sizes]) + "\n\n" + markdown([header, *cards])


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


@data.command
def main(argv: list[str] | None = None) -> None:
    data.Parser(prog="python -m extras.plan", description=__doc__).parse_args(argv)
    tables = plan()
    print(tables)
    before, start, rest = PAGE.read_text(encoding="utf-8").partition("<!-- plan -->\n")
    _, end, after = rest.partition("\n<!-- end of plan -->")
    PAGE.write_text(before + start + tables + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
