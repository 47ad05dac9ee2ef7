"""The mathematics of cached latents."""
