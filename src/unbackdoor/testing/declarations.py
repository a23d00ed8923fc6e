"""Contracts on what is written: signature, documentation, options and imports."""

from __future__ import annotations

import ast
import inspect
import re

from unbackdoor.errors import ConfigError
from unbackdoor.registry import Config
from unbackdoor.testing.contract import METHODS, PARAMETERS, Subject, contract, demand

HEADINGS = {
    "attack": ("Paper:", "Departs:"),
    "defense": ("Paper:", "Needs:", "Changes:", "Departs:", "Cost:"),
    "scanner": ("Paper:", "Needs:", "Departs:", "Cost:"),
    "screener": ("Paper:", "Needs:", "Departs:", "Cost:", "Blind:"),
}


# Modules that hold the truth, or the images that success is measured on.
HIDDEN = re.compile(
    r"unbackdoor\.(attacks|bench|cli|report|load_dataset|AttackTruth)\b|unbackdoor\.data\.(?!batches\b)"
)


@contract(
    "attack",
    *METHODS,
    name="signature",
    meaning="the function takes what every part of its kind takes, and nothing else",
)
def _signature(subject: Subject) -> None:
    got = list(inspect.signature(subject.part.function).parameters)
    demand(got == PARAMETERS[subject.part.kind], f"expected {PARAMETERS[subject.part.kind]}, got {got}")


@contract(
    "attack",
    *METHODS,
    name="documentation",
    meaning="the paper is named, and the docstring has every heading of its kind",
)
def _documentation(subject: Subject) -> None:
    part = subject.part
    module = inspect.getmodule(part.function)
    text = "\n".join(inspect.getdoc(place) or "" for place in (module, part.function))
    missing = [word for word in HEADINGS[part.kind] if word not in text]
    demand(not missing, f"the docstring lacks {', '.join(missing)}")
    demand(bool(part.paper), "no paper is registered; say 'a control' where there is none")
    demand(bool(part.summary), "the docstring has no first sentence")
    unnamed = [preset for preset in part.presets if f"``{preset}``" not in text]
    demand(not unnamed, f"the docstring does not explain the preset {', '.join(unnamed)}")


@contract(
    "attack",
    *METHODS,
    name="options",
    meaning="every option has a meaning and a source, and every preset changes what it says",
)
def _options(subject: Subject) -> None:
    part = subject.part
    for name, field in part.config.model_fields.items():
        demand(bool(field.description), f"the option {name!r} has no meaning; declare it with option(...)")
        extra = field.json_schema_extra
        sourced = isinstance(extra, dict) and bool(extra.get("source"))
        demand(sourced, f"the default of the option {name!r} has no source")
    plain = part.configure().model_dump()
    for preset, preset_options in part.presets.items():
        other = part.configure(preset=preset).model_dump()
        changed = {name: value for name, value in other.items() if plain[name] != value}
        demand(
            bool(changed) or not preset_options, f"the preset {preset!r} is the default under another name"
        )
        beside = {name: value for name, value in changed.items() if name not in preset_options}
        demand(not beside, f"the preset {preset!r} changes {sorted(beside)} too")
    part.configure(subject.options)
    part.configure(part.quick)


@contract(
    "attack",
    *METHODS,
    name="unknown options",
    meaning="a ConfigError names every unknown option at once",
)
def _unknown_options(subject: Subject) -> None:
    demand(issubclass(subject.part.config, Config), "the config is no unbackdoor.plugins.Config")
    try:
        subject.part.configure({"nonsense": 1, "rubbish": 2})
    except ConfigError as error:
        named = [word for word in ("nonsense", "rubbish") if word in str(error)]
        demand(len(named) == 2, f"named were only {named}")
    else:
        raise AssertionError("unknown options were accepted")


@contract(
    *METHODS,
    name="no way to the truth",
    meaning="its module imports neither attacks nor bench nor a data set",
)
def _no_way_to_the_truth(subject: Subject) -> None:
    module = inspect.getmodule(subject.part.function)
    try:
        source = inspect.getsource(module) if module is not None else ""
    except OSError:  # typed at a prompt
        source = ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        hidden = [name for name in names if HIDDEN.match(name)]
        demand(not hidden, f"it imports {', '.join(hidden)}")
