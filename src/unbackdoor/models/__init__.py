"""Architectures, and safe loading and saving. See docs/architecture.md."""

from unbackdoor.models.build import build
from unbackdoor.models.card import ModelCard, read_card
from unbackdoor.models.files import load_model, save_model
from unbackdoor.registry import load_all

__all__ = ["ModelCard", "build", "load_model", "read_card", "save_model"]

load_all(__name__)
