"""Models that do not fit one GPU: the decoder's frozen weights split over the processes (FSDP2).

    torchrun --nproc-per-node 8 train.py --model llava-1.5-13b --data pairs.jsonl --shard

Gradients, checkpoints and adapters are those of a run without --shard. Not run on a GPU yet.
"""

from torch import Tensor
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from data import ImageProcessor, TrainingBatch, rank_and_world_size
from vladva import Embeddings, VladVA


def shard_blocks(model: VladVA) -> None:
    """Split the blocks' frozen weights over the processes; one that runs is gathered (FSDP2)."""
    if type(model.image_processor).split is not ImageProcessor.split:
        raise ValueError(f"--shard: {model.name} takes images of any size, wanted a LLaVA model")
    if rank_and_world_size()[1] == 1:
        raise ValueError("--shard splits over processes, here is one: start it with torchrun")
    decoder, dtype = model.lvlm.decoder, model.lvlm.dtype
    # LoRA stays whole, and with it the optimizer, clipping and checkpoints as they are
    trained = set(model.trained_parameters().values())
    for block in tqdm(decoder.layers, "sharding", leave=False, disable=None):
        # from the file at this moment: no process ever holds the whole model
        for p in block.parameters():
            p.data = p.data.to(model.lvlm.device, p.dtype if p in trained else dtype)
        fully_shard(block, ignored_params=trained)
    # what knows the order of the blocks gathers the next one while one runs
    fully_shard(decoder, ignored_params=set(decoder.parameters()))
    model.__class__ = ShardedVladVA


class ShardedVladVA(VladVA):
    """All processes take part when a block is gathered, so all run equally many forwards."""

    def embed_batch(self, batch: TrainingBatch) -> tuple[Embeddings, Tensor]:
        emb, caption_states = super().embed_batch(batch)
        # for what the batch lacks the forward of a word, and with no gradient its backward
        missing = [batch.images, batch.texts, batch.further_texts].count(None) - 2
        for _ in range(missing + len(self.loss.inputs)):
            word = self.text_batch(["a"]).to(self.lvlm.device)
            caption_states = caption_states + self.hidden_states(word, "text")[0][:0].sum()
        return emb, caption_states
