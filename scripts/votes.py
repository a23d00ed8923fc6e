"""False alarms and finds of the vote of the unlearned, on small networks trained on digits for it.

    python scripts/votes.py --clean 50 --references 30 --poisoned 10

Prints a Markdown table. About two seconds of one core for each network.
"""

from __future__ import annotations

import argparse

from unbackdoor.bench.victims import VictimSpec, train_victim
from unbackdoor.data.datasets import DataSet, load_dataset
from unbackdoor.data.splits import draw_clean, reserve
from unbackdoor.engine.repeated_unlearning import Exposure, expose
from unbackdoor.engine.run import Run
from unbackdoor.engine.training import Recipe
from unbackdoor.report.markdown import table_lines
from unbackdoor.report.tables import Cell, Table, columns
from unbackdoor.report.words import NOTHING
from unbackdoor.scanners.rnp_vote import RNPVoteConfig, stability, weigh
from unbackdoor.types import CleanData

ARCHITECTURE = "small_cnn[width=16]"


def exposed(attack: str, seed: int, data: DataSet, clean: CleanData, cfg: RNPVoteConfig) -> Exposure:
    """Train a network, the attack's target drawn by the seed, and unlearn it."""
    options = {} if attack == "none" else {"target": 3 * seed % 10}
    spec = VictimSpec("digits", ARCHITECTURE, Recipe(epochs=15), attack=attack, options=options, seed=seed)
    model, _ = train_victim(spec, data, Run.create(seed=seed, policy="fp32"))
    return expose(model, clean, cfg, Run.create(seed=0, policy="fp32"))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", type=int, default=50)
    parser.add_argument("--references", type=int, default=30, help="of the clean networks")
    parser.add_argument("--poisoned", type=int, default=10, help="networks of each attack")
    arguments = parser.parse_args()
    data, cfg = load_dataset("digits"), RNPVoteConfig()
    _, pool = reserve(data.train, fraction=0.1)
    clean = CleanData.split(draw_clean(pool, count=100, seed=0), augmentation=data.augmentation)
    # The references and the networks that are judged by them are never the same.
    references = [exposed("none", seed, data, clean, cfg) for seed in range(arguments.references)]
    calibrated = replace_references(cfg, references)
    rows = []
    for attack in ("none", "badnets", "blended"):
        seeds = (
            range(arguments.references, arguments.clean) if attack == "none" else range(arguments.poisoned)
        )
        counts = [0, 0, 0, 0]
        for seed in seeds:
            votes = exposed(attack, seed, data, clean, cfg)
            finding, report = stability(votes, cfg.alpha), weigh(votes, calibrated)
            stable = finding.p_value is not None and finding.p_value <= cfg.alpha
            accused = report.verdict == "backdoor found"
            right = attack != "none" and finding.classes == (3 * seed % 10,)
            counts = [
                c + int(x)
                for c, x in zip(counts, (stable, stable and right, accused, accused and right), strict=True)
            ]
        numbers = [str(c) if attack != "none" or i % 2 == 0 else NOTHING for i, c in enumerate(counts)]
        rows.append(tuple(map(Cell, (attack, str(len(seeds)), *numbers))))
    heads = columns(
        "networks", "number", "one stable class", "it is the target", "backdoor found", "target named"
    )
    print("\n".join(table_lines(Table("votes", "", "", heads, rows))))


def replace_references(cfg: RNPVoteConfig, references: list[Exposure]) -> RNPVoteConfig:
    """Return the options with the attractions of clean networks."""
    return cfg.model_copy(update={"references": tuple(float(e.attraction().max()) for e in references)})


if __name__ == "__main__":
    main()
