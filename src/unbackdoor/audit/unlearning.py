"""One shared unlearning of a model, and the four questions it answers.

Unlearning is what costs; it is done once, and the votes, the verdict, the trigger, the screening and the
ranking of channels are read off the same networks. See docs/unlearning.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from unbackdoor.defenses.unlearned_prune import Ranking, UnlearnedPruneConfig, pruned, suspicion
from unbackdoor.engine.channels import prunable_sites
from unbackdoor.engine.precision import Policy
from unbackdoor.engine.repeated_unlearning import (
    Exposure,
    ExposureConfig,
    UnlearningConfig,
    expose,
    options_of,
)
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import check_inputs
from unbackdoor.engine.unlearned_inversion import ExposedTrigger, InversionConfig, invert_exposed
from unbackdoor.registry import DEFENSES, SCANNERS, SCREENERS
from unbackdoor.scanners.rnp_screen import Score, ScreenConfig, Screening, screen_inputs
from unbackdoor.scanners.rnp_vote import RNPVoteConfig, weigh
from unbackdoor.types import (
    Classifier,
    CleanData,
    Images,
    Progress,
    Purified,
    ScanReport,
    as_clean_data,
    require_classifier,
    silent,
)


class Unlearning:
    """A model that was unlearned several times; made by :func:`unlearn`.

    Args:
        model: The suspicious classifier; not changed.
        data: The defender's clean images.
        config: Options of the unlearning and of the votes.
        run: Seed, device, precision and progress.

    Attributes:
        exposure: The unlearned networks and the votes of the held-out images.
    """

    def __init__(self, model: Classifier, data: CleanData, config: RNPVoteConfig, run: Run) -> None:
        self._model = model.copy().to(run.device)
        self._data, self._config, self._run = data, config, run
        self.exposure: Exposure = expose(self._model, data, config, run)

    def detect(self) -> ScanReport:
        """Return the verdict over the votes; without references of clean networks "undecided" at the most."""
        return weigh(self.exposure, self._config)

    def recover_trigger(self, label: int | None = None) -> ExposedTrigger:
        """Return the smallest mask and pattern towards a class, tried on the model itself.

        Args:
            label: The class; None: the one with most votes.

        Raises:
            InputError: If there is no such class.
            MethodFailed: If every unlearned network sends all images to the class untouched, or no repeat
                forgot half of the task.
        """
        target = self.exposure.leader() if label is None else label
        return invert_exposed(self._model, self._data, self.exposure, target, InversionConfig(), self._run)

    def screen(self, inputs: Images, *, score: Score = "kept", centred: bool = False) -> Screening:
        """Score images of unknown origin; see :func:`unbackdoor.scanners.rnp_screen.screen_inputs`.

        Args:
            inputs: The images (N, C, H, W); labels are not read.
            score: What is scored, see :class:`unbackdoor.scanners.rnp_screen.ScreenConfig`.
            centred: Compare an image with clean images of the same predicted class.

        Raises:
            ConfigError: If there is no such score.
            InputError: If there is no image.
            UnsupportedModel: If the images do not fit the model.
            MethodFailed: If no repeat forgot half of the task.
        """
        options = {**options_of(self._config, ExposureConfig), "score": score, "centred": centred}
        how = SCREENERS["rnp"].configure(options)
        assert isinstance(how, ScreenConfig)
        return screen_inputs(self._model, self._data, inputs, how, run=self._run, exposure=self.exposure)

    def prune(self, ranking: Ranking = "change") -> Purified:
        """Rank channels on the unlearned networks, and cut them in the model while held-out accuracy holds.

        The method ``unlearned_prune`` does the same with one unlearning of its own, taken to its stop; here
        the scores of the half-unlearned networks are averaged.

        Args:
            ranking: Score of a channel, see ``defenses/unlearned_prune.py``.

        Raises:
            ConfigError: If there is no such ranking.
            UnsupportedModel: If there is no channel to cut.
            MethodFailed: If no repeat forgot half of the task.
        """
        options = {**options_of(self._config, UnlearningConfig), "score": ranking}
        cfg = DEFENSES["unlearned_prune"].configure(options)
        assert isinstance(cfg, UnlearnedPruneConfig)
        sites = prunable_sites(self._model)
        each = [
            suspicion(self._model, network, sites, self._data, cfg, self._run)
            for network in self.exposure.half_unlearned()
        ]
        scores = {name: torch.stack([one[name].float().cpu() for one in each]).mean(0) for name in each[0]}
        out = pruned(self._model, sites, scores, self._data, cfg, self._run)
        return replace(out, model=out.model.to("cpu"))


def unlearn(
    model: Classifier,
    data: CleanData | Images,
    *,
    options: Mapping[str, Any] | None = None,
    references: Sequence[float] = (),
    seed: int = 0,
    device: str = "cpu",
    precision: Policy = "auto",
    progress: Progress = silent,
) -> Unlearning:
    """Unlearn a model several times, once for all questions.

    Args:
        model: The suspicious classifier; not changed.
        data: The defender's clean, labelled images: the fitting part is unlearned, the other part votes.
            Images that are not split yet are.
        options: Options of ``rnp_vote``, such as ``{"repeats": 4}``.
        references: Attractions of clean networks of the same kind, for the verdict; they take the place of
            those in ``options``.
        seed: Seed of every draw.
        device: Where to compute.
        precision: ``auto``, ``fp32`` or ``bf16``.
        progress: Progress display.

    Raises:
        InputError: If the images or the weights cannot be used.
        ConfigError: If an option does not fit.
        MethodFailed: If the model does not know the images to begin with, or forgets nothing.

    Example:
        >>> import unbackdoor
        >>> unlearned = unbackdoor.unlearn(model, data)  # doctest: +SKIP
        >>> unlearned.detect().verdict  # doctest: +SKIP
        'undecided'
        >>> unlearned.recover_trigger().success  # doctest: +SKIP
    """
    part = SCANNERS["rnp_vote"]
    overrides = {"references": tuple(references)} if references else {}
    config = part.configure({**(options or {}), **overrides})
    assert isinstance(config, RNPVoteConfig)
    require_classifier(model)
    data = as_clean_data(data, seed=seed)
    check_inputs(part, model, data)
    run = Run.create(seed=seed, device=device, policy=precision, progress=progress)
    return Unlearning(model, data, config, run)
