"""List the classes of well-known libraries that a pickle may name without harm.

    python scripts/library_classes.py PLACE... [--out FILE]

The place with torch comes first, because the classes of the others descend from its classes. A place is a
wheel, or a folder in which packages lie (site-packages, or ``src`` of this project). Nothing is imported: the
source is parsed. A class is listed under the module that its ``class`` statement stands in, so that what a
module only imports is never listed, and only if it descends from a class of networks, optimizers, schedules,
image transforms or sets in memory. A class that does something when it is thrown away is left out. Several
versions of a library are put together.
The table of this project is made of torch 2.13, scikit-learn 1.9, timm 0.4.12, 0.6.13, 0.9.16 and 1.0.31,
torchvision 0.9.1, 0.13.1, 0.17.2 and 0.29.1, and transformers 4.44.2 and 5.24.

The table holds for classes that are made from their attributes, as pickles make objects. To call one, with
arguments that a file chooses, is another matter (``pickle_reader``).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from unbackdoor.files import atomic_write
from unbackdoor.weights.formats.torch_save.pickle_globals import CLASSES_FILE

# Modules that are looked into.
_MODULES = re.compile(
    r"torch\.(nn|optim|ao\.nn|ao\.quantization|quantization)(\.\w+)*|torch\.(cuda\.)?amp\.grad_scaler"
    r"|torch\.utils\.data\.(dataset|sampler|distributed)"
    r"|torchvision\.(models|ops|transforms)(\.\w+)*"
    r"|timm\.(models|layers|optim|scheduler|loss)(\.\w+)*|timm\.data\.(transforms|random_erasing|auto_augment|mixup)"
    r"|timm\.utils\.model_ema"
    r"|transformers\.activations|transformers\.models\.(vit\w*|deit|beit|swin\w*|dino\w*|convnext\w*|resnet|regnet"
    r"|levit|mobile\w+|efficientnet|poolformer|cvt|van|focalnet|bit|hiera|data2vec|clip|siglip\w*|pvt\w*"
    r"|timm_wrapper|timm_backbone|segformer|perceiver|imagegpt|ijepa|textnet|efficientformer|nat|dinat)"
    r"\.(modeling|configuration)_\w+"
    r"|sklearn\.preprocessing\.\w+|unbackdoor\.networks(\.\w+)*"
)
# Classes that need no ancestor: plain ones, in modules that hold nothing else.
_PLAIN = re.compile(
    r"torch\.nn\.utils\.(prune|spectral_norm|weight_norm)|torch\.(cuda\.)?amp\.grad_scaler"
    r"|torch\.optim\.(lr_scheduler|swa_utils)|torchvision\.transforms\.transforms"
    r"|timm\.scheduler\.\w+|timm\.data\.(transforms|random_erasing|auto_augment|mixup)|timm\.utils\.model_ema"
)
_ANCESTORS = {
    "torch.nn.modules.module.Module", "torch.nn.modules.module._WrappedHook",
    "torch.optim.optimizer.Optimizer", "torch.utils.data.dataset.Dataset",
    "torch.utils.data.sampler.Sampler", "sklearn.base.BaseEstimator",
    "transformers.configuration_utils.PretrainedConfig", "transformers.configuration_utils.PreTrainedConfig",
    "transformers.modeling_utils.PreTrainedModel",
}  # fmt: skip
_LEFT_OUT = {"__del__"}


def sources(place: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and text of every module of a wheel or a folder."""
    if place.suffix == ".whl":
        with zipfile.ZipFile(place) as wheel:
            for name in sorted(wheel.namelist()):
                module = _module(Path(name))
                if module is not None:
                    yield module, wheel.read(name).decode()
        return
    for top in ("torch", "torchvision", "timm", "transformers", "sklearn", "unbackdoor"):
        for path in sorted((place / top).rglob("*.py")):
            module = _module(path.relative_to(place))
            if module is not None:
                yield module, path.read_text()


def _module(path: Path) -> str | None:
    parts = [*path.parent.parts, *([] if path.stem == "__init__" else [path.stem])]
    name = ".".join(parts)
    return name if path.suffix == ".py" and _MODULES.fullmatch(name) else None


def listed(where: Path, known: frozenset[str] = frozenset()) -> dict[str, list[str]]:
    """Return the harmless classes of the libraries in one place, by module.

    Args:
        where: The place.
        known: Full names of such classes in other places, from which those of this one may descend: most
            wheels do not hold the torch that they build on.
    """
    bases: dict[tuple[str, str], list[str]] = {}
    left_out: set[tuple[str, str]] = set()
    stated: dict[str, str] = {}  # the module that a class says it is of, where that is another
    for module, text in sources(where):
        tree = ast.parse(text)
        names = _imported(module, tree)
        for statement in _statements(tree.body):
            if (
                isinstance(statement, ast.Assign)
                and isinstance(statement.targets[0], ast.Attribute)
                and statement.targets[0].attr == "__module__"
                and isinstance(statement.value, ast.Constant)
            ):
                stated[_base(statement.targets[0].value, names)] = str(statement.value.value)
            if isinstance(statement, ast.ClassDef):
                key = (module, statement.name)
                names[statement.name] = f"{module}.{statement.name}"
                bases[key] = [_base(base, names) for base in statement.bases]
                defined = {inner.name for inner in statement.body if isinstance(inner, ast.FunctionDef)}
                if defined & _LEFT_OUT:
                    left_out.add(key)
    full = {".".join(key): key for key in bases}
    good = {key for key in bases if ".".join(key) in _ANCESTORS or _PLAIN.fullmatch(key[0])}
    # Ancestors of what is re-exported are named by the package they are imported from: by the last name too.
    last = {key[1] for key in good} | {name.rpartition(".")[2] for name in _ANCESTORS | known}
    while True:
        more = {
            key
            for key, above in bases.items()
            if key not in good
            and any(full.get(base) in good or base.rpartition(".")[2] in last for base in above)
        }
        if not more:
            break
        good |= more
        last |= {name for _, name in more}
    bad = set(left_out)
    for _ in range(10):
        bad |= {key for key, above in bases.items() if any(full.get(base) in bad for base in above)}
    out: dict[str, set[str]] = {}
    for module, name in good - bad:
        for place in {module, stated.get(f"{module}.{name}", module)}:
            out.setdefault(place, set()).add(name)
    return {module: sorted(names) for module, names in out.items()}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    # Also those that depend on a version, or on whether something is installed.
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


def _imported(module: str, tree: ast.Module) -> dict[str, str]:
    out = {}
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ImportFrom):
            parts = module.split(".")
            above = ".".join(parts[: len(parts) - statement.level]) if statement.level else ""
            source = ".".join(part for part in (above, statement.module or "") if part)
            out.update({alias.asname or alias.name: f"{source}.{alias.name}" for alias in statement.names})
    return out


def _base(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Subscript):
        return _base(node.value, names)
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_base(node.value, names)}.{node.attr}"
    return ""


def main() -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("places", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=CLASSES_FILE)
    arguments = parser.parse_args()
    table: dict[str, set[str]] = {}
    for where in arguments.places:
        known = frozenset(f"{module}.{name}" for module, names in table.items() for name in names)
        for module, names in listed(where, known).items():
            table.setdefault(module, set()).update(names)
    rows = (f"{json.dumps(module)}: {json.dumps(sorted(table[module]))}" for module in sorted(table))
    with atomic_write(arguments.out) as path:
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    print(f"{sum(map(len, table.values()))} classes in {len(table)} modules", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
