"""Every error that this package raises on purpose.

    UnbackdoorError
    ├── InputError          a file, an image set or an argument that cannot be used
    │   ├── MissingExtra    an optional dependency that is not installed
    │   └── DiskFull        no room on the disk; no result of the method, so that a retry makes sense
    ├── ConfigError         options of a method, a recipe or a suite; all faults at once
    ├── UnsupportedModel    a network that a method cannot work on; names the layer
    ├── UnsafeFile          a file that would run code, or is built to do harm
    ├── IntegrityError      something changed that must not change: a hash, an input, a global
    ├── EngineFailed        the cluster that ran the cells is gone, or cannot run them
    └── MethodFailed        a method raised, returned nonsense, or ran out of budget

A message says what was expected, what was found, where, and what to do; the same facts are attributes.
"""

from __future__ import annotations

from collections.abc import Sequence

from unbackdoor.text import printable


class UnbackdoorError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: One sentence without a trailing full stop.
        expected: What would have been right.
        got: What was found instead.
        where: File, row, layer or option.
        remedy: What the user can do, as an imperative sentence.
    """

    def __init__(
        self,
        problem: str,
        *,
        expected: object | None = None,
        got: object | None = None,
        where: object | None = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.expected = expected
        self.got = got
        self.where = where
        self.remedy = remedy
        super().__init__(printable(self._message(), keep="\n"))

    def _message(self) -> str:
        parts = [self.problem]
        if self.where is not None:
            parts[0] += f" ({self.where})"
        if self.expected is not None or self.got is not None:
            facts = []
            if self.expected is not None:
                facts.append(f"expected {self.expected}")
            if self.got is not None:
                facts.append(f"got {self.got}")
            parts.append(", ".join(facts))
        message = ": ".join(parts) + "."
        if self.remedy:
            message += f" {self.remedy.rstrip('.')}."
        return message

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only facts would be lost by the default exception pickling between processes.
        return (_rebuild, (type(self), self.__dict__.copy(), self.args))


def _rebuild(
    kind: type[UnbackdoorError], state: dict[str, object], args: tuple[object, ...]
) -> UnbackdoorError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InputError(UnbackdoorError):
    """A file, an image set or an argument cannot be used as it is."""


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str, purpose: str) -> None:
        self.module = module
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {module}",
            remedy=f'Install it with: pip install "unbackdoor[{extra}]"',
        )


class TooFewImages(InputError):
    """A method needs more images than there are; another method may need fewer."""


class DiskFull(InputError):
    """There is no room on the disk; this is no failure of the method."""


class ConfigError(UnbackdoorError):
    """Options that do not fit their declaration; ``faults`` lists all of them."""

    def __init__(self, subject: str, faults: Sequence[str]) -> None:
        self.subject = subject
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{subject} has {count}: " + "; ".join(self.faults))


class UnsupportedModel(UnbackdoorError):
    """A network that the method cannot work on; ``where`` names the layer."""


class UnsafeFile(UnbackdoorError):
    """A file that would execute code when loaded, or is built to exhaust the machine."""


class IntegrityError(UnbackdoorError):
    """Something changed that must not change, or does not match its recorded hash."""


class EngineFailed(UnbackdoorError):
    """What was to run cells is gone or cannot run them; nothing is recorded of the cells in progress."""


class MethodFailed(UnbackdoorError):
    """A method raised, returned something unusable, or ran out of its budget."""
