"""Records what transformers and peft give for small random models, for the tests to compare with. By hand, where these are installed.

    python tests/record.py        # writes tests/recorded/*.safetensors; versions and configs are in their metadata

Weights and inputs are not stored: `drawn` (in conftest.py) makes them anew from their names, with numpy's frozen generator.
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
    drawn,
    drawn_picture,
    drawn_weight,
    lora_weight,
    sequences,
    shapes_by_layer,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration

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
TOP = {
    "model_type": "llava",
    "image_token_index": 5,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
}


def config(vision, text, **top):
    top = {
        "vision_feature_layer": -2,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    } | top
    return TOP | top | {"vision_config": VISION | vision, "text_config": TEXT | text}


CONFIGS = {
    "multi_head": config(
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7),
        dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
        | {"rms_norm_eps": 1e-5},
    ),
    "grouped_query": config(
        dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3, image_size=42, patch_size=14),
        dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
        vision_feature_layer=-1,
    ),
    "tied": config(
        dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, image_size=30, patch_size=8, layer_norm_eps=1e-6),
        dict(vocab_size=80, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
        | {"rms_norm_eps": 1e-4, "rope_theta": 500.0, "tie_word_embeddings": True},
        vision_feature_layer=-3,
    ),
}  # fmt: skip


def reference(raw):
    """transformers' model of a config, with the drawn weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        model = (
            LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder))
            .eval()
            .requires_grad_(False)
        )
    for name, p in model.named_parameters():
        p.copy_(drawn_weight(name, p.shape))
    model.tie_weights()
    return model


@torch.no_grad()
def record_llava(raw):
    """Image features, then for each of two sequences: final hidden states, logits, 16 greedy tokens and how clearly they won."""
    model, out = reference(raw), {}
    ids, pixels = sequences(raw)
    out["features"] = torch.stack(
        [model.get_image_features(p[None]).pooler_output[0] for p in pixels]
    )
    for n, row in enumerate(ids):
        inputs = {
            "input_ids": torch.tensor([row]),
            "pixel_values": pixels[n][None],
            "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        }
        result = model(**inputs, output_hidden_states=True)
        out |= {
            f"hidden.{n}": result.hidden_states[-1][0].contiguous(),
            f"logits.{n}": result.logits[0].contiguous(),
        }
        told = model.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        out[f"greedy.{n}"] = told.sequences[0, len(row) :].clone()
        best = torch.stack(told.logits)[:, 0].topk(2).values
        print(
            f"  greedy {out[f'greedy.{n}'].tolist()}, smallest margin {(best[:, 0] - best[:, 1]).min():.4f} of {best.abs().max():.1f}"
        )
    return out


@torch.no_grad()
def record_lora(decoder, embeds, rank, alpha):
    """Final hidden states of a text decoder of transformers with peft's LoRA on its seven linears, and the same after merging."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(
        decoder, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    ).eval()
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            layer, part = (
                name.removeprefix("base_model.model.")
                .removesuffix(".default.weight")
                .rsplit(".", 1)
            )
            p.copy_(lora_weight(layer, part.lower(), p.shape))
    plain = lambda model: model(inputs_embeds=embeds).last_hidden_state
    return {"hidden": plain(adapted).clone(), "merged": plain(adapted.merge_and_unload()).clone()}


def record_pixels(steps):
    """CLIPImageProcessor on pictures of several sizes and modes; LlavaImageProcessor's padding for "pad"."""
    out = {}
    for name, step in steps.items():
        cls = (
            transformers.LlavaImageProcessorPil
            if step.get("do_pad")
            else transformers.CLIPImageProcessorPil
        )
        for size, mode in PICTURES:
            pixels = cls(**step)(
                Image.fromarray(drawn_picture(size)).convert(mode), return_tensors="np"
            )["pixel_values"][0]
            out[f"{name}.{size[0]}x{size[1]}.{mode}"] = torch.from_numpy(
                np.ascontiguousarray(pixels)
            ).float()
    return out


PICTURES = (
    ((40, 28), "RGB"),
    ((28, 61), "RGB"),
    ((13, 17), "L"),
    ((90, 45), "RGBA"),
    ((33, 32), "P"),
)
STEPS = {
    "crop": {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    "wider": {"size": {"shortest_edge": 33}, "crop_size": {"height": 28, "width": 28}},
    "squeeze": {"size": {"height": 28, "width": 28}, "do_center_crop": False},
    "pad": {
        "size": {"shortest_edge": 28},
        "crop_size": {"height": 28, "width": 28},
        "do_pad": True,
    },
}


def record_shapes(raw):
    """{name with * for the layer's number: [how many, shape]} of the full-size model, without its weights."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
        )
    return shapes_by_layer(model.state_dict().items())


def main():
    versions = {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__,
    }
    save = lambda name, tensors, about: save_file(
        tensors,
        RECORDED / f"{name}.safetensors",
        {"versions": json.dumps(versions), "about": json.dumps(about)},
    )
    for name, raw in CONFIGS.items():
        print(name)
        save(name, record_llava(raw), raw)
    raw = CONFIGS["grouped_query"]
    embeds = drawn("embeds", (2, 11, raw["text_config"]["hidden_size"]))
    save(
        "lora",
        record_lora(reference(raw).model.language_model, embeds, 3, 5),
        {"config": raw, "rank": 3, "alpha": 5},
    )
    save("pixels", record_pixels(STEPS), STEPS)
    shapes = {size: record_shapes(raw) for size, raw in HUB_CONFIGS.items()}
    (RECORDED / "shapes.json").write_text(
        json.dumps({"versions": versions, **shapes}, separators=(",", ":")) + "\n"
    )
    print({path.name: path.stat().st_size for path in sorted(RECORDED.iterdir())}, versions)


if __name__ == "__main__":
    main()
