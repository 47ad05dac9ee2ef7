"""The mathematics of cached latents."""

from typing import Literal

MlaInit = Literal["default", "svd", "whitened", "transmla"]
Rotation = Literal["complex", "real", "none"]
"""How heads are mixed within each rotary frequency."""
Selector = Literal["gain", "energy", "2norm", "high", "low", "uniform", "top"]
"""Which rotary components stay rotated."""
LowrankInit = Literal["qw", "plain", "whitened"]
Layout = Literal["joint", "grouped", "head", "freq"]
"""Which KV heads share a latent of `lowrank`."""
