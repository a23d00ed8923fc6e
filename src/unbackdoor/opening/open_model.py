"""Open a file of weights of unknown origin as a classifier, with a record of everything that was assumed.

Nothing in the file is executed. What the file does not state is taken, in this order, from the arguments, a
card beside it, from the configuration of the architecture's source, and last from clean images: the
normalisation with which the model classifies them best (``normalisation_guess`` states the whole rule). The
provenance names the source of each fact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from unbackdoor.confinement import rehearsed
from unbackdoor.data.conform import conform
from unbackdoor.data.loaders import ImageFiles
from unbackdoor.engine.inference import mode
from unbackdoor.engine.run import Run
from unbackdoor.errors import ConfigError, InputError, UnbackdoorError, UnsupportedModel
from unbackdoor.networks.build import canonical, preprocessing_of
from unbackdoor.networks.sources import Preprocessing
from unbackdoor.networks.spec import OWN, PYTHON, read_spec
from unbackdoor.opening.binary import two_outputs
from unbackdoor.opening.candidates import CandidateSet, find_candidates, library_size, refuse_to_guess
from unbackdoor.opening.classifier_files import load_model
from unbackdoor.opening.cost_limits import outputs_of
from unbackdoor.opening.import_program import PROGRAMS, import_program
from unbackdoor.opening.load_tensors import Filled, fill, require_finite
from unbackdoor.opening.model_config import config_of
from unbackdoor.opening.normalisation_guess import (
    InferredNormalisation,
    Normalisation,
    infer_normalisation,
    usual_normalisations,
)
from unbackdoor.opening.provenance import (
    ArchitectureOrigin,
    InFile,
    NameChanges,
    NormalisationOrigin,
    Provenance,
)
from unbackdoor.opening.recognise_architecture import ends
from unbackdoor.opening.rename_tensors import Adapted, Difference
from unbackdoor.types import Classifier, Images, Progress, logits_in, silent
from unbackdoor.weights.card import ModelCard, normalisation
from unbackdoor.weights.formats.buffers import listed
from unbackdoor.weights.formats.onnx.canonical import AmbiguousOutput
from unbackdoor.weights.formats.onnx.graph import import_graph
from unbackdoor.weights.formats.onnx.node import Place
from unbackdoor.weights.source import Source, existing_file, open_source

# What is assumed where neither the file nor any image shows it.
_USUAL_SIDE = 32
_ASSUMED_SIZE = "assumed"
_LARGE = 96 * 96  # pixels of an image
_ASSUMED = Normalisation("none, pixels in [0, 1]")
_GRAPH = "the file's own graph"


Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Opened:
    """A classifier from a file, and how it was opened.

    Attributes:
        model: The classifier, in evaluation mode on the CPU.
        images: The clean images in the model's form, or None where none were given.
        provenance: What was assumed and why; its ``warnings`` are to be shown loudly.
        names: The file's name of every tensor by the network's name, so that a repaired model can be written
            under the names its owner knows.
        places: Of a network that is the file's own graph: where each of its tensors stands there; else None.
        source: The file as it was opened.
        output: The output of that graph that gives the logits, where it was named.
    """

    model: Classifier
    images: Images | None
    provenance: Provenance
    names: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Place] | None = None
    source: Source | None = None
    output: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should not be overlooked."""
        return self.provenance.warnings


