"""What only a GPU can show, as a table to paste into docs/scaling.md. By hand; it needs CUDA.

    python tests/gpu.py [--size 7B] [--layers 32]  # random weights; no file is read

Has not been run on a GPU yet; what of it runs on a CPU runs in test_gpu.py. Takes the memory that
extras/plan.py counts, and some minutes. Not here: several cards.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import train as training
from extras import plan
from model import LVLM, DecoderConfig, LVLMConfig, VisionConfig
from vladva import VladVA, VladVAConfig

RATES = {  # bfloat16 operations a second by the data sheets, dense
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
SMALL_VISION = VisionConfig(32, 48, 2, 2, image_size=28, patch_size=14)
SMALL = DecoderConfig(320, 64, 96, num_hidden_layers=2, num_attention_heads=4)
LR = training.TrainConfig(lr=1e-4, soft_prompt_lr=1e-4)


def random_model(vision, decoder, device: str, dtype: torch.dtype) -> VladVA:
    """LLaVA-1.5 with random weights and adapters, the same on each device."""
    torch.manual_seed(0)
    with torch.device(device):
        lvlm = LVLM(LVLMConfig(vision, decoder, image_token_id=decoder.vocab_size - 1)).to(dtype)
    lvlm.requires_grad_(False)
    model = VladVA(lvlm, None, None, VladVAConfig(soft_prompts=False), "random")
    model.attach()
    for modality in ("image", "text"):
        prompt = torch.randn(plan.PROMPT, decoder.hidden_size, device=device) * 0.02
        model.soft_prompts[modality] = nn.Parameter(prompt)
    return model


def random_batch(model: VladVA, num_pairs: int, long: int) -> data.TrainingBatch:
    """Pairs whose long captions have `long` tokens; the lengths of extras/plan.py."""
    generator = torch.Generator().manual_seed(1)
    config = model.lvlm.config
    num_image = config.image_grid()[0] ** 2

    def sequence(length: int, image: bool) -> data.TokenSequence:
        summary = length - 1
        length += (plan.DETAIL_TEMPLATE + long + 1) * image
        ids = torch.randint(config.image_token_id, (length,), generator=generator).tolist()
        if image:
            ids[12 : 12 + num_image] = [config.image_token_id] * num_image
        caption_start = summary + 1 + plan.DETAIL_TEMPLATE if image else None
        return data.TokenSequence(ids, 1, plan.PROMPT, summary, caption_start)

    images = [sequence(plan.IMAGE_TEMPLATE + num_image, True) for _ in range(num_pairs)]
    texts = [sequence(plan.TEXT_TEMPLATE + plan.SHORT, False) for _ in range(num_pairs)]
    side = config.vision.image_size
    pixels = torch.randn(num_pairs, 3, side, side, generator=generator)
    tokenizer = SimpleNamespace(pad_token_id=2, image_token_id=config.image_token_id)
    batches = [data.collate(rows, tokenizer) for rows in (images, texts)]
    return data.TrainingBatch(pixels, *batches, torch.arange(num_pairs), None)


def gradients(model: VladVA, caching: bool = True) -> dict[str, torch.Tensor]:
    """Of a batch of 4 pairs, on the host."""
    model.zero_grad()
    batch = random_batch(model, 2, 20)
    training.backward(model, [batch, batch], caching)
    return {name: p.grad.cpu() for name, p in model.trained_parameters().items()}


def gradient_difference(device: str) -> float:
    """To the CPU's in float32, as a share of the largest value of a tensor, at most."""
    reference = random_model(SMALL_VISION, SMALL, "cpu", torch.float32)
    model = random_model(SMALL_VISION, SMALL, device, torch.float32)
    model.load_state_dict(reference.state_dict())
    expected = gradients(reference)
    largest = 0.0
    for name, gradient in gradients(model).items():
        scale = expected[name].abs().max().clamp(min=1e-12)
        largest = max(largest, ((gradient - expected[name]).abs().max() / scale).item())
    return largest


