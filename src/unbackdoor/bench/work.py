"""Do one cell: the function that every engine runs, here or on another machine.

A job and its answer are plain JSON. Artefacts are written into a folder of the worker's own and moved to
their address in one rename, so a reader sees all of a cell or nothing, and two workers that race on the
same cell do each other no harm.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbackdoor.bench import steps
from unbackdoor.bench.cells import address
from unbackdoor.bench.code_version import sample_version
from unbackdoor.bench.jobs import Answer, Job, read_job
from unbackdoor.bench.judge import der, judge_scan
from unbackdoor.bench.repairs import running_commit
from unbackdoor.bench.steps import scores_from
from unbackdoor.bench.store import artefact_folder
from unbackdoor.bench.truth_files import load_truth
from unbackdoor.data.datasets import places_of_data
from unbackdoor.errors import MethodFailed, UnbackdoorError
from unbackdoor.files import is_disk_full
from unbackdoor.isolate import SCRATCH, Limits, call, log_of, preload

_STEPS = "unbackdoor.bench.steps"
_MODULES = {
    "train": "unbackdoor.bench.train_step",
    "scan": "unbackdoor.bench.scan_step",
    "altered_sample": "unbackdoor.bench.altered_samples",
}
# These bring the other steps along. The first optimizer of a process imports torch's compiler, a second
# of work that is done once in the server.
preload(_MODULES["train"], _MODULES["scan"], "torch._dynamo")
_COST: dict[str, tuple[type, ...]] = {
    "seconds": (float,),
    "peak_mb": (float,),
    "device": (str,),
    "flags": (list,),
}
_NUMBER = (float, type(None))
_ANSWER_COLUMNS: dict[str, dict[str, tuple[type, ...]]] = {
    "method": _COST,
    "scan": {
        **_COST,
        "verdict": (str,),
        "classes": (list,),
        "statistic": (str,),
        "value": _NUMBER,
        "p_value": _NUMBER,
    },
}


def execute(message: Mapping[str, Any]) -> Answer:
    """Do a cell and return its result or its error, with seconds and the end of its log.

    Args:
        message: A :class:`~unbackdoor.bench.jobs.Job`.

    Raises:
        EngineFailed: If it cannot be done here, whatever the cell.
    """
    start = time.perf_counter()
    job = read_job(message)
    logs: list[str] = []
    answer: Answer
    try:
        with _folder(Path(job["place"]["store"]), job["work"]) as folder:
            work = _Work(job, folder, logs)
            try:
                result = {"victim": _victim, "repair": _repair, "scan": _scan}[job["kind"]](work)
                answer = {"result": {**result, "timings": work.times, "commit": running_commit()}}
            finally:
                logs.append(log_of(folder))
    except (UnbackdoorError, OSError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
        if is_disk_full(error):
            answer["halt"] = str(error)
    answer["seconds"] = time.perf_counter() - start
    answer["log"] = "\n".join(filter(None, logs))[-20_000:]
    return answer


@dataclass(frozen=True)
class _Work:
    """A cell that is being run.

    Attributes:
        job: What was asked for.
        folder: Where it is done.
        logs: What its steps printed so far.
        times: Seconds of its steps and of their parts so far; of steps that are repeated, their sums.
    """

    job: Job
    folder: Path
    logs: list[str]
    times: dict[str, float] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        return self.job["spec"]

    @property
    def store(self) -> Path:
        return Path(self.job["place"]["store"])

    @property
    def victim(self) -> Path:
        """The artefacts of the victim that is repaired or scanned."""
        return artefact_folder(self.store / "artefacts", self.spec["victim"])

    def step(self, name: str, *, folder: Path | None = None, **more: Any) -> dict[str, Any]:
        """Run a trusted step, which is given the whole task, in a process of its own."""
        return self._call(
            name, {"spec": self.spec, "place": self.job["place"], **more}, folder or self.folder
        )

    def confined(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Run a method or a scanner in a confined process that is given a model, clean images and options."""
        sample = self.store / "samples" / f"{address(sample_spec(self.spec))}.safetensors"
        if not sample.exists():
            with _folder(self.store, f"{self.job['work']}-sample") as aside:
                self.step("altered_sample" if "altered" in self.spec else "sample", folder=aside)
                sample.parent.mkdir(exist_ok=True)
                # Moved here, because a step that is killed leaves its drafts where it writes.
                (aside / steps.SAMPLE).replace(sample)
        shutil.copyfile(sample, self.folder / steps.SAMPLE)
        steps.hand_over(self.victim, self.folder)
        # What the method's process may see: no victim, no attack, no path to either.
        columns = ("defense", "scanner", "seed", "precision")
        visible = {column: self.spec[column] for column in columns if column in self.spec}
        task = {
            "spec": {**visible, "options": dict(options)},
            "place": {"device": self.job["place"].get("device", "cpu")},
        }
        root, cache = (self.job["place"].get(name) for name in ("data_root", "cache"))
        places = places_of_data(Path(str(root)) if root else None, Path(str(cache)) if cache else None)
        private = [self.store, *places]
        if root and (foreign := self.spec.get("altered", {}).get("foreign")):
            private.append(Path(str(root)) / foreign)
        try:
            answer = self._call(name, task, self.folder, private)
            _require_answer(answer, _ANSWER_COLUMNS[name])
            self._spent(name, answer["seconds"])
            return answer
        finally:
            for file in (steps.SAMPLE, steps.MODEL, steps.MODEL.replace(".safetensors", ".json")):
                (self.folder / file).unlink(missing_ok=True)

    def publish(self) -> None:
        """Move what the cell leaves to its address; the first of two equal cells wins."""
        target = artefact_folder(self.store / "artefacts", self.job["key"])
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in ("task.json", "result.json", steps.PROGRESS):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        if target.exists():
            return
        with suppress(FileExistsError):
            try:
                self.folder.rename(target)
            except OSError:
                if not target.exists():
                    raise

    def _call(
        self, name: str, task: dict[str, Any], folder: Path, private: Sequence[Path] = ()
    ) -> dict[str, Any]:
        limits = Limits(**self.job["place"]["limits"])
        start = time.perf_counter()
        module = _MODULES.get(name, _STEPS)
        answer = call(f"{module}:{name}_step", task, folder, limits, private=private)
        self.logs.append(log_of(folder))
        self._spent(f"{name} step", time.perf_counter() - start)
        if not private:
            for part, seconds in answer.pop("timings", {}).items():
                self._spent(part, seconds)
        return answer

    def _spent(self, part: str, seconds: float) -> None:
        self.times[part] = round(self.times.get(part, 0.0) + seconds, 3)


