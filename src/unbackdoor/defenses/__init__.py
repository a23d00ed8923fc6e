"""Defenses: one file for each published method; none imports another."""

from unbackdoor.registry import load_all

load_all(__name__)
