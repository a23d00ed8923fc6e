"""The defenses of BackdoorBench beside ours: the same victim, the same images, one judge.

    python benchmarks/peers.py --victim FILE --checkout FOLDER --work FOLDER [--python PYTHON] ...

The checkout of SCLBD/BackdoorBench, or of a fork with the same layout, is yours and is only read; its
programs run with your rights, in the interpreter that you name, which needs their packages. In the work
folder lie links to the checkout, the victim as an attack result, the defender's images as the only training
images, and a record for each method and setting. What has a record is not done again, so that a run may be
killed at any moment; a method that fails has a record with its reason, and ``--retry`` does it again.
Results are read by this project's reader of weights, which runs nothing of them, and are judged as ours
are.

Settings: ``own`` is each side with its own defaults; ``equal`` gives theirs as many passes as ours makes,
and both ``--epochs`` many where that is given. Each pair is theirs, then ours, each in a process of its
own. ``seconds`` is the whole process, from its start to its end; ``algorithm`` leaves out the start, the
reading, passes over test sets and pictures; ``processor`` is what the process used of the processors, which
a busy machine changes least. Ours judges once, theirs as often as its script does.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _backdoorbench import (
    DATASET,
    RESULT,
    network_name,
    read_defense_result,
    write_attack_result,
    write_cifar10,
)
from _harness import Ratio, Result, describe_machine, parser
from _peer_process import used
from _setting import Setting, add_setting_options, prepare
from unbackdoor import run as call
from unbackdoor.bench.judge import judge
from unbackdoor.errors import UnbackdoorError
from unbackdoor.files import sha256_file, write_json
from unbackdoor.registry import DEFENSES

VICTIM = "victim"  # name of the attack result
DEFENSE_RESULT = "defense_result.pt"
WANTED = {"seconds": 10.0, "algorithm": 3.0}  # times as fast
WORDS = {
    "seconds": "end to end",
    "algorithm": "algorithm alone",
    "processor": "end to end in processor seconds",  # the one to read on a machine that others use
}
LONGEST_REASON = 300
_PROCESS = Path(__file__).with_name("_peer_process.py")
_LINKED = ("defense", "utils", "models", "config", "attack", "dataset", "resource", "detection_pretrain")
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A script of theirs and the method of ours that answers it.

    Attributes:
        ours: Registered name.
        passes: Our option that says how many passes, or steps, there are; empty where there are none.
        also: Further options of ours of the same meaning.
        arguments: Says the same to theirs.
        whole: Their option that takes a share of the training images, for all of them.
        remark: What a reader of its rates must know.
    """

    ours: str
    passes: str = ""
    also: tuple[str, ...] = ()
    arguments: Callable[[int], tuple[str, ...]] = lambda passes: ("--epochs", str(passes))
    whole: tuple[str, ...] = ("--ratio", "1")
    remark: str = ""


def _flags(*names: str) -> Callable[[int], tuple[str, ...]]:
    return lambda passes: tuple(word for name in names for word in (name, str(passes)))


def _anp(steps: int) -> tuple[str, ...]:
    return ("--nb_iter", str(steps), "--print_every", str(min(steps, 500)))  # 500 is its default


PEERS: dict[str, Peer] = {
    "ft": Peer("ft", "epochs"),
    "fp": Peer("fp", "epochs", remark="theirs stops pruning by the accuracy on test images"),
    "nc": Peer(
        "neural_cleanse",
        "epochs",
        arguments=_flags("--epochs", "--nc_epoch"),
        remark="where theirs finds a class, the network that it saves is not the one that it repaired",
    ),
    "nad": Peer("nad", "epochs", ("teacher_epochs",), _flags("--te_epochs")),
    "anp": Peer(
        "anp", "iterations", arguments=_anp, remark="theirs chooses its threshold by the ASR on test images"
    ),
    "rnp": Peer("rnp", "recover_epochs", arguments=_flags("--unlearning_epochs", "--recovering_epochs")),
    "clp": Peer("clp", whole=()),
    "ft-sam": Peer("ft_sam", "epochs"),
    "i-bau": Peer("i_bau", "rounds", arguments=_flags("--n_rounds")),
}


class Failed(Exception):
    """A method ended without a result."""