def flash_attention_is_taken(model: VladVA) -> bool:
    """torch raises where the only kernel that is allowed cannot run."""
    states = torch.randn(2, 600, model.lvlm.config.decoder.hidden_size, device=model.lvlm.device)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
            model.lvlm.decoder(states.to(model.lvlm.dtype))
    except RuntimeError:
        return False
    return True


def step_waits_for_the_device(model: VladVA, micro_batches: list, config) -> str:
    """The first operation of a step that makes the host wait, or none."""
    optimizer = training.make_optimizer(model, LR)
    training.train_step(model, micro_batches, optimizer, config)  # kernels are chosen, memory taken
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.train_step(model, micro_batches, optimizer, config)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def seconds_a_step(model: VladVA, micro_batches: list, config, steps: int = 5) -> float:
    """Median, after one step to warm up."""
    optimizer = training.make_optimizer(model, LR)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        training.train_step(model, micro_batches, optimizer, config)["loss"].item()  # waits
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[steps // 2]


def resumes_to_the_byte(device: str, *flags: str) -> bool:
    """A run of 2 steps against its own checkpoint of the first that goes on."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        short = "--steps 2 --save-every 1 --batch-size 4 --holdout 0 --deterministic".split()
        training.main([*short, *flags, "--out", str(out), "--device", device])
        again = Path(folder) / "again"
        shutil.copytree(out, again)
        training.checkpoints(again)[-1].unlink()
        (again / "adapter.safetensors").unlink()
        training.main(["--out", str(again), "--device", device, "--resume"])
        adapters = [(run / "adapter.safetensors").read_bytes() for run in (out, again)]
        return adapters[0] == adapters[1]


def measure(size: str, layers: int) -> list[list[str]]:
    """Rows of the table."""
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory
    config = plan.default_mode(memory)
    decoder = replace(plan.DECODERS[size], num_hidden_layers=layers)
    rows = [["card", f"{name}, {memory / 1e9:.1f} GB"], ["model", f"{size}, {layers} layers"]]
    mode = f"micro-batches of {config.micro_batch_size}"
    rows.append(["mode", mode + ", recomputed" * config.gradient_checkpointing])
    rows.append(["gradients, float32, differ by", f"{gradient_difference('cuda'):.1e}"])
    rows.append(["resumes to the byte", str(resumes_to_the_byte("cuda"))])
    model = random_model(plan.CLIP, decoder, "cuda", torch.bfloat16)
    training.prepare_blocks(model, config)
    rows.append(["FlashAttention is taken", str(flash_attention_is_taken(model))])
    batch = random_batch(model, config.micro_batch_size, plan.LONG).to("cuda")
    micro_batches = [batch] * 4
    rows.append(["waits", step_waits_for_the_device(model, micro_batches, config)])
    seconds = seconds_a_step(model, micro_batches, config)
    tokens = sum(part.num_tokens for part in micro_batches)
    rows.append(["a step", f"{seconds:.2f} s, {tokens / seconds:,.0f} tokens a second"])
    shape = plan.meta_model(decoder)
    meta_batch = plan.meta_batch(shape, config.micro_batch_size, plan.LONG)
    rate = 4 * plan.step_flops(shape, [meta_batch], config) / seconds
    sheet = [peak for card, peak in RATES.items() if card in name]
    share = f", {100 * rate / sheet[0]:.0f} % of the data sheet" if sheet else ""
    rows.append(["arithmetic", f"{rate / 1e12:.0f} TFLOPS{share}"])
    peak = torch.cuda.max_memory_allocated()
    planned = sum(plan.step_bytes(shape, meta_batch, config).values())
    rows.append(["peak memory", f"{peak / 1e9:.2f} GB, planned {planned / 1e9:.2f}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu.py", description="Checks on a GPU.")
    parser.add_argument("--size", choices=plan.DECODERS, default="7B", help="of LLaVA-1.5")
    parser.add_argument("--layers", type=int, default=32, help="of the decoder (default: 32)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("tests/gpu.py needs CUDA; test_gpu.py runs what a CPU can")
    print(plan.markdown([["", "measured"], *measure(args.size, args.layers)]))


if __name__ == "__main__":
    main()
