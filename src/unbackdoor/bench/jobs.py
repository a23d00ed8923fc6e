"""Jobs and answers: what travels between the driver and where cells run, as plain JSON.

They are plain dictionaries and not classes, because an engine may send them to another machine, which must
not import a class that a message names.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict, cast

from unbackdoor.bench.code_version import repair_version, scan_version, victim_version
from unbackdoor.bench.store import Cell
from unbackdoor.errors import EngineFailed
from unbackdoor.networks.spec import take_apart

Kind = Literal["victim", "repair", "scan"]


class Place(TypedDict, total=False):
    """What a job needs to know about the machine.

    Attributes:
        store: Folder of the store.
        data_root: First place to search for data sets, or None.
        cache: Where decoded data sets are kept, or None for the default.
        device: ``cpu`` by default.
        limits: Fields of :class:`unbackdoor.isolate.Limits`.
    """

    store: str
    data_root: str | None
    cache: str | None
    device: str
    limits: dict[str, Any]


class Job(TypedDict):
    """A cell to be done.

    Attributes:
        key: Its address.
        kind: What is done.
        spec: Its specification.
        victim: What was measured of the victim of a repair or a scan, or None.
        work: Name of the folder to work in.
        place: Of the machine.
        trained: Attack and architecture of the victim, which the specification of a repair does not name;
            absent where they are unknown, and then the worker's code cannot be compared.
    """

    key: str
    kind: Kind
    spec: dict[str, Any]
    victim: dict[str, Any] | None
    work: str
    place: Place
    trained: NotRequired[tuple[str, str] | list[str]]


class Answer(TypedDict, total=False):
    """What became of a job: a result, or an error.

    Attributes:
        result: What was measured.
        error: Why there is no result.
        halt: With an error: it is about the machine and not about the cell, such as a full disk.
        seconds: Wall time.
        log: The end of what the steps printed.
    """

    result: dict[str, Any]
    error: str
    halt: str
    seconds: float
    log: str


def make_job(cell: Cell, parent: Cell | None, *, owner: str, place: Mapping[str, Any]) -> Job:
    """Return the job that does a cell.

    Args:
        cell: What is to be done.
        parent: The victim of a repair or a scan, done.
        owner: The driver, which knows its work folders by this.
        place: See :class:`Place`.
    """
    job: Job = {
        "key": cell.key,
        "kind": cast(Kind, cell.kind),
        "spec": dict(cell.spec),
        "victim": None if parent is None or parent.result is None else dict(parent.result),
        "work": f"{owner}-{uuid.uuid4().hex}",
        "place": cast(Place, dict(place)),
    }
    victim = cell.spec if parent is None else parent.spec
    if "attack" in victim and "architecture" in victim:
        job["trained"] = [str(victim["attack"]), take_apart(str(victim["architecture"]))[0].name]
    return job


def read_job(message: Mapping[str, Any]) -> Job:
    """Return a job as it came, where it can be done here.

    Raises:
        EngineFailed: If it has another form, or was planned with other code than is installed here.
    """
    forms = {"key": str, "kind": str, "spec": dict, "work": str, "place": dict}
    wrong = [name for name, form in forms.items() if not isinstance(message.get(name), form)]
    if wrong or "victim" not in message:
        raise EngineFailed(
            "a job has another form than this version of unbackdoor gives it",
            got=f"wrong or missing: {', '.join(wrong or ['victim'])}",
            remedy="Give every worker the version of the driver",
        )
    job = cast(Job, dict(message))
    spec, trained = job["spec"], job.get("trained")
    if trained is None or "code" not in spec:
        return job
    attack, architecture = trained
    if job["kind"] == "victim":
        here = victim_version(attack, architecture)
    elif job["kind"] == "repair":
        here = repair_version(spec["defense"], attack, architecture)
    else:
        here = scan_version(spec["scanner"], attack, architecture)
    if here != spec["code"]:
        raise EngineFailed(
            "a worker has other code than the cell was planned with",
            expected=spec["code"],
            got=here,
            remedy="Give every worker the code of the driver, and start it and the run again",
        )
    return job
