"""One contender of the loaders' benchmark as a process of its own, so that peers may have their own versions of things.

`contenders.py NAME SOURCE COPY` opens the data set, then answers each line on standard input with one line of JSON:
`check` with what an epoch holds, `pass` with the seconds that an epoch takes. `contenders.py NAME SOURCE COPY prepare`
writes the form that the contender reads to COPY and ends.

A contender is a function (source, copy) → epoch, and `epoch()` yields an epoch's batches. All copy the same decoded
tensors into fresh batches of 32 in this process: means and logvars stacked, text padded with zeros to the batch's
longest. Nothing here imports more than its contender needs.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
TEXTS = ("t5", "clip_l", "clip_g")  # [L, D] each
FIXED = ("latent_mean", "latent_logvar", "pooled")

Batch = dict[str, Tensor]
Epoch = Callable[[], Iterable[Batch]]


# ---- what the contenders share


def collate(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Fresh tensors, as our own loader makes them."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in FIXED}
    for name in TEXTS:
        batch[name] = torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True)
        batch[f"{name}_length"] = torch.tensor([len(sample[name]) for sample in samples])
    return batch


def collate_images(images: Sequence[Tensor]) -> Batch:
    """Images of different sizes, uint8, one behind the other."""
    sizes = torch.tensor([image.numel() for image in images])
    return {"pixels": torch.cat([image.flatten() for image in images]), "size": sizes}


def in_batches(samples: Iterable[Any], collation: Callable[[list[Any]], Batch]) -> Iterator[Batch]:
    stream = (sample for sample in samples)  # litdata's data set is its own iterator and begins anew at each iter()
    while chunk := list(itertools.islice(stream, BATCH)):
        yield collation(chunk)


def shards_of(source: Path) -> list[str]:
    return [str(path) for path in sorted(source.glob("*.tar"))]


def members(shard: str, extension: str) -> Iterator[bytes]:
    with tarfile.open(shard) as tar:
        for member in tar:
            if member.name.endswith(extension):
                file = tar.extractfile(member)
                assert file is not None
                yield file.read()


def rgb(image: Any) -> Tensor:
    """A PIL image's pixels, uint8 [H, W, 3]."""
    import numpy as np

    return torch.from_numpy(np.asarray(image))


# ---- pre-encoded samples


def ours(source: Path, copy: Path) -> Epoch:
    from stack.data.dataset import LatentData, LatentDataset

    dataset = LatentDataset(LatentData(path=str(source), batch_size=BATCH, validation_share=0), seed=0)
    assert dataset.num_samples % BATCH == 0, dataset.num_samples
    steps = dataset.num_samples // BATCH
    starts = itertools.count(0, steps)

    def epoch() -> Iterator[Batch]:
        start = next(starts)
        for batch in dataset.loader(start, start + steps, rank=0, world=1, micro_batches=1):
            text = batch.text
            yield {
                "latent_mean": batch.mean_BCHW,
                "latent_logvar": batch.logvar_BCHW,
                "t5": text.t5_BLD,
                "t5_length": text.t5_length_B,
                "clip_l": text.clip_l_BLD,
                "clip_l_length": text.clip_length_B,
                "clip_g": text.clip_g_BLD,
                "clip_g_length": text.clip_length_B,
                "pooled": text.pooled_BD,
            }

    return epoch


def prepare_webdataset(source: Path, copy: Path) -> None:
    """A member a tensor, as webdataset itself encodes and decodes them: it knows no safetensors, NumPy no bfloat16."""
    _write_webdataset(source, copy, lambda tensors: {f"{name}.pth": tensor for name, tensor in tensors.items()})


def prepare_webdataset_dicts(source: Path, copy: Path) -> None:
    """A member a sample: less to unpickle."""
    _write_webdataset(source, copy, lambda tensors: {"pth": tensors})


def _write_webdataset(source: Path, copy: Path, parts: Callable[[dict[str, Tensor]], dict[str, Any]]) -> None:
    from safetensors.torch import load
    from webdataset import TarWriter

    for shard in shards_of(source):
        with TarWriter(str(copy / Path(shard).name)) as writer:
            for number, data in enumerate(members(shard, ".safetensors")):
                writer.write({"__key__": f"{number:06d}", **parts(load(data))})


