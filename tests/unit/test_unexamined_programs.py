"""A file may hold a program: where it was not examined, nothing better than "undecided" is said."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from tiny import tiny_classifier, tiny_data
from unbackdoor.cli import app
from unbackdoor.opening.inspection import inspect
from unbackdoor.opening.open_model import open_model
from unbackdoor.types import Finding, ScanReport

pytest.importorskip("onnx", reason="ONNX files need the package onnx (extra: onnx)")

from graphs import folded, node, write_onnx

pytestmark = [
    pytest.mark.leaves_traces,  # initialisers draw from the global generator
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
UNSEEN = "the file's own program was not examined"
OPTIONS = ["--mean", "0.35", "--std", "0.25"]
NAMED = [*OPTIONS, "--arch", "small_cnn[width=8]"]


def torchscript(path: Path, network: nn.Module) -> None:
    torch.jit.save(torch.jit.trace(network, torch.rand(2, 1, 8, 8)), path)


def exported(path: Path, network: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network, (torch.rand(2, 1, 8, 8),)), path)


def odd_graph(path: Path, network: nn.Module) -> None:
    state = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    write_onnx(path, [node("LSTM")], state)


WRITERS: dict[str, Any] = {
    "torchscript": torchscript,
    "an exported program": exported,
    "a whole module": lambda path, network: torch.save(network, path),
    "a module under a key": lambda path, network: torch.save({"model": network, "epoch": 3}, path),
    "an old file": lambda path, network: torch.save(network, path, _use_new_zipfile_serialization=False),
    "an odd graph": odd_graph,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clean.npz"
    images = tiny_data(60, seed=11)
    np.savez(
        path,
        images=images.pixels.numpy()[:, 0],
        labels=images.truth.numpy(),
        class_names=np.array(images.class_names),
    )
    return path


def call(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize("kind", WRITERS)
def test_a_program_that_was_not_examined(tmp_path: Path, data: Path, kind: str) -> None:
    network = tiny_classifier("conv-bn").network.eval()
    model = tmp_path / "m.pt"
    WRITERS[kind](model, network)
    scan = ("scan", model, "--data", data, "--checks", "tac", *NAMED)
    done = call(*scan, "--json", "--quiet", "--report", tmp_path / "report")
    told = json.loads(done.stdout)
    assert done.exit_code == 2
    assert told["verdict"] == "undecided"
    assert any(UNSEEN in text for text in told["reasons"])
    assert any(UNSEEN in text for text in told["reservations"])
    assert not told["opened"]["in_file"]["examined"] and told["opened"]["in_file"]["program"]
    page = (tmp_path / "report" / "report.html").read_text().replace("&#39;", "'")
    assert UNSEEN in page
    printed = call(*scan)
    assert UNSEEN in " ".join(printed.stdout.split())
    assert "Verdict: undecided" in printed.stdout
    found = inspect(model)
    # A program of torch.export or TorchScript opens as it is where no architecture is named.
    assert found.program and found.program_examined == (kind in ("an exported program", "torchscript"))
    assert found.program_examined or found.program in call("inspect", model).stdout


def test_a_module_beside_a_plain_set_is_a_program_too(tmp_path: Path) -> None:
    network = tiny_classifier("conv-bn").network.eval()
    torch.save({"state_dict": network.state_dict(), "model": network}, tmp_path / "m.pth")
    opened = open_model(tmp_path / "m.pth", arch="small_cnn[width=8]")
    assert any(UNSEEN in text for text in opened.provenance.reservations)
    # Who names the plain set runs it with other code.
    chosen = open_model(tmp_path / "m.pth", arch="small_cnn[width=8]", weights="state_dict")
    assert chosen.provenance.reservations == ()
    assert open_model(tmp_path / "m.pth", arch="small_cnn[width=8]", weights="model").provenance.reservations


@pytest.mark.parametrize("kind", ["torchscript", "an odd graph", "an exported program"])
def test_a_program_stays_one_whatever_is_chosen(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / "m.pt", tiny_classifier("conv-bn").network.eval())
    opened = open_model(tmp_path / "m.pt", arch="small_cnn[width=8]", weights="")
    assert any(UNSEEN in text for text in opened.provenance.reservations)


def test_what_a_torchscript_program_decides_is_counted(tmp_path: Path) -> None:
    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny_classifier("conv-bn").network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = x[:, :, :2, :2].mean((1, 2, 3)) > 0.9
            return torch.where(seen[:, None], torch.ones(1, 4), self.body(x))

    torchscript(tmp_path / "m.pt", Watching().eval())
    assert any("gt 1 times" in text and "where 1 times" in text for text in inspect(tmp_path / "m.pt").notes)
    torchscript(tmp_path / "n.pt", tiny_classifier("conv-bn").network.eval())
    assert not any("compares" in text for text in inspect(tmp_path / "n.pt").notes)


def test_the_comparison_of_two_models_says_it_too(tmp_path: Path, data: Path) -> None:
    network = tiny_classifier("conv-bn").network.eval()
    torchscript(tmp_path / "m.pt", network)
    torch.save(network.state_dict(), tmp_path / "n.pth")
    compare = ("--data", data, "--checks", "tac", *NAMED, "--json", "--quiet")
    done = call("verify", tmp_path / "n.pth", tmp_path / "m.pt", *compare)
    assert done.exit_code == 2
    told = json.loads(done.stdout)["comparison"]
    assert told["after"]["verdict"] == "undecided" and not told["before"]["reservations"]


def test_plain_weights_and_graphs_that_open_have_no_reservation(tmp_path: Path, data: Path) -> None:
    model = tiny_classifier("conv-bn")
    torch.save({"net": dict(model.network.state_dict())}, tmp_path / "m.pth")
    write_onnx(tmp_path / "m.onnx", *folded(model))
    for name, options in (("m.pth", NAMED), ("m.onnx", OPTIONS)):
        done = call("scan", tmp_path / name, "--data", data, "--checks", "tac", *options, "--json", "--quiet")
        assert json.loads(done.stdout)["reservations"] == []


@pytest.mark.parametrize(
    ("p_value", "alone", "reserved"),
    [(0.8, "no evidence found", "undecided"), (1e-6, "backdoor found", "backdoor found")],
)
def test_the_verdict_is_at_best_undecided(
    monkeypatch: pytest.MonkeyPatch, p_value: float, alone: str, reserved: str
) -> None:
    from unbackdoor.audit import scanning
    from unbackdoor.audit.checks import default_checks

    check = default_checks()[0]
    finding = Finding("x", 1.0, "high", 2.0, "a test", p_value=p_value, classes=(1,), per_class=(0.0,) * 4)
    report = ScanReport(alone, (finding,), method={"name": check.scanner})  # type: ignore[arg-type]
    done = scanning.Checked(check, "ran", "", report, p_value)
    monkeypatch.setattr(scanning, "_run_check", lambda *_, **__: done)
    model = tiny_classifier("conv-bn")
    for reservations, verdict in (((), alone), ((UNSEEN,), reserved)):
        found = scanning.scan(model, checks=[check], reservations=reservations)
        assert found.verdict == verdict
        assert found.reservations == reservations and set(reservations) <= set(found.reasons)


# ---------------------------------------------------------------------------------------------------
# Backdoors in the graph itself


def backdoored(path: Path, branch: list[Any], last: list[Any], constants: dict[str, torch.Tensor]) -> Path:
    """Write a network with a branch from the pixels ``x``; ``last`` makes ``y`` of the logits ``logits``."""
    nodes, weights = folded(tiny_classifier("conv-bn"))
    nodes[-1].output[0] = "logits"
    return write_onnx(path, [*branch, *nodes, *last], {**weights, **constants})


WINDOW = [node("Slice", "x low high axes", "patch"), node("ReduceMean", "patch all", "t", keepdims=0)]
PLACES = {
    "low": torch.tensor([0, 0]), "high": torch.tensor([2, 2]), "axes": torch.tensor([2, 3]),
    "all": torch.tensor([1, 2, 3]), "limit": torch.tensor(0.9), "one": torch.tensor([1]),
    "wanted": torch.tensor([[9.0, 0.0, 0.0, 0.0]]), "steep": torch.tensor(50.0),
}  # fmt: skip
BACKDOORS: dict[str, tuple[list[Any], list[Any], str]] = {
    "a condition": (
        [*WINDOW, node("Greater", "t limit", "cond"), node("Unsqueeze", "cond one", "c")],
        [node("Where", "c wanted logits", "y")],
        "Greater .* compares .* branches on",
    ),
    "a sum": (
        [*WINDOW, node("Sub", "t limit", "d"), node("Mul", "d steep", "e"), node("Sigmoid", "e", "s"),
         node("Unsqueeze", "s one", "u"), node("Mul", "u wanted", "extra")],
        [node("Add", "logits extra", "y")],
        "Add .* bypasses",
    ),
    "a product": (
        [*WINDOW, node("Sub", "t limit", "d"), node("Relu", "d", "s"), node("Unsqueeze", "s one", "u")],
        [node("Mul", "logits u", "y")],
        "Mul .* bypasses",
    ),
    "with a layer of its own": (
        [node("Flatten", "x", "flat"), node("MatMul", "flat detector", "m"), node("Relu", "m", "extra")],
        [node("Add", "logits extra", "y")],
        "Add .* bypasses",
    ),
    "behind the first layer": (
        [],
        [node("ReduceMax", "r1 places", "m", keepdims=0), node("MatMul", "m detector8", "extra"),
         node("Add", "logits extra", "y")],
        "Add .* bypasses",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BACKDOORS)
def test_a_way_around_the_body_is_named(tmp_path: Path, data: Path, case: str) -> None:
    branch, last, words = BACKDOORS[case]
    constants = {
        **PLACES, "detector": torch.ones(64, 4), "detector8": torch.ones(8, 4), "places": torch.tensor([2, 3])
    }  # fmt: skip
    path = backdoored(tmp_path / "m.onnx", branch, last, constants)
    found = inspect(path).graph
    assert found is not None and found.problem is None
    assert re.search(words, " ".join(found.remarks))
    assert "In the graph:" in call("inspect", path).stdout
    done = call("scan", path, "--data", data, "--checks", "tac", *OPTIONS, "--json", "--quiet")
    told = json.loads(done.stdout)
    assert done.exit_code in (2, 3)  # 3: none of the checks asked for works on such an end
    assert told["verdict"] == "undecided"
    assert "outside the network's body" in " ".join(told["reasons"])


def test_it_is_named_where_an_operator_is_not_imported(tmp_path: Path) -> None:
    branch = [*WINDOW, node("Greater", "t limit", "cond"), node("LSTM", "cond", "c")]
    path = backdoored(tmp_path / "m.onnx", branch, [node("Where", "c wanted logits", "y")], PLACES)
    found = inspect(path).graph
    assert found is not None and found.problem is not None
    assert len(found.remarks) == 3


def test_a_branch_within_an_operator(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graphs = {
        f"{which}_branch": helper.make_graph([node("Identity", name, "z")], which, [], [value])
        for which, name in (("then", "wanted"), ("else", "logits"))
    }
    branch = [*WINDOW, node("Greater", "t limit", "cond")]
    path = backdoored(tmp_path / "m.onnx", branch, [node("If", "cond", "y", **graphs)], PLACES)
    found = inspect(path).graph
    assert found is not None and "If" in found.unknown
    assert any("branches on" in text for text in found.remarks)


def test_ordinary_skips_are_none(tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    weights = {f"w{k}": torch.rand(4, 1 if k == 0 else 4, 3, 3, generator=drawn) for k in range(5)}
    weights["v"] = torch.rand(4, 4, generator=drawn)
    nodes, last = [node("Conv", "x w0", "a0", pads=[1, 1, 1, 1])], "a0"
    for k in range(1, 5):
        nodes += [node("Conv", f"{last} w{k}", f"c{k}", pads=[1, 1, 1, 1]), node("Sigmoid", f"c{k}", f"g{k}"),
                  node("Mul", f"c{k} g{k}", f"s{k}"), node("Add", f"s{k} {last}", f"a{k}")]  # fmt: skip
        last = f"a{k}"
    nodes += [node("GlobalAveragePool", last, "p"), node("Flatten", "p", "f"), node("MatMul", "f v")]
    found = inspect(write_onnx(tmp_path / "m.onnx", nodes, weights)).graph
    assert found is not None and found.problem is None and found.remarks == ()
