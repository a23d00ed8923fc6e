"""ONNX: weights, graphs as networks of torch, and writing back. Needs the extra ``onnx``."""
