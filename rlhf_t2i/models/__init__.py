"""Diffusers pipelines: loading, conditioning, denoising, one-step sampling and export."""
