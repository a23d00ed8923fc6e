"""Options that several commands share, and what they turn into. Imports torch only when called."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unbackdoor.errors import ConfigError, InputError
from unbackdoor.files import require_writable as require_writable

if TYPE_CHECKING:
    from unbackdoor.engine.run import Run
    from unbackdoor.types import Progress

SUFFIX = ".safetensors"


class PrecisionPolicy(StrEnum):
    """Number formats that can be asked for."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class AugmentationName(StrEnum):
    """What may be done to an image without changing its class."""

    none = "none"
    crop = "crop"
    crop_flip = "crop+flip"


_COMPUTE, _OUTPUT = "Computing", "Output"

DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds the data sets; else the environment variable UNBACKDOOR_DATA, else download.",
        show_default=False,
        rich_help_panel="Data",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.", rich_help_panel=_COMPUTE)]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:N or mps; auto takes cuda, else mps, else cpu.",
        rich_help_panel=_COMPUTE,
    ),
]
PrecisionOption = Annotated[
    PrecisionPolicy,
    typer.Option(
        "--precision",
        help="Number format; auto is bf16 where the processor has it, else fp32.",
        rich_help_panel=_COMPUTE,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=_OUTPUT)]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON on standard output.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=_OUTPUT)]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Which of several sets of weights in the file, such as state_dict_ema; inspect lists them.",
        show_default="the only one",
        rich_help_panel="Models without a card",
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Per-channel mean, comma-separated, of a model without a card.",
        show_default="what fits the images best; for evaluate, the data set's",
        rich_help_panel="Models without a card",
    ),
]
Std = Annotated[
    str | None,
    typer.Option(
        help="Per-channel deviation, likewise.", show_default=False, rich_help_panel="Models without a card"
    ),
]


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Split ``key=value`` texts.

    Raises:
        ConfigError: If one has another form or a key stands twice; all faults at once.
    """
    out: dict[str, str] = {}
    faults = []
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not (key and equals and value):
            faults.append(f"expected key=value, got {text!r}")
        elif key in out:
            faults.append(f"{key!r} stands twice")
        else:
            out[key] = value
    if faults:
        raise ConfigError(f"the option {option}", faults)
    return out


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Return comma-separated numbers.

    Raises:
        ConfigError: If one is none.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"the option {option}", [f"expected numbers such as 0.49,0.48,0.45, got {text!r}"]
        ) from None


def seconds_of(text: str | None, option: str) -> float | None:
    """Return the seconds of a text such as ``90``, ``90s``, ``30m`` or ``2h``; None of None.

    Raises:
        InputError: If it is no time.
    """
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        value = float(text) if text[-1:] not in units else float(text[:-1]) * units[text[-1]]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise InputError("this is not a time", expected="such as 90, 90s, 30m or 2h", got=text, where=option)
    return value


def open_run(seed: int, device: str, precision: PrecisionPolicy, progress: Progress) -> Run:
    """Return the surroundings of a computation.

    Raises:
        InputError: If there is no such device.
    """
    import torch

    from unbackdoor.audit.devices import resolved_device
    from unbackdoor.engine.run import Run
    from unbackdoor.registry import near_match

    device = resolved_device(device)
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if len(available) > 1:
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    device_names = [*available, "auto"]
    if device not in device_names:
        raise InputError(
            f"there is no device {device!r}{near_match(device, device_names)}",
            expected="one of " + ", ".join(device_names),
            where="--device",
        )
    return Run.create(seed=seed, device=device, policy=precision.value, progress=progress)


def existing_model(path: Path) -> Path:
    """Return the weights file, with its suffix appended where only that exists."""
    with_suffix = path.with_name(path.name + SUFFIX)
    return with_suffix if not path.exists() and with_suffix.exists() else path


def has_card(model: Path) -> bool:
    """Tell whether a card lies beside a weights file."""
    return model.suffix == SUFFIX and model.with_suffix(".json").exists()
