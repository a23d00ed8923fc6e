"""The comparison with BackdoorBench: its layout, its programs as processes, and one record each."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import unbackdoor
from unbackdoor.attacks import poison
from unbackdoor.attacks.poison import stamped
from unbackdoor.bench.backdoorbench import NORMALISATION
from unbackdoor.bench.victims import save_victim
from unbackdoor.errors import InputError, UnsafeFile, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, Images

pytestmark = pytest.mark.leaves_traces  # the benchmarks are programs and seed torch as such
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPEC = "small_cnn[width=8]"
MEAN, STD = NORMALISATION["cifar10"]
CLASSES = tuple("abcdefghij")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules; they find each other in their folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = ("peers", "_backdoorbench", "_peer_process", "_setting")
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(BENCHMARKS))


def images(count: int = 40, seed: int = 0) -> Images:
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=draws, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % 10, CLASSES, "made up")


def victim(std: tuple[float, ...] = STD, mean: tuple[float, ...] = MEAN, attack: str = "badnets") -> Any:
    model = build(SPEC, input_shape=(3, 32, 32), class_names=CLASSES, mean=mean, std=std, seed=1)
    options = {} if attack == "none" else {"target": 3, "poison_rate": 0.1}
    return model.eval(), poison(images(), attack, options)[1]


def logits(model: Classifier, of: Images) -> torch.Tensor:
    with torch.no_grad():
        return model(of.pixels.float() / 255)


# ---------------------------------------------------------------------------------------------------
# The layout


@pytest.mark.parametrize("std", [STD, (0.2470, 0.2435, 0.2616)], ids=["its deviations", "ours"])
def test_export_and_import_give_the_same_network_and_images(
    modules: dict[str, ModuleType], tmp_path: Path, std: tuple[float, ...]
) -> None:
    model, truth = victim(std)
    test, folder = images(30, seed=2), tmp_path / "record" / "victim"
    file = modules["_backdoorbench"].write_attack_result(model, truth, test, folder, network="smallcnn")
    done = unbackdoor.import_backdoorbench(file, arch=SPEC, class_names=CLASSES)
    eligible = truth.eligible(test)
    assert torch.equal(done.triggered.pixels, stamped(eligible.pixels, truth))
    assert torch.equal(done.triggered.truth, eligible.truth) and done.target == 3
    assert (done.network, done.dataset) == ("smallcnn", "cifar10") and len(eligible) == 27
    again = done.opened.model
    assert torch.allclose(logits(again, test), logits(model, test), atol=1e-4)
    if std == STD:
        held = model.network.state_dict()
        assert all(torch.equal(tensor, held[name]) for name, tensor in again.network.state_dict().items())


def test_what_cannot_be_exported_is_refused_in_words(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    write, folder = modules["_backdoorbench"].write_attack_result, tmp_path / "record" / "victim"
    with pytest.raises(UnsupportedModel, match="no network with these tensors"):
        write(*victim(), images(), folder)
    with pytest.raises(InputError, match="subtracts another mean"):
        write(*victim(mean=(0.5, 0.5, 0.5)), images(), folder, network="smallcnn")
    with pytest.raises(InputError, match="carries no attack"):
        write(*victim(attack="none"), images(), folder, network="smallcnn")
    assert not (folder / "attack_result.pt").exists()


def test_a_network_that_begins_otherwise_cannot_take_the_deviations(modules: dict[str, ModuleType]) -> None:
    model, _ = victim((0.2, 0.2, 0.2))
    model.network.conv1 = torch.nn.Conv2d(3, 3, 3, groups=3)
    with pytest.raises(UnsupportedModel, match="does not begin with a convolution"):
        modules["_backdoorbench"].renormalised(model)


def test_their_data_are_the_defenders_images_and_the_test_images(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    clean, test = images(13, seed=3), images(20, seed=4)
    modules["_backdoorbench"].write_cifar10(tmp_path, clean, test)
    folder = tmp_path / "cifar-10-batches-py"
    parts = [pickle.loads((folder / f"data_batch_{n}").read_bytes()) for n in range(1, 6)]
    pixels = np.vstack([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    assert np.array_equal(pixels, clean.pixels.numpy()) and pixels.dtype == np.uint8
    assert [label for part in parts for label in part["labels"]] == clean.truth.tolist()
    held = pickle.loads((folder / "test_batch").read_bytes())
    assert np.array_equal(held["data"].reshape(-1, 3, 32, 32), test.pixels.numpy())
    assert pickle.loads((folder / "batches.meta").read_bytes())["label_names"] == list(CLASSES)


def saved(file: Path, state: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_name": "smallcnn", "num_classes": 10, "model": state}, file)
    return file


class Harm:
    """What a hostile result would do."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_what_they_save_is_read_with_its_masks_and_never_run(
    modules: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, (model, _) = modules["_backdoorbench"].read_defense_result, victim()
    monkeypatch.chdir(tmp_path)
    state = dict(model.network.state_dict())
    name = next(name for name in state if name.startswith("fc") and name.endswith("weight"))
    mask = torch.ones_like(state[name])
    mask[:, :5] = 0
    pruned = {f"{name}_orig": state[name], f"{name}_mask": mask}
    pruned |= {other: tensor for other, tensor in state.items() if other != name}
    found = read(saved(tmp_path / "pruned.pt", pruned), model)
    assert torch.equal(found.network.state_dict()[name], state[name] * mask) and not found.training
    assert torch.allclose(
        logits(read(saved(tmp_path / "same.pt", state), model), images()), logits(model, images())
    )
    with pytest.raises(UnsupportedModel, match="not those of the network"):
        read(saved(tmp_path / "other.pt", {"weight": torch.ones(3)}), model)
    with pytest.raises(UnsafeFile):
        read(saved(tmp_path / "harm.pt", {**state, "more": Harm()}), model)
    with pytest.raises(InputError):
        read(saved(tmp_path / "none.pt", {}), model)
    assert not (tmp_path / "harmed").exists()


