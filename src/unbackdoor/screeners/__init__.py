"""Screeners examine images of unknown origin, single inputs or a training set: a score for each image."""

from unbackdoor.registry import load_all

load_all(__name__)
