"""``inspect``: what a file of weights is, what loading it elsewhere would execute, and what lies in it.

Nothing is executed. Faults of the content are reported and not raised, because a damaged or dangerous file is
exactly what this is for. Only a file that cannot be opened is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unbackdoor.confinement import rehearsed
from unbackdoor.errors import InputError, MissingExtra, UnbackdoorError, UnsafeFile, UnsupportedModel
from unbackdoor.opening.open_model import own_network
from unbackdoor.opening.recognise_architecture import nearest
from unbackdoor.result_views import Viewed
from unbackdoor.types import Progress, silent
from unbackdoor.weights.formats.onnx.graph import describe_graph, import_graph
from unbackdoor.weights.formats.state_dicts import Fact
from unbackdoor.weights.read import Contents
from unbackdoor.weights.source import Source, existing_file, open_source
from unbackdoor.weights.stored_file import StoredFile

Loading = Literal[
    "no code", "known classes", "unknown code", "a program", "dangerous", "deceptive", "undecided"
]

IN_WORDS: Mapping[Loading, str] = {
    "no code": "Loading it executes no code: it holds plain tensors.",
    "known classes": "Loading it as a pickle imports classes of well-known libraries, all of them harmless.",
    "unknown code": "Loading it as a pickle imports and runs code that is not in the file.",
    "a program": "It is a program: its own loader builds it, and calling it runs what its author wrote.",
    "dangerous": "Loading it with torch.load or pickle would execute code.",
    "deceptive": "It is built to show its readers different things, or to exhaust them: do not load it.",
    "undecided": "It cannot be told what loading it would execute, because it cannot be read to its end.",
}
_MEANS = ("mean", "new_mean", "means", "pixel_mean")
_DEVIATIONS = ("std", "new_std", "stds", "pixel_std")
_NO_PICKLES = ("safetensors", "onnx")
_PROGRAMS = ("torchscript", "torch.export")


@dataclass(frozen=True)
class TensorFact:
    """One tensor.

    Attributes:
        name: As in the state dict.
        shape: Its sizes.
        dtype: Its type in the file, such as ``float32``, or ``qint8``, which is read as float32.
        not_finite: How many of its values are NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    not_finite: int


@dataclass(frozen=True)
class CandidateFact:
    """An architecture that fits the names and shapes.

    Attributes:
        spec: Text that builds it.
        fits: Whether every tensor fits.
        classes: Number of classes, where the weights show it.
        note: What differs, or what was matched.
    """

    spec: str
    fits: bool
    classes: int | None
    note: str


