"""Open a file of weights that somebody else wrote: as a classifier, with everything that had to be assumed.

Nothing in the file is executed. What the file does not say is taken, in this order, from the arguments, from
a card beside it, from the configuration of the architecture's source, and last from clean images: a way to
read them under which the model is not clearly less accurate than under any other (the whole rule stands in
``normalisation_guess``). Its provenance tells which of these it was, for each fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from unbackdoor.data.conform import conform
from unbackdoor.data.loaders import load_images
from unbackdoor.engine.inference import mode
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.networks.build import canonical, preprocessing
from unbackdoor.networks.sources import Preprocessing
from unbackdoor.opening.candidates import Variants, find, library_size, refuse_to_guess
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.opening.cost_limits import outputs_of
from unbackdoor.opening.load_tensors import Filled, fill, require_finite
from unbackdoor.opening.normalisation_guess import Convention, Inferred, infer, usual
from unbackdoor.opening.provenance import ArchitectureOrigin, NameChanges, NormalisationOrigin, Provenance
from unbackdoor.opening.recognise_architecture import ends
from unbackdoor.opening.rename_tensors import Adapted, Difference
from unbackdoor.types import Classifier, Images, Progress, silent
from unbackdoor.weights.card import ModelCard, normalisation
from unbackdoor.weights.formats.onnx.graph import import_graph
from unbackdoor.weights.formats.onnx.node import Place
from unbackdoor.weights.source import Source, open_source

# What is assumed where neither the file nor any image says it.
_USUAL_SIDE = 32
_ASSUMED_SIZE = "assumed"
_LARGE = 96 * 96  # pixels of an image
_ASSUMED = Convention("none, pixels in [0, 1]")
_GRAPH = "the file's own graph"


Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Opened:
    """A classifier made of somebody's file.

    Attributes:
        model: The classifier, in evaluation mode on the CPU.
        images: The clean images in the model's form, or None where none were given.
        provenance: What was assumed and why; its ``warnings`` are to be shown loudly.
        names: The file's name of every tensor by the network's name, so that a repaired model can be written
            under the names its owner knows.
        places: Of a network that is the file's own graph: where each of its tensors stands there; else None.
        source: The file as it was opened.
    """

    model: Classifier
    images: Images | None
    provenance: Provenance
    names: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Place] | None = None
    source: Source | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should not be overlooked."""
        return self.provenance.warnings


def open_model(
    path: Path | str | Source,
    *,
    arch: str | None = None,
    images: Images | Path | str | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    run: Run | None = None,
    progress: Progress = silent,
) -> Opened:
    """Open a model for an audit.

    Args:
        path: File of weights, with or without a card of this package beside it; or what was opened already
            with :func:`unbackdoor.weights.source.open_source`.
        arch: Architecture, such as ``resnet18``, ``timm:NAME``, ``torchvision:NAME``, ``hf:FOLDER`` or
            ``FILE.py:CALLABLE``, which runs that code; None takes the graph of an ONNX file, and guesses it
            from the tensors of others. Options of our own families that are not typed are read off the
            tensors.
        images: Clean images, at best labelled, or where to load them from. Without any, an architecture or a
            normalisation that the file does not show is assumed, with a warning.
        class_names: K names, in logit order.
        mean: Per-channel mean; empty for no normalisation; None for not known: then of the usual ones that
            the images do not tell from the most accurate (sign test, 5 %), the library's own is taken, else
            the one with the lowest loss.
        std: Per-channel deviation, likewise.
        size: (H, W) of the model's input.
        run: Device, precision and seed of the trials; None is the CPU and seed 0.
        progress: Shows how far loading has come.

    Returns:
        The classifier, the images in its form, and its provenance.

    Raises:
        InputError: If a file cannot be used, or several networks fit and nothing decides.
        UnsafeFile: If a file would run code, or a card names what only the user may name.
        UnsupportedModel: If no known architecture fits, or the named one does not; lists the differences. If
            a graph has operators that are not imported; names them.
        ConfigError: If an argument does not fit.
        MissingExtra: If the architecture or the format needs a library that is not installed.
    """
    run = run or Run.create(progress=progress)
    _require_arguments(mean, std, size)
    given = _Given(arch, class_names, mean, std, size)
    source = path if isinstance(path, Source) else open_source(path)
    card = source.card()
    if card is not None:
        return _with_card(source, card, given, images, run, progress)
    return _bare(source, given, images, run, progress)


@dataclass(frozen=True)
class _Given:
    arch: str | None
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    size: tuple[int, int] | None

    @property
    def convention(self) -> Convention | None:
        if self.mean is None or self.std is None:
            return None
        return Convention("as given", tuple(self.mean), tuple(self.std))


