"""Ask a folder of images in words: a table, and a contact sheet of the nearest ones.

    python -m extras.search FOLDER "a red circle left of a square" --adapter runs/tiny --top 12

Embeds its images once (FOLDER/vladva-*.index, a file for each model and adapter), later those with
a new name, size or time: docs/search.md. Not here: several processes, an index library.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import data
from model import read_tensors
from vladva import VladVA, load_model, similarity

BATCH_SIZE = 64  # images that are encoded, then written
BLOCK = 8192  # embeddings that are in float32 at once


def file_stamps(folder: str | Path, endings: tuple[str, ...]) -> dict[bytes, Path]:
    """{digest of a file's name, size and time of the last change: its path}, subfolders too."""
    paths = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.name.lower().endswith(endings) and path.is_file():
            # not the content: nothing has to be read to see what is new
            status = path.stat()
            text = ascii([path.relative_to(folder).parts, status.st_size, status.st_mtime_ns])
            paths[hashlib.md5(text.encode()).digest()] = path
    return paths


class Index:
    """Embeddings of a folder's images on disk: records of a stamp and D numbers, only appended."""

    def __init__(self, folder: str | Path, model: VladVA, adapter: str | None = None):
        # all that an embedding depends on beside its image
        digest = hashlib.md5(str(model.lvlm.dtype).encode())
        for source in filter(None, (data.model_folder(model.name), adapter)):
            digest.update(b"".join(file_stamps(source, (".safetensors", "config.json"))))
        self.path = Path(folder) / f"vladva-{digest.hexdigest()[:12]}.index"
        width = model.lvlm.config.decoder.hidden_size
        self.dtype = np.dtype([("stamp", "V16"), ("embedding", np.float16, width)])

    def read(self) -> np.ndarray:
        """The records (N,), memory-mapped."""
        # an incomplete one at the end, which an interruption leaves, does not count
        count = self.path.stat().st_size // self.dtype.itemsize if self.path.exists() else 0
        return np.memmap(self.path, self.dtype, "c", 0, count) if count else np.empty(0, self.dtype)

    def append(self, stamps: list[bytes], image_emb: Tensor) -> None:
        rows = list(zip(stamps, image_emb.half().cpu().numpy()))
        with open(self.path, "ab") as file:
            # nothing may follow half a record: it would be read across two
            file.truncate(len(self.read()) * self.dtype.itemsize)
            file.write(np.array(rows, self.dtype).tobytes())

    def update(self, model: VladVA) -> tuple[list[int], list[Path]]:
        """Embed images that are new or changed. Returns the folder's images and their records."""
        images = file_stamps(self.path.parent, data.IMAGE_SUFFIXES)
        stored = set(self.read()["stamp"].tolist())
        new = [stamp for stamp in images if stamp not in stored]
        # those of a batch that has a bad image are tried again, one by one
        for batch_size in (BATCH_SIZE, 1):
            failed = []
            for batch in data.batches(new, batch_size, "embedding images"):
                try:
                    self.append(batch, model.encode_image([images[stamp] for stamp in batch]))
                except ValueError as error:
                    failed += batch
                    if batch_size == 1:
                        data.say(f"left out: {' '.join(str(error).split())}")
            new = failed
        # records of images that are gone or changed stay where they are, and are passed over
        row_of = {stamp: row for row, stamp in enumerate(self.read()["stamp"].tolist())}
        paths = {row_of[stamp]: images[stamp] for stamp in images if stamp in row_of}
        if not paths:
            raise ValueError(f"{self.path.parent}: no image can be read, of {len(images)}")
        data.say(f"{len(paths):,} images, {len(row_of) - len(stored):,} of them embedded now")
        return list(paths), list(paths.values())

    def reduce(self, records: np.ndarray, dim: int) -> tuple[Tensor, Tensor]:
        """Principal components (D, dim), and the embeddings along them (N, dim); computed once."""
        # of other records, other components: in a file of another name
        digest = hashlib.md5(records["stamp"].tobytes()).hexdigest()
        path = self.path.with_suffix(f".{digest[:12]}.{dim}.safetensors")
        if not path.exists():
            image_emb = torch.from_numpy(records["embedding"])
            # 20,000 rows, evenly spaced, say enough of D x D numbers
            sample = image_emb[:: 1 + len(image_emb) // 20000].float()
            _, vectors = torch.linalg.eigh(torch.cov(sample.T))  # smallest variance first
            components = vectors[:, -dim:].contiguous()
            parts = []
            for block in image_emb.split(BLOCK):
                parts.append(F.normalize(block.float() @ components, dim=-1).half())
            data.write_tensors(path, {"components": components, "embeddings": torch.cat(parts)})
        tensors, _ = read_tensors(path)
        return tensors["components"], tensors["embeddings"]

    def search(self, text_emb: Tensor, rows: list[int], top: int, dim: int | None = None) -> tuple:
        """(scores, indices into `rows`), best first, of the similarities to a text (1, D)."""
        records = self.read()
        image_emb = torch.from_numpy(records["embedding"])
        if dim is not None:
            components, image_emb = self.reduce(records, dim)
            text_emb = F.normalize(text_emb @ components, dim=-1)
        # all records, in blocks: picking the rows first would copy them
        sims = [similarity(block.float(), text_emb) for block in image_emb.split(BLOCK)]
        scores = torch.cat(sims)[:, 0]  # (N,)
        return scores[rows].topk(min(top, len(rows)))


def draw_sheet(path: str, hits: list[tuple[str, str]], side: int = 128) -> None:
    """Images in rows of six, best first, each above its label."""
    page = Image.new("RGB", (6 * (side + 8), (side + 20) * -(-len(hits) // 6)), "white")
    for place, (image, label) in enumerate(hits):
        left, top = 4 + (side + 8) * (place % 6), 4 + (side + 20) * (place // 6)
        page.paste(ImageOps.pad(data.open_image(image), (side, side), color="white"), (left, top))
        ImageDraw.Draw(page).text((left, top + side + 2), label, "black")
    page.save(path)


@data.command
def main(argv: list[str] | None = None) -> None:
    parser = data.Parser("python -m extras.search", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="images, in subfolders too; the index is written there")
    parser.add_argument("text", help="what to look for")
    data.add_model_flags(parser)
    parser.add_argument("--top", type=int, default=12, help="images to show (default: 12)")
    parser.add_argument("--dim", type=int, help="principal components to compare (default: all)")
    parser.add_argument("--sheet", default="search.png", help="contact sheet (default: search.png)")
    args = parser.parse_args(argv)
    sheet = Path(args.sheet).absolute()
    if sheet.suffix.lower() not in data.IMAGE_SUFFIXES or not sheet.parent.is_dir():
        raise ValueError(f"--sheet {sheet}: wanted .png or such, in a folder that is there")
    model = load_model(args)
    # what is wrong with a request is said before hours of work on the images
    text_emb = model.encode_text([args.text]).cpu()  # (1, D)
    width = text_emb.shape[1]
    if args.top < 1 or not 1 <= (width if args.dim is None else args.dim) <= width:
        raise ValueError(f"--top {args.top}, --dim {args.dim}: wanted 1 or more, and 1 to {width}")
    index = Index(args.folder, model, args.adapter)
    rows, paths = index.update(model)
    scores, places = index.search(text_emb, rows, args.top, args.dim)
    hits = [(str(paths[i]), f"{score:.3f}") for score, i in zip(scores.tolist(), places.tolist())]
    print(data.format_table(["", "score"], hits))
    draw_sheet(args.sheet, hits)


if __name__ == "__main__":
    main()
