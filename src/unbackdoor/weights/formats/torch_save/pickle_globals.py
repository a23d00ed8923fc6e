"""What a pickle names, judged without importing it: tensors, well-known classes, unknown code or danger.

A list of bad names is never complete, so the lists here are of good ones. A name of the standard library, of
torch or of numpy that no list has is dangerous, whatever it is. Only names of modules that are unknown here,
such as the user's own networks, are left between the two: to load them is to run code that was not checked.
"""

from __future__ import annotations

import _compat_pickle
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Danger = Literal["plain", "library", "unknown", "dangerous"]


@dataclass(frozen=True, order=True)
class Name:
    """A global of a pickle: the module that would be imported, and what would be taken from it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_PLAIN = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|(builtins|__builtin__)\.set"
    r"|torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.(Parameter|Buffer)"
    r"|torch\.jit\._pickle\.(build_\w+|restore_type_tag)|torch\.(Size|device|[A-Z]\w*Tensor)"
    r"|torch\.\w+Storage|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\.(bool|bfloat16|float(16|32|64)|u?int(8|16|32|64)|complex(32|64|128)|float8_\w+)"
)
# Each of these builds a value from its arguments, and calls nothing that the pickle chooses. They are named
# one by one, because a module offers all that it imports: openers of files, threads, clients of networks.
_LIBRARY = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.(defaultdict|deque|Counter)"
    r"|(builtins|__builtin__)\.(frozenset|list|dict|tuple|int|long|float|bool|str|unicode|bytes|bytearray"
    r"|complex|slice|range|xrange|object)"
    r"|(copyreg|copy_reg)\._reconstructor|functools\.partial|inspect\._empty"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|datetime\.(date|time|datetime|timedelta|timezone)"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.UUID"
    r"|numpy\.(ndarray|dtype|bool_?|u?int\d+|float\d+|complex\d+|float_|int_|longlong)"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(core|_core)\.numeric\._frombuffer"
    r"|numpy\.dtypes\.[A-Z]\w*DType|numpy\.random\._pickle\.__(bit_generator|generator|randomstate)_ctor"
    r"|numpy\.random\.(_generator\.Generator|_mt19937\.MT19937|_pcg64\.PCG64(DXSM)?|_philox\.Philox"
    r"|_sfc64\.SFC64|bit_generator\.SeedSequence)"
    r"|torch\.(Tensor|Generator|contiguous_format|channels_last|preserve_format|strided)"
    # What torch's own careful reader allows, and this one does not read as plain tensors.
    r"|torch\._utils\._rebuild_(qtensor|sparse_tensor|nested_tensor|meta_tensor_no_storage|wrapper_subclass"
    r"|device_tensor_from_(numpy|cpu_tensor))"
    r"|torch\.(q(u?int)(8|32|4x2|2x4)|bits\d+(x\d+)?|u?int[1-7]|float4_\w+)|torch\.per_(tensor|channel)_\w+"
    r"|torch\.(cuda\.)?(sparse\.)?[A-Z]\w*Tensor|torch\.cuda\.[A-Z]\w*Storage"
    r"|torch\.serialization\._get_layout"
    # It opens a pickle inside; its names are recorded when it is read, see ``pickle_reader``. So is what the
    # second makes: one of the packed weights that are listed there.
    r"|torch\.storage\._load_from_bytes|torch\.ScriptObject|unbackdoor\.types\.Classifier"
    r"|torch\.nn\.functional\.(relu6?|leaky_relu|elu|selu|celu|gelu|glu|silu|mish|hardtanh|hardswish"
    r"|hardsigmoid|tanh|sigmoid|softplus|softmax|log_softmax|logsigmoid|dropout[123]?d?|cross_entropy|nll_loss"
    r"|mse_loss|l1_loss|smooth_l1_loss|kl_div|binary_cross_entropy(_with_logits)?|interpolate|normalize)"
    r"|torch\.nn\.init\.((kaiming|xavier)_)?(uniform|normal|trunc_normal|constant|ones|zeros|orthogonal)_"
    r"|torch\._C\._nn\.(gelu|silu|mish|elu|leaky_relu|hardswish)|torch\.(relu|tanh|sigmoid|selu|celu)"
    r"|torchvision\.transforms\.functional\.InterpolationMode|timm\.layers\.format\.Format|PIL\.Image\.Image"
)
# Classes by the module that defines them, made by ``scripts/library_classes.py``.
CLASSES_FILE = Path(__file__).with_name("library_classes.json")
# Removed from the library over the years, and there for those who load with an older Python.
_FORMER = {
    "aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "commands", "crypt", "dircache",
    "distutils", "dummy_threading", "exceptions", "execfile", "formatter", "imghdr", "imp", "lib2to3",
    "mailcap", "msilib", "new", "nis", "nntplib", "ossaudiodev", "parser", "pipes", "popen2", "sets",
    "smtpd", "sndhdr", "spwd", "sunau", "symbol", "telnetlib", "test", "urllib2", "uu", "user", "xdrlib",
}  # fmt: skip
_STANDARD = frozenset(sys.stdlib_module_names) | _FORMER | frozenset(_compat_pickle.IMPORT_MAPPING)
# Packages that stand beside torch nearly everywhere; what no list above has of them may do anything.
_PRESENT = {
    "torch", "torchvision", "torchaudio", "functorch", "torchgen", "triton", "numpy", "scipy", "timm",
    "sklearn", "PIL", "pandas", "joblib", "dill", "cloudpickle", "pip", "setuptools", "pkg_resources",
    "wheel", "IPython", "jinja2", "yaml", "sympy", "networkx", "requests", "fsspec", "huggingface_hub",
    "transformers", "fickling", "pydoc_data", "six", "execnet", "lib", "py", "pytest", "_pytest",
    "matplotlib", "tensorflow", "keras", "jax", "cffi", "pexpect", "ptyprocess", "sh", "plumbum", "invoke",
    "fabric", "paramiko", "ray", "dask", "distributed", "unbackdoor",
}  # fmt: skip
# In a dotted name any part may be a door: torch.nn.modules.module + "sys.modules".
_DOORS = {
    "os", "posix", "nt", "sys", "subprocess", "builtins", "__builtin__", "__builtins__", "socket", "shutil",
    "runpy", "importlib", "ctypes", "pickle", "cPickle", "_pickle", "commands", "eval", "exec", "execfile",
    "compile", "open", "getattr", "setattr", "delattr", "__import__", "import_module", "globals", "locals",
    "vars", "breakpoint", "__class__", "__base__", "__bases__", "__subclasses__", "__mro__", "__globals__",
    "__dict__", "__getattribute__", "__reduce__", "__reduce_ex__", "__init__", "__call__", "__code__",
    "__loader__", "__spec__", "mro",
}  # fmt: skip


@functools.cache
def _library_classes() -> frozenset[str]:
    table = json.loads(CLASSES_FILE.read_text(encoding="utf-8"))
    return frozenset(f"{module}.{name}" for module, names in table.items() for name in names)


def is_library_class(name: Name) -> bool:
    """Tell whether a name is that of a class of networks or the like, under the module that defines it.

    Such classes are harmless where an object is made from its attributes, as pickles make them. Some do a lot
    when they are called: they load files, or fetch code.
    """
    return str(name) in _library_classes()


def judge(name: Name) -> Danger:
    """Return how dangerous it would be to import and call a name of a pickle.

    Example:
        >>> judge(Name("models.resnet", "ResNet")), judge(Name("os", "system"))
        ('unknown', 'dangerous')
    """
    full = str(name)
    # Protocols below 3 translate the names of Python 2, so that "commands" means subprocess.
    modern = _compat_pickle.NAME_MAPPING.get((name.module, name.name), (name.module, name.name))
    modern = (_compat_pickle.IMPORT_MAPPING.get(modern[0], modern[0]), modern[1])
    if "." not in name.name and "\n" not in full:
        if _PLAIN.fullmatch(full):
            return "plain"
        if _LIBRARY.fullmatch(full) or is_library_class(name):
            return "library"
    for module, attribute in ((name.module, name.name), modern):
        parts = module.split(".")
        if parts[0] in _STANDARD or parts[0] in _PRESENT or not parts[0]:
            return "dangerous"
        if _DOORS & set(attribute.split(".")) or _DOORS & set(parts):
            return "dangerous"
    return "unknown"
