"""Architectures: one file a family, the texts that name them, and other libraries as sources."""

from unbackdoor.networks.build import build
from unbackdoor.registry import load_all

__all__ = ["build"]

load_all(__name__)
