"""The probe of the alternative trigger in the form of a patch: a small square in the place of pixels.

A faint pattern over the whole image says nothing of a trigger that is small and strong. This form is asked
beside it, and stands in a module of its own, so that what the other probes found stays what it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unbackdoor.attacks import AttackTruth, stamped

# The draws and the features are those of the other form, so that the two are asked alike.
from unbackdoor.bench.probes import ProbeConfig, _draw, _features
from unbackdoor.data.batches import to_float
from unbackdoor.engine.inference import frozen, images_per_pass, logits_of, mode, predict
from unbackdoor.engine.run import Run
from unbackdoor.metrics import agreement
from unbackdoor.types import Classifier, Images

SHARE = 0.025  # of the pixels: 5 x 5 of CIFAR-10, as large as the patches of the usual attacks
_REACH = 1 / 4  # the first step, as a share of the range of a pixel


def patch_trigger(
    model: Classifier,
    truth: AttackTruth,
    training: Images,
    test: Images,
    run: Run,
    *,
    config: ProbeConfig | None = None,
) -> float | None:
    """Return the success on test images of a square patch that is searched from the attack's own trigger.

    It lies where the trigger changes most, begins as what triggered images show there, may take any value,
    and is searched as :func:`unbackdoor.bench.probes.alternative_trigger` searches its pattern.

    Paper:   Abad et al., "Removing the trigger, not the backdoor: alternative triggers and latent backdoors",
             arXiv 2603.09772; the universal patch: Brown et al., "Adversarial patch", arXiv 1712.09665.
    Departs: signed steps that shrink to zero; one place, size and start are this project's.

    Args:
        model: Not changed.
        truth: The attack.
        training: Clean training images of the attacker, labelled.
        test: Labelled test images.
        run: See :func:`unbackdoor.bench.probes.probe`.
        config: Likewise.

    Returns:
        None where the attack sends no test image anywhere.
    """
    cfg = config or ProbeConfig()
    images = _draw(truth.eligible(training), cfg.search_images, run, "search images")
    eligible = truth.eligible(test)
    if not len(images) or not len(eligible):
        return None
    model = model.copy().to(run.device).eval()
    goals = truth.targets_of(images).to(run.device)
    clean = to_float(images.pixels, run.device)  # (N, C, H, W)
    triggered = to_float(stamped(images.pixels, truth), run.device)
    side = max(2, round((SHARE * clean.shape[2] * clean.shape[3]) ** 0.5))
    top, left = _place((triggered - clean).abs().mean(0).sum(0), side)
    window = (..., slice(top, top + side), slice(left, left + side))
    patch = triggered[window].mean(0, keepdim=True)  # (1, C, side, side)
    size = max(2, min(cfg.batch_size, images_per_pass(images.shape)))
    with frozen(model), mode(model, training=False), _features(model) as seen:

        def features(pixels: torch.Tensor) -> torch.Tensor:
            out = []
            with torch.no_grad():
                for part in pixels.split(size):
                    logits_of(model, part, run)
                    out.append(seen.pop())
            return torch.cat(out)  # (N, D)

        start = features(clean)
        direction = (features(triggered) - start).mean(0, keepdim=True)  # (1, D)
        for step in run.progress(range(cfg.search_steps), "alternative patch"):
            order = torch.randperm(len(images), generator=run.generator("patch", step))
            rows = order[:size].to(run.device)
            patch.requires_grad_()
            stamped_rows = clean[rows].clone()
            stamped_rows[window] = patch
            logits = logits_of(model, stamped_rows, run)  # (B, K)
            along = F.cosine_similarity(seen.pop() - start[rows], direction).mean()
            loss = F.cross_entropy(logits, goals[rows]) - cfg.direction_weight * along
            (slope,) = torch.autograd.grad(loss, patch)
            reach = _REACH * (1 - step / cfg.search_steps)
            patch = (patch.detach() - reach * slope.sign()).clamp(0, 1)
    # Judged in whole grey levels, as an image file would hold it.
    shown = (patch * 255).round().to("cpu", torch.uint8)

    def stamp(pixels: torch.Tensor) -> torch.Tensor:
        out = pixels.clone()
        out[window] = shown
        return out

    logits = predict(model, eligible, run, transform=stamp)
    return agreement(logits.argmax(1), truth.targets_of(eligible)).value


def _place(change: torch.Tensor, side: int) -> tuple[int, int]:
    """Return the corner of the square in which a map (H, W) of changes has the largest sum."""
    sums = F.avg_pool2d(change.double()[None, None], side, stride=1)[0, 0]  # (H - side + 1, W - side + 1)
    place = int(sums.flatten().argmax())
    return place // sums.shape[1], place % sums.shape[1]
