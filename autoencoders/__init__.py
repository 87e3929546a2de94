"""The latent codec (pixels, moments, latents) and how it is trained. Never imports stack."""
