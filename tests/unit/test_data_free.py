"""Repairs that need no image: of an owner who has none, or who keeps all of them for the proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unbackdoor
from tiny import tiny_classifier, tiny_data
from unbackdoor.cli.app import app
from unbackdoor.errors import InputError
from unbackdoor.types import CleanData


def test_purify_works_without_any_image() -> None:
    model = tiny_classifier("conv-bn")
    done = unbackdoor.purify(model, None, "clp")
    assert done.accuracy is None and done.facts["images_for_the_method"] == 0
    assert done.model.sha256() == unbackdoor.purify(model, tiny_data(40), "clp").model.sha256()
    json.dumps(done.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="promise about accuracy needs labelled images"):
        unbackdoor.purify(model, None, "clp", max_accuracy_drop=10)


def test_images_may_be_for_the_proof_alone() -> None:
    proof = tiny_data(40, seed=5)
    done = unbackdoor.purify(tiny_classifier("conv-bn"), None, "clp", proof=proof, max_accuracy_drop=0.9)
    assert done.accuracy is not None and done.accuracy.before.total == 40
    assert done.promise is not None and not done.proof_is_fit
    assert done.facts["images_for_the_method"] == 0 and done.facts["images_for_the_proof"] == 40


@pytest.mark.parametrize("method", ["ft", "random_prune", "none"])
def test_a_method_that_needs_images_is_refused_without(method: str) -> None:
    model = tiny_classifier("conv-bn")
    with pytest.raises(InputError, match="no clean image"):
        unbackdoor.purify(model, None, method)
    with pytest.raises(InputError, match="needs clean images"):
        unbackdoor.run(method, model, CleanData.empty((1, 8, 8), model.class_names))


def test_the_choice_by_held_out_images_is_refused_without() -> None:
    for method in ("clp", "bnp", "otbr"):
        with pytest.raises(InputError, match="no held-out images"):
            unbackdoor.purify(tiny_classifier("conv-bn"), None, method, preset="held-out")


def test_the_command_needs_no_data_for_a_method_that_needs_none(tmp_path: Path) -> None:
    model = tmp_path / "model.pth"
    torch.save(dict(tiny_classifier("conv-bn").network.state_dict()), model)
    shape = ["--arch", "small_cnn[width=8]", "--mean", "0.35", "--std", "0.25", "--size", "8x8"]
    words = ["purify", str(model), *shape, "--quiet", "--json", "--out", str(tmp_path / "out.safetensors")]
    done = CliRunner().invoke(app, [*words, "--method", "clp"])
    assert done.exit_code == 4, done.output  # nothing shows that anything was repaired
    record = json.loads(done.stdout)
    assert record["accuracy"] is None and record["images_for_the_method"] == 0
    assert (tmp_path / "out.safetensors").exists()
    refused = CliRunner().invoke(app, [*words, "--force", "--method", "ft"])
    assert refused.exit_code != 0 and "no clean image" in refused.output
