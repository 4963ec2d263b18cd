"""Compares this project with transformers on a model folder. By hand, where transformers is installed; pytest does not collect it.

    python tests/reference.py assets/tiny

Prints the largest differences of hidden states and logits, and whether 16 greedy tokens and the preprocessed pixels agree.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

import data
from vladva import GENERATE_TEMPLATE, VladVA, collate


@torch.no_grad()
def main(folder):
    ours = VladVA.from_pretrained(folder)
    theirs, loading = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    print(f"transformers {transformers.__version__}; keys missing {len(loading['missing_keys'])}, unexpected {len(loading['unexpected_keys'])}")
    pictures = [data.render(data.make_scene(0, i), ours.lvlm.config.vision.image_size) for i in range(4)]
    pixels = torch.stack([ours.image_processor(picture) for picture in pictures])
    sequence = ours.sequence(GENERATE_TEMPLATE, ours.settings.detail_prompt)
    their_ids = tokenizer(GENERATE_TEMPLATE.format(prompt=ours.settings.detail_prompt)).input_ids
    image = their_ids.index(ours.tokenizer.image_id)
    expanded = their_ids[:image] + [ours.tokenizer.image_id] * ours.lvlm.config.num_image_tokens + their_ids[image + 1 :]
    print(f"token ids equal: {expanded == sequence.ids}")
    batch = collate([sequence] * len(pictures), ours.tokenizer.pad_id)
    hidden = ours.hidden(batch, "image", pixels)
    inputs = {"input_ids": batch.ids, "pixel_values": pixels, "attention_mask": torch.ones_like(batch.ids)}
    out = theirs(**inputs, output_hidden_states=True)
    for name, a, b in (("hidden states", hidden, out.hidden_states[-1]), ("logits", ours.lvlm.head(hidden), out.logits)):
        print(f"{name}: largest difference {(a - b).abs().max():.2e}, largest value {b.abs().max():.2e}")
    new = theirs.generate(**inputs, max_new_tokens=16, do_sample=False)[:, batch.ids.shape[1] :]
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in new]
    print(f"greedy text equal: {texts == ours.generate_batch(pictures, [ours.settings.detail_prompt] * len(pictures), 16)}; e.g. {texts[0]!r}")
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    wide = pictures[0].resize((150, 110))
    print(f"pixels: largest difference {(torch.tensor(processor(wide)['pixel_values'][0]) - ours.image_processor(wide)).abs().max():.2e}")


if __name__ == "__main__":
    main(sys.argv[1])
