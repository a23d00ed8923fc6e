"""CLIP as a classifier: an image encoder with a list of prompts *is* a network with a linear head.

Source:  Radford et al., ICML 2021, arXiv 2103.00020, section 3.1.4: the weights of the head are the
         embeddings of the prompts, of length one, times the temperature; the logits are its products with the
         embedding of the image, of length one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unbackdoor.errors import ConfigError, InputError, UnsupportedModel
from unbackdoor.files import parse_json, read_text
from unbackdoor.hub import is_hub, model_folder
from unbackdoor.networks.sources.optional_libraries import import_library
from unbackdoor.types import Classifier
from unbackdoor.weights.source import open_source

PROMPT = "a photo of a {}"
# Of the images that CLIP was trained on; its preprocessor_config.json has them.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_MAX_JSON = 4 << 20  # bytes
_MAX_CLASSES = 100_000
_PURPOSE = "a classifier of CLIP"


class ZeroShot(nn.Module):
    """The image encoder of CLIP, its projection, and a linear head of text embeddings.

    Args:
        vision: From pixels (B, C, H, W) to an output with ``pooler_output`` (B, E).
        projection: From E to D features.
        text_features: (K, D), of length one.
        scale: Temperature of the logits.
    """

    def __init__(self, vision: nn.Module, projection: nn.Module, text_features: Tensor, scale: float) -> None:
        super().__init__()
        self.vision = vision
        self.projection = projection
        classes, features = text_features.shape
        with torch.random.fork_rng(devices=[]):  # the weights are replaced at once
            self.head = nn.Linear(features, classes, bias=False)
        self.head.weight = nn.Parameter(scale * text_features.detach().clone())

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, K) of normalised pixels (B, C, H, W)."""
        embedding = self.projection(self.vision(pixel_values=pixels).pooler_output)  # (B, D)
        logits: Tensor = self.head(nn.functional.normalize(embedding, dim=-1))
        return logits


