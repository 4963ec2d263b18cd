"""Records what transformers and peft give for a small random Qwen2-VL. By hand, where these are.

    python tests/record_qwen.py  # writes tests/recorded/qwen*.safetensors and qwen_shapes.json

Each image goes alone; that transformers' own right-padded batch of both gives the same is checked
here. record.py does the same for LLaVA-1.5.
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
    QWEN_IMAGE_SIZES,
    QWEN_PROCESSOR,
    RECORDED,
    qwen_config,
    qwen_sequences,
    seeded_image,
    seeded_tensor,
    seeded_weight,
    shapes_by_layer,
)
from PIL import Image
from record import record_lora
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

SMALL = {"patch_size": 6, "min_pixels": 4 * 144, "max_pixels": 12 * 144}
SIZES = ((1, 1), (13, 17), (28, 28), (42, 70), (14, 2800), (2000, 10))
SIZES += ((640, 480), (999, 1333), (5000, 3000), (56, 57), (4032, 3024), (70, 126))
BUDGETS = ((3136, 12845056), (3136, 28 * 28 * 1280), (50000, 100000))


def empty_model(raw: dict):
    """transformers' model of a config."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))


def seeded_model(raw: dict):
    """transformers' model of a config, with the seeded weights."""
    model = empty_model(raw).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        p.copy_(seeded_weight(name, p.shape))
    model.tie_weights()
    return model


def model_inputs(raw: dict, sequences: list, pixels: list, grids: list) -> dict:
    """What the processor would give: right-padded sequences, with the type of each token."""
    input_ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    mask = pad_sequence([torch.ones(len(ids)).long() for ids in sequences], batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "mm_token_type_ids": (input_ids == raw["image_token_id"]).int(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
    }


@torch.no_grad()
def record_model(raw: dict) -> dict:
    """Of two images: patches, features, positions, last hidden states, logits, greedy tokens."""
    model = seeded_model(raw)
    process = Qwen2VLImageProcessorPil(**SMALL)
    pixels, grids, sizes = [], [], []
    for size in QWEN_IMAGE_SIZES:
        processed = process(Image.fromarray(seeded_image(size)), return_tensors="pt")
        pixels.append(processed["pixel_values"])
        grids.append(processed["image_grid_thw"])
        _, rows, columns = grids[-1][0].tolist()
        sizes.append((rows // 2, columns // 2))
    sequences = qwen_sequences(raw, sizes)
    out = {}
    for n, input_ids in enumerate(sequences):
        inputs = model_inputs(raw, [input_ids], pixels[n : n + 1], grids[n : n + 1])
        result = model(**inputs, output_hidden_states=True)
        text_inputs = {key: value for key, value in inputs.items() if key != "pixel_values"}
        features = model.model.get_image_features(pixels[n], grids[n]).pooler_output[0]
        out[f"patches.{n}"] = pixels[n]
        out[f"features.{n}"] = features
        positions = model.model.get_rope_index(**text_inputs)[0]  # (3, 1, T)
        out[f"positions.{n}"] = positions[:, 0].contiguous()
        out[f"hidden.{n}"] = result.hidden_states[-1][0].contiguous()
        out[f"logits.{n}"] = result.logits[0].contiguous()
        options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 16}
        options |= {"output_logits": True, "return_dict_in_generate": True}
        answer = model.generate(**inputs, **options)
        out[f"greedy.{n}"] = answer.sequences[0, len(input_ids) :].clone()

        # how clearly the greedy tokens won: far more than float32 can be off
        best = torch.stack(answer.logits)[:, 0].topk(2).values
        margin = best.diff().abs().min().item()
        print(f"  {grids[n].tolist()}: smallest margin {margin:.4f} of {best.abs().max():.1f}")
    batch = model_inputs(raw, sequences, pixels, grids)
    hidden_states = model(**batch, output_hidden_states=True).hidden_states[-1]
    for n, input_ids in enumerate(sequences):
        difference = (hidden_states[n, : len(input_ids)] - out[f"hidden.{n}"]).abs().max().item()
        print(f"  its batch of both differs by {difference:.1e}")
        assert difference < 1e-5
    return out


def record_sizes() -> dict:
    """smart_resize with the hub's patches: (width, height, fewest, most) -> (width, height).

    And the patches of one image.
    """
    asked, given = [], []
    for width, height in SIZES:
        for budget in BUDGETS:
            if max(width, height) <= 200 * min(width, height):
                asked.append((width, height, *budget))
                given.append(smart_resize(height, width, 28, *budget)[::-1])
    process = Qwen2VLImageProcessorPil(**QWEN_PROCESSOR | {"max_pixels": 4 * 784})
    processed = process(Image.fromarray(seeded_image((75, 45))), return_tensors="pt")
    tensors = {"asked": torch.tensor(asked), "given": torch.tensor(given)}
    return tensors | {"patches": processed["pixel_values"]}


def record_shapes(raw: dict) -> dict:
    """{name with * for the layer's number: [how many, shape]} of the full-size model."""
    with torch.device("meta"):
        model = empty_model(raw)
    model.tie_weights()
    return shapes_by_layer(model.named_parameters())


def save(name: str, tensors: dict, about: dict, versions: dict) -> None:
    metadata = {"versions": json.dumps(versions), "about": json.dumps(about)}
    save_file(tensors, RECORDED / f"{name}.safetensors", metadata)


def main() -> None:
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    versions["torch"] = torch.__version__
    raw = qwen_config(first=80, vocab_size=96)
    about = {"config": raw, "processor": QWEN_PROCESSOR | SMALL}
    save("qwen", record_model(raw), about, versions)
    embeds = seeded_tensor("embeds", (2, 7, raw["hidden_size"]))
    hidden_states = record_lora(seeded_model(raw).model.language_model, embeds, 3, 5)
    save("qwen_lora", hidden_states, {"config": raw, "rank": 3, "alpha": 5}, versions)
    save("qwen_sizes", record_sizes(), {}, versions)
    shapes = json.dumps({"versions": versions, "2b": record_shapes(QWEN_2B)}, separators=(",", ":"))
    (RECORDED / "qwen_shapes.json").write_text(shapes + "\n")
    print(versions)


if __name__ == "__main__":
    main()
