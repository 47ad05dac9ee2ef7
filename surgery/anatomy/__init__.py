"""Read a decoder's attention from its graph: `examine` finds, probes and proves one AttentionSite per layer."""

from ..attention.reference import attend, project_qkv
from .model import Anatomy, OtherLayer
from .reader import examine

__all__ = ["Anatomy", "OtherLayer", "attend", "examine", "project_qkv"]
