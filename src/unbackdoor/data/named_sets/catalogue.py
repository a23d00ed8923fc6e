"""Facts of each named data set, and where its owners publish it."""

from __future__ import annotations

from dataclasses import dataclass

from unbackdoor.types import Augmentation


@dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        url: Official address.
        algorithm: Name of the checksum in ``hashlib``.
        digest: The checksum, in hex.
        max_bytes: A download that grows past this is broken off.
    """

    url: str
    algorithm: str
    digest: str
    max_bytes: int

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Facts:
    """What a named set must be; checked after every load.

    Attributes:
        name: Name in the list of sets.
        class_names: K names, in label order.
        shape: (C, H, W) of every image.
        train: Number of training images.
        test: Number of test images.
        augmentation: What may be done to an image without changing its class.
        mean: Per-channel mean of training pixels in [0, 1].
        std: Per-channel standard deviation likewise.
        archives: The owners' files; empty where a package brings the set along.
    """

    name: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    train: int
    test: int
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    archives: tuple[Archive, ...] = ()

    def count(self, part: str) -> int:
        """Number of images of ``train`` or ``test``."""
        return self.train if part == "train" else self.test


DIGITS = Facts(
    name="digits",
    class_names=tuple("0123456789"),
    shape=(1, 8, 8),
    train=1200,
    test=597,
    augmentation="crop",
    # Of the 1200 training images, to four places.
    mean=(0.3045,),
    std=(0.3757,),
)

CIFAR10 = Facts(
    name="cifar10",
    class_names=(
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
    shape=(3, 32, 32),
    train=50_000,
    test=10_000,
    augmentation="crop+flip",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    archives=(
        # The binary version: the python version is pickled. Its owners publish the MD5
        # c32a1d4ab5d03f1284b67883e8d87530; this is the SHA-256 of the same file.
        Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "sha256",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            180_000_000,
        ),
    ),
)

_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
GTSRB32 = Facts(
    name="gtsrb32",
    class_names=tuple(f"{k:05d}" for k in range(43)),
    shape=(3, 32, 32),
    train=19_605,
    test=12_630,
    # A mirrored sign is another sign.
    augmentation="crop",
    mean=(0.3403, 0.3121, 0.3214),
    std=(0.2724, 0.2608, 0.2669),
    # The 39,209 training images of the final benchmark; GTSRB-Training_fixed.zip holds 26,640.
    archives=(
        Archive(
            f"{_GTSRB}/GTSRB_Final_Training_Images.zip",
            "md5",
            "f33fd80ac59bff73c82d25ab499e03a3",
            300_000_000,
        ),
        Archive(
            f"{_GTSRB}/GTSRB_Final_Test_Images.zip", "md5", "c7e4e6327067d32654124b0fe9e82185", 100_000_000
        ),
        Archive(f"{_GTSRB}/GTSRB_Final_Test_GT.zip", "md5", "fe31e9c9270bbcd7b84b7f21a9d9d9e5", 1_000_000),
    ),
)

TINYIMAGENET20 = Facts(
    name="tinyimagenet20",
    class_names=(
        "n01443537 goldfish",
        "n01784675 centipede",
        "n02002724 black stork",
        "n02123045 tabby",
        "n02231487 walking stick",
        "n02410509 bison",
        "n02666196 abacus",
        "n02808440 bathtub",
        "n02906734 broom",
        "n03014705 chest",
        "n03250847 drumstick",
        "n03544143 hourglass",
        "n03763968 military uniform",
        "n03930313 picket fence",
        "n04067472 reel",
        "n04254777 sock",
        "n04376876 syringe",
        "n04532106 vestment",
        "n07614500 ice cream",
        "n07768694 pomegranate",
    ),
    shape=(3, 64, 64),
    train=10_000,
    test=1_000,
    augmentation="crop+flip",
    mean=(0.4802, 0.4481, 0.3975),
    std=(0.2770, 0.2691, 0.2821),
    archives=(
        # Published over plain HTTP, so that the checksum is all that vouches for it: SHA-256, not the
        # better known MD5 90528d7ca1a48142e341f4ef8d21d0de.
        Archive(
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "sha256",
            "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            260_000_000,
        ),
    ),
)

SETS: dict[str, Facts] = {facts.name: facts for facts in (DIGITS, CIFAR10, GTSRB32, TINYIMAGENET20)}
