"""Tests that say whether some of K numbers stand apart, and exact probabilities."""
