"""``FILE.py:CALLABLE[argument=value]``: the user's own code, executed in this process.

It is run only when the user names it: neither a weights file nor a model card can make it run. The callable
is called with the arguments in brackets and returns the untrained network. While the file is imported and the
callable runs, the file's folder stands on the import path, as if the file had been started as a script.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

from torch import nn

from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.networks.geometry import Geometry
from unbackdoor.networks.sources.preprocessing import Preprocessing
from unbackdoor.networks.spec import Spec, value_of


def build(spec: Spec, geometry: Geometry) -> nn.Module:
    """Run the user's callable and return the network that it made.

    Raises:
        InputError: If there is no such file or name, or the code raises.
        UnsupportedModel: If it returns something else than a module.
    """
    file, _, name = spec.name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("there is no such Python file", where=path, remedy="Name it as FILE.py:CALLABLE")
    arguments = {key: value_of(text) for key, text in spec.options.items()}
    with _importable(path.resolve().parent):
        try:
            module = _module(path.resolve())
            maker = reduce(getattr, name.split("."), module)
            network = maker(**arguments)  # type: ignore[operator]
        # Every exception of the user's code is reported with its place and reason.
        except Exception as error:
            raise InputError(
                "the code that builds the network failed",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                where=f"{path}:{name}",
                remedy="Run it by itself; arguments are given as FILE.py:CALLABLE[argument=value]",
            ) from error
    if not isinstance(network, nn.Module):
        raise UnsupportedModel(
            "the code returned no network",
            expected="a torch.nn.Module",
            got=type(network).__name__,
            where=f"{path}:{name}",
        )
    return network


def load_callable(text: str) -> Callable[..., object]:
    """Run a file of the user and return the callable that ``FILE.py:CALLABLE`` names.

    Raises:
        InputError: If there is no such file or name, or the code raises.
    """
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError("there is no such Python file", where=path, remedy="Name it as FILE.py:CALLABLE")
    with _importable(path.resolve().parent):
        try:
            found = reduce(getattr, name.split("."), _module(path.resolve()))
        # Every exception of the user's code is reported with its place and reason.
        except Exception as error:
            raise InputError(
                "the code of the method failed",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                where=f"{path}:{name}",
                remedy="Run it by itself",
            ) from error
    if not callable(found):
        raise InputError("this is no function", got=type(found).__name__, where=f"{path}:{name}")
    return found


def preprocessing_of(spec: Spec) -> Preprocessing:
    """Return an empty preprocessing: a Python file states none."""
    return Preprocessing()


def _module(path: Path) -> object:
    # A name of its own by the content, so that an edited file is read again, and no module is shadowed.
    content = path.read_bytes()
    name = f"_unbackdoor_user_{hashlib.sha256(str(path).encode() + content).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None
    module = importlib.util.module_from_spec(description)
    # Registered before it runs, because dataclasses need their module there.
    sys.modules[name] = module
    try:
        # The text that was read, and no compiled copy beside it: that may be of an earlier text of the same
        # second, or of another program.
        exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
