"""The plan at full size: what torch counts, what a block keeps, what docs/scaling.md shows."""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import HUB_CONFIGS, write_llama_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
from extras import plan
from lora import attach_lora
from model import Decoder, DecoderConfig, parse_config
from vladva import VladVA

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model_7b():
    return plan.meta_model(plan.DECODERS["7B"])


@pytest.mark.parametrize("size", ["7B", "13B"])
def test_the_plan_is_about_the_models_on_the_hub(size):
    config = parse_config(HUB_CONFIGS[size.lower()])
    assert plan.CLIP == config.vision
    decoder = replace(config.decoder, rms_norm_eps=1e-6, max_position_embeddings=2048)
    assert plan.DECODERS[size] == decoder


def test_the_lengths_are_those_of_llamas_tokenizer(model_7b, tmp_path):
    write_llama_tokenizer(tmp_path)
    tokenizer = data.Tokenizer(tmp_path, model_7b.lvlm.config)
    model = VladVA(model_7b.lvlm, tokenizer, None, model_7b.config, "7B")
    caption = "there are two objects."
    caption_tokens = len(tokenizer.encode(caption).ids) - 1
    image = model.image_sequence(caption)
    text = model.text_sequence(caption)
    assert image.summary_index + 1 == plan.IMAGE_TEMPLATE + 576
    assert image.caption_start == plan.IMAGE_TEMPLATE + 576 + plan.DETAIL_TEMPLATE
    assert len(text.input_ids) == plan.TEXT_TEMPLATE + caption_tokens
    assert image.prompt_length == text.prompt_length == plan.PROMPT


def test_a_frozen_weight_costs_two_operations_a_token_forwards_and_two_backwards():
    """No gradient of a frozen weight is computed. 10 % for LoRA and attention.

    The last block's MLP runs for the states that a loss takes.
    """
    model = plan.meta_model(replace(plan.DECODERS["7B"], num_hidden_layers=4))
    batch = plan.meta_batch(model, 1, plan.LONG)
    blocks = model.lvlm.decoder.layers
    mlp = 3 * blocks[-1].mlp.up_proj.weight.numel()
    others = sum(p.numel() for name, p in blocks.named_parameters() if name.endswith("proj.weight"))
    others -= mlp
    forward = 2 * others * batch.num_tokens + 2 * mlp * (2 + len(batch.caption_targets))
    prefixes = 2 * others * batch.prefixes().num_tokens + 2 * mlp * 2
    # a recomputed block ends before its last product
    last_products = 2 * (3 * batch.num_tokens + 2 + len(batch.caption_targets)) * mlp // 3
    vision = 2 * 577 * sum(p.numel() for p in model.lvlm.vision.layers[:23].parameters())
    vision += 2 * 576 * sum(p.numel() for p in model.lvlm.projector.parameters())
    head = 4 * len(batch.caption_targets) * model.lvlm.lm_head.weight.numel()
    steps = {
        (False, False): head + vision + 2 * forward,
        (False, True): head + vision + 3 * forward - last_products,
        (True, True): head + 2 * vision + 3 * forward - last_products + prefixes,
    }
    for (caching, checkpointing), expected in steps.items():
        config = replace(
            plan.CUDA_DEFAULT, gradient_caching=caching, gradient_checkpointing=checkpointing
        )
        assert expected < plan.step_flops(model, [batch], config) < 1.1 * expected


def test_a_recomputed_block_ends_before_its_last_product():
    """Nothing after it is kept: 7.4 % of a step's products (forward, recomputed, backward)."""
    config = DecoderConfig(64, 256, 688, num_hidden_layers=1, num_attention_heads=4)
    decoder = Decoder(config).requires_grad_(False)
    attach_lora(decoder, 4, 4)
    inputs_embeds = torch.randn(2, 100, 256, requires_grad=True)
    flops = []
    for checkpointing in (None, False, True):
        decoder.gradient_checkpointing = checkpointing
        with plan.FlopCounterMode(display=False, custom_mapping=plan.IN_PLACE) as counter:
            states = decoder(inputs_embeds)
            if checkpointing is not None:
                states.sum().backward()
        flops.append(counter.get_total_flops())
    forward, kept, recomputed = flops
    last_product = 2 * 200 * 688 * 256
    assert recomputed == kept + forward - last_product


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made inside the context, at its peak."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = 0
        self.peak = 0

    def forget(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("width, inner, num_layers", [(256, 688, 4), (128, 640, 4)])
def test_a_graph_takes_no_more_memory_than_planned(width, inner, num_layers, checkpointing, dtype):
    """The peak of forward and backward, temporaries included; the plan is at most half too high."""
    config = DecoderConfig(64, width, inner, num_layers, num_attention_heads=4)
    decoder = Decoder(config).to(dtype).requires_grad_(False)
    attach_lora(decoder, 4, 4)
    decoder.gradient_checkpointing = checkpointing
    inputs_embeds = torch.randn(2, 100, width, dtype=dtype, requires_grad=True)
    with LiveBytes([inputs_embeds, *decoder.parameters()]) as memory:
        decoder(inputs_embeds).sum().backward()
    planned = plan.activation_bytes(config, 200, checkpointing, dtype.itemsize)
    assert memory.peak <= planned < 1.5 * memory.peak


def test_the_default_of_train_py_fits_7b_into_24_gb(model_7b):
    """With room to spare, captions of the paper's limit."""
    batch = plan.meta_batch(model_7b, plan.CUDA_DEFAULT.micro_batch_size, plan.LONGEST)
    needed = sum(plan.step_bytes(model_7b, batch, plan.CUDA_DEFAULT).values())
    assert needed < 0.9 * 24e9


def test_on_80_gb_nothing_is_recomputed_and_a_pair_costs_at_most_31_5_tflop(model_7b):
    """With checkpointing it is 40; both models fit, captions of the paper's limit."""
    config = plan.default_mode(80e9)
    assert not config.gradient_checkpointing
    flops = plan.step_flops(model_7b, [plan.meta_batch(model_7b, 1, plan.LONG)], config)
    assert 30e12 < flops < 31.5e12
    for model in (model_7b, plan.meta_model(plan.DECODERS["13B"])):
        batch = plan.meta_batch(model, config.micro_batch_size, plan.LONGEST)
        assert sum(plan.step_bytes(model, batch, config).values()) < plan.USABLE * 80e9


def test_13b_fits_24_gb_cards_if_eight_share_its_blocks():
    """All that is frozen and in no block stays whole, and two blocks are gathered at a time."""
    model = plan.meta_model(plan.DECODERS["13B"])
    block = sum(p.nbytes for p in model.lvlm.decoder.layers[0].parameters() if not p.requires_grad)
    rest = plan.weight_bytes(model, 1) - 40 * block
    assert plan.weight_bytes(model, 8) == rest + 5 * block + 2 * block
    config = plan.default_mode(24e9)
    batch = plan.meta_batch(model, config.micro_batch_size, plan.LONGEST)
    assert sum(plan.step_bytes(model, batch, config, num_cards=8).values()) < 0.7 * 24e9


def test_the_page_shows_the_plan(model_7b):
    """Of 7B; its arithmetic takes longer to count, and is compared above."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for card, memory in plan.CARDS.items():
        row = " | ".join(["7B", card, *plan.card_row(model_7b, memory)])
        assert f"| {row} |" in page