def open_model(
    path: Path | str | Source,
    *,
    arch: str | None = None,
    images: Images | ImageFiles | Path | str | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    weights: str | None = None,
    output: str | None = None,
    run: Run | None = None,
    progress: Progress = silent,
) -> Opened:
    """Open a model for an audit.

    Args:
        path: File of weights, with or without a card of this package beside it; a model folder, whose
            ``config.json`` says what they are of; or what was opened already with
            :func:`unbackdoor.weights.source.open_source`.
        arch: Architecture, such as ``resnet18``, ``timm:NAME``, ``torchvision:NAME``, ``hf:FOLDER`` or
            ``FILE.py:CALLABLE``, which runs that code; None takes the graph of an ONNX file, and guesses it
            from the tensors of others. Options of our own families that are not typed are read off the
            tensors.
        images: Clean images, at best labelled, or where to load them from. Without any, an architecture or a
            normalisation that the file does not show is assumed, with a warning.
        class_names: K names, in logit order.
        mean: Per-channel mean; empty for no normalisation; None if unknown: then of the usual ones that
            are not clearly less accurate than the best on the images (sign test, 5 %), the library's own is
            taken, else the one with the lowest loss.
        std: Per-channel deviation, likewise.
        size: (H, W) of the model's input.
        weights: Which of several sets of weights in a file, by the keys that lead to it, separated by dots,
            such as ``state_dict_ema``; None where there is one, or all are the same.
        output: Which of several outputs of an ONNX graph gives the logits; None where there is one.
        run: Device, precision and seed of the trials; None is the CPU and seed 0.
        progress: Shows how far loading has come.

    Returns:
        The classifier, the images in its form, and its provenance.

    Raises:
        InputError: If a file cannot be used, or several networks fit and nothing decides.
        UnsafeFile: If a file would run code, or a card names what only the user may name.
        UnsupportedModel: If no registered architecture fits, or the named one does not; lists what differs.
            If a graph has operators that are not imported; names them.
        ConfigError: If an argument does not fit.
        MissingExtra: If the architecture or the format needs a library that is not installed.
    """
    run = run or Run.create(progress=progress)
    _require_arguments(mean, std, size)
    arguments = _Arguments(arch, class_names, mean, std, size, weights, output)
    file = path.path if isinstance(path, Source) else existing_file(Path(path))
    if isinstance(path, Source) and path.contents.chosen and weights is None:
        arguments = replace(arguments, weights=path.contents.key)
    # Where the user chooses what is built, only reading is rehearsed, because code of the user runs once.
    own = arch is None or read_spec(arch).source == OWN
    name = "unbackdoor.opening.open_model:rehearse"
    with rehearsed(name, file, arguments.to_dict()) if own else nullcontext():
        source = path if isinstance(path, Source) else open_source(file)
        return _open_model(source, arguments, images, run, progress)


def rehearse(path: Path, options: Mapping[str, Any]) -> UnbackdoorError | None:
    """Open a model in a process of its own, without images, and return the fault of its content."""
    source = open_source(path)
    _open_model(source, _Arguments(**options), None, Run.create(), silent)
    return source.contents.problem