def zero_shot(
    model: Path | str | nn.Module,
    class_names: Sequence[str],
    *,
    prompts: Sequence[str] = (PROMPT,),
    text_features: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Return CLIP with the classes as a classifier, which every scanner and repair takes.

    Args:
        model: A folder as transformers writes it (config, weights, tokenizer), ``hf://ORG/MODEL``, or a
            ``transformers.CLIPModel``. The weights of a folder are read like any file of a stranger.
        class_names: K names.
        prompts: Texts with ``{}`` for the name; the embeddings of several are averaged.
        text_features: (K, D) embeddings of the classes, in the place of prompts; for a model in memory they
            are needed, because it has no tokenizer.
        mean: Per-channel mean; None: the folder's, else CLIP's own.
        std: Per-channel deviation, likewise.

    Returns:
        A classifier of pixels in [0, 1], of the size that the encoder takes.

    Raises:
        InputError: If the folder is no CLIP, or the embeddings do not fit.
        ConfigError: If the names or the prompts cannot be used.
        UnsafeFile: If the weights are a file that would execute code.
        MissingExtra: Without transformers.

    Paper:   arXiv:2103.00020.

    Example:
        >>> clip = unbackdoor.zero_shot("clip-vit-base-patch32", ["cat", "dog"])  # doctest: +SKIP
        >>> unbackdoor.scan(clip, "images/")  # doctest: +SKIP
    """
    names = _usable(class_names, prompts)
    library: Any = import_library("transformers", extra="hf", purpose=_PURPOSE)
    folder: Path | None = None
    if isinstance(model, nn.Module):
        clip: Any = model
        if text_features is None:
            raise InputError("a model in memory has no tokenizer", expected="text_features", where=_PURPOSE)
    else:
        folder = model_folder(model) if is_hub(model) else Path(model)
        clip = _loaded(folder, library)
    config = getattr(clip, "config", None)
    if not all(hasattr(clip, part) for part in ("vision_model", "visual_projection", "logit_scale")):
        raise UnsupportedModel("this is no CLIP", expected="a CLIPModel", got=type(clip).__name__)
    if text_features is None:
        assert folder is not None
        text_features = _embedded(clip, folder, library, names, prompts)
    features = _of_length_one(text_features, len(names), clip.visual_projection.out_features)
    own_mean, own_std = _normalisation(folder)
    side = int(config.vision_config.image_size)  # type: ignore[union-attr]
    channels = int(getattr(config.vision_config, "num_channels", 3))  # type: ignore[union-attr]
    scale = float(clip.logit_scale.detach().exp())
    network = ZeroShot(clip.vision_model, clip.visual_projection, features, scale)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return Classifier(
        network.eval(),
        input_shape=(channels, side, side),
        class_names=names,
        mean=tuple(own_mean if mean is None else mean)[:channels],
        std=tuple(own_std if std is None else std)[:channels],
        origin=f"zero-shot CLIP of {folder or 'a model in memory'}",
    )


def _usable(class_names: Sequence[str], prompts: Sequence[str]) -> tuple[str, ...]:
    names = tuple(class_names)
    faults = []
    if isinstance(class_names, str) or not 2 <= len(names) <= _MAX_CLASSES:
        faults.append(f"expected 2 to {_MAX_CLASSES} class names")
    elif not all(isinstance(name, str) and name.strip() for name in names) or len(set(names)) < len(names):
        faults.append("class names must be texts, none empty and none twice")
    if isinstance(prompts, str) or not prompts or not all(str(text).count("{}") == 1 for text in prompts):
        faults.append(f"expected prompts with one {{}} for the name, such as {PROMPT!r}")
    if faults:
        raise ConfigError(_PURPOSE, faults)
    return names


def _loaded(folder: Path, library: Any) -> Any:
    """Return the model of a folder; its weights are read by our own readers."""
    path = folder / "config.json"
    content = parse_json(read_text(path, "the config", limit=_MAX_JSON), "the config", path)
    if not isinstance(content, dict) or content.get("model_type") != "clip":
        got = content.get("model_type") if isinstance(content, dict) else type(content).__name__
        raise InputError("the folder holds no CLIP", expected="model_type clip", got=got, where=path)
    state = open_source(folder).state()
    try:
        config = library.CLIPConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.random.fork_rng(devices=[]):  # it draws weights that are replaced at once
            clip = library.CLIPModel(config)
        known = clip.state_dict()
        missing, _ = clip.load_state_dict({k: t for k, t in state.items() if k in known}, strict=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            "transformers cannot build CLIP from the folder",
            got=lines[0][:300] if lines else type(error).__name__,
            where=folder,
        ) from error
    lost = [name for name in missing if not name.endswith("position_ids")]
    if lost:
        raise InputError("weights of CLIP are missing", got=", ".join(lost[:5]), where=folder)
    return clip.float().eval()


def _embedded(clip: Any, folder: Path, library: Any, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Return the averaged embeddings of the prompts, (K, D)."""
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        rows = []
        with torch.no_grad():
            for prompt in prompts:
                texts = [prompt.replace("{}", name) for name in names]
                tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
                out = clip.text_model(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output
                rows.append(nn.functional.normalize(clip.text_projection(out), dim=-1))
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise InputError(
            "the prompts cannot be embedded",
            got=lines[0][:300] if lines else type(error).__name__,
            where=folder,
            remedy="Give a folder with the tokenizer, or text_features",
        ) from error
    return torch.stack(rows).mean(0)


def _of_length_one(features: object, classes: int, width: int) -> Tensor:
    if not isinstance(features, Tensor) or tuple(features.shape) != (classes, width):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise InputError(
            "the embeddings of the classes do not fit", expected=f"a tensor ({classes}, {width})", got=got
        )
    lengths = features.detach().float().norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()) or not bool((lengths > 0).all()):
        raise InputError("the embeddings of the classes are not finite, or zero", where=_PURPOSE)
    return features.detach().float() / lengths


def _normalisation(folder: Path | None) -> tuple[Sequence[float], Sequence[float]]:
    path = None if folder is None else folder / "preprocessor_config.json"
    if path is None or not path.is_file():
        return MEAN, STD
    steps = parse_json(read_text(path, "the preprocessing", limit=_MAX_JSON), "the preprocessing", path)
    mean, std = (steps.get(f"image_{name}") if isinstance(steps, dict) else None for name in ("mean", "std"))
    if not all(isinstance(v, list) and all(isinstance(x, int | float) for x in v) for v in (mean, std)):
        return MEAN, STD
    return mean, std  # type: ignore[return-value]
