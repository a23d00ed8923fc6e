"""What the shape of a program shows: ways from the pixels to the logits that go around the network's body.

A backdoor may lie in the program and not in its weights: a branch that watches the pixels for a trigger and
is added to, multiplied with or selected instead of what the body computes. Such a branch has no layer in
common with the body, or joins it behind the last one; and a decision needs a comparison somewhere. Ordinary
skips begin behind the first layer and end before the last.

Source: the forms of graph backdoors in Bober-Irizar et al., CVPR 2023, arXiv 2206.07840, and Langford et al.,
arXiv 2402.06957.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WEIGHTED = {
    "Conv", "ConvInteger", "ConvTranspose", "Einsum", "FusedConv", "Gemm", "MatMul", "MatMulInteger", "QGemm",
    "QLinearConv", "QLinearMatMul",
}  # fmt: skip
COMPARING = {
    "And", "Equal", "Greater", "GreaterOrEqual", "Hardmax", "IsInf", "IsNaN", "Less", "LessOrEqual", "Mod",
    "NonZero", "Not", "OneHot", "Or", "Sign", "Unique", "Xor", "BitShift", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "Cast to a whole number", "ArgMax", "ArgMin", "TopK",
}  # fmt: skip
BRANCHING = {"If", "Loop", "Scan", "Where", "Compress"}
SIZES = {"Shape", "Size"}  # their results depend on the form of their operands, and on no pixel
_MOST = 12  # remarks


@dataclass(frozen=True)
class Step:
    """One operator of a program.

    Attributes:
        label: What to call it.
        kind: What it does, in the words of ONNX.
        inputs: Values that it uses.
        outputs: Values that it makes.
    """

    label: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Value:
    # Layers on the longest way from the pixels; and, one bit each, the layers on every way from them.
    depth: int
    passed: int


def remarks(steps: Sequence[Step], pixels: Iterable[str], results: Iterable[str]) -> tuple[str, ...]:
    """Return what in a program watches the pixels outside the body of the network, in words.

    Args:
        steps: The operators, each after those whose values it uses.
        pixels: Names of its input.
        results: Names of its outputs.
    """
    values = {name: _Value(0, 0) for name in pixels}
    joins: list[tuple[Step, list[_Value]]] = []
    decisions: list[tuple[Step, str]] = []
    for place, step in enumerate(steps):
        operands = [values[name] for name in step.inputs if name in values]
        if not operands or step.kind in SIZES:
            continue
        depth = max(value.depth for value in operands)
        passed = operands[0].passed
        for value in operands[1:]:
            passed &= value.passed
        if step.kind in WEIGHTED and len(operands) < len([name for name in step.inputs if name]):
            depth, passed = depth + 1, passed | 1 << place
        if len(operands) > 1:
            joins.append((step, operands))
        if step.kind in COMPARING:
            decisions.append((step, "compares values that depend on the pixels"))
        elif step.kind in BRANCHING:
            condition = step.inputs[:1] if step.kind in ("If", "Where") else step.inputs
            if any(name in values for name in condition):
                decisions.append((step, "branches on values that depend on the pixels"))
        values |= dict.fromkeys((name for name in step.outputs if name), _Value(depth, passed))
    total = max((values[name].depth for name in results if name in values), default=0)
    used = _behind(steps, results)
    out = [
        f"{step.label} joins the network's body with a path from the pixels that bypasses it"
        for step, operands in joins
        if used.intersection(step.outputs) and _bypassed(operands, total)
    ]
    out += [f"{step.label} {what}" for step, what in decisions if used.intersection(step.outputs)]
    more = [f"and {len(out) - _MOST} more of this kind"] if len(out) > _MOST else []
    return (*out[:_MOST], *more)


def _bypassed(operands: list[_Value], total: int) -> bool:
    deepest = max(operands, key=lambda value: value.depth)
    if total < 2 or 2 * deepest.depth < total:
        return False
    return any(
        (not value.passed & deepest.passed) or (deepest.depth == total and 2 * value.depth <= total)
        for value in operands
        if value is not deepest
    )


def _behind(steps: Sequence[Step], results: Iterable[str]) -> set[str]:
    """Return the values that the results depend on."""
    used = set(results)
    for step in reversed(steps):
        if used.intersection(step.outputs):
            used.update(step.inputs)
    return used