# ---------------------------------------------------------------------------------------------------
# One process


SCRIPT = """
import argparse, sys
import numpy as np, torch
from utils.kept import keep
time = json = Path = None  # names of the clocks' own
parser = argparse.ArgumentParser()
parser.add_argument("--device")
args = parser.parse_args()
class Local:
    pass
torch.save(Local(), "local.pt")  # found again by its name
torch.load("local.pt", weights_only=False)
x = torch.zeros(1, device='cuda')
keep([np.infty == np.inf, args.device, sys.argv[0], x.device.type])
"""


def test_a_script_runs_as_its_own_program(tmp_path: Path) -> None:
    (tmp_path / "defense").mkdir()
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "kept.py").write_text(
        "import json\ndef keep(x):\n    open('kept.json', 'w').write(json.dumps(x))\n"
    )
    (tmp_path / "defense" / "any.py").write_text(SCRIPT)
    program = str(BENCHMARKS / "_peer_process.py")
    command = [sys.executable, program, "report.json", "defense/any.py", "--device", "cpu"]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "kept.json").read_text()) == [True, "cpu", "defense/any.py", "cpu"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"algorithm", "evaluation", "processor", "peak_mb"} and report["peak_mb"] > 10


class Part:
    """A data set as torchvision's know their part."""

    def __init__(self, train: bool) -> None:
        self.train, self.held = train, TensorDataset(torch.arange(6))

    def __len__(self) -> int:
        return 6

    def __getitem__(self, row: int) -> Any:
        return self.held[row]


class Wrapped(Part):
    """One that wraps another, and passes on what it is asked for."""

    def __init__(self, dataset: Any, name: str) -> None:
        vars(self)[name] = dataset
        self.held = TensorDataset(torch.arange(6))


