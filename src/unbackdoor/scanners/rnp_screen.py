"""Screening by the unlearned: triggered images keep their class where clean ones lose it.

Half-unlearned networks have forgotten much of the clean task and, if all goes well, nothing of the backdoor.
An image is suspicious where they still give it the class that the model gives it. Clean images of the class
that forgetful networks fall to keep it as well, so they are the false alarms to expect; ``centred`` compares
an image with the defender's clean images of the same predicted class only.

Paper:   Li et al., ICML 2023, arXiv 2305.14876, backdoor-sample detection.
Needs:   clean images and labels, and images of unknown origin without labels.
Departs: several half-unlearned networks are averaged; where one has forgotten everything, all images agree.
         Each image gets a p-value over the defender's held-out clean images.
Cost:    see engine/repeated_unlearning.py, and repeats + 1 forwards over the screened images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.engine.inference import mode, predict
from unbackdoor.engine.repeated_unlearning import Exposure, ExposureConfig, expose
from unbackdoor.engine.run import Run
from unbackdoor.errors import InputError
from unbackdoor.registry import option
from unbackdoor.types import Classifier, CleanData, Images, require_fit

Score = Literal["kept", "lost", "voted"]


class ScreenConfig(ExposureConfig):
    """Options of the screening."""

    score: Score = option(
        "kept",
        "kept: log-probability that the unlearned give to the model's class; lost: how much less that is "
        "than the model's own; voted: log-probability of the class that the unlearned vote for",
        source="kept: the loss of arXiv:2305.14876",
    )
    centred: bool = option(
        False,
        "subtract the mean score of clean images of the same predicted class",
        source="this project: clean images of the voted class are the usual false alarms",
    )
    alpha: float = option(
        0.01, "accepted share of clean images that are called suspicious", source="convention", gt=0, lt=1
    )


@dataclass(frozen=True)
class Screening:
    """The result of screening: scores and p-values of images.

    Attributes:
        scores: (N,) high for suspicious.
        p_values: (N,) share of the defender's clean images with so high a score, itself counted; none is
            below 1 / (held-out clean images + 1).
        predicted: (N,) class that the model gives.
        voted: Class that the unlearned networks fall to.
        suspicious: (N,) bool, where the p-value is at most alpha.
    """

    scores: Tensor
    p_values: Tensor
    predicted: Tensor
    voted: int
    suspicious: Tensor

    def evidence(self) -> dict[str, Any]:
        """Return the JSON-ready record."""
        return {
            "voted": self.voted,
            "images": len(self.scores),
            "suspicious": int(self.suspicious.sum()),
            "smallest_p_value": float(self.p_values.min()) if len(self.p_values) else None,
        }


def screen_inputs(
    model: Classifier,
    data: CleanData,
    inputs: Images,
    cfg: ScreenConfig,
    *,
    run: Run,
    exposure: Exposure | None = None,
) -> Screening:
    """Score images of unknown origin, such as a training set or what a service receives.

    Args:
        model: The suspicious classifier; not changed.
        data: The defender's clean images; the held-out part is what scores are compared with.
        inputs: The images; labels are not read.
        cfg: See :class:`ScreenConfig`.
        run: Seed, device, precision and progress.
        exposure: Unlearned networks that are there already; else they are made.

    Raises:
        InputError: If there is no image.
        UnsupportedModel: If the images do not fit the model.
        MethodFailed: See :func:`unbackdoor.engine.repeated_unlearning.expose`.
    """
    if not len(inputs):
        raise InputError("there is no image to screen", expected="at least 1", got=0, where=inputs.name)
    require_fit(model, inputs)
    exposure = exposure if exposure is not None else expose(model, data, cfg, run)
    networks, voted = exposure.half_unlearned(), exposure.leader()
    scores, predicted = _scores(model, networks, voted, inputs, cfg, run)
    clean_scores, clean_predicted = _scores(model, networks, voted, data.select, cfg, run)
    if cfg.centred:
        means = torch.stack(
            [
                clean_scores[clean_predicted == k].mean()
                if bool((clean_predicted == k).any())
                else clean_scores.mean()
                for k in range(model.classes)
            ]
        )  # (K,)
        scores, clean_scores = scores - means[predicted], clean_scores - means[clean_predicted]
    # Of the sorted clean scores, those at or above each score.
    above = len(clean_scores) - torch.searchsorted(clean_scores.sort().values, scores)  # (N,)
    p_values = (1 + above) / (len(clean_scores) + 1)
    return Screening(scores, p_values, predicted, voted, p_values <= cfg.alpha)


def _scores(
    model: Classifier, networks: Sequence[Classifier], voted: int, images: Images, cfg: ScreenConfig, run: Run
) -> tuple[Tensor, Tensor]:
    """Return scores (N,) and the classes (N,) that the model gives."""
    with mode(model, training=False):
        own = F.log_softmax(predict(model, images, run), 1)  # (N, K)
    predicted = own.argmax(1)
    scored_class = torch.full_like(predicted, voted) if cfg.score == "voted" else predicted
    total = torch.zeros(len(images))
    for network in networks:
        with mode(network, training=False):
            after = F.log_softmax(predict(network, images, run), 1)
        total += after.gather(1, scored_class[:, None])[:, 0]
    scores = total / len(networks)
    if cfg.score == "lost":
        scores = scores - own.gather(1, predicted[:, None])[:, 0]
    return scores, predicted
