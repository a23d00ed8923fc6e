"""One form of all networks that answer alike, so that no check depends on how the weights are written down.

The same predictions can be written in many ways: logits times a factor or plus a constant, an output twice,
an output that never wins, channels of the last normalisation larger and the head's weights smaller. Whoever
trains a model chooses among them, and a check that compares classes must not see the choice. So the checks
get a copy of the model in which

* outputs that are equal on all inputs, up to a constant, are one output: the highest of them;
* outputs that never win are left out: no clean image is given to them, and they are either far from every
  image (half as far again as any output that wins is from the images of others), or not given any of ten
  images with their own label, or a search from the nearest inputs hardly drives them above the others;
* the logits have a unit scale: on average over the images, the largest is ten above the mean of the others.
  That is what networks trained with cross-entropy have, within a factor of two, so that losses and step
  sizes mean what they mean elsewhere;
* the rows of the head sum to zero.

What looks at features besides takes them from their own rest in units of their own spread
(:func:`feature_units`): then a channel of the last normalisation times a factor, or plus a constant, with the
head's weights and bias making up for it, gives the same numbers.

A network that gives everything to one class has nothing that could be compared.

Cost: one forward pass over at most 512 images and 64 patterns; where an output wins none of them, a search
for it, bounded by ``_PASSES``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbackdoor.data.batches import to_float
from unbackdoor.engine import trusted_caller
from unbackdoor.engine.heads import AffineHead, find_affine_head
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.precision import resolve
from unbackdoor.engine.run import Run
from unbackdoor.engine.statistics.one_outlier import FEWEST
from unbackdoor.errors import MethodFailed, UnbackdoorError, UnsupportedModel
from unbackdoor.types import Classifier, CleanData, Images, ScanReport, require_fit

COMPARISON = "comparison of the classes"
LEAD = 10.0  # of the largest logit over the mean of the others
_IMAGES = 512  # clean images that are looked at
_PATTERNS = 16  # of each of the four kinds
_SAME = 0.03  # spread of the difference of two outputs that are the same, in units of the usual difference
_NEVER = 4  # spreads by which an output must lie below another one, so that it never wins
_ROUNDING = 1e-3  # of the canonical logits
_DEAD = 1e-6  # spread of all differences of the outputs, in units of the largest of them
_FAR = 1.5  # times the farthest output that wins; beyond it, an output is out of reach
_ENOUGH, _OWN = 30, 10  # images, of all classes and of one, from which on they say that an output never wins
_STARTS, _STEPS, _STEP = 2, 20, 1 / 24  # of the search: inputs, steps, and their size in all pixels
_WEAK = 0.4  # of how far the search drives the sixth of the outputs; no attack has so many targets
_PASSES = 1 << 26  # numbers in all images of the search; beyond it, no output is left out for its lack
_NAMED = 10  # classes that a sentence lists


@dataclass(frozen=True)
class CanonicalForm:
    """A model as the checks see it.

    Attributes:
        model: A copy with the outputs that can be compared, in canonical units.
        data: The clean images, with labels of these outputs; images of outputs that are left out are too.
        kept: The class that each output of the copy is, (K',).
        unused: Classes that never win.
        equal: Classes whose output is another one's, and whose.
        constant: Why no classes can be compared, in words; empty where they can. Then the copy is the model
            as it is.
    """

    model: Classifier
    data: CleanData
    kept: tuple[int, ...]
    unused: tuple[int, ...] = ()
    equal: Mapping[int, int] = field(default_factory=dict)
    constant: str = ""

    def left_out(self, names: Sequence[str]) -> dict[str, str]:
        """Return what is not compared, with the reason; empty where all outputs are.

        Args:
            names: Class names of the model.
        """
        out = {}
        if self.unused:
            out["unused outputs"] = (
                f"{_listed(self.unused, names)}: no input that was tried is given to them, so that they "
                "are left out of all comparisons; a trigger that leads to one of them is not looked for"
            )
        if self.equal:
            pairs = [f"{_name(k, names)} is {_name(other, names)}" for k, other in self.equal.items()]
            more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
            out["equal outputs"] = f"on all inputs {', '.join(pairs[:_NAMED])}{more}; each counts once"
        return out

    def restored(self, report: ScanReport, names: Sequence[str]) -> ScanReport:
        """Return a report on the copy as one on the model: its classes, tables and triggers.

        Args:
            report: Of a check that was given the copy.
            names: Class names of the model.
        """
        left_out = self.left_out(names)
        if self.constant:
            reason = f"no class can stand apart: {self.constant}"
            return replace(report, verdict="undecided", skipped={**report.skipped, COMPARISON: reason})
        if not left_out:
            return report
        findings = []
        for one in report.findings:
            table = self._table(one.per_class, len(names), math.nan)
            trigger = one.trigger and replace(one.trigger, label=self.kept[one.trigger.label])
            # Rows of other tensors are outputs of the copy; this one says which classes they are.
            rows = {"classes": torch.tensor(self.kept)} if one.artefacts else {}
            findings.append(
                replace(
                    one,
                    classes=tuple(self.kept[k] for k in one.classes),
                    per_class=table,
                    artefacts={**one.artefacts, **rows},
                    trigger=trigger,
                    class_p_values=self._table(one.class_p_values, len(names), math.nan),
                    mapping=tuple((self.kept[a], self.kept[b]) for a, b in one.mapping),
                )
            )
        return replace(report, findings=tuple(findings), skipped={**report.skipped, **left_out})

    def _table(self, values: Sequence[float], classes: int, missing: float) -> tuple[float, ...]:
        """Return values of the copy's outputs as a table of the model's classes."""
        table = [missing] * classes if values else []
        for place, value in zip(self.kept, values, strict=False):
            table[place] = value
        return tuple(table)


def form_for_checks(model: Classifier, data: CleanData, run: Run) -> CanonicalForm:
    """Return the canonical form of a model; its network runs as in a check, and leaves as little behind.

    Args:
        model: The suspicious classifier; never changed.
        data: Clean images that fit the model; there may be none.
        run: Seed, device and progress.

    Raises:
        UnsupportedModel: If the images do not fit the model.
        MethodFailed: If the network cannot be run.
    """
    for images in (data.fit, data.select):
        require_fit(model, images)
    process_state = trusted_caller.Surroundings.take()
    try:
        return canonical_form(model, data, run)
    except UnbackdoorError:
        raise
    except Exception as error:
        raise MethodFailed(f"the network raised {type(error).__name__}: {error}") from error
    finally:
        process_state.restore()


def canonical_form(model: Classifier, data: CleanData, run: Run) -> CanonicalForm:
    """Return the form of a model that its checks work on.

    Args:
        model: The classifier; not changed.
        data: Clean images, labelled or not; there may be none.
        run: Device and progress; the logits are computed in fp32 whatever its precision.
    """
    exact = replace(run, precision=resolve("fp32", run.device))
    twin = model.copy().to(run.device)
    everything = tuple(range(model.classes))
    images = data.all
    rows = torch.randperm(len(images), generator=run.generator("canonical form"))[:_IMAGES]
    images, patterns = images.subset(rows), _patterns(model)
    with mode(twin, training=False):
        parts = [predict(twin, some, exact) for some in (images, patterns) if len(some)]
    logits = torch.cat(parts).double()  # (N + P, K)
    if logits.dim() != 2 or logits.shape[1] != model.classes or not bool(torch.isfinite(logits).all()):
        return CanonicalForm(model, data, everything)  # the check itself says what is wrong with it
    kept, unused, equal = _distinct(logits)
    if len(kept) == 1:
        return CanonicalForm(model, data, everything, constant="its answers do not depend on the input")
    answers = logits[: len(images), kept].argmax(1)  # (N,), places in kept
    constant = _one_answer(answers, images)
    if constant:
        return CanonicalForm(model, data, everything, constant=constant)
    idle = _idle(twin, logits[:, kept], images, patterns, kept, exact)
    unused = sorted([*unused, *(kept[i] for i in idle)])
    kept = [k for k in kept if k not in unused]
    # What equals an output that never wins never wins either.
    unused = sorted([*unused, *(k for k, other in equal.items() if other in unused)])
    equal = {k: other for k, other in equal.items() if k not in unused}
    if len(kept) < 2:
        return CanonicalForm(
            model, data, everything, constant="it gives all inputs that were tried to one class"
        )
    judged = logits[: len(images), kept] if len(images) else logits[:, kept]
    factor = LEAD / float(_lead(judged))
    return CanonicalForm(
        _rewritten(twin, kept, factor, logits[:, kept], [images, patterns], exact).to(model.mean.device),
        _restricted(data, kept, equal, model),
        tuple(kept),
        tuple(unused),
        equal,
    )


@dataclass(frozen=True)
class FeatureUnits:
    """What features before the head are measured in: (feature - rest) / unit is the same in all writings.

    Attributes:
        unit: (D,) float64, the standard deviation; negative where the longer tail of the feature is below, 0
            where it never changes.
        rest: (D,) float64, the end of the shorter tail: 0 behind a rectifier.
    """

    unit: Tensor
    rest: Tensor

    def rows(self, head: AffineHead) -> Tensor:
        """Return the head's weights (K, D) for features in these units, in float64."""
        return head.weight.detach().cpu().double() * self.unit

    def bias(self, head: AffineHead) -> Tensor:
        """Return the logits (K,) of features at rest, in float64."""
        weight, bias = head.weight.detach().cpu().double(), head.module.bias
        own = torch.zeros(len(weight)) if bias is None else bias.detach().cpu()
        return head.scale * own.double() + weight @ self.rest


def feature_units(model: Classifier, head: AffineHead, images: Images, run: Run) -> FeatureUnits:
    """Return the units of the features before the head.

    They are taken over clean images and over patterns, which count the same: a feature that clean images
    never wake is still seen, because some triggers are nothing else. Without images, over patterns only.

    Args:
        model: The classifier; not changed.
        head: Its last linear layer.
        images: Clean images; there may be none.
        run: Device and progress.
    """
    exact = replace(run, precision=resolve("fp32", run.device))
    parts = [images.subset(range(min(len(images), _IMAGES))), _patterns(model)]
    seen = [_moments(model, head, some, exact) for some in parts if len(some)]
    first, second, third = torch.stack([moments for moments, _, _ in seen]).mean(0)  # (D,) each
    low = torch.stack([low for _, low, _ in seen]).amin(0)
    high = torch.stack([high for _, _, high in seen]).amax(0)
    variance = second - first**2
    # What is left of a feature that never changes is rounding.
    variance = variance.where(variance > 1e-10 * second, torch.zeros_like(variance))
    skewed_down = third - 3 * first * second + 2 * first**3 < 0
    deviation = variance.sqrt()
    return FeatureUnits(deviation.where(~skewed_down, -deviation), torch.where(skewed_down, high, low))


@torch.no_grad()
def _moments(model: Classifier, head: AffineHead, images: Images, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first three moments (3, D) of the features, their smallest and their largest values (D,)."""
    powers = torch.zeros(3, head.features, dtype=torch.float64)
    low = torch.full((head.features,), torch.inf, dtype=torch.float64)
    high = -low
    count = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        features = inputs[0].detach()
        # A linear layer has its features last, a convolution second.
        flat = features.movedim(1, -1) if isinstance(module, nn.Conv2d) else features
        flat = flat.reshape(-1, head.features).double().cpu()  # (B * places, D)
        powers.add_(torch.stack([(flat**n).sum(0) for n in (1, 2, 3)]))
        torch.minimum(low, flat.amin(0), out=low)
        torch.maximum(high, flat.amax(0), out=high)
        count += len(flat)

    handle = head.module.register_forward_pre_hook(add)
    try:
        with mode(model, training=False):
            predict(model, images, run)
    finally:
        handle.remove()
    return powers / max(count, 1), low, high


# ---------------------------------------------------------------------------------------------------
# Outputs that can be compared


def _patterns(model: Classifier) -> Images:
    """Return inputs that are no photographs: noise, noise in black and white, coarse noise, plain colours."""
    channels, height, width = model.input_shape
    draws = torch.Generator().manual_seed(0)  # the same for every model, so that equal ones are equal
    noise = torch.rand(2, _PATTERNS, channels, height, width, generator=draws)
    coarse = torch.rand(_PATTERNS, channels, 4, 4, generator=draws)
    plain = torch.rand(_PATTERNS, channels, 1, 1, generator=draws)
    enlarged = [F.interpolate(one, (height, width)) for one in (coarse, plain)]
    pixels = torch.cat([noise[0], noise[1].round(), *enlarged])  # (P, C, H, W)
    return Images((255 * pixels).round().to(torch.uint8), None, model.class_names, "patterns")


def _distinct(logits: Tensor) -> tuple[list[int], list[int], dict[int, int]]:
    """Return the outputs that differ, those that lie below another one everywhere, and those that are equal.

    Args:
        logits: (N, K) in float64.
    """
    classes = logits.shape[1]
    centred = logits - logits.mean(1, keepdim=True)
    means, largest = centred.mean(0), float(centred.abs().max())  # (K,)
    centred = centred - means
    covariance = centred.T @ centred / len(logits)  # (K, K)
    variances = covariance.diagonal()
    spread = variances[:, None] + variances - 2 * covariance  # (K, K), of the difference of two outputs
    usual = float(spread.sum()) / max(classes * (classes - 1), 1)
    if usual <= (_DEAD * largest) ** 2:
        return [0], [], {}
    same = spread <= _SAME**2 * usual
    kept: list[int] = []
    below: list[int] = []
    equal: dict[int, int] = {}
    grouped: set[int] = set()
    for k in range(classes):
        if k in grouped:
            continue
        group = [j for j in same[k].nonzero().flatten().tolist() if j not in grouped]
        grouped.update(group)
        top = max(group, key=lambda j: float(means[j]))
        first, *others = [
            j
            for j in group
            if float(means[top] - means[j])
            <= max(_SAME * math.sqrt(usual), _NEVER * math.sqrt(max(float(spread[top, j]), 0.0)))
        ]
        kept.append(first)
        equal.update(dict.fromkeys(others, first))
        below += [j for j in group if j != first and j not in others]
    return sorted(kept), below, equal


def _one_answer(answers: Tensor, images: Images) -> str:
    """Return why the answers to the images say that the network is constant; empty where they do not."""
    if len(answers) < 2 or len(answers.unique()) > 1:
        return ""
    if images.labels is not None and len(images.labels.unique()) < 2:
        return ""  # images of one class are rightly given to one
    return f"it gives all {len(answers)} clean images to one class"


def _idle(
    model: Classifier, logits: Tensor, images: Images, patterns: Images, kept: Sequence[int], run: Run
) -> list[int]:
    """Return the places in ``kept`` of the outputs that never win.

    Args:
        model: On the run's device.
        logits: (N + P, K') of images and patterns.
        images: N clean images.
        patterns: P other inputs.
        kept: Classes of the K' outputs.
        run: In full precision.
    """
    count, gaps = len(images), logits.amax(1, keepdim=True) - logits  # (N + P, K'), 0 where the output wins
    wins = (gaps[:count] == 0).any(0)  # (K',)
    if bool(wins.all()):
        return []
    limit = math.inf
    if count >= _ENOUGH and int(wins.sum()) > 2:
        nearest = gaps[:count].where(gaps[:count] > 0, torch.inf).amin(0)  # (K',), of the images of others
        limit = _FAR * float(nearest[wins].max())
    own = torch.zeros(len(kept), dtype=torch.int64)
    if images.labels is not None:
        own = images.labels.cpu().bincount(minlength=max(kept) + 1)[torch.tensor(kept)]
    far = gaps[:count].amin(0) > limit if count else wins
    idle = ~wins & (far | (own >= _OWN))
    if bool((wins | idle).all()):
        return idle.nonzero().flatten().tolist()
    best = _best_margins(model, torch.cat([images.pixels, patterns.pixels]), gaps, kept, run)
    if best is not None:
        usual = float(best.sort().values[-FEWEST]) if len(best) >= FEWEST else 0.0
        weak = ~wins & (best <= max(_WEAK * usual, 0.0))
        # Without images the search is all there is. Where it leaves too few to compare, it says too little.
        if count or not 1 < int((~idle & ~weak).sum()) < FEWEST:
            idle |= weak
    return idle.nonzero().flatten().tolist()


def _best_margins(
    model: Classifier, pixels: Tensor, gaps: Tensor, kept: Sequence[int], run: Run
) -> Tensor | None:
    """Return how far above all others a search drives each output (K',); None where it would cost too much.

    It begins at the inputs that are nearest to the output.
    """
    classes, starts = len(kept), min(_STARTS, len(pixels))
    if classes * starts * _STEPS * math.prod(model.input_shape) > _PASSES:
        return None
    nearest = gaps.topk(starts, dim=0, largest=False).indices.T  # (K', S)
    outputs = torch.tensor(kept, device=run.device)
    best = []
    with torch.enable_grad(), frozen(model), mode(model, training=False):
        groups = torch.arange(classes).split(max(1, images_per_pass(model.input_shape) // starts))
        for part in run.progress(groups, "outputs that never win"):
            rows = nearest[part].flatten().to(pixels.device)
            x = to_float(pixels[rows], run.device).unflatten(0, (-1, starts))  # (G, S, C, H, W)
            aims = part.to(run.device)[:, None, None].expand(-1, starts, 1)
            highest = torch.full((len(part),), -torch.inf)
            for _ in range(_STEPS):
                own = x.detach().requires_grad_()
                logits = logits_of(model, own.flatten(0, 1), run)[:, outputs].unflatten(0, (-1, starts))
                rest = logits.scatter(2, aims, -torch.inf).amax(2)
                margin = logits.gather(2, aims)[:, :, 0] - rest  # (G, S)
                highest = torch.maximum(highest, margin.detach().amax(1).cpu())
                (gradient,) = torch.autograd.grad(margin.sum(), own)
                x = (own.detach() + _STEP * gradient.sign()).clamp(0, 1)
            best.append(highest)
    return torch.cat(best)


# ---------------------------------------------------------------------------------------------------
# The copy


def _lead(logits: Tensor) -> Tensor:
    """Return by how much the largest of the logits (N, K) is above the mean of the others, on average."""
    top = logits.amax(1)
    return (top - (logits.sum(1) - top) / (logits.shape[1] - 1)).mean()


class _Rewritten(Classifier):
    """A classifier that stands for another one, and may return some outputs of its network times a factor."""

    _selected: tuple[int, ...] | None
    _factor: float
    _hashes: tuple[str, str]

    def forward(self, pixels: Tensor) -> Tensor:
        logits = super().forward(pixels)
        if self._selected is None:
            return logits
        logits = logits[:, list(self._selected)]
        return self._factor * (logits - logits.mean(1, keepdim=True))

    def sha256(self) -> str:
        """Return the hash of the model that it stands for, as long as nothing has changed it."""
        own = super().sha256()
        return self._hashes[1] if own == self._hashes[0] else own


def _rewritten(
    twin: Classifier, kept: Sequence[int], factor: float, logits: Tensor, inputs: Sequence[Images], run: Run
) -> Classifier:
    """Return the copy with the outputs that are kept, in canonical units.

    They are written into the head, so that what looks for it finds it. Where there is none, or what follows
    it does not pass them on, they are computed from the network's own.
    """
    sha256 = twin.sha256()
    expected = factor * (logits - logits.mean(1, keepdim=True))  # (N + P, K')
    in_head = _write_into_head(twin, kept, factor, expected, inputs, run)
    twin.class_names = tuple(twin.class_names[k] for k in kept)
    twin.__class__ = _Rewritten
    assert isinstance(twin, _Rewritten)
    twin._selected, twin._factor = None if in_head else tuple(kept), factor
    twin._hashes = (Classifier.sha256(twin), sha256)
    return twin


def _write_into_head(
    twin: Classifier, kept: Sequence[int], factor: float, expected: Tensor, inputs: Sequence[Images], run: Run
) -> bool:
    """Replace the head and return whether the network then answers as expected; else leave it as it is."""
    try:
        head = find_affine_head(twin)
    except UnsupportedModel:
        return False
    parent, _, last = head.name.rpartition(".")
    owner = twin.get_submodule(parent)
    setattr(owner, last, _smaller(head.module, kept, factor))
    with mode(twin, training=False):
        got = torch.cat([predict(twin, some, run) for some in inputs if len(some)]).double()
    if got.shape == expected.shape:
        got = got - got.mean(1, keepdim=True)
        if float((got - expected).abs().max()) <= _ROUNDING * LEAD:
            return True
    setattr(owner, last, head.module)
    return False


@torch.no_grad()
def _smaller(module: nn.Linear | nn.Conv2d, kept: Sequence[int], factor: float) -> nn.Module:
    """Return the head with some of its rows, centred, times the factor."""
    weight = module.weight.detach().double()[list(kept)]
    out: nn.Linear | nn.Conv2d
    # Without drawing first weights: no check may move the generators of the process.
    if isinstance(module, nn.Linear):
        out = nn.utils.skip_init(nn.Linear, module.in_features, len(kept), bias=module.bias is not None)
    else:
        out = nn.utils.skip_init(
            nn.Conv2d,
            module.in_channels,
            len(kept),
            1,
            stride=module.stride,
            padding=module.padding,
            bias=module.bias is not None,
        )
    out = out.to(module.weight)
    out.weight.copy_(factor * (weight - weight.mean(0)))
    if module.bias is not None:
        assert out.bias is not None
        bias = module.bias.detach().double()[list(kept)]
        out.bias.copy_(factor * (bias - bias.mean()))
    for parameter in out.parameters():
        parameter.requires_grad_(module.weight.requires_grad)
    return out.eval()


def _restricted(
    data: CleanData, kept: Sequence[int], equal: Mapping[int, int], model: Classifier
) -> CleanData:
    """Return the images with labels of the kept outputs, without those of outputs that are left out."""
    names = tuple(model.class_names[k] for k in kept)
    if len(kept) == model.classes:
        return data
    places = torch.full((model.classes,), -1)
    places[list(kept)] = torch.arange(len(kept))
    for k, other in equal.items():
        places[k] = places[other]

    def part(images: Images) -> Images:
        if images.labels is None:
            return replace(images, class_names=names)
        labels = places.to(images.labels.device)[images.labels]
        rows = (labels >= 0).nonzero().flatten()
        return replace(images, pixels=images.pixels[rows], labels=labels[rows], class_names=names)

    fit, select = part(data.fit), part(data.select)
    if not len(fit) or not len(select):
        fit = select = fit if len(fit) else select
    return replace(data, fit=fit, select=select, select_is_fit=data.select_is_fit or fit is select)


def _listed(classes: Sequence[int], names: Sequence[str]) -> str:
    more = f" and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
    return ", ".join(_name(k, names) for k in classes[:_NAMED]) + more


def _name(label: int, names: Sequence[str]) -> str:
    name = names[label][:60]
    return f"class {label}" if name == str(label) else f"{name} (class {label})"