def test_passes_over_test_images_are_told_from_those_over_training_images(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = modules["_peer_process"]
    monkeypatch.setattr(torch, "load", torch.load)  # both are put back
    monkeypatch.setattr(DataLoader, "__iter__", DataLoader.__iter__)
    figure = pytest.importorskip("matplotlib.figure", reason="pictures are matplotlib's")
    monkeypatch.setattr(figure.Figure, "savefig", figure.Figure.savefig)
    clocks = process.Clocks()
    clocks.put_on()
    train, test = (Wrapped(Wrapped(Part(part), "dataset"), "wrapped_dataset") for part in (True, False))
    assert [process.of_tests(one) for one in (train, test, Part(False))] == [False, True, True]
    seen = [int(batch[0].sum()) for batch in DataLoader(train, 3)]  # type: ignore[arg-type]
    assert clocks.aside == 0 and seen == [3, 12]
    assert [int(batch[0].sum()) for batch in DataLoader(test, 3)] == [3, 12]  # type: ignore[arg-type]
    assert clocks.aside > 0 and clocks.report()["algorithm"] >= 0
    before = clocks.aside
    figure.Figure().savefig(os.devnull, format="svg")
    assert clocks.aside > before


# ---------------------------------------------------------------------------------------------------
# Records


PROGRAM = r"""#!/bin/sh
# What stands in the place of their interpreter: $2 is the report, $3 the script.
method=$(basename "$3" .py)
echo "$method $*" >> calls
folder=record/victim/defense/$method
mkdir -p "$folder"
case $method in
ft|clp|nc) cp record/victim/attack_result.pt "$folder/defense_result.pt" ;;
fp) echo "Traceback"; echo "ValueError: they said so"; exit 3 ;;
rnp) echo "no checkpoint" > "$folder/defense_result.pt" ;;
anp) sleep 600 ;;
esac
echo '{"algorithm": 1.5, "evaluation": 0.5, "processor": 8, "peak_mb": 100}' > "$2"
"""


@pytest.fixture
def arguments(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    tmp_path = tmp_path_factory.mktemp("peers")  # the name of a test may hold the word that is refused
    checkout = tmp_path / "checkout"
    for method in ("ft", "clp", "nc", "fp", "rnp", "anp", "nad"):
        for file in (f"defense/{method}.py", f"config/defense/{method}/cifar10.yaml"):
            (checkout / file).parent.mkdir(parents=True, exist_ok=True)
            (checkout / file).write_text("")
    (checkout / "config/defense/ft/cifar10.yaml").rename(checkout / "config/defense/ft/config.yaml")
    program = tmp_path / "interpreter"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    model, truth = victim()
    save_victim(model, truth, tmp_path / "victim.safetensors", history=[])
    return argparse.Namespace(
        checkout=checkout, work=tmp_path / "work", python=str(program), network="smallcnn", threads=1, seed=0,
        limit=600.0, retry=False, pairs=1, victim=tmp_path / "victim.safetensors", quick=False, clean=20,
        test_images=30, data="made-up", num_workers=0,
    )  # fmt: skip


@pytest.fixture
def place(
    modules: dict[str, ModuleType], arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A work folder; ours answers at once."""
    answer = {
        "acc": 0.9,
        "asr": 0.1,
        "ra": 0.8,
        "seconds": 0.5,
        "algorithm": 0.25,
        "processor": 2.0,
        "peak_mb": 50.0,
    }
    monkeypatch.setattr(modules["peers"], "ask", lambda task: dict(answer))
    made = modules["peers"].Workplace(arguments, modules["_setting"].prepare(arguments))
    made.set_up()
    return made


def task(modules: dict[str, ModuleType], method: str, setting: str = "own", passes: int | None = None) -> Any:
    return modules["peers"].Task(method, setting, passes)


def calls(place: Any) -> list[str]:
    file = place.folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_record_has_both_sides_and_is_not_made_again(modules: dict[str, ModuleType], place: Any) -> None:
    peers, before = modules["peers"], tree(place.checkout)
    record = peers.compare(place, task(modules, "ft"))
    (pair,) = record["pairs"]
    # It saved the victim, so it is judged as the victim, and that is said.
    judged = peers.judge(
        place.setting.model, place.setting.truth, place.setting.test, place.setting.run
    ).rates()
    assert {name: pair["theirs"][name] for name in judged} == judged and pair["theirs"]["unchanged"]
    assert pair["theirs"]["algorithm"] == 1.5 and pair["theirs"]["seconds"] > 0
    ratios = peers.ratios(record)
    assert ratios["algorithm"].median == 6 and ratios["processor"].median == 4
    assert ratios["seconds"].median == pair["theirs"]["seconds"] / 0.5
    text = "\n".join(peers.lines_of(record))
    assert "6.0 times as fast, algorithm alone" in text and "the victim's own weights" in text
    worse = dict(pair["ours"], acc=judged["acc"] - 0.25, asr=judged["asr"] + 0.125)
    (line,) = [x for x in peers.lines_of({**record, "pairs": [{**pair, "ours": worse}]}) if "worse" in x]
    assert line.endswith("ours is worse: ACC 25.0%, ASR 12.5%")
    kept = json.loads((place.folder / "rows" / "ft.own.json").read_text())
    assert kept == json.loads(json.dumps(record)) and kept["machine"]["threads"] >= 1
    # Again: nothing runs. With more pairs: what is missing.
    assert peers.compare(place, task(modules, "ft"))["pairs"] == record["pairs"] and len(calls(place)) == 1
    place.arguments.pairs = 3
    assert len(peers.compare(place, task(modules, "ft"))["pairs"]) == 3 and len(calls(place)) == 3
    assert tree(place.checkout) == before  # which is only read
    # Of another victim: a new record.
    place.state["victim"] = "other"
    place.arguments.pairs = 1
    assert len(peers.compare(place, task(modules, "ft"))["pairs"]) == 1 and len(calls(place)) == 4


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("fp", "exit code 3: ValueError: they said so"),
        ("nad", "it saved no defense_result.pt"),
        ("rnp", "its defense_result.pt cannot be used"),
        ("i-bau", "the checkout has no defense/i-bau.py"),
        ("anp", "it took more than 0.2 s"),
    ],
)
def test_a_method_that_fails_is_a_record_with_its_reason(
    modules: dict[str, ModuleType], place: Any, method: str, reason: str
) -> None:
    peers = modules["peers"]
    place.arguments.limit = 0.2 if method == "anp" else 600
    record = peers.compare(place, task(modules, method))
    assert reason in record["error"] and "failed: " in "\n".join(peers.lines_of(record))
    assert json.loads((place.folder / "rows" / f"{method}.own.json").read_text())["error"] == record["error"]
    count = len(calls(place))
    assert (
        peers.compare(place, task(modules, method))["error"] == record["error"] and len(calls(place)) == count
    )
    place.arguments.retry = True
    assert reason in peers.compare(place, task(modules, method))["error"]
    assert len(calls(place)) == count + (method not in ("i-bau", "anp")) or method == "anp"


def test_what_an_earlier_run_saved_is_not_judged(modules: dict[str, ModuleType], place: Any) -> None:
    left = place.folder / "record" / "victim" / "defense" / "nad" / "defense_result.pt"
    saved(left, place.setting.model.network.state_dict())
    assert "saved no" in modules["peers"].compare(place, task(modules, "nad"))["error"]


def test_ours_that_fails_is_told_apart(
    modules: dict[str, ModuleType], place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(task: Any) -> None:
        raise modules["peers"].Failed("ours: MethodFailed")

    monkeypatch.setattr(modules["peers"], "ask", fail)
    assert modules["peers"].compare(place, task(modules, "ft"))["error"] == "ours: MethodFailed"


def test_settings_give_both_sides_the_same_number_of_passes(
    modules: dict[str, ModuleType], place: Any
) -> None:
    peers = modules["peers"]
    tasks = peers.Task.all(["ft", "clp", "nad", "anp"], ["own", "equal"], None)
    named = {one.name: one for one in tasks}
    assert "clp.own" in named and "clp.equal" not in named  # it has no passes
    assert named["ft.own"].options == {} and "--epochs" not in named["ft.own"].arguments("n", Path("c"))
    assert named["nad.equal"].options == {"epochs": 100, "teacher_epochs": 100}
    assert " --te_epochs 100" in " ".join(named["nad.equal"].arguments("n", Path("c")))
    (few,) = peers.Task.all(["anp"], ["equal"], 7)
    assert few.options == {"iterations": 7}
    assert " --nb_iter 7 --print_every 7" in " ".join(few.arguments("n", Path("c")))
    # Every option of ours is one that its method has, and every share of the images is all of them.
    for method, peer in peers.PEERS.items():
        for one in peers.Task.all([method], ["equal"], 3):
            assert DEFENSES[peer.ours].config(**one.options)
        assert ("--ratio 1" in " ".join(task(modules, method).arguments("n", Path("c")))) == (method != "clp")
    peers.compare(place, task(modules, "nc", "equal", 4))
    assert "--epochs 4 --nc_epoch 4" in calls(place)[-1] and "--device cpu" in calls(place)[-1]
    assert "--yaml_path config/defense/nc/cifar10.yaml" in calls(place)[-1]
    peers.compare(place, task(modules, "ft"))
    assert "--yaml_path config/defense/ft/config.yaml" in calls(place)[-1]


def test_ours_is_the_registered_method_on_the_same_images(modules: dict[str, ModuleType], place: Any) -> None:
    done = modules["peers"].ours(place.setting, task(modules, "ft", "equal", 1))
    assert set(done) == {"acc", "asr", "ra", "algorithm", "processor", "peak_mb"} and 0 <= done["acc"] <= 1


def test_folders_that_cannot_serve_are_refused(
    modules: dict[str, ModuleType], arguments: argparse.Namespace
) -> None:
    setting = modules["_setting"].prepare(arguments)
    for change, message in (
        ({"checkout": arguments.work}, "no checkout of BackdoorBench"),
        ({"work": arguments.work / "records"}, "'record'"),
    ):
        with pytest.raises(SystemExit, match=message):
            modules["peers"].Workplace(argparse.Namespace(**{**vars(arguments), **change}), setting)
    with pytest.raises(SystemExit, match="got abc"):
        modules["peers"]._listed("ft,abc", modules["peers"].PEERS, "--methods")
