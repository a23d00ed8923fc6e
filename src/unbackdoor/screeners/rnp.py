"""Screening by the unlearned: triggered images keep their class where clean ones lose it.

Paper:   Li et al., ICML 2023, arXiv 2305.14876, backdoor-sample detection; see scanners/rnp_screen.py.
Needs:   clean images and labels.
Departs: see there.
Cost:    see engine/repeated_unlearning.py, and repeats + 1 forwards over the inputs.
Blind:   networks whose backdoor is unlearned with the task; clean images of the class that the unlearned
         fall to are its false alarms.
"""

from __future__ import annotations

from unbackdoor.engine.run import Run
from unbackdoor.registry import screener
from unbackdoor.scanners.rnp_screen import ScreenConfig, screen_inputs
from unbackdoor.types import Classifier, CleanData, Images, Screening


@screener(
    "rnp",
    config=ScreenConfig,
    paper="arXiv:2305.14876",
    needs={"images", "labels"},
    quick={"repeats": 2, "batch_size": 32, "max_steps": 40, "unlearn_lr": 0.1},
)
def screen(model: Classifier, data: CleanData, inputs: Images, cfg: ScreenConfig, *, run: Run) -> Screening:
    """Unlearn the network again and again, and score inputs by how they keep their class."""
    screening = screen_inputs(model, data, inputs, cfg, run=run)
    facts = {**screening.evidence(), "clean_images": len(data.select)}
    return Screening(screening.scores, screening.p_values, screening.predicted, screening.suspicious, facts)
