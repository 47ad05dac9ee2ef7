"""The result of an evaluation: its data, its page and its plots."""

from .data import Report

__all__ = ["Report"]
