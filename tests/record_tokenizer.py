"""Cuts a Llama tokenizer.json down to what the tests need: a few hundred of 32,000 entries.

    python tests/record_tokenizer.py path/to/llava-1.5-7b-hf/tokenizer.json  # by hand

Form, merges and ids stay. What stays of the entries are bytes, single ASCII characters, and all
that occur in this project's prompts, in captions of 300 scenes and in the golden strings of
tests/test_llava.py: all of these tokenise as with the full file (checked here). conftest.py fills
the gaps.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
from extras import scenes
from vladva import VladVAConfig

GOLDEN = ("Hello world", "USER: <image>\nDescribe the image in detail. ASSISTANT:")


def corpus() -> list[str]:
    """All texts that must tokenise as with the full file."""
    config = VladVAConfig()
    texts = [*GOLDEN, config.image_prompt, config.text_prompt, config.detail_prompt]
    texts += ["The red bus.", "2 dogs"]
    for i in range(300):
        scene = scenes.make_scene(9, i)
        rng = random.Random(i)
        texts += [str(scenes.short_caption(scene, rng)), scenes.long_caption(scene, rng)]
    return texts


def is_needed(token: str, token_id: int, text: str) -> bool:
    """Is an entry of the vocabulary a byte, an ASCII character, or part of the text?"""
    is_ascii = len(token) == 1 and token.isascii()
    return token_id < 259 or is_ascii or token in text or token in ("▁", "▁▁")


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="record_tokenizer.py")
    parser.add_argument("path", type=Path, help="tokenizer.json of llava-hf/llava-1.5-7b-hf")
    path = parser.parse_args(argv).path
    raw = json.loads(path.read_text(encoding="utf-8"))
    text = "\n".join(f"▁{text.replace(' ', '▁')}" for text in corpus())
    vocabulary = {}
    for token, token_id in raw["model"]["vocab"].items():
        if is_needed(token, token_id, text):
            vocabulary[token] = token_id
    merges = []
    for first, second in raw["model"]["merges"]:
        if {first, second, first + second} <= vocabulary.keys():
            merges.append([first, second])
    raw["model"] |= {"vocab": vocabulary, "merges": merges}
    out = Path(__file__).parent / "recorded" / "llama_tokenizer.json"
    compact = json.dumps(raw, ensure_ascii=False, separators=(",", ":"))
    out.write_text(compact + "\n", encoding="utf-8")
    full = tokenizers.Tokenizer.from_file(str(path))
    small = tokenizers.Tokenizer.from_file(str(out))
    for text in corpus():
        assert full.encode(text).tokens == small.encode(text).tokens, text
    print(f"{out}: {len(vocabulary)} entries, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
