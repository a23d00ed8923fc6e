"""Scanners examine and change nothing: model, images or training set in, findings out."""

from unbackdoor.registry import load_all

load_all(__name__)
