"""Write the measured table of the README from the records in ``benchmarks/measured/``.

python benchmarks/render.py
"""

from __future__ import annotations

import json
from pathlib import Path

HERE = Path(__file__).parent
MARK = "## Measured\n"
# How the contestants of authors.py chose the strength of their repair; all others use held-out clean images.
CHOSEN_BY = {
    "released rnp": "the test sets",
    "released awm": "nothing: the last round",
    "awm:reference": "nothing: the last round",
}


def table(folder: Path) -> str:
    """Return the table of all records, with the machines they were made on."""
    lines = ["| benchmark | ratio | median | low | high | pairs |", "|---|---|---:|---:|---:|---:|"]
    machines = set()
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        name = f"{record['benchmark']}: {record['subject']}"
        if record["settings"].get("preset", "default") != "default":
            name += f", preset {record['settings']['preset']}"
        for label, ratio in record["ratios"].items():
            cells = [f"{ratio[key]:.2f}" for key in ("median", "low", "high")]
            lines.append("| " + " | ".join([name, label, *cells, str(len(ratio["pairs"]))]) + " |")
            name = ""
        m = record["machine"]
        bf16 = "native bf16" if m["native_bf16"] else "no native bf16"
        machines.add(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['memory_gib']} GiB, {bf16}, "
            f"torch {m['torch']}, Python {m['python']}"
        )
    return "\n".join([*lines, "", "Measured on: " + "; ".join(sorted(machines)) + "."])


def beside_the_released_code(folder: Path) -> str:
    """Return the table of what the contestants of ``authors.py`` reached; nothing if it was not run."""
    file = folder / "authors.json"
    if not file.exists():
        return ""
    record = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        f"`authors.py`: {record['subject']}, {record['settings']['test_images']} test images.",
        "",
        "| contestant | ACC | ASR | strength chosen by | seconds | without evaluation | peak MB |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, outcome in record["outcome"].items():
        cells = [name, f"{100 * outcome['acc']:.1f} %", f"{100 * outcome['asr']:.1f} %"]
        if name == "before":
            cells += [""] * 4
        else:
            seconds = [f"{outcome[key]:.0f}" for key in ("seconds", "algorithm", "peak_mb")]
            cells += [CHOSEN_BY.get(name, "held-out clean images"), *seconds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def readme(text: str, folder: Path) -> str:
    """Return the README with its last section made anew."""
    head, mark, _ = text.partition(MARK)
    assert mark, "the README has lost its section of measurements"
    note = (
        "Made by `python benchmarks/render.py` from `measured/`. Do not edit. The records of authors, awm, "
        "ims, rnp and tac_repair are of one pair each, on a machine that was training networks at the same "
        "time: a floor below 1 is that noise."
    )
    parts = [note, table(folder), beside_the_released_code(folder)]
    return f"{head}{MARK}\n" + "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def main() -> None:
    """Write the README."""
    file = HERE / "README.md"
    file.write_text(readme(file.read_text(encoding="utf-8"), HERE / "measured"), encoding="utf-8")


if __name__ == "__main__":
    main()
