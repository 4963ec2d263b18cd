"""Memory and arithmetic of a training step at full size, counted from the shapes.

    python -m extras.plan  # prints the tables of docs/scaling.md and writes them there

The models are on the meta device, where tensors have shapes and no numbers: torch counts the
operations of a real step of train.backward there, and the memory follows from what a block keeps.

Not here: measurements. train.py writes the peak memory and the speed of a run to metrics.jsonl.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import data
from data import Batch, TrainingBatch
from model import LVLM, DecoderConfig, LVLMConfig, VisionConfig
from train import HEAD_CHUNK, TrainConfig, backward
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
ALL_KEPT = TrainConfig(gradient_caching=True, gradient_checkpointing=False)
CUDA_DEFAULT = TrainConfig(gradient_caching=True, gradient_checkpointing=True, micro_batch_size=8)


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
        image_of_text = torch.empty(num_pairs, dtype=torch.long)
    return TrainingBatch(pixels, images, texts, image_of_text, None)


def meta_sequences(count: int, prefix: int, image: int, question: int, caption: int) -> Batch:
    """`count` sequences of prefix (with its image tokens), question and caption tokens."""
    input_ids = torch.empty(count, prefix + question + caption, dtype=torch.long)
    one_each = torch.empty(count, dtype=torch.long)
    image_token_index = torch.empty(2, count * image, dtype=torch.long)
    captions = torch.empty(count * caption, dtype=torch.long)
    spans = (one_each, one_each, image_token_index, captions, captions)
    return Batch(input_ids, *spans, prefix_width=prefix, position_ids=None)


def step_flops(model: VladVA, micro_batches: list[TrainingBatch], config: TrainConfig) -> int:
    """Operations of one step, counted by torch; it counts what the causal mask skips as well."""
    model.lvlm.decoder.gradient_checkpointing = config.gradient_checkpointing
    with FlopCounterMode(display=False) as counter:
        backward(model, micro_batches, config.gradient_caching)
    return counter.get_total_flops()


def activation_bytes(config: DecoderConfig, num_tokens: int, checkpointing: bool, itemsize: int):
    """The most memory that the decoder's graph of `num_tokens` tokens takes before it is gone.

    In numbers a token: a block keeps 12 D + 4 I (I: width of its MLP), or its input of D if it is
    recomputed; the block whose gradient is being computed takes 12 D + 6 I.
    """
    width, inner = config.hidden_size, config.intermediate_size
    kept = width if checkpointing else 12 * width + 4 * inner
    numbers = config.num_hidden_layers * kept + 12 * width + 6 * inner
    return numbers * num_tokens * itemsize


def step_bytes(model: VladVA, batch: TrainingBatch, config: TrainConfig) -> dict[str, int]:
    """Memory of a step with gradient caching whose largest micro-batch is `batch`, by purpose."""
    decoder, itemsize = model.lvlm.config.decoder, model.lvlm.dtype.itemsize
    graph = (batch.num_tokens, config.gradient_checkpointing, itemsize)
    rows = min(HEAD_CHUNK, len(batch.caption_targets))
    return {
        "weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "adapter": 4 * sum(p.nbytes for p in model.trained_parameters().values()),
        "activations": activation_bytes(decoder, *graph),
        # they and their gradient, in the model's dtype; they, softmax and gradient in float32
        "logits": (2 * itemsize + 3 * 4) * decoder.vocab_size * rows,
    }


def largest_micro_batch(model: VladVA, memory: float, config: TrainConfig) -> int:
    """Pairs with the longest captions that fit together into a card's memory, at most 256."""
    for count in range(1, 257):
        needed = step_bytes(model, meta_batch(model, count, LONGEST), config)
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
        "... with gradient checkpointing and caching": CUDA_DEFAULT,
    }
    for label, config in steps.items():
        flops = step_flops(model, [mean], config)
        rows[label] = f"{flops / 1e12:.1f} TFLOP"
    rows["8.1 million of these, at 100 TFLOPS"] = f"{8.1e6 * flops / 100e12 / 86400:.0f} days"
    return rows


def card_row(model: VladVA, memory: float) -> list[str]:
    """Room beside the default micro-batch; the largest with and without checkpointing."""
    batch = meta_batch(model, CUDA_DEFAULT.micro_batch_size, LONGEST)
    needed = sum(step_bytes(model, batch, CUDA_DEFAULT).values())
    room = gigabytes(memory - needed) if needed < memory else f"none: {gigabytes(needed)} needed"
    largest = [largest_micro_batch(model, memory, config) for config in (CUDA_DEFAULT, ALL_KEPT)]
    return [room, *(str(count or "none") for count in largest)]


def plan() -> str:
    """The tables, in Markdown."""
    columns, cards = {}, []
    for name, decoder in DECODERS.items():
        model = meta_model(decoder)
        columns[name] = size_rows(model)
        for card, memory in CARDS.items():
            cards.append([name, card, *card_row(model, memory)])
    sizes = [[label, *(columns[name][label] for name in columns)] for label in columns["7B"]]
    header = ("", "card", "room beside a micro-batch of 8", "largest", "without checkpointing")
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