@dataclass(frozen=True)
class Task:
    """One method in one setting.

    Attributes:
        method: Name of the script.
        setting: ``own`` or ``equal``.
        passes: Of both sides; None for each side's defaults.
    """

    method: str
    setting: str
    passes: int | None

    @classmethod
    def all(cls, methods: list[str], settings: list[str], epochs: int | None) -> list[Task]:
        """Return the tasks in their order; a method without passes has one setting."""
        tasks = []
        for setting in settings:
            for method in methods:
                peer = PEERS[method]
                if setting == "own":
                    tasks.append(cls(method, setting, None))
                elif peer.passes:
                    ours = DEFENSES[peer.ours].config()
                    tasks.append(cls(method, setting, epochs or int(getattr(ours, peer.passes))))
        return tasks

    @property
    def name(self) -> str:
        """Of the record."""
        return f"{self.method}.{self.setting}"

    @property
    def options(self) -> dict[str, int]:
        """Options of ours."""
        peer = PEERS[self.method]
        return {} if self.passes is None else dict.fromkeys((peer.passes, *peer.also), self.passes)

    def arguments(self, network: str, config: Path) -> list[str]:
        """Return the options of theirs, all on the processor and without mixed precision."""
        peer = PEERS[self.method]
        words = [
            "--result_file",
            VICTIM,
            "--dataset",
            DATASET,
            "--dataset_path",
            "./data",
            "--model",
            network,
        ]
        words += ["--device", "cpu", "--num_workers", "0", "--amp", "False", "--pin_memory", "False"]
        words += ["--non_blocking", "False", "--yaml_path", str(config), *peer.whole]
        return words if self.passes is None else [*words, *peer.arguments(self.passes)]