def sample_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a defender's sample depends on, out of the specification of a repair or a scan."""
    names = ("dataset", "data_sha256", "augmentation", "clean_images", "seed")
    more = {name: spec[name] for name in ("altered", "altered_code") if name in spec}
    return {**{name: spec[name] for name in names}, **more, "code": sample_version()}


def _victim(work: _Work) -> dict[str, Any]:
    result = work.step("train", checkpoint=str(work.store / "checkpoints" / work.job["key"]))
    work.publish()
    return result


def _repair(work: _Work) -> dict[str, Any]:
    assert work.job["victim"] is not None  # a repair is planned with its victim, and runs after it
    before = scores_from(work.job["victim"]["scores"])
    tries: list[dict[str, Any]] = []
    # One try, or one for each choice of an oracle, of which the judge then keeps the best.
    for options in work.spec.get("choices", [work.spec["options"]]):
        worked = work.confined("method", options)
        judged = work.step("judge", victim=str(work.victim))
        after = scores_from(judged["scores"])
        tries.append({**worked, "scores": judged["scores"], "der": der(before, after), "options": options})
        if steps.best(tries) is tries[-1]:
            for name in (steps.REPAIRED, steps.REPAIRED.replace(".safetensors", ".json"), steps.EVIDENCE):
                (work.folder / name).replace(work.folder / f"best-{name}")
    for file in sorted(work.folder.glob("best-*")):
        file.replace(work.folder / file.name.removeprefix("best-"))
    best = dict(steps.best(tries))
    if "choices" not in work.spec:
        del best["options"]
    work.publish()
    return {**best, "seconds": sum(one["seconds"] for one in tries)}


def _scan(work: _Work) -> dict[str, Any]:
    answer = work.confined("scan", work.spec["options"])
    judged = judge_scan(answer["verdict"], answer["classes"], load_truth(work.victim / steps.MODEL))
    work.publish()
    return {**answer, **judged}


def _require_answer(answer: dict[str, Any], kinds: Mapping[str, tuple[type, ...]]) -> None:
    """Raise MethodFailed for other columns; a method may have written the answer in place of its step."""
    right = set(answer) == set(kinds) and all(isinstance(answer[name], kinds[name]) for name in kinds)
    if not right or not all(math.isfinite(v) for v in answer.values() if isinstance(v, float)):
        raise MethodFailed("it answered with what is no answer", got=str(answer)[:200])


@contextmanager
def _folder(store: Path, name: str) -> Iterator[Path]:
    """Yield a new folder inside the store, and remove it at the end if it is still there."""
    folder = store / "work" / name
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try that was pre-empted
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
