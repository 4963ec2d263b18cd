"""Records what transformers and peft give for small random models, for the tests to compare with.

    python tests/record.py  # by hand, where these are installed: writes tests/recorded

Versions and configs are in the files' metadata. Weights and inputs are not stored: seeded_tensor
(in conftest.py) makes them anew from their names, with numpy's frozen generator.

Not here: Qwen2-VL (record_qwen.py), Llama's tokenizer (record_tokenizer.py).
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np
import peft
import torch
import transformers
from conftest import (
    HUB_CONFIGS,
    RECORDED,
    seeded_image,
    seeded_lora_weight,
    seeded_tensor,
    seeded_weight,
    sequences,
    shapes_by_layer,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

import data

VISION = {
    "model_type": "clip_vision_model",
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 16,
}
TEXT = {
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(vision: dict, text: dict, vision_feature_layer: int = -2) -> dict:
    """A small LLaVA's config.json in the hub's layout."""
    return {
        "model_type": "llava",
        "image_token_index": 5,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": vision_feature_layer,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "vision_config": VISION | vision,
        "text_config": TEXT | text,
    }


CONFIGS = {
    "multi_head": config(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        },
        {
            "vocab_size": 96,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
        },
    ),
    "grouped_query": config(
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 42,
            "patch_size": 14,
        },
        {
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        },
        vision_feature_layer=-1,
    ),
    "tied": config(
        {
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 30,
            "patch_size": 8,
            "layer_norm_eps": 1e-6,
        },
        {
            "vocab_size": 80,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-4,
            "rope_theta": 500.0,
            "tie_word_embeddings": True,
        },
        vision_feature_layer=-3,
    ),
}


def reference(raw: dict) -> LlavaForConditionalGeneration:
    """transformers' model of a config, with the seeded weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder))
    model.eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(seeded_weight(name, p.shape))
    model.tie_weights()
    return model


@torch.no_grad()
def record_llava(raw: dict) -> dict[str, torch.Tensor]:
    """Image features, then of each of two sequences: hidden states, logits, 16 greedy tokens.

    Prints how clearly the greedy tokens won.
    """
    model = reference(raw)
    input_ids, pixels = sequences(raw)
    features = [model.get_image_features(p[None]).pooler_output[0] for p in pixels]
    out = {"features": torch.stack(features)}
    for n, ids in enumerate(input_ids):
        inputs = {
            "input_ids": torch.tensor([ids]),
            "pixel_values": pixels[n][None],
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        result = model(**inputs, output_hidden_states=True)
        out[f"hidden.{n}"] = result.hidden_states[-1][0].contiguous()
        out[f"logits.{n}"] = result.logits[0].contiguous()
        answer = model.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out[f"greedy.{n}"] = answer.sequences[0, len(ids) :].clone()
        first, second = torch.stack(answer.logits)[:, 0].topk(2).values.unbind(-1)
        margin = f"smallest margin {(first - second).min():.4f} of {first.abs().max():.1f}"
        print(f"  greedy {out[f'greedy.{n}'].tolist()}, {margin}")
    return out


@torch.no_grad()
def record_lora(decoder, embeds: torch.Tensor, rank: int, alpha: int) -> dict[str, torch.Tensor]:
    """Final hidden states of transformers' decoder with peft's LoRA, and the same after merging."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora_config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    adapted = peft.get_peft_model(decoder, lora_config).eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            layer, part = name.rsplit(".", 1)
            p.copy_(seeded_lora_weight(layer, part.lower(), p.shape))
    hidden_states = adapted(inputs_embeds=embeds).last_hidden_state.clone()
    merged = adapted.merge_and_unload()(inputs_embeds=embeds).last_hidden_state.clone()
    return {"hidden": hidden_states, "merged": merged}


IMAGES = (
    ((40, 28), "RGB"),
    ((28, 61), "RGB"),
    ((13, 17), "L"),
    ((90, 45), "RGBA"),
    ((33, 32), "P"),
)
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
STEPS = {"crop": CROP, "pad": CROP | {"do_pad": True}}


def record_pixels(steps: dict) -> dict[str, torch.Tensor]:
    """CLIPImageProcessor on images of several sizes and modes; LlavaImageProcessor's padding."""
    out = {}
    for name, step in steps.items():
        if step.get("do_pad"):
            processor = transformers.LlavaImageProcessorPil(**step)
        else:
            processor = transformers.CLIPImageProcessorPil(**step)
        for (width, height), mode in IMAGES:
            image = Image.fromarray(seeded_image((width, height))).convert(mode)
            pixels = processor(image, return_tensors="np")["pixel_values"][0]
            pixels = torch.from_numpy(np.ascontiguousarray(pixels)).float()
            out[f"{name}.{width}x{height}.{mode}"] = pixels
    return out


def record_shapes(raw: dict) -> dict[str, list]:
    """{name with * for the layer's number: [how many, shape]} of the full-size model."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**fields))
    return shapes_by_layer(model.state_dict().items())


@data.command
def main(argv: list[str] | None = None) -> None:
    versions = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
    }

    def save(name, tensors, about):
        metadata = {"versions": json.dumps(versions), "about": json.dumps(about)}
        save_file(tensors, RECORDED / f"{name}.safetensors", metadata)

    for name, raw in CONFIGS.items():
        print(name)
        save(name, record_llava(raw), raw)
    raw = CONFIGS["grouped_query"]
    embeds = seeded_tensor("embeds", (2, 11, raw["text_config"]["hidden_size"]))
    outputs = record_lora(reference(raw).model.language_model, embeds, 3, 5)
    save("lora", outputs, {"config": raw, "rank": 3, "alpha": 5})
    save("pixels", record_pixels(STEPS), STEPS)
    shapes = {"versions": versions}
    for size, raw in HUB_CONFIGS.items():
        shapes[size] = record_shapes(raw)
    text = json.dumps(shapes, separators=(",", ":"))
    (RECORDED / "shapes.json").write_text(text + "\n")
    for path in sorted(RECORDED.iterdir()):
        print(path.name, path.stat().st_size)
    print(versions)


if __name__ == "__main__":
    main()
