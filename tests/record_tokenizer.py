"""Cuts a Llama tokenizer.json down to what the tests need: the same form, merges and ids, a few hundred of the 32,000 entries. By hand.

    python tests/record_tokenizer.py path/to/llava-1.5-7b-hf/tokenizer.json

Kept are bytes, single ASCII characters, and every entry that occurs in this project's prompts, in captions of 300 scenes and in the
golden strings of tests/test_llava.py; so all of these tokenise as with the full file (checked here). conftest.py fills the gaps.
"""

import json
import random
import sys
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from extras import scenes
from vladva import Settings

GOLDEN = ("Hello world", "USER: <image>\nDescribe the image in detail. ASSISTANT:")


def corpus():
    settings = Settings()
    texts = [
        *GOLDEN,
        settings.image_prompt,
        settings.text_prompt,
        settings.detail_prompt,
        "The red bus.",
        "2 dogs",
    ]
    for i in range(300):
        scene, rng = scenes.make_scene(9, i), random.Random(i)
        texts += [str(scenes.short_caption(scene, rng)), scenes.long_caption(scene, rng)]
    return texts


def main(path):
    raw = json.loads(Path(path).read_text(encoding="utf-8"))
    model, found = raw["model"], "\n".join(f"▁{text.replace(' ', '▁')}" for text in corpus())
    model["vocab"] = {
        t: i
        for t, i in model["vocab"].items()
        if i < 259 or (len(t) == 1 and t.isascii()) or t in found or t in ("▁", "▁▁")
    }
    model["merges"] = [
        [a, b]
        for a, b in model["merges"]
        if a in model["vocab"] and b in model["vocab"] and a + b in model["vocab"]
    ]
    full = tokenizers.Tokenizer.from_file(str(path))
    out = Path(__file__).parent / "recorded" / "llama_tokenizer.json"
    out.write_text(
        json.dumps(raw, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    cut = tokenizers.Tokenizer.from_file(str(out))
    assert all(full.encode(text).tokens == cut.encode(text).tokens for text in corpus())
    print(f"{out}: {len(model['vocab'])} entries, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
