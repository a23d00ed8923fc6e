"""The user's own repair: a function, or ``FILE.py:FUNCTION``, as a defense that nobody has to register."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, create_model
from torch import nn

from unbackdoor.errors import ConfigError, InputError
from unbackdoor.networks.sources.python_file import load_callable
from unbackdoor.registry import DEFENSES, Config, Part
from unbackdoor.types import Classifier, Purified

_FILE = ".py:"


class _OwnOptions(Config):
    """Options of a function, of the types of their defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


def defense_of(method: object) -> Part[Any]:
    """Return a defense by its name, itself, or made of a function of the user.

    A function is called with a copy of the model and of the clean images: ``function(model, data)``, with a
    third argument its options where it has one (annotated with a ``Config`` of :mod:`unbackdoor.plugins`),
    and with ``run=`` where it has a parameter of that name. Its other parameters with plain defaults are its
    options. It returns the repaired ``Classifier``, its network, a ``Purified``, or None where it changed the
    copy.

    Args:
        method: A registered name, a part, a function, or a text ``FILE.py:FUNCTION``, which runs that file.

    Raises:
        InputError: If it is of another type, or there is no such defense, file or function.
        ConfigError: If the function cannot be called so.
    """
    if isinstance(method, Part):
        return method
    if isinstance(method, str):
        if _FILE not in method.lower():
            return DEFENSES[method]
        function = load_callable(method)
        return _part(function, method.rpartition(":")[2])
    if callable(method):
        return _part(method, getattr(method, "__name__", type(method).__name__))
    if method is None:
        raise InputError("no method was named", expected="a registered defense", where="method")
    raise InputError(
        "the method is of another type",
        expected="a registered name, a part, or a function",
        got=type(method).__name__,
    )


def _part(function: Callable[..., Any], name: str) -> Part[Any]:
    try:
        parameters = list(inspect.signature(function, eval_str=False).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the method {name!r}", [f"its parameters cannot be read: {error}"]) from None
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in places and p.name != "run"]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(f"the method {name!r}", ["it cannot be called with (model, data)"])
    takes_run = any(p.name == "run" for p in parameters)
    takes_config = len(positional) > 2 and positional[2].default is inspect.Parameter.empty
    declared = _declared(function, positional[2].name) if takes_config else None
    if takes_config and declared is None:
        raise ConfigError(
            f"the method {name!r}",
            [f"its third parameter {positional[2].name!r} is no Config and has no default"],
        )
    given = {p.name for p in positional[:3]} | {"run"}
    unfilled = [p.name for p in parameters if p.name not in given and _is_required(p)]
    if unfilled:
        raise ConfigError(
            f"the method {name!r}", [f"its parameters have no default: {', '.join(map(repr, unfilled))}"]
        )
    options = {} if takes_config else {p.name: p for p in parameters if _is_option(p, positional)}
    config = declared or create_model(
        f"{name}Options",
        __base__=_OwnOptions,
        **{key: (_type_of(p.default), p.default) for key, p in options.items()},
    )

    def call(model: Classifier, data: Any, cfg: Config, *, run: Any) -> Purified:
        keywords: dict[str, Any] = {key: getattr(cfg, key) for key in options}
        if takes_run:
            keywords["run"] = run
        arguments = (model, data, cfg) if takes_config else (model, data)
        return _purified(function(*arguments, **keywords), model)

    call.__doc__ = inspect.getdoc(function) or "A method of the user."
    call.__name__ = name
    return Part(name, "defense", call, config, "", frozenset({"images"}))


def _is_option(parameter: inspect.Parameter, positional: list[inspect.Parameter]) -> bool:
    named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    free = named and parameter not in positional[:2] and parameter.name != "run"
    # What has no plain value, or a name that an options class has itself, keeps its default.
    plain = isinstance(parameter.default, bool | int | float | str | None)
    return free and plain and not parameter.name.startswith("_") and not hasattr(_OwnOptions, parameter.name)


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not variadic and parameter.default is inspect.Parameter.empty


def _type_of(default: object) -> Any:
    return Any if default is None else type(default)


def _declared(function: Callable[..., Any], name: str) -> type[Config] | None:
    try:
        annotated = inspect.get_annotations(function, eval_str=True).get(name)
    except Exception:  # noqa: BLE001  the user's own annotation, whatever it names
        return None
    return annotated if isinstance(annotated, type) and issubclass(annotated, Config) else None


def _purified(returned: object, model: Classifier) -> Any:
    """Return what a function returned as a method returns it; what it is nothing of is refused later."""
    if returned is None:
        return Purified(model)
    if isinstance(returned, Classifier):
        return Purified(returned)
    if isinstance(returned, nn.Module):
        repaired = copy.deepcopy(model)
        repaired.network = returned
        return Purified(repaired)
    return returned
