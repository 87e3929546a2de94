from __future__ import annotations

import pytest
import torch

from autoencoders.codec import Affine, Codec, Moments, draw, fingerprint


def small(**keys: object) -> Codec:
    torch.manual_seed(0)
    return Codec.build(
        **{"channels": 4, "block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_groups": 4, **keys}
    )


def test_published_parameter_counts():
    """SD1's KL-f8 (arXiv 2112.10752) and SD3's autoencoder, which has no quant convolutions."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        sd1 = Codec.build(4, [128, 256, 512, 512], 2, 32)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    assert sum(p.numel() for p in sd1.parameters()) == 83_653_863
    assert sum(p.numel() for p in vae.encoder.parameters()) == 34_274_208
    assert sum(p.numel() for p in vae.decoder.parameters()) == 49_545_475
    sd3 = Codec(vae)
    assert (sd3.factor, sd3.channels, sd3.affine) == (8, 16, Affine(1.5305, 0.0609))


def test_a_saved_codec_loads_from_its_folder_and_from_a_vae_subfolder(tmp_path):
    codec = small()
    codec.save(tmp_path / "whole" / "vae", Affine(0.5, 0.25))
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    for path in (tmp_path / "whole" / "vae", tmp_path / "whole"):
        loaded = Codec.load(str(path))
        assert loaded.affine == Affine(0.5, 0.25)
        torch.testing.assert_close(loaded.encode(image), codec.encode(image))
        latent = loaded.encode(image).mean_BCHW
        assert latent.shape == (2, 4, 4, 6)
        torch.testing.assert_close(
            loaded.decode((latent - 0.25) * 0.5), codec.decode_raw(latent).clamp(-1, 1), rtol=1e-4, atol=1e-5
        )
    assert fingerprint(str(tmp_path / "whole")) == fingerprint(str(tmp_path / "whole" / "vae"))


def test_the_fingerprint_follows_weights_and_config(tmp_path):
    small().save(tmp_path / "a", Affine(1.0, 0.0))
    small().save(tmp_path / "same", Affine(1.0, 0.0))
    small().save(tmp_path / "scaled", Affine(2.0, 0.0))
    other = small()
    next(other.parameters()).data += 1e-3
    other.save(tmp_path / "moved", Affine(1.0, 0.0))
    known = {name: fingerprint(str(tmp_path / name)) for name in ("a", "same", "scaled", "moved")}
    assert known["a"] == known["same"]
    assert len({known["a"], known["scaled"], known["moved"]}) == 3


def test_draw_has_the_moments_of_the_posterior():
    generator = torch.Generator().manual_seed(0)
    moments = Moments(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -2.0))
    z = draw(moments, torch.randn(1, 1, 200, 200, generator=generator), Affine(0.5, 1.0))
    assert abs(z.mean() - (3 - 1) * 0.5) < 0.01
    assert abs(z.std() - 0.5 * torch.exp(torch.tensor(-1.0))) < 0.01


def test_odd_sides_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="18×16 has a side not divisible by the factor 4"):
        small().encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Codec.load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fingerprint(str(tmp_path / "nowhere"))
