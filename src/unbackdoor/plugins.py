"""What people who write methods may import; see ``docs/plugins.md``.

The names of ``__all__`` are pinned by a test: they keep their meaning, whatever moves below them. A method
of another distribution imports from here and from :mod:`unbackdoor.testing`, and from no other module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unbackdoor.data.batches import augment, batches, resident, to_float
from unbackdoor.engine.channels import lipschitz_bounds, mean_activations, prunable_sites
from unbackdoor.engine.heads import AffineHead, Head, find_affine_head, find_head
from unbackdoor.engine.inference import accuracy, frozen, logits_of, mode, predict
from unbackdoor.engine.masks import (
    Masks,
    Site,
    channel_sites,
    fold,
    keep_above,
    norm_sites,
    removed,
    unit_sites,
    weight_sites,
)
from unbackdoor.engine.run import Run
from unbackdoor.engine.screening_statistics import ScreenerConfig, conformal_p_values, features, judged
from unbackdoor.engine.selection import Choice, harshest_within
from unbackdoor.engine.statistics.one_outlier import Outlier, smallest_outlier
from unbackdoor.engine.statistics.several_outliers import Outliers, smallest_few
from unbackdoor.engine.training import Recipe, Trained, train
from unbackdoor.engine.trusted_caller import run as run_defense
from unbackdoor.engine.trusted_caller import scan as run_scanner
from unbackdoor.engine.trusted_caller import screen as run_screener
from unbackdoor.errors import (
    ConfigError,
    InputError,
    MethodFailed,
    TooFewImages,
    UnbackdoorError,
    UnsupportedModel,
)
from unbackdoor.networks.geometry import Geometry
from unbackdoor.registry import (
    FAMILIES,
    INPUT_LABELS,
    ONE_A_CLASS,
    SUSPICION,
    Config,
    architecture,
    attack,
    defense,
    option,
    scanner,
    screener,
)
from unbackdoor.triggers import RecoveredTrigger, Suspicion
from unbackdoor.types import (
    Augmentation,
    Classifier,
    CleanData,
    Finding,
    Images,
    Purified,
    ScanReport,
    Screening,
    Verdict,
    require_fit,
    require_labels,
    require_one_a_class,
)

if TYPE_CHECKING:
    from unbackdoor.attacks.truth import AttackConfig, Learning, Stamp, Tensors, Trigger

__all__ = [
    "FAMILIES",
    "INPUT_LABELS",
    "ONE_A_CLASS",
    "SUSPICION",
    "AffineHead",
    "AttackConfig",
    "Augmentation",
    "Choice",
    "Classifier",
    "CleanData",
    "Config",
    "ConfigError",
    "Finding",
    "Geometry",
    "Head",
    "Images",
    "InputError",
    "Learning",
    "Masks",
    "MethodFailed",
    "Outlier",
    "Outliers",
    "Purified",
    "Recipe",
    "RecoveredTrigger",
    "Run",
    "ScanReport",
    "ScreenerConfig",
    "Screening",
    "Site",
    "Stamp",
    "Suspicion",
    "Tensors",
    "TooFewImages",
    "Trained",
    "Trigger",
    "UnbackdoorError",
    "UnsupportedModel",
    "Verdict",
    "accuracy",
    "architecture",
    "attack",
    "augment",
    "batches",
    "channel_sites",
    "conformal_p_values",
    "defense",
    "features",
    "find_affine_head",
    "find_head",
    "fold",
    "frozen",
    "harshest_within",
    "judged",
    "keep_above",
    "lipschitz_bounds",
    "logits_of",
    "mean_activations",
    "mode",
    "norm_sites",
    "option",
    "predict",
    "prunable_sites",
    "removed",
    "require_fit",
    "require_labels",
    "require_one_a_class",
    "resident",
    "run_defense",
    "run_scanner",
    "run_screener",
    "scanner",
    "screener",
    "smallest_few",
    "smallest_outlier",
    "to_float",
    "train",
    "unit_sites",
    "weight_sites",
]

_OF_ATTACKS = {"AttackConfig", "Learning", "Stamp", "Tensors", "Trigger"}


def __getattr__(name: str) -> Any:
    # At first use, so that a defense that imports from here does not import the attacks.
    if name not in _OF_ATTACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module("unbackdoor.attacks.truth"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
