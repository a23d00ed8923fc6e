"""Results in a session and in a notebook: a line, a table, a frame, a chart; names of strangers are text."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.audit.notebook import in_notebook, shown
from unbackdoor.errors import MissingExtra
from unbackdoor.result_views import Viewed
from unbackdoor.types import silent

HOSTILE = "<script>alert(1)</script>\x1b[2J$x$"
FEW: dict[str, Any] = {"checks": ["weight_statistics"]}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Viewed]:
    model, images = tiny_classifier("conv-bn"), tiny_data(60, seed=11)
    named = unbackdoor.Classifier(
        model.network,
        input_shape=model.input_shape,
        class_names=(HOSTILE, "b", "c", "d"),
        mean=tuple(model.mean.flatten().tolist()),
        std=tuple(model.std.flatten().tolist()),
    )
    images = replace(images, class_names=named.class_names)
    file = tmp_path_factory.mktemp("views") / "model.safetensors"
    save_file({"fc.weight": torch.zeros(3, 4), HOSTILE: torch.zeros(2)}, file)
    return {
        "Audit": unbackdoor.scan(named, images, checks=["weight_statistics", "tac"]),
        "Purification": unbackdoor.purify(named, images, "random_prune"),
        "Verification": unbackdoor.verify(named, named, images, **FEW),
        "ScreenedImages": unbackdoor.screen(named, images, "strip", images, options={"overlays": 2}),
        "Inspection": unbackdoor.inspect(file),
        "Assessment": unbackdoor.audit(named, images, checks=["weight_statistics"], plan=True),
        "Evaluation": unbackdoor.evaluate(
            named, _data_set(images), triggered=images, target=1, before=named, precision="fp32"
        ),
    }


def _data_set(images: unbackdoor.Images) -> Any:
    from unbackdoor.data.datasets import DataSet

    return DataSet("own", images, images, "none", (0.5,), (0.5,))


def test_every_result_is_seen_in_one_line_and_as_a_table(results: dict[str, Viewed]) -> None:
    for name, result in results.items():
        line = repr(result)
        assert line.startswith(f"<{name}: ") and "\n" not in line and "\x1b" not in line and len(line) < 400
        rows = result.rows()
        assert len({tuple(row) for row in rows}) <= 1  # the same columns
        html = result._repr_html_()
        assert "<script>" not in html and "\x1b" not in html
        assert html.count("<tr>") == (1 + min(len(rows), 20) if rows else 0)
        assert len(re.findall("<table>", html)) == len(re.findall("</table>", html)) == bool(rows)
        assert result.to_dict()  # type: ignore[attr-defined]
    assert "&lt;script&gt;" in results["Inspection"]._repr_html_()


def test_every_result_is_a_chart(results: dict[str, Viewed]) -> None:
    pytest.importorskip("matplotlib", reason="charts are matplotlib's (extra: report)")
    for name, result in results.items():
        figure = result.plot()
        figure.canvas.draw()
        bars = result.bars()
        assert len(figure.axes[0].patches) == (len(bars.values) if bars else 0), name
    assert results["Audit"].bars() and results["Evaluation"].bars() and results["Inspection"].bars() is None


def test_every_result_is_a_frame(results: dict[str, Viewed]) -> None:
    pandas = pytest.importorskip("pandas", reason="frames are pandas' (extra: frame)")
    for result in results.values():
        frame = result.to_frame()
        assert isinstance(frame, pandas.DataFrame) and len(frame) == len(result.rows())


@pytest.mark.parametrize(("module", "call"), [("pandas", "to_frame"), ("matplotlib.figure", "plot")])
def test_a_library_that_is_missing_is_named(
    results: dict[str, Viewed], monkeypatch: pytest.MonkeyPatch, module: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match="pip install"):
        getattr(results["Audit"], call)()


def test_a_notebook_shows_a_bar_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(silent) is silent
    kernel = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    bar = shown(silent)
    assert bar is not silent and [*bar(range(3), "counting [b]")] == [0, 1, 2]

    def own(items: Any, label: str, total: int | None = None) -> Any:
        return items

    assert shown(own) is own
    monkeypatch.setenv("UNBACKDOOR_PROGRESS", "0")
    assert shown(silent) is silent
    monkeypatch.delenv("UNBACKDOOR_PROGRESS")
    # A terminal of IPython is no notebook.
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=SimpleNamespace))
    assert not in_notebook()
