"""Options from a file: ``[tool.unbackdoor]`` of pyproject.toml, or unbackdoor.toml.

It is looked for in the working folder alone, never beside a model, whose owner may be the attacker. A file
that was found, and not named with ``--config``, can lie in a folder that somebody else made: it may not name
code that would be run, nor say that files are replaced, and what it sets is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbackdoor.errors import ConfigError, InputError, UnbackdoorError
from unbackdoor.files import is_there, read_text
from unbackdoor.toml_text import parse_toml

FILES = ("unbackdoor.toml", "pyproject.toml")
_LARGEST = 1 << 20  # bytes
_MAX_DEPTH = 8  # tables in tables; the parser's own limit is that of the interpreter


def near_match(name: str, names: list[str]) -> str:
    """Return a hint at a name that was meant; only a fault waits for the import."""
    from unbackdoor import registry

    return registry.near_match(name, names)


@dataclass(frozen=True)
class Settings:
    """Options of a file by command, as the application's parser takes them.

    Attributes:
        path: The file.
        defaults: By command, and for groups by command inside: values by the name of the parameter.
    """

    path: Path
    defaults: dict[str, Any]

    def of(self, command: str) -> dict[str, Any]:
        """Return the values for a command such as ``patch apply``."""
        values: dict[str, Any] = self.defaults
        for name in command.split():
            values = values.get(name, {})
        return values


def read_settings(named: Path | None, group: Any) -> Settings | None:
    """Read the options of the file that was named, else of the one in the working folder.

    Args:
        named: What ``--config`` says; None looks for ``unbackdoor.toml`` and then for a ``pyproject.toml``
            with the table.
        group: The parser's group of all commands.

    Returns:
        The options; None where there is no file.

    Raises:
        InputError: If it cannot be read.
        ConfigError: If it has unknown keys, or values of another type; all faults at once.
    """
    if named is not None:
        table = _table(named, named=True)
        if table is None:
            raise InputError("the file has no table [tool.unbackdoor]", where=named)
        return _settings(named, table, group, trusted=True)
    for name in FILES:
        path = Path(name)
        if is_there(path) and path.is_file():
            table = _table(path, named=False)
            if table is not None:
                return _settings(path, table, group, trusted=False)
    return None


def _table(path: Path, *, named: bool) -> Mapping[str, Any] | None:
    """Return the table of the options in a file; None for another project's file."""
    ours = path.name != "pyproject.toml"
    try:
        text = read_text(path, "the file of options", limit=_LARGEST)
    except UnbackdoorError:
        if not ours and not named:
            return None  # another project's file
        raise
    try:
        content = parse_toml(text)
    except ValueError as error:
        if not ours and not named and "tool.unbackdoor" not in text:
            return None
        raise InputError("the file of options is no TOML", got=str(error), where=path) from None
    tool = content.get("tool")
    if not ours or (isinstance(tool, dict) and "unbackdoor" in tool):
        content = tool.get("unbackdoor") if isinstance(tool, dict) else None  # type: ignore[assignment]
        if content is not None and not isinstance(content, dict):
            raise ConfigError(f"the file {path}", ["[tool.unbackdoor] is no table"])
    return content


def _settings(path: Path, table: Mapping[str, Any], group: Any, *, trusted: bool) -> Settings:
    commands = {name: c for name, c in group.commands.items() if not getattr(c, "hidden", False)}
    everywhere = {key: value for key, value in table.items() if not isinstance(value, dict)}
    faults: list[str] = []
    used: set[str] = set()
    defaults = {
        name: _of_command(command, everywhere, table.get(name, {}), name, faults, used, trusted=trusted)
        for name, command in commands.items()
    }
    options = sorted({key for command in commands.values() for key in _options(command)})
    for key in everywhere.keys() - used:
        faults.append(f"there is no option {key!r}{near_match(_plain(key), options)}")
    for key, value in table.items():
        if isinstance(value, dict) and key not in commands:
            faults.append(f"there is no command {key!r}{near_match(key, list(commands))}")
    if faults:
        raise ConfigError(f"the file {path}", sorted(dict.fromkeys(faults)))
    return Settings(path, defaults)


def _of_command(
    command: Any,
    everywhere: Mapping[str, Any],
    own: Any,
    name: str,
    faults: list[str],
    used: set[str],
    *,
    trusted: bool,
) -> dict[str, Any]:
    """Return the values for one command or group; adds to the faults and the keys used."""
    if not isinstance(own, dict):
        return {}
    inner = getattr(command, "commands", None)
    out: dict[str, Any] = {}
    if inner is not None:
        shared = {**everywhere, **{key: value for key, value in own.items() if not isinstance(value, dict)}}
        taken: set[str] = set()
        for below, part in inner.items():
            where = f"{name} {below}"
            table = own.get(below, {})
            out[below] = _of_command(part, shared, table, where, faults, taken, trusted=trusted)
        used |= taken
        for key, value in own.items():
            if isinstance(value, dict) and key not in inner:
                faults.append(f"there is no command '{name} {key}'{near_match(key, list(inner))}")
            elif not isinstance(value, dict) and key not in taken:
                names = sorted({option for part in inner.values() for option in _options(part)})
                faults.append(f"{name} has no option {key!r}{near_match(_plain(key), names)}")
        return out
    options = _options(command)
    for key, value in [*everywhere.items(), *own.items()]:
        option = options.get(_plain(key))
        if option is None:
            if key in own:
                faults.append(f"{name} has no option {key!r}{near_match(_plain(key), list(options))}")
            continue
        used.add(key)
        fault, converted = _converted(option, value)
        if fault is None and not trusted:
            fault = _distrusted(option, converted)
        if fault is not None:
            faults.append(f"{key}: {fault}")
            continue
        out[option.name] = converted
    return out


def _plain(key: str) -> str:
    return key.replace("_", "-").lower()


def _options(command: Any) -> dict[str, Any]:
    """Return the options of a command by their names without dashes before them; arguments are left out."""
    if hasattr(command, "commands"):
        return {key: option for part in command.commands.values() for key, option in _options(part).items()}
    return {
        text.lstrip("-"): option
        for option in command.params
        for text in option.opts
        if text.startswith("--") and option.name != "help"
    }


def _converted(option: Any, value: Any) -> tuple[str | None, Any]:
    """Return what is wrong with a value, or None, and the value as the parser takes it."""
    if getattr(option, "is_flag", False):
        fits, expected = isinstance(value, bool), "true or false"
        return (None, value) if fits else (f"expected {expected}, got {value!r}", None)
    scalars = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in scalars):
        return f"expected text or a number, got {value!r}", None
    texts = [str(one) for one in scalars]
    if getattr(option, "multiple", False):
        return None, texts
    return None, ",".join(texts)


_REPLACES = "force"


def _distrusted(option: Any, value: Any) -> str | None:
    """Return why a file that nobody named may not set this, or None."""
    if option.name == _REPLACES and value:
        return "files are replaced only where --force is typed, or this file is named with --config"
    texts = value if isinstance(value, list) else [value]
    if any(isinstance(text, str) and ".py:" in text.lower() for text in texts):
        return "code is run only where it is typed, or this file is named with --config"
    return None