def webdataset(source: Path, copy: Path) -> Epoch:
    return _webdataset(copy, lambda sample: {name: sample[f"{name}.pth"] for name in (*FIXED, *TEXTS)})


def webdataset_dicts(source: Path, copy: Path) -> Epoch:
    return _webdataset(copy, lambda sample: sample["pth"])


def _webdataset(copy: Path, tensors_of: Callable[[dict[str, Any]], dict[str, Tensor]]) -> Epoch:
    import webdataset as wds

    dataset = wds.WebDataset(shards_of(copy), shardshuffle=False, empty_check=False).decode()
    stages = dataset.map(tensors_of).batched(BATCH, collation_fn=collate)
    return lambda: iter(stages)


def webdataset_on_ours(source: Path, copy: Path) -> Epoch:
    """Our shards with a decoder written for them, as fast as the pipeline's stages go: JSON sidecars are passed over
    unread, as our loader does."""
    import webdataset as wds
    from safetensors.torch import load

    def decode(key: str, data: bytes) -> dict[str, Tensor]:
        return load(data)

    dataset = wds.WebDataset(
        shards_of(source),
        shardshuffle=False,
        empty_check=False,
        select_files=lambda name: name.endswith(".safetensors"),
    )
    stages = dataset.decode(decode, pre=[], post=[], only=["safetensors"]).map(lambda sample: sample["safetensors"])
    stages = stages.batched(BATCH, collation_fn=collate)
    return lambda: iter(stages)


def prepare_litdata(source: Path, copy: Path) -> None:
    import litdata

    litdata.optimize(
        fn=_shard_tensors,
        inputs=shards_of(source),
        output_dir=str(copy),
        chunk_bytes="64MB",
        num_workers=1,
    )


def _shard_tensors(shard: str) -> Iterator[dict[str, Tensor]]:
    """Its tensors know no bfloat16 of two dimensions: the bits go in as integers."""
    from safetensors.torch import load

    for data in members(shard, ".safetensors"):
        yield {name: tensor.view(torch.int16) for name, tensor in load(data).items()}


def litdata(source: Path, copy: Path) -> Epoch:
    import litdata

    dataset = litdata.StreamingDataset(str(copy), shuffle=False)

    def samples() -> Iterator[dict[str, Tensor]]:
        for sample in dataset:
            yield {name: tensor.view(torch.bfloat16) for name, tensor in sample.items()}

    return lambda: in_batches(samples(), collate)


def prepare_mosaicml(source: Path, copy: Path) -> None:
    from safetensors.torch import load
    from streaming import MDSWriter

    columns = dict.fromkeys((*FIXED, *TEXTS), "ndarray:uint16")  # it has no bfloat16
    with MDSWriter(out=str(copy), columns=columns, size_limit="64mb") as writer:
        for data in itertools.chain.from_iterable(members(shard, ".safetensors") for shard in shards_of(source)):
            writer.write({name: tensor.view(torch.uint16).numpy() for name, tensor in load(data).items()})


def mosaicml(source: Path, copy: Path) -> Epoch:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(copy), shuffle=False, batch_size=BATCH)
    return lambda: in_batches(map(_bfloat16, dataset), collate)


