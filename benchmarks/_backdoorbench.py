"""A victim as BackdoorBench keeps one: an attack result with its triggered images, and CIFAR-10 files.

The layout is that of its utils/save_load_attack.py and utils/bd_dataset_v2.py, and of torchvision's
CIFAR10; ``unbackdoor import-backdoorbench`` is the way back. Its training set is the defender's images and
nothing else, so that every script, told to use all of it, has exactly what ours has.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from unbackdoor.attacks import AttackTruth
from unbackdoor.attacks.poison import stamped
from unbackdoor.attacks.truth import of_classes
from unbackdoor.bench.backdoorbench import NORMALISATION
from unbackdoor.errors import InputError, UnsupportedModel
from unbackdoor.networks import build
from unbackdoor.types import Classifier, Images
from unbackdoor.weights.source import open_source

DATASET = "cifar10"  # the only one whose files are written here
RESULT, TEST_FOLDER = "attack_result.pt", "bd_test_dataset"
# What BackdoorBench calls our networks that are tensor for tensor its own.
NETWORKS = {
    "preact_resnet18[final_norm=false]": "preactresnet18",
    "preact_resnet18[width=64,final_norm=false]": "preactresnet18",
}
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))


def network_name(model: Classifier) -> str:
    """Return what BackdoorBench calls the network of a victim.

    Raises:
        UnsupportedModel: If it has none that is the same tensor for tensor.
    """
    if model.architecture in NETWORKS:
        return NETWORKS[model.architecture]
    raise UnsupportedModel(
        "BackdoorBench has no network with these tensors",
        expected="one of " + ", ".join(NETWORKS),
        got=model.architecture,
        remedy="Train such a victim: unbackdoor train --architecture 'preact_resnet18[final_norm=false]'",
    )


def write_attack_result(
    model: Classifier, truth: AttackTruth, test: Images, folder: Path, *, network: str | None = None
) -> Path:
    """Write a victim and its triggered test images as an attack result.

    Args:
        model: The victim, of CIFAR-10.
        truth: Its attack.
        test: Clean test images, labelled; those that the attack is judged on are triggered.
        folder: ``record/NAME`` of the folder that the scripts run in; must not hold a result.
        network: What BackdoorBench calls the network; None: as :func:`network_name` says.

    Returns:
        The file.

    Raises:
        InputError: If the attack triggers no test image, or the network subtracts another mean.
        UnsupportedModel: See :func:`network_name`.
    """
    name = network or network_name(model)
    rows = truth.targets_of(test) != test.truth
    rows &= of_classes(test.truth, truth.trigger.sources)
    chosen = rows.nonzero().flatten()
    if not len(chosen):
        raise InputError("the victim carries no attack, and there is nothing to compare", got=truth.attack)
    eligible = test.subset(chosen)
    place = f"./record/{folder.name}/{TEST_FOLDER}"
    entries = {}
    pictures = stamped(eligible.pixels, truth).permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    facts = zip(chosen.tolist(), truth.targets_of(eligible).tolist(), eligible.truth.tolist(), strict=True)
    for picture, (row, wanted, label) in zip(pictures, facts, strict=True):
        file = folder / TEST_FOLDER / str(label) / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
        entries[row] = {"path": f"{place}/{label}/{row}.png", "other_info": [wanted, label]}
    channels, height, width = model.input_shape
    torch.save(
        {
            "model_name": name,
            "num_classes": model.classes,
            "model": renormalised(model),
            "data_path": f"./data/{DATASET}",
            "img_size": (height, width, channels),
            "clean_data": DATASET,
            "bd_train": None,
            "bd_test": {
                "bd_data_container": {
                    "save_folder_path": place,
                    "data_dict": entries,
                    "save_file_format": ".png",
                },
                "getitem_all": True,
                "getitem_all_switch": False,
                "original_index_array": chosen.numpy(),
                "poison_indicator": rows.numpy().astype(np.float64),
                "save_folder_path": place,
            },
        },
        folder / RESULT,
    )
    return folder / RESULT


def renormalised(model: Classifier) -> dict[str, Tensor]:
    """Return the weights of a network as they are behind the normalisation of BackdoorBench.

    Where only the deviations differ, the first convolution takes the quotient: it multiplies each channel,
    and the zeros of its padding stay zeros. Another mean cannot be taken over in this way.

    Raises:
        InputError: If the means differ.
        UnsupportedModel: If the deviations differ and the network does not begin with a convolution.
    """
    mean, std = (torch.tensor(values) for values in NORMALISATION[DATASET])
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.network.state_dict().items()}
    if not torch.allclose(model.mean.cpu().flatten(), mean):
        raise InputError(
            "the network subtracts another mean than BackdoorBench",
            expected=mean.tolist(),
            got=model.mean.flatten().tolist(),
        )
    factor = std / model.std.cpu().flatten()  # (C,)
    if torch.equal(factor, torch.ones_like(factor)):
        return state
    first = next(
        ((name, layer) for name, layer in model.network.named_modules() if isinstance(layer, nn.Conv2d)), None
    )
    if first is None or first[1].in_channels != len(factor) or first[1].groups != 1:
        raise UnsupportedModel("the network does not begin with a convolution", got=model.architecture)
    state[f"{first[0]}.weight"] *= factor.view(1, -1, 1, 1)
    return state


def read_defense_result(file: Path, victim: Classifier) -> Classifier:
    """Return a network that a script saved, as a classifier of ours; its pickle is never run.

    Args:
        file: ``defense_result.pt``.
        victim: What was defended; of the same network.

    Raises:
        InputError: If the file is no such result.
        UnsafeFile: If it names what would run code.
        UnsupportedModel: If its tensors are not those of the network.
    """
    source = open_source(file)
    if not source.contents.dangerous and "model" in source.contents.sets:
        source = source.choose("model")
    state = plain(source.state())  # a dangerous or damaged file ends here, with the words of its reader
    mean, std = NORMALISATION[DATASET]
    model = build(
        victim.architecture,
        input_shape=victim.input_shape,
        class_names=victim.class_names,
        mean=mean,
        std=std,
    )
    try:
        model.network.load_state_dict(state)
    except RuntimeError as error:
        raise UnsupportedModel(
            "the saved tensors are not those of the network", got=str(error)[:300], where=file
        ) from None
    return model.eval()


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a pruned network without the masks that ``torch.nn.utils.prune`` keeps apart."""
    out = {}
    for name, tensor in state.items():
        stem = name.removesuffix("_orig")
        if stem != name and f"{stem}_mask" in state:
            out[stem] = tensor * state[f"{stem}_mask"]
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state):
            out[name] = tensor
    return out


def write_cifar10(folder: Path, train: Images, test: Images) -> None:
    """Write images as the Python version of CIFAR-10, which torchvision reads.

    Args:
        folder: ``data/cifar10`` of the folder that the scripts run in.
        train: What they may train on, (N, 3, 32, 32), N >= 5.
        test: Clean test images of the same shape.
    """
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True, exist_ok=True)
    parts = zip(_BATCHES, torch.arange(len(train)).tensor_split(len(_BATCHES)), strict=True)
    for name, images in (*((name, train.subset(rows)) for name, rows in parts), ("test_batch", test)):
        content = {"data": images.pixels.flatten(1).numpy(), "labels": images.truth.tolist()}
        (batches / name).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(train.class_names)}))
