"""What every registered defense owes, on every family of networks, failing paths included."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_classifier, tiny_data
from unbackdoor.engine.inference import accuracy
from unbackdoor.engine.run import Run
from unbackdoor.engine.trusted_caller import run
from unbackdoor.errors import ConfigError, InputError, MethodFailed, UnsupportedModel
from unbackdoor.registry import DEFENSES
from unbackdoor.types import Classifier, CleanData

# Options that make a method quick; its mathematics stays the same.
QUICK: dict[str, dict[str, object]] = {
    "awm": {"rounds": 3, "passes": 2, "tau": 3000.0},
    "ft": {"epochs": 2},
    "fp": {"epochs": 1, "step": 0.1},
    "ims": {"start_rounds": 3, "free_rounds": 3, "sparse_rounds": 3, "steps": 2, "batch_size": 32},
    "neural_cleanse": {"steps": 40, "images": 8, "rounds": 2, "epochs": 2},
    "random_prune": {"step": 0.1},
    "rnp": {"recover_epochs": 3, "batch_size": 32, "step": 0.2},
    "tac": {"epochs": 2},
    "unlearned_prune": {"batch_size": 32, "step": 0.1},
}
NAMES = sorted(DEFENSES)
Trained = tuple[Classifier, CleanData]


@pytest.mark.parametrize("name", NAMES)
def test_repairs_any_family_and_changes_nothing_else(name: str, trained: Trained) -> None:
    model, data = trained
    weights, images = model.sha256(), data.fingerprint()
    out = run(name, model, data, options=QUICK.get(name), precision="fp32")
    assert model.sha256() == weights
    assert data.fingerprint() == images
    assert not out.model.training
    assert out.model.class_names == model.class_names
    assert out.seconds >= 0
    assert out.method["name"] == name
    # A repair that forgets the task is none; every family here starts near 1.
    assert accuracy(out.model, data.all, Run.create(policy="fp32")) > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name: str, tiny: Trained) -> None:
    model, data = tiny
    first, again = (run(name, model, data, options=QUICK.get(name), seed=3).model.sha256() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", NAMES)
def test_evidence_is_plain_json(name: str, tiny: Trained) -> None:
    import json

    model, data = tiny
    out = run(name, model, data, options=QUICK.get(name))
    json.dumps([dict(out.evidence), dict(out.method)], allow_nan=False)


class _Bomb(nn.Module):
    """Raises in the middle of a method's work."""

    def __init__(self, network: nn.Module, fuse: int) -> None:
        super().__init__()
        self.network = network
        self.fuse = fuse

    def forward(self, x: Tensor) -> Tensor:
        self.fuse -= 1
        if self.fuse < 0:
            raise RuntimeError("bang")
        out: Tensor = self.network(x)
        return out


@pytest.mark.parametrize("fuse", [0, 1])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_nothing_leaks_when_it_raises_half_way(name: str, fuse: int, tiny: Trained) -> None:
    model, data = tiny
    bomb = Classifier(_Bomb(model.copy().network, fuse), input_shape=(1, 8, 8), class_names=model.class_names)
    weights = bomb.sha256()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bomb.modules()]
    with pytest.raises(MethodFailed, match="bang"):
        run(name, bomb, data, options=QUICK.get(name), precision="fp32")
    assert bomb.sha256() == weights
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bomb.modules()] == hooks
    assert all(p.requires_grad and p.grad is None for p in bomb.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_with_our_errors(name: str, tiny: Trained) -> None:
    model, data = tiny
    broken = model.copy()
    with torch.no_grad():
        next(broken.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(InputError, match="not a finite number"):
        run(name, broken, data)
    large = replace(data.fit, pixels=torch.zeros(len(data.fit), 1, 9, 9, dtype=torch.uint8))
    with pytest.raises(UnsupportedModel, match="do not fit the model"):
        run(name, model, replace(data, fit=large))
    more = replace(data.fit, class_names=("a", "b", "c", "d", "e"), labels=torch.full((len(data.fit),), 4))
    with pytest.raises(UnsupportedModel, match=r"labels in 0\.\.3"):
        run(name, model, replace(data, fit=more))
    if "labels" in DEFENSES[name].needs:
        bare = replace(data, fit=replace(data.fit, labels=None))
        with pytest.raises(InputError, match="labelled images"):
            run(name, model, bare)
        one = data.all.subset((data.all.truth == 0).nonzero().flatten())
        with pytest.raises(InputError, match="all of one class"):
            run(name, model, CleanData.split(one))


@pytest.mark.parametrize("name", NAMES)
def test_works_from_one_image_per_class_or_says_why_not(name: str) -> None:
    model = tiny_classifier("conv-bn")
    data = CleanData.split(tiny_data(4, seed=2))
    assert data.select_is_fit
    out = run(name, model, data, options=QUICK.get(name))
    assert out.model.classes == 4


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_all_named(name: str, tiny: Trained) -> None:
    model, data = tiny
    with pytest.raises(ConfigError) as caught:
        run(name, model, data, options={"nonsense": 1, "rubbish": 2})
    assert len(caught.value.faults) == 2


@pytest.mark.parametrize("name", NAMES)
def test_documentation_is_complete(name: str) -> None:
    part = DEFENSES[name]
    module = inspect.getmodule(part.function)
    text = module.__doc__ or ""
    for word in ("Paper:", "Needs:", "Changes:", "Departs:", "Cost:"):
        assert word in text, f"{module.__name__} lacks {word}"
    assert part.paper
    for option, field in part.config.model_fields.items():
        assert field.description, option
        assert isinstance(field.json_schema_extra, dict), option
        assert field.json_schema_extra["source"], option
    for preset in part.presets:
        part.configure(preset=preset)
    assert len(inspect.getsource(module).splitlines()) <= 220
    assert list(inspect.signature(part.function).parameters) == ["model", "data", "cfg", "run"]