def mosaicml_by_index(source: Path, copy: Path) -> Epoch:
    """Without the threads that its iteration starts, which small samples spend much of their time waiting for."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(copy), shuffle=False, batch_size=BATCH)
    return lambda: in_batches((_bfloat16(dataset[sample]) for sample in range(len(dataset))), collate)


def _bfloat16(sample: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array).view(torch.bfloat16) for name, array in sample.items()}


def prepare_webshart(source: Path, copy: Path) -> None:
    import webshart

    webshart.MetadataExtractor().extract_metadata(source=str(source), destination=str(copy), max_workers=1)


def webshart(source: Path, copy: Path) -> Epoch:
    """It hands out undecoded bytes; its metadata knows the JSON sidecars as parts of their samples."""
    import webshart
    from safetensors.torch import load

    dataset = webshart.discover_dataset(str(source), metadata=str(copy))

    def samples() -> Iterator[dict[str, Tensor]]:
        for number in range(dataset.num_shards):
            shard = dataset.open_shard(number)
            for row in range(shard.num_samples):
                yield load(shard.read_sample(row))

    return lambda: in_batches(samples(), collate)


def plain_read(source: Path, copy: Path) -> Epoch:
    """Whole tars by readv, one after the other into the same buffer: the speed that the page cache gives."""
    shards = [Path(shard) for shard in shards_of(source)]
    view = memoryview(bytearray(max(path.stat().st_size for path in shards)))

    def epoch() -> Iterator[Batch]:
        for shard in shards:
            with shard.open("rb", buffering=0) as file:
                read = 0
                while count := os.readv(file.fileno(), [view[read:]]) if read < len(view) else 0:
                    read += count
            yield {"bytes": torch.frombuffer(view[:read], dtype=torch.uint8)}

    return epoch


# ---- raw images


def ours_images(source: Path, copy: Path) -> Epoch:
    """What `ImageDataset` reads and decodes, without the resize that follows."""
    from stack.data.images import decode_image
    from stack.data.shards import ShardReader, ShardSet, index_shards

    shards = ShardSet(index_shards(source, copy))
    reader = ShardReader(shards.indices)

    def images() -> Iterator[Tensor]:
        for sample in range(shards.num_samples):
            shard, row = shards.locate(sample)
            extension = shards.indices[shard].image_extension(row)
            yield rgb(decode_image(reader.read(shard, row, extension)))

    return lambda: in_batches(images(), collate_images)


def webdataset_images(source: Path, copy: Path) -> Epoch:
    import webdataset as wds

    wanted = {"select_files": lambda name: name.endswith(".jpg")}
    dataset = wds.WebDataset(shards_of(source), shardshuffle=False, empty_check=False, **wanted)
    stages = dataset.decode("pil", only=["jpg"]).map(lambda sample: rgb(sample["jpg"]))
    stages = stages.batched(BATCH, collation_fn=collate_images)
    return lambda: iter(stages)


def prepare_litdata_images(source: Path, copy: Path) -> None:
    import litdata

    litdata.optimize(
        fn=_shard_images,
        inputs=shards_of(source),
        output_dir=str(copy),
        chunk_bytes="64MB",
        num_workers=1,
    )


def _shard_images(shard: str) -> Iterator[Any]:
    from litdata.types import Jpeg

    for data in members(shard, ".jpg"):
        yield Jpeg(bytes=data)  # stored as it is


def litdata_images(source: Path, copy: Path) -> Epoch:
    """Its JPEG form, decoded by torchvision."""
    import litdata

    dataset = litdata.StreamingDataset(str(copy), shuffle=False)
    return lambda: in_batches(dataset, collate_images)


CONTENDERS: dict[str, Callable[[Path, Path], Epoch]] = {
    "ours": ours,
    "webdataset": webdataset,
    "webdataset a member a sample": webdataset_dicts,
    "webdataset on our shards": webdataset_on_ours,
    "litdata": litdata,
    "mosaicml-streaming": mosaicml,
    "mosaicml-streaming by index": mosaicml_by_index,
    "webshart": webshart,
    "plain read": plain_read,
    "ours images": ours_images,
    "webdataset images": webdataset_images,
    "litdata images": litdata_images,
}
PREPARATIONS: dict[str, Callable[[Path, Path], None]] = {
    "webdataset": prepare_webdataset,
    "webdataset a member a sample": prepare_webdataset_dicts,
    "litdata": prepare_litdata,
    "mosaicml-streaming": prepare_mosaicml,
    "mosaicml-streaming by index": prepare_mosaicml,
    "webshart": prepare_webshart,
    "litdata images": prepare_litdata_images,
}


# ---- the process


def check(epoch: Epoch) -> dict[str, int]:
    """Samples of an epoch, and a sum over all bits that order and padding with zeros leave alone."""
    samples = total = 0
    for batch in epoch():
        for tensor in batch.values():
            words = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
            total += int(words.sum(dtype=torch.int64))
        samples += len(batch["size" if "size" in batch else "latent_mean"])
    return {"samples": samples, "total": total}


def one_pass(epoch: Epoch) -> dict[str, float]:
    wall, processor = time.perf_counter(), time.process_time()
    for _ in epoch():
        pass
    return {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor}


def main() -> None:
    name, source, copy, *prepare = sys.argv[1:]
    sys.path.insert(1, str(ROOT))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable")
    if prepare:
        PREPARATIONS[name](Path(source), Path(copy))
        return
    epoch = CONTENDERS[name](Path(source), Path(copy))
    for line in sys.stdin:
        answer = check(epoch) if line.strip() == "check" else one_pass(epoch)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
