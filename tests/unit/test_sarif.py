"""A SARIF log has what code scanning asks for, and says the same of the same file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unbackdoor.audit.checks import Check
from unbackdoor.audit.scanning import Agreed, Audit, Checked
from unbackdoor.report.sarif import Scanned, sarif, sarif_log
from unbackdoor.types import Finding, ScanReport

NAMES = ("a", "b", "c")
TAC = Check("tac", "tac", "Do images move in one direction?")


def pointing(*classes: int) -> ScanReport:
    finding = Finding("size", 1.0, "small", 0.5, "made up", 0.001, classes, (4.0, 1.0, 4.0))
    return ScanReport("backdoor found", (finding,), coverage=("size",))


GUILTY = Checked(TAC, "ran", report=pointing(2), p_value=0.001, adjusted=0.002)


def audit(*checks: Checked, verdict: Any = "backdoor found", **more: Any) -> Audit:
    return Audit(verdict, more.pop("classes", (2,)), checks, ("why",), **more)


def log(path: Path, *, digest: str = "0" * 64, scan: Audit | None = None) -> dict[str, Any]:
    found = sarif(scan or audit(GUILTY), path, NAMES, file_sha256=digest)
    run: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))["runs"][0]
    return run


def test_every_rule_and_result_has_what_code_scanning_shows() -> None:
    together = Agreed(1, ("tac", "mm_bd"), 0.01)
    done = audit(GUILTY, agreed=(together,))
    for scan in (done, audit(replace(GUILTY, adjusted=0.5), verdict="undecided", classes=())):
        run = log(Path("m.pth"), scan=scan)
        rules = run["tool"]["driver"]["rules"]
        for rule in rules:
            assert rule["name"].isalnum() and rule["help"]["text"] and rule["help"]["markdown"]
            assert len(rule["fullDescription"]["text"]) > len(rule["shortDescription"]["text"]) > 0
            assert len(rule["fullDescription"]["text"]) < 1024  # what code scanning keeps
            assert 0 < float(rule["properties"]["security-severity"]) <= 10
            assert {"security"} <= set(rule["properties"]["tags"]) and len(rule["properties"]["tags"]) <= 10
            assert rule["properties"]["precision"] in {"very-high", "high", "medium", "low"}
        assert len({rule["id"] for rule in rules}) == len(rules)
        assert run["results"]
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            (place,) = result["locations"]
            assert place["physicalLocation"]["region"]["startLine"] == 1
            assert result["partialFingerprints"]["primaryLocationLineHash"]
            assert result["message"]["text"]


def fingerprints(run: dict[str, Any]) -> list[str]:
    return [result["partialFingerprints"]["primaryLocationLineHash"] for result in run["results"]]


def test_a_fingerprint_is_of_the_file_the_rule_and_the_class(tmp_path: Path) -> None:
    usual = fingerprints(log(tmp_path / "m.pth"))
    later = audit(replace(GUILTY, p_value=0.0004, adjusted=0.0008), seconds=9.0)
    assert fingerprints(log(tmp_path / "m.pth", scan=later)) == usual
    other_class = audit(replace(GUILTY, report=pointing(1)))
    changed = [
        log(tmp_path / "m.pth", digest="1" * 64),
        log(tmp_path / "n.pth"),
        log(tmp_path / "m.pth", scan=other_class),
    ]
    assert len({usual[0], *(fingerprints(run)[0] for run in changed)}) == 4


def uri(run: dict[str, Any]) -> dict[str, Any]:
    place: dict[str, Any] = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert run["artifacts"][0]["location"]["uri"] == place["uri"]
    return place


def test_a_file_is_named_from_the_root_of_its_repository(tmp_path: Path, monkeypatch: Any) -> None:
    repository = tmp_path / "work" / "repository"
    (repository / "models" / "new ones").mkdir(parents=True)
    (repository / ".git").mkdir()
    wanted = {"uri": "models/new%20ones/m.pth", "uriBaseId": "%SRCROOT%", "index": 0}
    for folder, name in (
        (repository, "models/new ones/m.pth"),
        (repository / "models", "new ones/m.pth"),
        (repository / "models", "../models/new ones/m.pth"),
        (tmp_path, str(repository / "models" / "new ones" / "m.pth")),
    ):
        monkeypatch.chdir(folder)
        assert uri(log(Path(name))) == wanted
    # A work tree of another repository has a file of that name.
    (repository / ".git").rmdir()
    (repository / ".git").write_text("gitdir: elsewhere")
    assert uri(log(repository / "models" / "new ones" / "m.pth")) == wanted
    # Outside of any repository: from the working folder, and elsewhere by its name alone, never absolute.
    (repository / ".git").unlink()
    monkeypatch.chdir(repository)
    assert uri(log(Path("models/m.pth")))["uri"] == "models/m.pth"
    monkeypatch.chdir(repository / "models")
    assert uri(log(repository / "m.pth")) == {"uri": "m.pth", "index": 0}


def test_several_models_are_one_run(tmp_path: Path) -> None:
    quiet = audit(replace(GUILTY, p_value=0.9, adjusted=1.0), verdict="no evidence found", classes=())
    scans = [
        Scanned(audit(GUILTY), tmp_path / "a.pth", NAMES, "0" * 64),
        Scanned(None, tmp_path / "b.pth", failure="the file is damaged"),
        Scanned(quiet, tmp_path / "c.pth", NAMES, "1" * 64),
        Scanned(audit(GUILTY), tmp_path / "d.pth", NAMES, "2" * 64),
    ]
    (run,) = sarif_log(scans)["runs"]
    places = [r["locations"][0]["physicalLocation"]["artifactLocation"] for r in run["results"]]
    assert [(place["uri"], place["index"]) for place in places] == [("a.pth", 0), ("d.pth", 3)]
    assert len(set(fingerprints(run))) == 2 and len(run["artifacts"]) == 4
    assert not run["invocations"][0]["executionSuccessful"]
    (note,) = run["invocations"][0]["toolExecutionNotifications"]
    assert "damaged" in note["message"]["text"]
    assert [artifact.get("properties", {}).get("verdict") for artifact in run["artifacts"]] == [
        "backdoor found", None, "no evidence found", "backdoor found",
    ]  # fmt: skip


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_a_check_that_did_not_run_is_a_notification(status: Any) -> None:
    run = log(Path("m.pth"), scan=audit(GUILTY, Checked(TAC, status, "it broke")))
    (note,) = run["invocations"][0]["toolExecutionNotifications"]
    assert note["level"] == ("error" if status == "failed" else "warning")