def _require_arguments(
    mean: Sequence[float] | None, std: Sequence[float] | None, size: tuple[int, int] | None
) -> None:
    faults = []
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        faults.append("mean and std belong together, one value for each channel")
    if any(value <= 0 for value in std or ()):
        faults.append("every std must be positive")
    if size is not None and (len(size) != 2 or min(size) < 1):
        faults.append(f"the size must be (height, width), got {size}")
    if faults:
        raise ConfigError("the input of the model", faults)


# ---------------------------------------------------------------------------------------------------
# With a card


def _with_card(
    source: Source,
    card: ModelCard,
    given: _Given,
    images: Images | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    path = source.path
    if given.class_names is not None and len(given.class_names) != len(card.class_names):
        raise _names_misfit(len(card.class_names), given.class_names, path)
    shape = (card.input_shape[0], *given.size) if given.size is not None else None
    model = load_model(
        source,
        architecture=given.arch,
        input_shape=shape,
        class_names=given.class_names,
        mean=given.mean,
        std=given.std,
    )
    held, told = _fitting_images(images, model.input_shape, model.class_names, progress)
    mean, std = normalisation(model)
    scale = given.convention or Convention("the card's", mean, std)
    inferred = _judge({model.architecture: model.network}, held, [scale], None, run)
    provenance = Provenance(
        path.name,
        True,
        ArchitectureOrigin(model.architecture, "named by the user" if given.arch else "the card"),
        NameChanges(),
        NormalisationOrigin.of(scale, "arguments" if given.convention else "the card"),
        model.input_shape,
        "arguments" if given.size else "the card",
        model.classes,
        "arguments" if given.class_names else "the card",
    )
    return Opened(model, held, provenance.measured(told, inferred, []), source=source)


# ---------------------------------------------------------------------------------------------------
# Without one


def _bare(
    source: Source, given: _Given, images: Images | Path | str | None, run: Run, progress: Progress
) -> Opened:
    if source.graph is not None and not source.contents.dangerous and given.arch is None:
        try:
            network = import_graph(source.graph)
        except UnsupportedModel as unknown:  # an operator that is not imported
            if source.contents.problem is not None:
                raise
            try:
                return _by_names(source, given, images, run, progress)
            except UnsupportedModel:
                raise unknown from None  # what it is, and not what it resembles
        return _own_graph(source, network, given, images, run, progress)
    return _by_names(source, given, images, run, progress)


def _own_graph(
    source: Source,
    network: fx.GraphModule,
    given: _Given,
    images: Images | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    """Open an ONNX file as the network that it describes."""
    path = source.path
    require_finite(network.state_dict(), path)
    stated = network.meta["input_shape"]
    raw = load_images_of(images, given.size or (stated[1:] if stated else None), progress)
    channels = network.meta["channels"] or (raw.shape[0] if raw is not None else _channels(network))
    facts = Preprocessing(size=stated[1:], size_fixed=True, source=_GRAPH) if stated else Preprocessing()
    size, size_source = _sizes(given, facts, None, raw.shape[1:] if raw is not None else None)[0]
    shape = (channels, *size)
    classes = outputs_of(network, shape, path)
    _require_separate(network, shape, path)
    names, names_source = _class_names(given, Preprocessing(), raw, classes)
    filled = Filled(network, Adapted({}, Difference((), (), (), 0)))
    attempt = _opened_as(
        path,
        lambda *_: {_GRAPH: filled},
        given,
        Preprocessing(),
        raw,
        shape,
        size_source,
        names,
        run,
        progress,
    )
    warnings = [_assumed_size(shape)] if size_source == _ASSUMED_SIZE else []
    architecture = ArchitectureOrigin("ONNX", _GRAPH, "; ".join(network.meta["notes"]))
    opened = _with_provenance(source, attempt, architecture, names_source, warnings)
    return replace(opened, places=network.meta["places"])


def _by_names(
    source: Source,
    given: _Given,
    images: Images | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    """Open a file as a network that has its tensors: the named one, or a known one."""
    path, state = source.path, source.state()
    facts = preprocessing(given.arch) if given.arch is not None else Preprocessing()
    stated = facts.size if given.arch is not None else library_size(state)
    raw = load_images_of(images, given.size or stated, progress)
    channels, classes = ends(state)
    channels = channels or (raw.shape[0] if raw is not None else 3)
    warnings = [facts.note] if facts.note else []
    side = given.size[0] if given.size else (raw.shape[1] if raw is not None else None)
    variants = find(state, given.arch, side=side, exact=given.size is not None, where=path)
    if raw is None or raw.labels is None:
        variants = variants.only(side)
        if len(variants.specs) > 1 and variants.decisive:
            raise refuse_to_guess(variants, path)
        if len(variants.specs) > 1:
            variants = variants.first()
            warnings.append(f"{variants.note}; the most usual was assumed: {variants.specs[0]}")
    if given.arch is None:
        facts = preprocessing(variants.specs[0])
    names, names_source = _class_names(given, facts, raw, classes)
    attempts: list[_Attempt] = []
    failures: list[UnsupportedModel] = []
    for shape, specs, size_source in _plan(channels, given, facts, variants, raw):
        if attempts and attempts[-1].convincing:
            break

        def build(shape: Shape, classes: int, specs: tuple[str, ...] = specs) -> dict[str, Filled]:
            return _filled(specs, state, shape, classes, path)

        try:
            attempts.append(
                _opened_as(path, build, given, facts, raw, shape, size_source, names, run, progress)
            )
        except UnsupportedModel as error:
            # Another size may do; if none does, the first reason is the one to tell.
            failures.append(error)
    if not attempts and given.class_names is not None and classes not in (None, len(names)):
        # Built with as many outputs as there are names, no network fits; the names are what is wrong.
        raise _names_misfit(classes, names, path) from failures[0]
    if not attempts:
        raise failures[0]
    attempt = max(attempts, key=lambda a: a.inferred.interval.low if a.inferred is not None else 0.0)
    if given.size is None and raw is None and attempt.size_source == _ASSUMED_SIZE:
        warnings.append(_assumed_size(attempt.shape))
    architecture = ArchitectureOrigin(
        attempt.model.architecture,
        variants.source,
        variants.note,
        tuple(candidate.spec for candidate in variants.candidates),
    )
    return _with_provenance(source, attempt, architecture, names_source, warnings)


def _assumed_size(shape: Shape) -> str:
    return f"The input size is not known; {shape[1]} x {shape[2]} was assumed. Give the size"


def _with_provenance(
    source: Source,
    attempt: _Attempt,
    architecture: ArchitectureOrigin,
    names_source: str,
    warnings: list[str],
) -> Opened:
    provenance = Provenance(
        source.path.name,
        False,
        architecture,
        NameChanges.of(attempt.filled.adapted),
        NormalisationOrigin.of(attempt.scale, attempt.scale_source),
        attempt.shape,
        attempt.size_source,
        attempt.model.classes,
        names_source,
    ).measured(attempt.changes, attempt.inferred, [*warnings, *attempt.warnings])
    translated = attempt.filled.adapted.renamed
    file_names = {
        name: translated.get(name, name)
        for name in attempt.model.network.state_dict()
        if name not in attempt.filled.adapted.filled
    }
    return Opened(attempt.model, attempt.images, provenance, file_names, source=source)


def _names_misfit(outputs: int | None, names: Sequence[str], path: Path) -> UnsupportedModel:
    return UnsupportedModel(
        "the class names do not fit the model",
        expected=f"{outputs} names, one for each output",
        got=len(names),
        where=path,
    )


@dataclass(frozen=True)
class _Attempt:
    model: Classifier
    filled: Filled
    images: Images | None
    shape: tuple[int, int, int]
    size_source: str
    scale: Convention
    scale_source: str
    inferred: Inferred | None
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def convincing(self) -> bool:
        """Whether there is no reason to try anything else."""
        return self.inferred is None or (self.inferred.by_labels and not self.inferred.warning)


def _opened_as(
    path: Path,
    build: Callable[[Shape, int], dict[str, Filled]],
    given: _Given,
    facts: Preprocessing,
    raw: Images | None,
    shape: Shape,
    size_source: str,
    names: tuple[str, ...],
    run: Run,
    progress: Progress,
) -> _Attempt:
    """Open the file for one input shape."""
    filled = build(shape, len(names))
    outputs, probabilities = _probe(next(iter(filled.values())).network, shape, path)
    if outputs != len(names):
        if given.class_names is not None:
            raise _names_misfit(outputs, names, path)
        names = _numbered(outputs) if raw is None or len(raw.class_names) != outputs else raw.class_names
    held, told = (None, ()) if raw is None else conform(
        raw, input_shape=shape, class_names=names, progress=progress
    )  # fmt: skip
    first = next(iter(filled.values()))
    fixed, source = _stated(given, facts, first)
    default = _default(facts, shape[0]) if fixed is None else None
    tried = [fixed] if fixed is not None else _all_conventions(shape[0], default)
    warnings = []
    inferred = _judge({spec: f.network for spec, f in filled.items()}, held, tried, default, run)
    if inferred is None:
        spec = next(iter(filled))
        scale = fixed or default or _ASSUMED
        if fixed is None:
            source = facts.source if default is not None else "assumed"
            warnings.append(
                f"The normalisation is not known; {scale.name} was assumed. Give clean images, or mean "
                "and std"
            )
    else:
        spec, scale = inferred.best.variant, inferred.best.convention
        if fixed is None:
            source = "inferred from clean accuracy" if inferred.by_labels else "guessed from predictions"
        warnings += _second_thoughts(filled[spec].network, inferred, held, tried, run)
    if probabilities:
        warnings.append(
            "The network returns probabilities instead of logits: leave its softmax out, or what is computed "
            "from its outputs is distorted"
        )
    chosen = filled[spec]
    model = Classifier(
        chosen.network,
        input_shape=shape,
        class_names=names,
        mean=scale.mean,
        std=scale.std,
        architecture=canonical(spec) if spec != _GRAPH else "",  # no text builds it again
        origin=f"loaded from {path.name}",
    ).eval()
    return _Attempt(model, chosen, held, shape, size_source, scale, source, inferred, told, tuple(warnings))


def _filled(
    specs: tuple[str, ...], state: Mapping[str, Tensor], shape: tuple[int, int, int], classes: int, path: Path
) -> dict[str, Filled]:
    """Return the variants that can be built for this shape."""
    if len(specs) > 1:
        # Once for all of them, so that they share their memory: several are of our own families, in float32.
        state = {
            name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()
        }
    out: dict[str, Filled] = {}
    failure: UnsupportedModel | None = None
    for spec in specs:
        try:
            out[spec] = fill(spec, state, input_shape=shape, classes=classes, where=path)
        except UnsupportedModel as error:
            failure = failure or error
    if not out:
        assert failure is not None
        raise failure
    return out


@torch.no_grad()
def _probe(network: nn.Module, shape: tuple[int, int, int], path: Path) -> tuple[int, bool]:
    """Return the number of outputs for an image, and whether they look like probabilities."""
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with mode(network, training=False):
            out = network(pixels)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise UnsupportedModel(
            "the network does not take images of this size",
            expected=f"(C, H, W) = {shape}",
            got=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}",
            where=path,
            remedy="Give the input size that the model was trained with",
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != 2 or not out.is_floating_point():
        raise UnsupportedModel(
            "the network returns no logits",
            expected="a tensor of shape (images, classes)",
            got=f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__,
            where=path,
            remedy="Wrap it in code of your own that returns the logits, named as FILE.py:CALLABLE",
        )
    sums = out.sum(1)
    likely = bool((out >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4))
    return int(out.shape[1]), likely and out.shape[1] > 1


@torch.no_grad()
def _require_separate(network: nn.Module, shape: Shape, path: Path) -> None:
    """Raise UnsupportedModel where the answer to an image depends on the others of its batch."""
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        both, alone = network(pixels), network(pixels[1:])
        same = both.shape[1:] == alone.shape[1:] and torch.allclose(both[1:], alone, rtol=1e-3, atol=1e-3)
        got = "answers that depend on the other images"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        words = (str(error).strip() or "no message").splitlines()[0][:200]
        same, got = False, f"{type(error).__name__}: {words}"
    if not same:
        raise UnsupportedModel(
            "the graph does not take one image as well as two",
            expected="a classifier of single images",
            got=got,
            where=path,
            remedy="Export it again with an axis of the batch that is open",
        )


# ---------------------------------------------------------------------------------------------------
# Facts and where they come from


def _stated(given: _Given, facts: Preprocessing, filled: Filled) -> tuple[Convention | None, str]:
    """Return the normalisation that somebody states of this very file, and who."""
    if given.convention is not None:
        return given.convention, "arguments"
    if facts.for_these_weights and facts.mean is not None and facts.std is not None:
        return Convention(f"as in {facts.source}", facts.mean, facts.std), facts.source
    found = filled.adapted
    if found.mean is not None and found.std is not None:
        channels = _channels(filled.network)
        mean, std = (v * channels if len(v) == 1 else v for v in (found.mean, found.std))
        return Convention("as stored in the file", mean, std), "a normalising layer in the file"
    return None, ""


def _channels(network: nn.Module) -> int:
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def _default(facts: Preprocessing, channels: int) -> Convention | None:
    if facts.mean is None or facts.std is None or len(facts.mean) not in (0, channels):
        return None
    return Convention(facts.source, facts.mean, facts.std)


def _all_conventions(channels: int, default: Convention | None) -> list[Convention]:
    if default is None:
        return list(usual(channels))
    same = (default.mean, default.std)
    return [default, *(c for c in usual(channels) if (c.mean, c.std) != same)]


Plan = Iterator[tuple[Shape, tuple[str, ...], str]]


def _plan(channels: int, given: _Given, facts: Preprocessing, variants: Variants, raw: Images | None) -> Plan:
    """Yield input shapes, the specs to try for each, and where the size comes from; the likeliest first."""
    own = raw.shape[1:] if raw is not None else None
    for side, specs in sorted(variants.by_side.items(), key=lambda item: own is None or item[0] != own[0]):
        for size, source in _sizes(given, facts, side, own):
            shape = (channels, *size)
            if size[0] * size[1] > _LARGE and len(specs) > 1:
                # Trying everything on large images takes long: the most usual first, the rest if it must be.
                yield shape, specs[:1], source
                yield shape, specs[1:], source
            else:
                yield shape, specs, source


def _sizes(
    given: _Given, facts: Preprocessing, side: int | None, own: tuple[int, int] | None
) -> list[tuple[tuple[int, int], str]]:
    if given.size is not None:
        return [(given.size, "arguments")]
    if side is not None:
        return [((side, side), "the shapes of the tensors")]
    stated = facts.size
    if stated is not None and (facts.size_fixed or own is None or own == stated):
        return [(stated, facts.source)]
    if stated is not None and own is not None:
        # The library's own weights want its size; others may have been trained on images such as these.
        both = [(own, "the images"), (stated, facts.source)]
        return both if min(own) < min(stated) else both[1:]
    return [(own, "the images")] if own is not None else [((_USUAL_SIDE, _USUAL_SIDE), _ASSUMED_SIZE)]


def _class_names(
    given: _Given, facts: Preprocessing, raw: Images | None, classes: int | None
) -> tuple[tuple[str, ...], str]:
    if given.class_names is not None:
        return tuple(given.class_names), "arguments"
    if facts.class_names is not None and classes in (None, len(facts.class_names)):
        return facts.class_names, facts.source
    if raw is not None and raw.class_names and classes in (None, len(raw.class_names)):
        return raw.class_names, "the images, in their order"
    return _numbered(classes or 1), "numbered"


def _numbered(classes: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(classes))


# ---------------------------------------------------------------------------------------------------
# Images


def load_images_of(
    images: Images | Path | str | None, size: tuple[int, int] | None, progress: Progress
) -> Images | None:
    """Return the images in their own size; in the model's, where theirs differ among themselves."""
    if images is None or isinstance(images, Images):
        return images
    try:
        return load_images(Path(images), progress=progress)
    except InputError as error:
        if size is None or error.problem != "the images differ in size":
            raise
        return load_images(Path(images), size=size, progress=progress)


def _fitting_images(
    images: Images | Path | str | None,
    shape: tuple[int, int, int],
    names: tuple[str, ...],
    progress: Progress,
) -> tuple[Images | None, tuple[str, ...]]:
    raw = load_images_of(images, shape[1:], progress)
    if raw is None:
        return None, ()
    return conform(raw, input_shape=shape, class_names=names, progress=progress)


def _judge(
    networks: Mapping[str, nn.Module],
    images: Images | None,
    conventions: Sequence[Convention],
    prefer: Convention | None,
    run: Run,
) -> Inferred | None:
    if images is None or not len(images):
        return None
    placed = {spec: network.to(run.device) for spec, network in networks.items()}
    try:
        return infer(placed, images, run, conventions=conventions, prefer=prefer)
    finally:
        for network in placed.values():
            network.cpu()


def _second_thoughts(
    network: nn.Module,
    inferred: Inferred,
    images: Images | None,
    tried: Sequence[Convention],
    run: Run,
) -> list[str]:
    """Return warnings about a choice that the images do not bear out, or cannot make."""
    out = []
    others = {trial.variant for trial in inferred.alternatives} - {inferred.best.variant}
    if others:
        out.append(
            "These images cannot tell the architecture from "
            + ", ".join(sorted(others)[:5])
            + f"; the one with the lowest loss was taken: {inferred.best.variant}"
        )
    if inferred.warning and len(tried) == 1 and inferred.by_labels and images is not None:
        every = _judge({"": network}, images, _all_conventions(images.shape[0], None), None, run)
        if every is not None and every.interval.low > inferred.interval.high:
            best = every.best.convention
            out.append(
                f"With another normalisation ({best.name}: mean {_listed(best.mean)}, std "
                f"{_listed(best.std)}) the clean accuracy would be {every.best.accuracy:.1%} instead of "
                f"{inferred.best.accuracy:.1%}"
            )
    return out


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)  # as --mean and --std take them
