"""Invertible masking using selection: a mask that keeps the clean task, and whose inverse keeps the rest.

A channel is shared, or belongs to the repaired network, or to its inverse (invertible_gates.py). The inverse
shall fail the clean task and follow perturbations; the repaired network shall ignore them.

Paper:   Dunnett, Arablouei, Miller, Dedeoglu & Jurdak, NeurIPS 2025, arXiv 2509.15497.
Needs:   clean images; labels are used for evidence only, because every loss compares with the model itself.
Changes: kernels and biases of convolutions, or the batch norm that alone reads one; in transformers the layer
         norms. Scaled by gates in [0, 1], which are not rounded.
Departs: losses are computed in log-space (1 - O in fp32 loses a saturated model's gradient); what the
         reference computes and does not use is not computed; squeeze-excite convolutions are left out; a gate
         sits behind the batch norm where it can (before it, a closed gate leaves a constant); the
         perturbation has a budget that is adapted until most predictions flip, stays in the image range, and
         goes on where it stopped, in 4 steps instead of 20; smaller batches, half the rounds at twice the
         step; no weight decay, fixed rounds, the mean of the last gates, and a clean term that weighs more
         while predictions change (``robust`` is this default). Preset ``reference``: none of these but the
         first two. Transformers: a gate on the residual stream cannot be folded into weights, so what the
         later layer norms let through is gated (gates.py); ``reference-vit`` sets lambda to 0 as the released
         configuration does.
Cost:    of each image of a round 2 forward + 2 backward in the first stage, then 5 + 2 x steps forward and
         4 + 2 x steps backward; by default 333,000 forward-equivalents of one image, in all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbackdoor.data.batches import resident, to_float
from unbackdoor.defenses.ims.gates import Position, gate_sites
from unbackdoor.defenses.ims.invertible_gates import InvertibleGates
from unbackdoor.defenses.ims.perturbations import Perturbations
from unbackdoor.defenses.ims.prediction_overlap import agree, disagree
from unbackdoor.engine.inference import Network, frozen, logits_of, mode, predict, require_several_classes
from unbackdoor.engine.run import Run
from unbackdoor.errors import MethodFailed, UnsupportedModel
from unbackdoor.registry import ONE_A_CLASS, Config, defense, option
from unbackdoor.types import Classifier, CleanData, Images, Purified


class IMSConfig(Config):
    """Options of IMS."""

    start_rounds: int = option(50, "rounds without perturbations", source="reference 100, half lr", ge=0)
    free_rounds: int = option(100, "rounds without sparsity", source="reference 200 at half the lr", ge=0)
    sparse_rounds: int = option(100, "rounds with sparsity", source="reference 200 at half the lr", ge=0)
    lr: float = option(0.04, "AdamW step of masks and selections", source="twice the reference", gt=0, le=1)
    weight_decay: float = option(0.0, "decay of all that learns", source="this project", ge=0, le=1)
    sparsity: float = option(10.0, "lambda, weight of the mean of 1 - s", source="reference", ge=0)
    # One term of five does not hold the clean task.
    agreement: float = option(
        0.98, "share of clean predictions to keep by weight; 0: weight 1", source="this project", ge=0, le=1
    )
    sharpness: float = option(20.0, "k, slope of the gate's sigmoid", source="reference code", gt=0, le=1000)
    batch_size: int = option(64, "images a round", source="this project; reference 256", ge=1)
    steps: int = option(4, "steps of a perturbation a round", source="this project; reference 20", ge=1)
    budget: float = option(
        0.02, "first steps x step size of a perturbation", source="reference, 20 x 0.001", gt=0, le=1
    )
    # A budget that flips nothing makes the method a no-op.
    flip_rate: float = option(
        0.8,
        "share of predictions to flip, which raises the budget; 0: never",
        source="this project",
        ge=0,
        lt=1,
    )
    largest_budget: float = option(0.25, "limit of a moved budget", source="this project", gt=0, le=1)
    bounded: bool = option(True, "hold deltas to budget and image range", source="this project; reference no")
    warm_start: bool = option(True, "perturb on from the last delta", source="this project; reference from 0")
    averaging: float = option(0.95, "decay of the mean gate; 0: the last", source="this project", ge=0, lt=1)
    patience: int = option(0, "rounds without 2 % less loss; 0: no stop", source="reference 25", ge=0)
    gates: Position = option(
        "norm", "gate the norm that alone reads a conv, or the conv", source="this project; reference conv"
    )
    squeeze_excite: bool = option(False, "gate squeeze-excite convs", source="this project; reference yes")


HEAVIEST = 100.0  # weight of the clean term at most


REFERENCE: dict[str, Any] = {
    "start_rounds": 100, "free_rounds": 200, "sparse_rounds": 200, "patience": 25, "lr": 0.02,
    "weight_decay": 0.01, "batch_size": 256, "steps": 20, "flip_rate": 0.0, "agreement": 0.0,
    "bounded": False, "warm_start": False, "averaging": 0.0, "gates": "conv", "squeeze_excite": True,
}  # fmt: skip


@defense(
    "ims",
    config=IMSConfig,
    paper="arXiv:2509.15497",
    needs={"images", ONE_A_CLASS},
    presets={"robust": {}, "reference": REFERENCE, "reference-vit": {**REFERENCE, "sparsity": 0.0}},
    quick={"start_rounds": 3, "free_rounds": 3, "sparse_rounds": 3, "steps": 2, "batch_size": 32},
)
def purify(model: Classifier, data: CleanData, cfg: IMSConfig, *, run: Run) -> Purified:
    """Play the three stages and fold the forward gates into the weights."""
    if model.classes < 2:
        raise UnsupportedModel("predictions cannot disagree", expected="2 classes or more", got=model.classes)
    with mode(model, training=False), frozen(model):
        optimisation = AlternatingOptimisation(model, resident(data.all, run.device), cfg, run)
        stages = [
            optimisation.stage("selecting", cfg.start_rounds, cfg.sparsity, perturbed=False),
            optimisation.stage("masking", cfg.free_rounds, 0.0),
            optimisation.stage("sparsifying", cfg.sparse_rounds, cfg.sparsity),
        ]
        evidence = {"stages": stages, **optimisation.evidence()}
    return Purified(optimisation.gates.folded(), evidence)


class AlternatingOptimisation:
    """The gates and the perturbations of one model, which are optimised in turn."""

    def __init__(self, model: Classifier, images: Images, cfg: IMSConfig, run: Run) -> None:
        self.model, self.images, self.cfg, self.run = model, images, cfg, run
        sites = gate_sites(model, position=cfg.gates, squeeze_excite=cfg.squeeze_excite)
        self.gates = InvertibleGates(model, sites, cfg.sharpness)
        self.clean_weight = 1.0  # weight of the clean term; raised where too few predictions are kept
        self.base = F.log_softmax(require_several_classes(predict(model, images, run)), dim=1).to(
            run.device
        )  # (N, K)
        self.deltas = Perturbations(
            images.pixels.shape, run.device, budget=cfg.budget, steps=cfg.steps, bounded=cfg.bounded,
            warm=cfg.warm_start, weight_decay=cfg.weight_decay,
        )  # fmt: skip

    def stage(self, label: str, rounds: int, sparsity: float, *, perturbed: bool = True) -> dict[str, Any]:
        """Move masks and selections for some rounds; return what happened."""
        cfg, a, s = self.cfg, self.gates.a, self.gates.s
        optimizer = torch.optim.AdamW([a, s], lr=cfg.lr, weight_decay=cfg.weight_decay)
        rows: list[dict[str, float]] = []
        best, stale = math.inf, 0
        for i in self.run.progress(range(rounds), label):
            order = torch.randperm(len(self.images), generator=self.run.generator(label, i))
            losses, facts = self.losses(order[: cfg.batch_size].to(self.run.device), perturbed)
            losses["sparsity"] = sparsity * (1 - s).abs().mean()
            total = torch.stack(list(losses.values())).sum()
            a.grad, s.grad = torch.autograd.grad(total, [a, s])
            optimizer.step()
            self.gates.clamp_()
            self.gates.average_(cfg.averaging, i)
            # Read in one go, because each read waits for the device.
            named = {"total": total, **losses, **facts}
            read = torch.stack([value.detach() for value in named.values()]).tolist()
            rows.append(dict(zip(named, read, strict=True)))
            if not math.isfinite(rows[-1]["total"]):
                where = f"{label}, round {i + 1}"
                raise MethodFailed("a loss is not a finite number", got=rows[-1], where=where)
            if cfg.agreement:
                growth = math.exp(cfg.agreement - rows[-1]["agreement"])
                self.clean_weight = min(max(self.clean_weight * growth, 1.0), HEAVIEST)
            if perturbed:
                rows[-1]["budget"] = self.deltas.budget
                if cfg.flip_rate:
                    largest = max(cfg.largest_budget, cfg.budget)
                    self.deltas.adapt(
                        rows[-1]["flip_rate"], target_rate=cfg.flip_rate, smallest=cfg.budget, largest=largest
                    )
            stale += 1
            if rows[-1]["total"] < 0.98 * best:
                best, stale = rows[-1]["total"], 0
            if cfg.patience and stale > cfg.patience:
                break
        flips, budgets = ([row[k] for row in rows if k in row] for k in ("flip_rate", "budget"))
        ends = {"first": rows[:1], "last": rows[-1:]}
        return {"stage": label, "rounds": len(rows), **ends, "flip_rates": flips, "budgets": budgets}

    def losses(self, rows: Tensor, perturbed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the terms of the outer problem on some images, and what the perturbation did to them."""
        gates, base = self.gates, self.base[rows]
        x = to_float(self.images.pixels[rows], self.run.device)  # (B, C, H, W)
        delta = self.perturb(rows, x, base) if perturbed else None
        both = x if delta is None else torch.cat([x, x + delta])  # (2 B, C, H, W): both in one pass
        repaired_clean, *repaired_perturbed = self.log_probs(gates.network(gates.values()), both).split(
            len(x)
        )
        inverse_clean, *inverse_perturbed = self.log_probs(
            gates.network(gates.values(inverse=True)), both
        ).split(len(x))
        terms = {
            "keep clean": self.clean_weight * agree(repaired_clean, base),
            "inverse: lose clean": disagree(inverse_clean, base),
        }
        agreed = (repaired_clean.detach().argmax(1) == base.argmax(1)).float().mean()
        if delta is None:
            return terms, {"agreement": agreed}
        with torch.no_grad():
            moved = self.log_probs(self.model, both[len(x) :])  # (B, K)
        terms["restore perturbed"] = agree(repaired_perturbed[0], base)
        terms["inverse: follow perturbed"] = agree(inverse_perturbed[0], moved)
        terms["inverse: leave clean answer"] = disagree(inverse_perturbed[0], base)
        flipped = (moved.argmax(1) != base.argmax(1)).float().mean()
        facts = {"agreement": agreed, "flip_rate": flipped, "largest_delta": delta.abs().max()}
        return terms, facts

    def perturb(self, rows: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Return delta (B, C, H, W) that moves predictions away, to where the inverse network follows."""
        inverse = self.gates.network(self.gates.values(inverse=True).detach())

        def loss(pixels: Tensor) -> Tensor:
            moved, followed = self.log_probs(self.model, pixels), self.log_probs(inverse, pixels)
            return agree(followed, moved) + disagree(moved, base)

        return self.deltas.minimise(rows, x, loss)

    def log_probs(self, network: Network, pixels: Tensor) -> Tensor:
        """Return log-probabilities (B, K) in fp32."""
        return F.log_softmax(logits_of(network, pixels, self.run), dim=1)

    def evidence(self) -> dict[str, Any]:
        """Return the state of the gates, and what both networks do on clean images."""
        gates, answers = self.gates, self.base.argmax(1).cpu()
        repaired, inverse = (
            predict(gates.network(gates.mean_values(inverse=i)), self.images, self.run).argmax(1)
            for i in (False, True)
        )
        out = {
            **gates.evidence(),
            "budget": self.deltas.budget,
            "clean_weight": self.clean_weight,
            "agreement": float((repaired == answers).float().mean()),
            "inverse_agreement": float((inverse == answers).float().mean()),
        }
        if self.images.labels is not None:
            out["inverse_accuracy"] = float((inverse == self.images.labels.cpu()).float().mean())
        return out