class Workplace:
    """The folder in which their scripts run: it looks like a checkout, with data and records of its own.

    Args:
        arguments: Of the command line.
        setting: What both sides are given.
    """

    def __init__(self, arguments: argparse.Namespace, setting: Setting) -> None:
        self.folder: Path = arguments.work.resolve()
        self.arguments, self.setting = arguments, setting
        self.checkout: Path = arguments.checkout.resolve()
        self.network: str = arguments.network or network_name(setting.model)
        if not (self.checkout / "defense").is_dir():
            raise SystemExit(
                f"this is no checkout of BackdoorBench, it has no folder defense: {self.checkout}"
            )
        if "record" in str(self.folder):
            raise SystemExit(
                f"their reader cuts paths at the first 'record', so it must not be in {self.folder}"
            )
        self.state: dict[str, Any] = {
            "victim": setting.model.sha256(),
            "clean": _digest(setting.clean_images.pixels, setting.clean_images.truth),
            "test": _digest(setting.test.pixels, setting.test.truth),
            "checkout": _commit(self.checkout),
            "threads": arguments.threads,
            "seed": arguments.seed,
        }

    def set_up(self) -> None:
        """Make links, attack result and data, unless those of this very victim and these images are there."""
        mark = self.folder / "workplace.json"
        if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == self.state:
            return
        mark.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in _LINKED:
            link = self.folder / name
            if link.is_symlink():
                link.unlink()
            if (self.checkout / name).exists():
                link.symlink_to(self.checkout / name)
        _remove(self.folder / "record", self.folder / "data")
        write_cifar10(self.folder / "data" / DATASET, self.setting.clean_images, self.setting.test)
        write_attack_result(
            self.setting.model, self.setting.truth, self.setting.test, self.folder / "record" / VICTIM,
            network=self.network,
        )  # fmt: skip
        write_json(mark, self.state)

    def theirs(self, task: Task) -> Outcome:
        """Run a script of theirs, and judge what it saved.

        Raises:
            Failed: If it ends with an error, takes too long, or saves nothing that can be read.
        """
        script = self.folder / "defense" / f"{task.method}.py"
        if not script.exists():
            raise Failed(f"the checkout has no defense/{task.method}.py")
        configs = self.folder / "config" / "defense" / task.method
        config = next((c for c in (configs / f"{DATASET}.yaml", configs / "config.yaml") if c.exists()), None)
        if config is None:
            raise Failed(f"the checkout has no configuration in {configs.relative_to(self.folder)}")
        results = self.folder / "record" / VICTIM / "defense" / task.method
        _remove(results)  # what an earlier run left must not be judged
        report, log = self.folder / "report.json", self.folder / "log" / f"{task.name}.txt"
        report.unlink(missing_ok=True)
        log.parent.mkdir(exist_ok=True)
        words = task.arguments(self.network, config.relative_to(self.folder))
        command = [self.arguments.python, str(_PROCESS), str(report), f"defense/{task.method}.py", *words]
        seconds = self._timed(command, log)
        saved = results / DEFENSE_RESULT
        if not saved.exists():
            raise Failed(f"it saved no {DEFENSE_RESULT}")
        try:
            model = read_defense_result(saved, self.setting.model)
            scores = judge(model, self.setting.truth, self.setting.test, self.setting.run)
        except UnbackdoorError as error:
            raise Failed(f"its {DEFENSE_RESULT} cannot be used: {error}") from error
        facts = json.loads(report.read_text(encoding="utf-8"))
        unchanged = _same_weights(saved, self.folder / "record" / VICTIM / RESULT)
        return {**scores.rates(), "seconds": seconds, **facts, "unchanged": unchanged}

    def _timed(self, command: list[str], log: Path) -> float:
        """Run a command within the limit of time and return its seconds; its output goes into a file."""
        surroundings = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.arguments.threads),
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # their files hold arrays and lists beside tensors
            "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
            "MPLBACKEND": "Agg",
        }
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as output:
            output.write(shlex.join(command) + "\n")
            output.flush()
            process = subprocess.Popen(
                command, cwd=self.folder, env=surroundings, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(self.arguments.limit)
            except subprocess.TimeoutExpired:
                raise Failed(f"it took more than {self.arguments.limit:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):  # it and all that it started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise Failed(f"exit code {code}: {lines[-1][:LONGEST_REASON]}")
        return time.perf_counter() - start


def ours(setting: Setting, task: Task) -> Outcome:
    """Repair and judge once; the clock of the algorithm runs while the method does."""
    start = time.perf_counter()
    repaired = call(
        PEERS[task.method].ours, setting.model, setting.clean, options=task.options, seed=setting.run.seed
    )
    algorithm = time.perf_counter() - start
    rates = judge(repaired.model, setting.truth, setting.test, setting.run).rates()
    return {**rates, "algorithm": algorithm, **used()}


def ask(task: Task) -> Outcome:
    """Run ours in a process of its own.

    Raises:
        Failed: If it ends with an error.
    """
    passes = "" if task.passes is None else str(task.passes)
    command = [sys.executable, *sys.argv, "--contestant", f"{task.method}:{task.setting}:{passes}"]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise Failed("ours: " + (done.stderr.strip().splitlines() or ["no word"])[-1][:LONGEST_REASON])
    outcome: Outcome = json.loads(done.stdout.splitlines()[-1])
    return {**outcome, "seconds": time.perf_counter() - start}


def compare(place: Workplace, task: Task) -> Outcome:
    """Return the record of a method, after doing what is missing of it."""
    arguments = place.arguments
    file = place.folder / "rows" / f"{task.name}.json"
    file.parent.mkdir(exist_ok=True)
    same = {**place.state, "method": task.method, "setting": task.setting, "passes": task.passes}
    record: Outcome = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if any(record.get(name) != value for name, value in same.items()) or (
        arguments.retry and "error" in record
    ):
        record = {**same, "remark": PEERS[task.method].remark, "machine": describe_machine(), "pairs": []}
    try:
        while "error" not in record and len(record["pairs"]) < arguments.pairs:
            record["pairs"].append({"theirs": place.theirs(task), "ours": ask(task)})
            write_json(file, record)
    except Failed as failure:
        write_json(file, record | {"error": str(failure)})
        record["error"] = str(failure)
    return record


def ratios(record: Outcome) -> dict[str, Ratio]:
    """Return how many times as fast ours is, end to end and the algorithm alone; nothing where one failed."""
    if "error" in record:
        return {}
    return {
        name: Ratio.of(*([pair[side][name] for pair in record["pairs"]] for side in ("theirs", "ours")))
        for name in WORDS
    }


def lines_of(record: Outcome) -> Iterator[str]:
    """Say what a record holds: both sides as measured last, and the medians of the ratios."""
    head = f"{record['method']:<8}{record['setting']:<7}"
    if "error" in record:
        yield f"{head}failed: {record['error']}"
        return
    for side, numbers in record["pairs"][-1].items():
        rates = "  ".join(f"{name.upper()} {_percent(numbers[name])}" for name in ("acc", "asr", "ra"))
        note = "  (the victim's own weights)" if numbers.get("unchanged") else ""
        yield (
            f"{head}{side:<7}{rates}  {numbers['seconds']:8.1f} s  algorithm {numbers['algorithm']:8.1f} s  "
            f"processor {numbers['processor']:8.1f} s  {numbers['peak_mb']:6.0f} MB{note}"
        )
        head = " " * len(head)
    for name, ratio in ratios(record).items():
        missed = "" if ratio.median >= WANTED.get(name, 0) else f"  missed: wanted {WANTED[name]:g}"
        spread = f"{ratio.low:.1f} to {ratio.high:.1f}"
        yield f"{head}ours is {ratio.median:.1f} times as fast, {WORDS[name]} ({spread}){missed}"
    theirs, own = (record["pairs"][-1][side] for side in ("theirs", "ours"))
    worse = [f"ACC {_percent(theirs['acc'] - own['acc']).strip()}"] if own["acc"] < theirs["acc"] else []
    worse += [f"ASR {_percent(own['asr'] - theirs['asr']).strip()}"] if own["asr"] > theirs["asr"] else []
    if worse:
        yield f"{head}ours is worse: {', '.join(worse)}"
    if record["remark"]:
        yield f"{head}mind: {record['remark']}"


def _percent(value: float | None) -> str:
    return "     -" if value is None else f"{100 * value:5.1f}%"


def _digest(*tensors: Any) -> str:
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def _commit(checkout: Path) -> str:
    """Return the commit of a checkout; where it has none, the hash of its scripts."""
    if (checkout / ".git").exists():
        words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        if not done.returncode:
            return done.stdout.strip()
    scripts = sorted((checkout / "defense").rglob("*.py"))
    return "files " + hashlib.sha256("".join(map(sha256_file, scripts)).encode()).hexdigest()[:16]


def _same_weights(one: Path, other: Path) -> bool:
    from unbackdoor.weights.source import open_source

    states: list[Mapping[str, Any]] = [open_source(file).choose("model").state() for file in (one, other)]
    return states[0].keys() == states[1].keys() and all(
        bool((tensor == states[1][name]).all()) for name, tensor in states[0].items()
    )


def _remove(*folders: Path) -> None:
    import shutil

    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _listed(text: str, known: Mapping[str, object] | tuple[str, ...], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    strange = [name for name in names if name not in known]
    if strange or not names:
        raise SystemExit(f"{what}: expected some of {', '.join(known)}, got {', '.join(strange) or 'none'}")
    return names


def main() -> None:
    """Compare, and print a table."""
    options = parser(__doc__ or "", pairs=1)
    options.add_argument(
        "--checkout", type=Path, required=True, metavar="FOLDER", help="of BackdoorBench; only read"
    )
    options.add_argument(
        "--work", type=Path, required=True, metavar="FOLDER", help="gets data, records and rows"
    )
    options.add_argument(
        "--python", default=sys.executable, help="interpreter that has the packages of the checkout"
    )
    options.add_argument("--methods", default=",".join(PEERS), help="their scripts, separated by commas")
    options.add_argument("--settings", default="own,equal", help="own, equal, or both")
    options.add_argument(
        "--epochs", type=int, help="passes of both sides in the setting equal; default: ours"
    )
    options.add_argument(
        "--network", help="what the checkout calls the network; default: by its architecture"
    )
    options.add_argument("--limit", type=float, default=24 * 3600, help="seconds for one script")
    options.add_argument("--retry", action="store_true", help="do methods that failed again")
    options.add_argument("--contestant", help=argparse.SUPPRESS)
    add_setting_options(options)
    arguments = options.parse_args()
    if arguments.victim is None or arguments.quick:
        options.error("name a victim with --victim; there is no quick form")
    methods = _listed(arguments.methods, PEERS, "--methods")
    settings = _listed(arguments.settings, ("own", "equal"), "--settings")
    setting = prepare(arguments)
    if arguments.contestant:
        method, name, passes = arguments.contestant.split(":")
        print(json.dumps(ours(setting, Task(method, name, int(passes) if passes else None))))
        return
    place = Workplace(arguments, setting)
    place.set_up()
    before = judge(setting.model, setting.truth, setting.test, setting.run).rates()
    print(f"peers: {setting.subject}")
    print(
        "before: " + "  ".join(f"{name.upper()} {_percent(value)}" for name, value in before.items()),
        flush=True,
    )
    records = []
    for task in Task.all(methods, settings, arguments.epochs):
        records.append(compare(place, task))
        for line in lines_of(records[-1]):
            print(line, flush=True)
    result = Result("peers", setting.subject, setting.facts(arguments))
    for record in records:
        for name, ratio in ratios(record).items():
            result.add(f"{record['method']}, {record['setting']}, {WORDS[name]}", ratio)
    result.facts = {"before": before, "records": records}
    if result.ratios:
        result.show({}, arguments.json)


if __name__ == "__main__":
    main()
