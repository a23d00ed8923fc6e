"""Nothing that exists is lost: outputs are checked before the work, and replaced only by force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor import InputError
from unbackdoor.audit.scanning import Audit
from unbackdoor.cli.app import app
from unbackdoor.cli.demo import DemoSettings, run_demo
from unbackdoor.files import atomic_write, require_writable, writing
from unbackdoor.report.audit import MAX_TRIGGERS
from unbackdoor.triggers import RecoveredTrigger
from unbackdoor.weights.triggers import PNG, TENSORS, write_triggers

TRIGGER = RecoveredTrigger(1, torch.full((1, 8, 8), 0.5), torch.full((8, 8), 0.25))


@pytest.fixture(scope="module")
def audit() -> Audit:
    return unbackdoor.scan(tiny_classifier("conv-bn"), tiny_data(60), checks=["tac"])


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("place", range(MAX_TRIGGERS))
@pytest.mark.parametrize("name", [PNG, TENSORS])
def test_triggers_of_an_earlier_report_are_kept(audit: Audit, tmp_path: Path, place: int, name: str) -> None:
    kept = tmp_path / f"trigger-{place}" / name
    kept.parent.mkdir()
    kept.write_bytes(b"of an earlier scan")
    with pytest.raises(InputError, match="the file exists"):
        audit.save_report(tmp_path)
    assert content(tmp_path) == {f"trigger-{place}/{name}": b"of an earlier scan"}
    audit.save_report(tmp_path, force=True)
    assert b"of an earlier scan" not in content(tmp_path).values()


@pytest.mark.parametrize("name", ["report.html", "result.json", "trigger-2/trigger.png"])
def test_a_scan_refuses_a_used_folder_before_its_work(tmp_path: Path, name: str) -> None:
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "model.pth")
    used = tmp_path / "report" / name
    used.parent.mkdir(parents=True)
    used.write_bytes(b"old")
    # There is no such data set: the folder is refused before anything is opened.
    report = str(tmp_path / "report")
    outcome = CliRunner().invoke(
        app,
        ["scan", str(tmp_path / "model.pth"), "--data", "none-such", "--report", report],
    )
    assert outcome.exit_code == 2 and "the file exists" in outcome.stderr, outcome.stderr
    assert content(tmp_path / "report") == {name: b"old"}


def test_of_two_results_for_one_folder_the_first_is_kept(audit: Audit, tmp_path: Path) -> None:
    # Both have passed the check before the work; the second comes to its end after the first.
    require_writable((tmp_path / "report.html", tmp_path / "result.json"), force=False)
    audit.save_report(tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match="the file exists"):
        audit.save_report(tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_after_the_check_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:  # a file system that has no hard links

        def refused(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refused)
    target = tmp_path / "result.json"
    with pytest.raises(InputError, match="the file exists"), writing((target,), force=False):
        target.write_text("of another process")
        with atomic_write(target) as draft:
            draft.write_text("mine")
    assert content(tmp_path) == {"result.json": b"of another process"}
    with writing((tmp_path / "new",), force=False), atomic_write(tmp_path / "new") as draft:
        draft.write_text("mine")
    with writing((target,), force=True), atomic_write(target) as draft:
        draft.write_text("mine")
    assert content(tmp_path) == {"result.json": b"mine", "new": b"mine"}


@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_the_place_of_a_triggers_folder_is_not_followed(
    audit: Audit, tmp_path: Path, force: bool
) -> None:
    elsewhere, report = tmp_path / "elsewhere", tmp_path / "report"
    elsewhere.mkdir()
    report.mkdir()
    (elsewhere / PNG).write_bytes(b"somebody's")
    (report / "trigger-1").symlink_to(elsewhere)
    with pytest.raises(InputError, match="link"):
        audit.save_report(report, force=force)
    with pytest.raises(InputError, match="link"):
        write_triggers(report, [TRIGGER], {}, most=MAX_TRIGGERS, force=force)
    assert content(elsewhere) == {PNG: b"somebody's"} and not content(report)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(
    audit: Audit, tmp_path: Path, dangling: bool
) -> None:
    elsewhere, report = tmp_path / "elsewhere.json", tmp_path / "report"
    report.mkdir()
    if not dangling:
        elsewhere.write_text("somebody's")
    (report / "result.json").symlink_to(elsewhere)
    with pytest.raises(InputError, match="the file exists"):
        audit.save_report(report)
    audit.save_report(report, force=True)
    assert json.loads((report / "result.json").read_text())["verdict"]
    assert not (report / "result.json").is_symlink()
    assert elsewhere.read_text() == "somebody's" if not dangling else not elsewhere.exists()


def test_a_dangling_link_in_the_place_of_the_folder_is_a_typed_error(audit: Audit, tmp_path: Path) -> None:
    (tmp_path / "report").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no folder"):
        audit.save_report(tmp_path / "report")


def test_the_demo_replaces_nothing_unasked(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my homepage")
    with pytest.raises(InputError, match="the file exists"):
        run_demo(DemoSettings(), tmp_path, seed=0, silent=True, quiet=True)
    assert content(tmp_path) == {"index.html": b"my homepage"}


def test_a_reference_is_never_replaced_by_the_report(audit: Audit, tmp_path: Path) -> None:
    audit.save_report(tmp_path / "report")
    torch.save(tiny_classifier("conv-bn").network.state_dict(), tmp_path / "model.pth")
    record = tmp_path / "report" / "result.json"
    arguments = ["scan", str(tmp_path / "model.pth"), "--references", str(record), "--force"]
    outcome = CliRunner().invoke(app, [*arguments, "--report", str(tmp_path / "report")])
    assert outcome.exit_code == 2 and "replace an input" in outcome.stderr, outcome.stderr