@dataclass(frozen=True)
class StatedNormalisation:
    """What is subtracted from pixels in [0, 1], and what they are divided by, one number for each channel.

    Attributes:
        mean: Means.
        std: Deviations.
        source: What says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class GraphFact:
    """The graph of an ONNX file.

    Attributes:
        operators: Number of operators.
        unknown: Kinds of operators that are not imported.
        input_shape: (C, H, W) as the file states it, or None.
        problem: Why no network can be made of it, or None where one can.
        outputs: Names of its outputs.
        remarks: Paths from the pixels that bypass the network's body, and comparisons of and branches on what
            depends on the pixels: what a backdoor in the graph itself would need.
    """

    operators: int
    unknown: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    problem: str | None
    outputs: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetFact:
    """One set of weights of a file.

    Attributes:
        key: Keys that lead to it, separated by dots; empty at the top.
        tensors: Number of its tensors.
        parameters: Numbers in all of them.
        state: Whether it is the one that is ``shown``, ``the same``, or ``different``.
        module: Class of the whole module that it was taken from; empty for a plain state dict.
        problem: Why it cannot be read, or None.
    """

    key: str
    tensors: int
    parameters: int
    state: str
    module: str
    problem: str | None


@dataclass(frozen=True, repr=False)
class Inspection(Viewed):
    """What a file of weights is.

    Attributes:
        path: The file.
        size: Its bytes.
        sha256: Hash of its content.
        format: What it is, judged by its bytes.
        loading: What a loader of this format would execute.
        dangerous: Names in it that no file of weights has a reason to hold.
        foreign: All names beyond plain tensors that a loader of pickles would import.
        tensors: Its tensors, in their order.
        parameters: Numbers in all its tensors.
        candidates: Architectures that may be meant, the likeliest first.
        channels: Colour channels that the first layer takes, or None.
        normalisation: The normalisation that the file or its card states, or None.
        beside: Plain values that stood beside the weights.
        prefix: What stood before every name and was taken off.
        notes: Remarks in words.
        problem: Why its tensors cannot be read, or None.
        graph: The graph of an ONNX file, of which a network is made as it is; None for other formats.
        sets: Every set of weights in the file, such as a running average beside the weights.
        other_tensors: Keys of further entries that hold tensors, such as the state of an optimizer.
        program: The program that the file holds around its tensors, in words; empty for tensors alone.
        program_examined: Whether a scan examines that program: it opens as it is.
        quantised: Names of the tensors that are whole numbers with a scale; they are read as float32.
    """

    path: str
    size: int
    sha256: str
    format: str
    loading: Loading
    dangerous: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    tensors: tuple[TensorFact, ...] = ()
    parameters: int = 0
    candidates: tuple[CandidateFact, ...] = ()
    channels: int | None = None
    normalisation: StatedNormalisation | None = None
    beside: Mapping[str, Fact] = field(default_factory=dict)
    prefix: str = ""
    notes: tuple[str, ...] = ()
    problem: str | None = None
    graph: GraphFact | None = None
    sets: tuple[SetFact, ...] = ()
    other_tensors: tuple[str, ...] = ()
    program: str = ""
    program_examined: bool = False
    quantised: tuple[str, ...] = ()

    @property
    def executes(self) -> bool:
        """True where loading it elsewhere would, or may well, execute what its author wants."""
        return self.loading in ("dangerous", "deceptive")

    @property
    def not_finite(self) -> int:
        """Number of values that are NaN or infinite."""
        return sum(tensor.not_finite for tensor in self.tensors)

    def headline(self) -> str:
        """Return what the file is in one line."""
        kind = f"quantised {self.format}" if self.quantised else self.format
        words = f"{self.path}: {kind}, {self.parameters:,} numbers. {IN_WORDS[self.loading]}"
        return words if self.problem is None else f"{words} Not readable: {self.problem}"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each tensor."""
        return [
            {"name": t.name, "shape": tuple(t.shape), "dtype": t.dtype, "not_finite": t.not_finite}
            for t in self.tensors
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        out = asdict(self)
        out["beside"] = dict(self.beside)
        return {**out, "executes": self.executes, "not_finite": self.not_finite}


def inspect(model: Path | str | Source, progress: Progress = silent) -> Inspection:
    """Describe a file of weights; nothing in it is executed.

    Args:
        model: The file, or what was opened already.
        progress: Shows how far the reading has come.

    Returns:
        Format, hash, what loading would execute, tensors, likely architectures and normalisation. A fault
        of the content is reported there and not raised.

    Raises:
        InputError: If the file cannot be opened.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> save_file({"fc.weight": torch.zeros(10, 4)}, file)
        >>> inspect(file).loading
        'no code'
    """
    path = model.path if isinstance(model, Source) else existing_file(Path(model))
    with rehearsed("unbackdoor.opening.inspection:rehearse", path):
        return _inspect(model if isinstance(model, Source) else path, progress)


def rehearse(path: Path, options: Mapping[str, Any]) -> UnbackdoorError | None:
    """Inspect a file in a process of its own, and return the fault of its content."""
    source = open_source(path)
    _inspect(source, silent)
    return source.contents.problem


def _inspect(model: Path | Source, progress: Progress) -> Inspection:
    steps = iter(progress(range(2), "Inspecting", 2))
    next(steps, None)
    source = model if isinstance(model, Source) else open_source(model)
    contents = source.contents
    next(steps, None)
    tensors = tuple(_facts(contents.tensors, contents.quantised))
    graph, lies = (None, False) if source.graph is None else _graph(source.graph)
    if contents.format in _PROGRAMS and contents.problem is None and not contents.dangerous:
        graph, lies = _program(source)
    result = Inspection(
        path=str(source.path),
        size=source.size,
        sha256=source.sha256,
        format=contents.format,
        loading="deceptive" if lies and not contents.dangerous else _loading(contents),
        dangerous=contents.dangerous,
        foreign=contents.foreign,
        tensors=tensors,
        parameters=sum(tensor.numel() for tensor in contents.tensors.values()),
        candidates=_candidates(contents.tensors),
        channels=_channels(contents.tensors),
        normalisation=_normalisation(source),
        beside=contents.beside,
        prefix=contents.prefix,
        notes=contents.notes,
        problem=str(contents.problem) if contents.problem is not None else None,
        graph=graph,
        sets=tuple(_sets(contents)),
        other_tensors=contents.others,
        program=contents.program,
        program_examined=graph is not None and graph.problem is None,
        quantised=tuple(contents.quantised),
    )
    for _ in steps:
        pass
    return result


def _loading(contents: Contents) -> Loading:
    if contents.dangerous:
        return "dangerous"
    if isinstance(contents.problem, UnsafeFile):
        return "deceptive"
    if contents.format in _NO_PICKLES:
        return "no code"
    if contents.format in _PROGRAMS:
        return "a program"
    dangers = set(contents.names.values())
    if "unknown" in dangers:
        return "unknown code"
    # What is read to its end, and is only no network of a kind that is known, leaves nothing undecided.
    if contents.problem is not None and not isinstance(contents.problem, UnsupportedModel):
        return "undecided"
    return "known classes" if dangers else "no code"


def _graph(file: StoredFile) -> tuple[GraphFact | None, bool]:
    """Return what a graph is, and whether it is built to show its readers different things."""
    problem, lies = None, False
    try:
        description = describe_graph(file)
    except MissingExtra:
        return None, False  # the tensors cannot be read either, and that is reported
    except UnbackdoorError as error:
        return GraphFact(0, (), None, str(error)), isinstance(error, UnsafeFile)
    try:
        import_graph(file)
    except UnbackdoorError as error:
        problem, lies = str(error), isinstance(error, UnsafeFile)
    fact = GraphFact(
        description.operators,
        description.unknown,
        description.input_shape,
        problem,
        description.outputs,
        description.remarks,
    )
    return fact, lies


def _program(source: Source) -> tuple[GraphFact, bool]:
    """Return what a program of torch.export or TorchScript is, and whether it is built to mislead."""
    try:
        network = own_network(source)
    except UnbackdoorError as error:
        return GraphFact(0, (), None, str(error)), isinstance(error, UnsafeFile)
    shape, remarks = network.meta["input_shape"], network.meta["remarks"]
    return GraphFact(len(network.graph.nodes), (), shape, None, (), remarks), False


def _sets(contents: Contents) -> Iterable[SetFact]:
    states = contents.other_sets
    for key, one in contents.sets.items():
        yield SetFact(
            key,
            len(one.tensors),
            sum(tensor.numel() for tensor in one.tensors.values()),
            states.get(key, "shown"),
            one.module,
            None if one.problem is None else str(one.problem),
        )


def _facts(state: Mapping[str, Tensor], quantised: Mapping[str, str]) -> Iterable[TensorFact]:
    for name, tensor in state.items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        kind = quantised.get(name, str(tensor.dtype).removeprefix("torch."))
        yield TensorFact(name, tuple(tensor.shape), kind, bad)


def _candidates(state: Mapping[str, Tensor]) -> tuple[CandidateFact, ...]:
    if not state:
        return ()
    return tuple(CandidateFact(c.spec, c.fits, c.classes, c.note) for c in nearest(state))


def _channels(state: Mapping[str, Tensor]) -> int | None:
    for tensor in state.values():
        if tensor.dim() == 4:
            return int(tensor.shape[1])
    return None


def _normalisation(source: Source) -> StatedNormalisation | None:
    try:
        card = source.card()
    except InputError:
        return None
    if card is not None:
        assert source.card_file is not None
        said_by = f"the card {source.card_file.path.name}"
        return StatedNormalisation(tuple(card.mean), tuple(card.std), said_by) if card.mean else None
    state = source.contents.tensors
    # Many networks carry it as a first layer with two buffers.
    for name, tensor in state.items():
        owner, _, last = name.rpartition(".")
        if last not in _MEANS or not _is_row(tensor):
            continue
        other = f"{owner}.{_DEVIATIONS[_MEANS.index(last)]}".removeprefix(".")
        if other in state and _is_row(state[other]) and state[other].numel() == tensor.numel():
            mean, std = (tuple(float(v) for v in t.flatten().tolist()) for t in (tensor, state[other]))
            if all(v > 0 for v in std) and all(abs(v) < 1e6 for v in (*mean, *std)):
                return StatedNormalisation(mean, std, f"the tensors {name} and {other}")
    return None


def _is_row(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() in (1, 3, 4)
