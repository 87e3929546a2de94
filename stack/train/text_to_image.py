"""Text-to-image pre-training: an MM-DiT over pre-encoded samples, on rectified flow (SD3, arXiv 2403.03206) or any
other objective of `stack.flow.process`.

Shapes: B batch · C channels · H W height, width of the latent · L text tokens · D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL.Image import Image
from pydantic import Field, field_validator
from torch import Tensor, nn

from autoencoders.codec import Affine, Codec, Moments, draw, fingerprint
from stack.config import Config, Location, Seed, UserError
from stack.data.dataset import LatentBatch, LatentDataset
from stack.flow.noise import Draws
from stack.flow.process import Example, FlowConfig
from stack.models import captioned, convert
from stack.models.captioned import CaptionNetwork
from stack.models.flops import flops_per_sample
from stack.models.mmdit import MMDiT, MMDiTConfig
from stack.text import prompts
from stack.text.conditioning import EncodedText, join
from stack.text.encoders import TextConfig, TextEncoders, fingerprints
from stack.train.objective import Losses
from stack.train.pictures import contact_sheet
from stack.train.sampler import Sampler, SamplerConfig, check_size
from stack.train.snapshot import Snapshot

Probability = Annotated[float, Field(ge=0, le=1)]


class DropoutConfig(Config):
    """Probability with which each encoder is dropped (zeroed), independently (SD3 §5.2; 0.464³ = 0.0999).

    `all` drops the three together, beside that (MLPerf's FLUX.1: 0.1): a short training learns more of its captions
    from this and small values of the others.
    """

    t5: Probability = 0.464
    clip_l: Probability = 0.464
    clip_g: Probability = 0.464
    all: Probability = 0.0


class PreviewConfig(SamplerConfig):
    prompts: tuple[str, ...] = ("a red circle",)
    seed: Seed = 0
    size: tuple[int, int] = (32, 32)
    """(width, height) in pixels."""

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        prompts.check(texts)
        return texts


class TextToImageConfig(FlowConfig):
    kind: Literal["text_to_image"] = "text_to_image"
    model: captioned.NetworkConfig
    text: TextConfig
    autoencoder: Location
    """Folder or hub id of the codec that made the latents."""
    dropout: DropoutConfig = DropoutConfig()
    guidance: float = 1.0
    """What a model with a guidance embedding is told while it trains on plain data."""
    preview: PreviewConfig = PreviewConfig()


def encoder_fingerprints(text: TextConfig, autoencoder: str) -> dict[str, str]:
    return {"autoencoder": fingerprint(autoencoder), **fingerprints(text)}


def check_encoders(snap: Snapshot) -> TextConfig:
    """The text encoders of a snapshot. UserError where one of them, or the autoencoder, is not that of the training."""
    text: TextConfig = snap.part(TextConfig, "text")
    encoders = snap.part(dict[str, str], "encoders")
    for name, value in encoder_fingerprints(text, snap.part(str, "autoencoder")).items():
        if encoders.get(name) != value:
            raise UserError(
                f"{snap.path}: trained with {name} {encoders.get(name)}, found {value}: "
                "restore the encoder that made the training data"
            )
    return text


def _read(path: Path, config: MMDiTConfig) -> MMDiT:
    """The model in `path`, in float32; UserError where it is not the one that the configuration describes."""
    network, found = convert.load(path, torch.float32)
    unused = {"preset"}
    if config.rope_axes:
        unused |= {"position_table_size", "position_base_size", "position_origin"}
    keys = [k for k in MMDiTConfig.model_fields if k not in unused and getattr(found, k) != getattr(config, k)]
    if keys:
        has, wanted = ({key: getattr(c, key) for key in keys} for c in (found, config))
        raise UserError(f"init.from={path} is another model than objective.model: it has {has}, expected {wanted}")
    return network


class TextToImage:
    """Without another word in the configuration: the mean square of v − (ε − x_0) on the straight path."""

    def __init__(
        self,
        config: TextToImageConfig,
        data: LatentDataset,
        seed: int,
        device: torch.device,
        init: Path | None = None,
        previews: bool = False,
    ):
        """previews: whether `preview` will be called: its prompts are encoded here, before the model is built."""
        manifest = data.manifest
        self._encoders = encoder_fingerprints(config.text, config.autoencoder)
        manifest.check(data.folder, self._encoders, config.text)
        if isinstance(config.model, MMDiTConfig) and config.model.in_channels != manifest.latent_channels:
            raise UserError(
                f"objective.model.in_channels is {config.model.in_channels}, the latents of {data.folder} have "
                f"{manifest.latent_channels} channels"
            )
        if config.coupling.kind == "paired":
            raise UserError("objective.coupling.kind=paired: latents have no second image to begin with")
        config.preview.check(config)
        for key, none in (("autoguidance", 1), ("classifier", 0)):
            if getattr(config.preview.guidance, key) != none:
                raise UserError(f"objective.preview.guidance.{key}: a training has nothing that it would scale")
        self._config, self._batch_size = config, data.config.batch_size
        for side in (*manifest.buckets, config.preview.size):
            check_size(config.model, manifest.latent_factor, side)
        self._affine = Affine(manifest.scale, manifest.shift)
        self._check_widths(config, manifest.empty_text)
        self._device = device
        self._sampler: Sampler | None = None
        if previews:
            self._texts = prompts.encode(config.preview.prompts, TextEncoders(config.text, device))
        self.network: nn.Module
        if init and isinstance(config.model, MMDiTConfig):
            self.network = _read(init, config.model)
        else:
            self.network = captioned.build(config.model, manifest.latent_channels, seed)

    @staticmethod
    def _check_widths(config: TextToImageConfig, text: EncodedText) -> None:
        clip = sum(t.shape[-1] for t in (text.clip_l, text.clip_g) if t is not None and len(t))
        needed = max(clip, text.t5.shape[-1] if text.t5 is not None else 0)
        if config.model.context_dim < needed:
            raise UserError(f"objective.model.context_dim is {config.model.context_dim}, the captions need {needed}")
        if isinstance(config.model, MMDiTConfig) and config.model.pooled_dim != text.pooled.shape[-1]:
            raise UserError(
                f"objective.model.pooled_dim is {config.model.pooled_dim}, the captions' is {text.pooled.shape[-1]}"
            )

    def _latent(self, batch: LatentBatch, draws: Draws) -> Tensor:
        """x_0 [B, C, H, W], drawn from the stored moments."""
        posterior = draws.normal("posterior", tuple(batch.mean_BCHW.shape[1:])).to(batch.mean_BCHW.device)
        return draw(Moments(batch.mean_BCHW, batch.logvar_BCHW), posterior, self._affine)

    def _loss_B(
        self, network: nn.Module, batch: LatentBatch, example: Example, **keep: Tensor
    ) -> tuple[Tensor, int | None]:
        """Of each sample, and the floating-point operations that it took, forward and backward, where known."""
        x_BCHW, t_B, model = example.x_t, example.t_B, self._config.model
        guidance_B = torch.full_like(t_B, self._config.guidance) if model.guidance_embedding else None
        context = join(batch.text, model.context_dim, **keep)
        output_BCHW = network(x_BCHW * self._config.input_scale(t_B, x_BCHW), t_B, *context, guidance_B)
        loss_B = self._config.loss_B(output_BCHW, example)
        if not isinstance(model, MMDiTConfig):
            return loss_B, None
        num_image = math.prod(x_BCHW.shape[2:]) // model.patch_size**2
        return loss_B, sum(flops_per_sample(model, num_image, length)[1] for length in context.lengths)

    def loss(self, network: nn.Module, batch: LatentBatch, draws: Draws) -> Losses:
        config, latent_BCHW = self._config, self._latent(batch, draws)
        t_B = config.times(draws, self._batch_size).to(latent_BCHW.device)
        noise_BCHW = config.coupling.noise(latent_BCHW, draws, self._batch_size)
        keep_any_B = draws.uniform("keep_all") >= config.dropout.all
        keep = {
            f"keep_{name}_B": keep_any_B & (draws.uniform(f"keep_{name}") >= getattr(config.dropout, name))
            for name in ("t5", "clip_l", "clip_g")
        }
        loss_B, flop = self._loss_B(network, batch, config.example(latent_BCHW, noise_BCHW, t_B), **keep)
        return Losses(loss_B.mean(), flop=flop, by_time=(loss_B, t_B))

    def validate(self, network: nn.Module, batch: LatentBatch, draws: Draws) -> Tensor:
        latent_BCHW = self._latent(batch, draws)
        noise_BCHW = self._config.coupling.noise(latent_BCHW, draws, None)
        example = self._config.validation_example(latent_BCHW, noise_BCHW, batch.positions)
        return self._loss_B(network, batch, example)[0]

    def preview(self, network: nn.Module, limit: int | None = None) -> Image:
        assert isinstance(network, CaptionNetwork)
        preview = self._config.preview
        if self._sampler is None:
            codec = Codec.load(self._config.autoencoder).to(self._device)
            self._sampler = Sampler(network, codec, self._config.text.pad, self._config)
        self._sampler.network = network
        prompts = preview.prompts[:limit]
        images = self._sampler.sample(self._texts[:limit], preview.size, preview, range(len(prompts)), preview.seed)
        return contact_sheet(images, prompts)

    def metadata(self) -> dict[str, Any]:
        return {
            "kind": self._config.kind,
            "flow": self._config.model_dump(mode="json", include=set(FlowConfig.model_fields)),
            "model": self._config.model.model_dump(mode="json"),
            "text": self._config.text.model_dump(mode="json"),
            "autoencoder": self._config.autoencoder,
            "encoders": self._encoders,
            "sampling": self._config.preview.model_dump(mode="json", exclude={"prompts", "seed"}),
        }
