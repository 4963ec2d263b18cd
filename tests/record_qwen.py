"""Records what transformers and peft give for a small random Qwen2-VL, as record.py does for LLaVA. By hand, where these are installed.

    python tests/record_qwen.py        # writes tests/recorded/qwen*.safetensors and qwen_shapes.json

Each picture goes alone; that transformers' own batch of both, right-padded, gives the same is checked here.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import peft
import torch
import transformers
from conftest import (
    QWEN_2B,
    QWEN_PICTURES,
    QWEN_PROCESSOR,
    RECORDED,
    drawn,
    drawn_picture,
    drawn_weight,
    qwen_config,
    qwen_rows,
    shapes_by_layer,
)
from PIL import Image
from record import record_lora
from safetensors.torch import save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

SMALL = {"patch_size": 6, "min_pixels": 4 * 144, "max_pixels": 12 * 144}
SIZES = [
    (1, 1),
    (13, 17),
    (28, 28),
    (42, 70),
    (14, 2800),
    (2000, 10),
    (640, 480),
    (999, 1333),
    (5000, 3000),
    (56, 57),
    (4032, 3024),
    (70, 126),
]


def reference(raw):
    """transformers' model of a config, with the drawn weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        model = (
            Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
            .eval()
            .requires_grad_(False)
        )
    for name, p in model.named_parameters():
        p.copy_(drawn_weight(name, p.shape))
    model.tie_weights()
    return model


def inputs_of(raw, rows, pixels, grids):
    """What the processor would give: rows right-padded, with the type of each token."""
    ids, mask = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in each], batch_first=True)
        for each in (rows, [[1] * len(r) for r in rows])
    )
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == raw["image_token_id"]).int(),
            "pixel_values": torch.cat(pixels), "image_grid_thw": torch.cat(grids)}  # fmt: skip


@torch.no_grad()
def record_model(raw):
    """For each of two pictures: patches, features, positions, final hidden states, logits, 16 greedy tokens and how clearly they won."""
    model, out = reference(raw), {}
    process = Qwen2VLImageProcessorPil(**SMALL)
    seen = [
        process(Image.fromarray(drawn_picture(size)), return_tensors="pt") for size in QWEN_PICTURES
    ]
    pixels, grids = [s["pixel_values"] for s in seen], [s["image_grid_thw"] for s in seen]
    rows = qwen_rows(raw, [(g[0, 1].item() // 2, g[0, 2].item() // 2) for g in grids])
    for n, row in enumerate(rows):
        inputs = inputs_of(raw, [row], pixels[n : n + 1], grids[n : n + 1])
        result = model(**inputs, output_hidden_states=True)
        features = model.model.get_image_features(pixels[n], grids[n]).pooler_output[0]
        asked = {
            k: inputs[k]
            for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        }
        out |= {
            f"patches.{n}": pixels[n],
            f"features.{n}": features,
            f"positions.{n}": model.model.get_rope_index(**asked)[0][:, 0].contiguous(),
        }
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
            f"  {grids[n].tolist()} greedy {out[f'greedy.{n}'].tolist()}, smallest margin {best.diff().abs().min():.4f} of {best.abs().max():.1f}"
        )
    both = model(**inputs_of(raw, rows, pixels, grids), output_hidden_states=True).hidden_states[-1]
    apart = max(
        (both[n, : len(row)] - out[f"hidden.{n}"]).abs().max().item() for n, row in enumerate(rows)
    )
    print(f"  its batch of both differs by {apart:.1e}")
    assert apart < 1e-5
    return out


def record_sizes():
    """smart_resize with the hub's patches under two budgets: (width, height, fewest, most) -> (width, height); patches of one picture."""
    budgets = ((3136, 12845056), (3136, 28 * 28 * 1280), (50000, 100000))
    asked = [
        (*size, *budget) for size in SIZES for budget in budgets if max(size) <= 200 * min(size)
    ]
    given = [smart_resize(height, width, 28, low, high)[::-1] for width, height, low, high in asked]
    patches = Qwen2VLImageProcessorPil(**QWEN_PROCESSOR | {"max_pixels": 4 * 784})(
        Image.fromarray(drawn_picture((75, 45))), return_tensors="pt"
    )
    return {
        "asked": torch.tensor(asked),
        "given": torch.tensor(given),
        "patches": patches["pixel_values"],
    }


def record_shapes(raw):
    """{name with * for the layer's number: [how many, shape]} of the full-size model, without its weights."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        Path(folder, "config.json").write_text(json.dumps(raw))
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
    model.tie_weights()
    return shapes_by_layer(model.named_parameters())


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
    raw = qwen_config(first=80, vocab_size=96)
    save("qwen", record_model(raw), {"config": raw, "processor": QWEN_PROCESSOR | SMALL})
    embeds = drawn("embeds", (2, 7, raw["hidden_size"]))
    save(
        "qwen_lora",
        record_lora(reference(raw).model.language_model, embeds, 3, 5),
        {"config": raw, "rank": 3, "alpha": 5},
    )
    save("qwen_sizes", record_sizes(), {})
    (RECORDED / "qwen_shapes.json").write_text(
        json.dumps({"versions": versions, "2b": record_shapes(QWEN_2B)}, separators=(",", ":"))
        + "\n"
    )
    print({path.name: path.stat().st_size for path in sorted(RECORDED.glob("qwen*"))}, versions)


if __name__ == "__main__":
    main()
