"""Safetensors: a header of JSON, and the tensors behind it."""