def _open_model(
    source: Source,
    arguments: _Arguments,
    images: Images | ImageFiles | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    if arguments.weights is not None and not source.contents.chosen:
        source = source.choose(arguments.weights)
    if arguments.output is not None and (source.graph is None or arguments.arch is not None):
        raise ConfigError(
            "the output of the model", ["only an ONNX file that is opened as it is has outputs with names"]
        )
    card = source.card()
    if card is not None:
        return _with_card(source, card, arguments, images, run, progress)
    return _without_card(source, arguments, images, run, progress)


@dataclass(frozen=True)
class _Arguments:
    arch: str | None
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    size: tuple[int, int] | None
    weights: str | None
    output: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON, also where they are numbers of numpy."""
        return {
            **asdict(self),
            "class_names": None if self.class_names is None else [str(name) for name in self.class_names],
            "mean": None if self.mean is None else [float(value) for value in self.mean],
            "std": None if self.std is None else [float(value) for value in self.std],
            "size": None if self.size is None else [int(side) for side in self.size],
        }

    @property
    def normalisation(self) -> Normalisation | None:
        if self.mean is None or self.std is None:
            return None
        return Normalisation("as given", tuple(self.mean), tuple(self.std))


def _require_arguments(
    mean: Sequence[float] | None, std: Sequence[float] | None, size: tuple[int, int] | None
) -> None:
    faults = []
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        faults.append("mean and std belong together, one value for each channel")
    if not all(math.isfinite(value) for value in (*(mean or ()), *(std or ()))):
        faults.append("mean and std must be finite numbers")
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
    arguments: _Arguments,
    images: Images | ImageFiles | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    path = source.path
    if arguments.class_names is not None and len(arguments.class_names) != len(card.class_names):
        raise _names_misfit(len(card.class_names), arguments.class_names, path)
    shape = (card.input_shape[0], *arguments.size) if arguments.size is not None else None
    model = load_model(
        source,
        architecture=arguments.arch,
        input_shape=shape,
        class_names=arguments.class_names,
        mean=arguments.mean,
        std=arguments.std,
    )
    if arguments.size is None and read_spec(model.architecture).source == OWN:
        outputs_of(model.network, model.input_shape, path)  # what a size that only the card states would cost
    conformed, image_changes = _fitting_images(images, model.input_shape, model.class_names, progress)
    mean, std = normalisation(model)
    scale = replace(arguments.normalisation or Normalisation("the card's", mean, std), bgr=model.bgr)
    networks = {model.architecture: model.network}
    inferred = _infer_on_device(networks, conformed, [scale], None, run, channels_known=True)
    provenance = Provenance(
        path.name,
        True,
        ArchitectureOrigin(model.architecture, "named by the user" if arguments.arch else "the card"),
        NameChanges(),
        NormalisationOrigin.of(scale, "arguments" if arguments.normalisation else "the card"),
        model.input_shape,
        "arguments" if arguments.size else "the card",
        model.classes,
        "arguments" if arguments.class_names else "the card",
        in_file=InFile.of(source.contents),
    )
    return Opened(model, conformed, provenance.measured(image_changes, inferred, []), source=source)


# ---------------------------------------------------------------------------------------------------
# Without one


def _without_card(
    source: Source,
    arguments: _Arguments,
    images: Images | ImageFiles | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    has_program = source.graph is not None or source.contents.format in PROGRAMS
    if has_program and not source.contents.dangerous and arguments.arch is None:
        try:
            network = own_network(source, arguments.output)
        except AmbiguousOutput:
            raise
        except UnsupportedModel as unknown:  # an operator that is not imported
            if source.contents.problem is not None:
                raise
            try:
                return _by_names(source, arguments, images, run, progress)
            except UnsupportedModel:
                raise unknown from None  # the fault of the graph, not of the guess
        if source.graph is not None:
            return _own_graph(source, network, arguments, images, run, progress)
        try:
            return _own_graph(source, network, arguments, images, run, progress)
        except UnsupportedModel as unfit:  # most often the batch of the example, written into the program
            try:
                return _by_names(source, arguments, images, run, progress)
            except UnsupportedModel:
                raise unfit from None
    return _by_names(source, arguments, images, run, progress)


def own_network(source: Source, output: str | None = None) -> fx.GraphModule:
    """Return the network that a file's own program describes.

    Args:
        source: The file.
        output: The output of an ONNX graph that gives the logits; None where there is one.

    Raises:
        UnsupportedModel: If the file has none that is imported, or it has operators that are not.
        UnbackdoorError: If it is damaged, or built to exhaust the memory.
    """
    if source.graph is not None:
        return import_graph(source.graph, output)
    if source.contents.format not in PROGRAMS:
        raise UnsupportedModel("the file holds no program that is imported", where=source.path)
    return import_program(source.main, source.state(), source.contents.prefix)


def _own_graph(
    source: Source,
    network: fx.GraphModule,
    arguments: _Arguments,
    images: Images | ImageFiles | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    """Open a file as the network that its own program describes."""
    path = source.path
    require_finite(network.state_dict(), path)
    stated = network.meta["input_shape"]
    raw = load_images_of(images, arguments.size or (stated[1:] if stated else None), progress)
    channels = network.meta["channels"] or (raw.shape[0] if raw is not None else _channels(network))
    from_graph = Preprocessing(size=stated[1:], size_fixed=True, source=_GRAPH) if stated else Preprocessing()
    own_size = raw.shape[1:] if raw is not None else None
    size, size_source = _sizes(arguments, from_graph, None, own_size)[0]
    shape = (channels, *size)
    classes = outputs_of(network, shape, path)
    _require_independent_images(network, shape, path)
    names, names_source = _class_names(arguments, Preprocessing(), raw, classes)
    names_in_file = network.meta.get("names", {})
    renamed = {name: old for name, old in names_in_file.items() if name != old}
    filled = Filled(network, Adapted({}, Difference((), (), (), 0), renamed))
    attempt = _open_at_shape(
        path,
        lambda *_: {_GRAPH: filled},
        arguments,
        Preprocessing(),
        raw,
        shape,
        size_source,
        names,
        run,
        progress,
    )
    warnings = [_assumed_size(shape)] if size_source == _ASSUMED_SIZE else []
    kind = "ONNX" if source.graph is not None else source.contents.format
    architecture = ArchitectureOrigin(kind, _GRAPH, "; ".join(network.meta["notes"]))
    in_file = InFile.of(
        source.contents, examined=True, output=arguments.output, remarks=network.meta["remarks"]
    )
    opened = _with_provenance(source, attempt, architecture, names_source, warnings, in_file)
    return replace(opened, places=network.meta.get("places"), output=arguments.output)


def _by_names(
    source: Source,
    arguments: _Arguments,
    images: Images | ImageFiles | Path | str | None,
    run: Run,
    progress: Progress,
) -> Opened:
    """Open a file as a network that has its tensors: the named one, or a registered one."""
    path, state = source.path, source.state()
    binary: tuple[str, ...] = ()
    if (
        arguments.arch is None or read_spec(arguments.arch).source != PYTHON
    ):  # the user's code says what it returns
        state, binary = two_outputs(state)
    # What lies beside the weights says what they are; what the user names comes before it.
    config = config_of(path) if arguments.arch is None else None
    if config is not None:
        arguments = replace(arguments, arch=config.spec)
    preprocessing = preprocessing_of(arguments.arch) if arguments.arch is not None else Preprocessing()
    if config is not None and config.preprocessing is not None:
        preprocessing = config.preprocessing
    stated = preprocessing.size if arguments.arch is not None else library_size(state)
    raw = load_images_of(images, arguments.size or stated, progress)
    channels, classes = ends(state)
    channels = channels or (raw.shape[0] if raw is not None else 3)
    classes = preprocessing.classes or classes
    warnings = [preprocessing.note] if preprocessing.note else []
    warnings += [f"The folder also holds {name}, of which nothing is said here" for name in source.rivals]
    side = arguments.size[0] if arguments.size else (raw.shape[1] if raw is not None else None)
    candidates = find_candidates(
        state, arguments.arch, side=side, exact=arguments.size is not None, where=path
    )
    if raw is None or raw.labels is None:
        candidates = candidates.only(side)
        if len(candidates.specs) > 1 and candidates.decisive:
            raise refuse_to_guess(candidates, path)
        if len(candidates.specs) > 1:
            candidates = candidates.first()
            warnings.append(f"{candidates.note}; the most usual was assumed: {candidates.specs[0]}")
    if arguments.arch is None:
        preprocessing = preprocessing_of(candidates.specs[0])
    names, names_source = _class_names(arguments, preprocessing, raw, classes)
    attempts: list[_Attempt] = []
    failures: list[UnsupportedModel] = []
    for shape, specs, size_source in _shapes_to_try(channels, arguments, preprocessing, candidates, raw):
        if attempts and attempts[-1].convincing:
            break

        def build(shape: Shape, classes: int, specs: tuple[str, ...] = specs) -> dict[str, Filled]:
            return _fill_all(specs, state, shape, classes, path)

        try:
            attempts.append(
                _open_at_shape(
                    path, build, arguments, preprocessing, raw, shape, size_source, names, run, progress
                )
            )
        except UnsupportedModel as error:
            # Another size may fit; if none does, the first error is raised.
            failures.append(error)
    if not attempts and arguments.class_names is not None and classes not in (None, len(names)):
        # No network with as many outputs as names fits, so the names are wrong.
        raise _names_misfit(classes, names, path) from failures[0]
    if not attempts:
        raise failures[0]
    attempt = max(attempts, key=lambda a: a.inferred.interval.low if a.inferred is not None else 0.0)
    if arguments.size is None and raw is None and attempt.size_source == _ASSUMED_SIZE:
        warnings.append(_assumed_size(attempt.shape))
    architecture = ArchitectureOrigin(
        attempt.model.architecture,
        candidates.source if config is None else "config.json of the model folder",
        candidates.note,
        tuple(candidate.spec for candidate in candidates.fitting),
    )
    if binary:
        attempt.filled.adapted.remarks.append(
            "the one output y for two classes became the logits [0, y], and is written back as one: "
            + listed(list(binary))
        )
    in_file = InFile.of(source.contents)
    return _with_provenance(source, attempt, architecture, names_source, warnings, in_file)


def _assumed_size(shape: Shape) -> str:
    return f"The input size is not known; {shape[1]} x {shape[2]} was assumed. Give the size"


def _with_provenance(
    source: Source,
    attempt: _Attempt,
    architecture: ArchitectureOrigin,
    names_source: str,
    warnings: list[str],
    in_file: InFile,
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
        in_file=in_file,
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
    scale: Normalisation
    scale_source: str
    inferred: InferredNormalisation | None
    changes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def convincing(self) -> bool:
        """Whether there is no reason to try anything else."""
        return self.inferred is None or (self.inferred.by_labels and not self.inferred.warning)


def _open_at_shape(
    path: Path,
    build: Callable[[Shape, int], dict[str, Filled]],
    arguments: _Arguments,
    preprocessing: Preprocessing,
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
        if arguments.class_names is not None:
            raise _names_misfit(outputs, names, path)
        names = (
            _numbered_names(outputs) if raw is None or len(raw.class_names) != outputs else raw.class_names
        )
    conformed, image_changes = (None, ()) if raw is None else conform(
        raw, input_shape=shape, class_names=names, progress=progress
    )  # fmt: skip
    first_filled = next(iter(filled.values()))
    fixed, source = _stated_normalisation(arguments, preprocessing, first_filled)
    default = _library_normalisation(preprocessing, shape[0]) if fixed is None else None
    normalisations = [fixed] if fixed is not None else _all_normalisations(shape[0], default)
    warnings = []
    inferred = _infer_on_device(
        {spec: f.network for spec, f in filled.items()}, conformed, normalisations, default, run
    )
    if inferred is None:
        spec = next(iter(filled))
        scale = fixed or default or _ASSUMED
        if fixed is None:
            source = preprocessing.source if default is not None else "assumed"
            warnings.append(
                f"The normalisation is not known; {scale.name} was assumed. Give clean images, or mean "
                "and std"
            )
    else:
        spec, scale = inferred.best.variant, inferred.best.normalisation
        if fixed is None:
            source = "inferred from clean accuracy" if inferred.by_labels else "guessed from predictions"
        warnings += _choice_warnings(filled[spec].network, inferred, conformed, normalisations, run)
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
        bgr=scale.bgr,
        architecture=canonical(spec) if spec != _GRAPH else "",  # no text builds it again
        origin=f"loaded from {path.name}",
    ).eval()
    return _Attempt(
        model, chosen, conformed, shape, size_source, scale, source, inferred, image_changes, tuple(warnings)
    )


def _fill_all(
    specs: tuple[str, ...], state: Mapping[str, Tensor], shape: tuple[int, int, int], classes: int, path: Path
) -> dict[str, Filled]:
    """Return the networks of all specs that can be built for this shape."""
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
    """Return the number of outputs for an image, and whether they are probabilities."""
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        with mode(network, training=False):
            out = logits_in(network(pixels))
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
def _require_independent_images(network: nn.Module, shape: Shape, path: Path) -> None:
    """Raise UnsupportedModel where the answer to an image depends on the others of its batch."""
    pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        both, alone = logits_in(network(pixels)), logits_in(network(pixels[1:]))
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


def _stated_normalisation(
    arguments: _Arguments, preprocessing: Preprocessing, filled: Filled
) -> tuple[Normalisation | None, str]:
    """Return the normalisation that is stated for this file, and who states it."""
    if arguments.normalisation is not None:
        return arguments.normalisation, "arguments"
    if preprocessing.for_these_weights and preprocessing.mean is not None and preprocessing.std is not None:
        return Normalisation(
            f"as in {preprocessing.source}", preprocessing.mean, preprocessing.std
        ), preprocessing.source
    adapted = filled.adapted
    if adapted.mean is not None and adapted.std is not None:
        channels = _channels(filled.network)
        mean, std = (v * channels if len(v) == 1 else v for v in (adapted.mean, adapted.std))
        return Normalisation("as stored in the file", mean, std), "a normalising layer in the file"
    return None, ""


def _channels(network: nn.Module) -> int:
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    return first.in_channels if first is not None else 3


def _library_normalisation(preprocessing: Preprocessing, channels: int) -> Normalisation | None:
    if (
        preprocessing.mean is None
        or preprocessing.std is None
        or len(preprocessing.mean) not in (0, channels)
    ):
        return None
    return Normalisation(preprocessing.source, preprocessing.mean, preprocessing.std)


def _all_normalisations(channels: int, default: Normalisation | None) -> list[Normalisation]:
    if default is None:
        return list(usual_normalisations(channels))
    same = (default.mean, default.std)
    return [default, *(c for c in usual_normalisations(channels) if (c.mean, c.std) != same)]


ShapesToTry = Iterator[tuple[Shape, tuple[str, ...], str]]


def _shapes_to_try(
    channels: int,
    arguments: _Arguments,
    preprocessing: Preprocessing,
    candidates: CandidateSet,
    raw: Images | None,
) -> ShapesToTry:
    """Yield input shapes, the specs to try for each, and where the size comes from; the likeliest first."""
    own = raw.shape[1:] if raw is not None else None
    for side, specs in sorted(candidates.by_side.items(), key=lambda item: own is None or item[0] != own[0]):
        for size, source in _sizes(arguments, preprocessing, side, own):
            shape = (channels, *size)
            if size[0] * size[1] > _LARGE and len(specs) > 1:
                # Large images are slow: the most usual spec first, the others only if it is not convincing.
                yield shape, specs[:1], source
                yield shape, specs[1:], source
            else:
                yield shape, specs, source


def _sizes(
    arguments: _Arguments, preprocessing: Preprocessing, side: int | None, own: tuple[int, int] | None
) -> list[tuple[tuple[int, int], str]]:
    if arguments.size is not None:
        return [(arguments.size, "arguments")]
    if side is not None:
        return [((side, side), "the shapes of the tensors")]
    stated = preprocessing.size
    if stated is not None and (preprocessing.size_fixed or own is None or own == stated):
        return [(stated, preprocessing.source)]
    if stated is not None and own is not None:
        # The library's own weights need its size; others may have been trained on images of this size.
        both = [(own, "the images"), (stated, preprocessing.source)]
        return both if min(own) < min(stated) else both[1:]
    return [(own, "the images")] if own is not None else [((_USUAL_SIDE, _USUAL_SIDE), _ASSUMED_SIZE)]


def _class_names(
    arguments: _Arguments, preprocessing: Preprocessing, raw: Images | None, classes: int | None
) -> tuple[tuple[str, ...], str]:
    if arguments.class_names is not None:
        return tuple(arguments.class_names), "arguments"
    if preprocessing.class_names is not None and classes in (None, len(preprocessing.class_names)):
        return preprocessing.class_names, preprocessing.source
    if raw is not None and raw.class_names and classes in (None, len(raw.class_names)):
        return raw.class_names, "the images, in their order"
    return _numbered_names(classes or 1), "numbered"


def _numbered_names(classes: int) -> tuple[str, ...]:
    return tuple(str(k) for k in range(classes))


# ---------------------------------------------------------------------------------------------------
# Images


def load_images_of(
    images: Images | ImageFiles | Path | str | None, size: tuple[int, int] | None, progress: Progress
) -> Images | None:
    """Return the images in their own size; in the model's, where theirs differ among themselves."""
    if images is None or isinstance(images, Images):
        return images
    files = images if isinstance(images, ImageFiles) else ImageFiles(Path(images))
    try:
        return files.load(progress=progress)
    except InputError as error:
        if size is None or error.problem != "the images differ in size":
            raise
        return files.load(size=size, progress=progress)


def _fitting_images(
    images: Images | ImageFiles | Path | str | None,
    shape: tuple[int, int, int],
    names: tuple[str, ...],
    progress: Progress,
) -> tuple[Images | None, tuple[str, ...]]:
    raw = load_images_of(images, shape[1:], progress)
    if raw is None:
        return None, ()
    return conform(raw, input_shape=shape, class_names=names, progress=progress)


def _infer_on_device(
    networks: Mapping[str, nn.Module],
    images: Images | None,
    normalisations: Sequence[Normalisation],
    prefer: Normalisation | None,
    run: Run,
    *,
    channels_known: bool = False,
) -> InferredNormalisation | None:
    if images is None or not len(images):
        return None
    placed = {spec: network.to(run.device) for spec, network in networks.items()}
    try:
        return infer_normalisation(
            placed,
            images,
            run,
            normalisations=normalisations,
            prefer=prefer,
            channels_known=channels_known,
        )
    finally:
        for network in placed.values():
            network.cpu()


def _choice_warnings(
    network: nn.Module,
    inferred: InferredNormalisation,
    images: Images | None,
    normalisations: Sequence[Normalisation],
    run: Run,
) -> list[str]:
    """Return warnings about a choice that the images contradict or leave open."""
    out = []
    others = {trial.variant for trial in inferred.alternatives} - {inferred.best.variant}
    if others:
        out.append(
            "These images cannot tell the architecture from "
            + ", ".join(sorted(others)[:5])
            + f"; the one with the lowest loss was taken: {inferred.best.variant}"
        )
    if inferred.warning and len(normalisations) == 1 and inferred.by_labels and images is not None:
        every = _infer_on_device({"": network}, images, _all_normalisations(images.shape[0], None), None, run)
        if every is not None and every.interval.low > inferred.interval.high:
            best = every.best.normalisation
            out.append(
                f"With another normalisation ({best.name}: mean {_listed(best.mean)}, std "
                f"{_listed(best.std)}) the clean accuracy would be {every.best.accuracy:.1%} instead of "
                f"{inferred.best.accuracy:.1%}"
            )
    return out


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)  # as --mean and --std take them
