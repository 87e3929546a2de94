"""What a snapshot is measured by, beside the drawn scenes: loss by timestep, and FID and KID of samples by
torch-fidelity.

FID depends on the number of samples: compare values of equal numbers only. The only module that imports torch_fidelity.

Shapes: N samples · D features.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoders.codec import Codec, to_uint8
from stack.config import UserError, refusal
from stack.data.dataset import ImageDataset, LatentDataset
from stack.data.images import DecodeError, decode_image
from stack.files import probe
from stack.flow.process import VALIDATION_LEVELS
from stack.text import conditioning
from stack.text.conditioning import EncodedText

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
LAYER = "2048"
"""Of the network: as many features, before its classifier."""
KID_SUBSET = 1000
"""Samples in each of the subsets over which KID is a mean; all, where there are fewer."""


def by_timestep(loss_N: Tensor) -> dict[str, float]:
    """Mean of the validation losses at each level t = i/8, by t."""
    levels = range(min(VALIDATION_LEVELS, len(loss_N)))
    return {f"{i / VALIDATION_LEVELS:g}": float(loss_N[i::VALIDATION_LEVELS].mean()) for i in levels}


def held_out_prompts(data: LatentDataset, batch_size: int) -> tuple[list[EncodedText], list[tuple[int, int]]]:
    """The held-out samples' encoded captions, and the (width, height) of their images in pixels."""
    texts: list[EncodedText] = []
    sizes: list[tuple[int, int]] = []
    factor = data.manifest.latent_factor
    for batch in data.validation(batch_size):
        height, width = (factor * cells for cells in batch.mean_BCHW.shape[2:])
        texts += conditioning.split(batch.text)
        sizes += [(width, height)] * len(batch.keys)
    return texts, sizes


def decoded(data: LatentDataset, codec: Codec, batch_size: int) -> Iterator[np.ndarray]:
    """The held-out images as the codec gives them back from their latents' means, uint8 [H, W, 3]: pre-encoding keeps
    no pixels, and a model that draws latents cannot do better."""
    weight = next(codec.parameters())
    for batch in data.validation(batch_size):
        with torch.inference_mode():
            image_BCHW = codec.decode_raw(batch.mean_BCHW.to(weight)).clamp(-1, 1)
        yield from to_uint8(image_BCHW).numpy()


def pixels(data: ImageDataset, batch_size: int) -> Iterator[np.ndarray]:
    """The held-out images as a model of pixels sees them, uint8 [H, W, 3]."""
    for batch in data.validation(batch_size):
        yield from to_uint8(batch.image_BCHW).numpy()


def images_in(folder: Path) -> Iterator[np.ndarray]:
    """The images of a folder, uint8 [H, W, 3], as large as they are. UserError for one that cannot be decoded."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGES]
    for path in paths:
        try:
            yield np.asarray(decode_image(path.read_bytes()))
        except DecodeError as error:
            raise UserError(f"{path}: {error}") from None


class Inception:
    """The network whose features FID and KID compare: the InceptionV3 of the FID paper (arXiv 1706.08500).

    path: its weights, in torch-fidelity's names, as safetensors. Nothing is fetched.
    Raises UserError where they are missing or others.
    """

    def __init__(self, path: Path, device: torch.device, batch_size: int):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from torch_fidelity import FeatureExtractorInceptionV3

        if path.suffix != ".safetensors":
            raise UserError(f"inception: {path} is not a .safetensors file; README.md says how to convert the weights")
        weights = io.BytesIO()  # the library fetches or unpickles weights: it gets what was written here
        try:
            probe(path)
            torch.save(load_file(path), weights)
            weights.seek(0)
            with torch.random.fork_rng(devices=[]):
                self._network: Any = FeatureExtractorInceptionV3(
                    "inception-v3-compat", [LAYER], feature_extractor_weights_path=weights
                )
        except (OSError, RuntimeError, SafetensorError) as error:
            message = f"inception: {path} cannot be loaded: {' '.join(str(error).split())[:300]}"
            raise refusal(error, message) from None
        self._network.to(device)
        self._device = device
        self._batch_size = batch_size

    @torch.inference_mode()
    def features(self, images: Iterable[np.ndarray]) -> Tensor:
        """[N, D] in float32 of uint8 [H, W, 3] images; it scales them to 299² by itself."""
        found = []
        for batch in _batches(images, self._batch_size):
            image_BCHW = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(self._device)
            found.append(self._network(image_BCHW)[0].cpu())
        return torch.cat(found) if found else torch.empty(0, 0)


def _batches(images: Iterable[np.ndarray], batch_size: int) -> Iterator[Sequence[np.ndarray]]:
    """The images in order, in batches of one size."""
    for _, alike in groupby(images, key=lambda image: image.shape):
        batch: list[np.ndarray] = []
        for image in alike:
            batch.append(image)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def fid(drawn_ND: Tensor, reference_ND: Tensor) -> float:
    """Fréchet distance of two sets of features, each taken for a Gaussian."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(features_ND) for features_ND in (drawn_ND, reference_ND)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kid(drawn_ND: Tensor, reference_ND: Tensor) -> tuple[float, float]:
    """Kernel distance (arXiv 1801.01401) of two sets of features: mean and standard deviation over subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(drawn_ND), len(reference_ND))
    found = kid_features_to_metric(drawn_ND, reference_ND, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
