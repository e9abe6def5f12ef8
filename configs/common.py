"""The blocks that the configurations of several methods share, with their defaults.

Each function returns a ``ConfigDict`` whose fields are explained where they are read: the engine's in
``jaxvision/engine/options.py``, ``data`` in ``engine/datasets.py``, the others in ``engine/recipes.py``.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.engine import options


def engine(**changes) -> ConfigDict:
    """seed, parallel, log_every, save_every, keep_last, keep_best, tensorboard; a config starts from these."""
    return _update(ConfigDict(options.defaults()), changes)


def data(source: str, *, augment: dict | None = None, options: dict | None = None, **changes) -> ConfigDict:
    """A ``data`` block; ``augment`` changes fields of its block of that name, ``options`` go to the source."""
    block = ConfigDict(
        {
            "source": source,
            "path": "",
            "options": options or {},
            "train_split": "train",
            "eval_split": "test",
            "train_size": 0,
            "validation_size": 0,
            "validation_rule": "fixed",
            "validation_seed": 0,
            "class_aware": 0,
            "batch_size": 128,
            "eval_batch_size": 256,
            "pipeline": "array",
            "size": 0,
            "eval_size": 0,
            "mean": (),
            "std": (),
            "eval_mean": (),
            "eval_std": (),
            "augment": {
                "crop_padding": 0,
                "flip": False,
                "scale": (0.08, 1.0),
                "jitter": 0.0,
                "rand_augment": 0.0,
                "erasing": 0.0,
            },
        }
    )
    _update(block.augment, augment or {})
    return _update(block, changes)


def digits(**changes) -> ConfigDict:
    """scikit-learn's handwritten digits, 8x8 grey in 0..1, shifted to -1..1: 1,297 for training, 500 for testing."""
    return data("digits", mean=(0.5,), std=(0.5,), **changes)


def cifar(num_classes: int = 10, **changes) -> ConfigDict:
    """CIFAR with the standard augmentation: 4 pixels of padding, random crop, mirror. ``path`` is for the user."""
    return data(f"cifar{num_classes}", augment={"crop_padding": 4, "flip": True}, **changes)


def cifar_long_tail(num_classes: int = 10, imbalance: float = 0.1, **changes) -> ConfigDict:
    """CIFAR with ``imbalance`` times as many images in the last class as in the first, sampled class by class."""
    changes = {"options": {"imbalance": imbalance}, "class_aware": 4, **changes}
    return cifar(num_classes, **changes)


def tiny_imagenet(**changes) -> ConfigDict:
    """Tiny-ImageNet, tested on its 10,000 validation images; 10,000 training images held out as ACLS does it."""
    changes = {"validation_size": 10_000, "validation_rule": "per_class", "validation_seed": 1, **changes}
    return data("tiny_imagenet", augment={"crop_padding": 4, "flip": True}, eval_split="val", **changes)


def cub(**changes) -> ConfigDict:
    """CUB-200-2011: whole image to 256 x 256, random crop of 224, mirror."""
    return data("cub", augment={"flip": True}, pipeline="square", **changes)


def voc(**changes) -> ConfigDict:
    """VOC 2012 segmentation: crops of 512 of the 1,464 training images, tested at 480 on the 1,449 others."""
    changes = {"pipeline": "voc", "eval_split": "val", "size": 512, "eval_size": 480, **changes}
    return data("voc2012", augment={"flip": True, "jitter": 0.3}, **changes)


def imagenet(augment: dict | None = None, **changes) -> ConfigDict:
    """ImageNet-1k as ``<path>/train/<class>/*`` and ``<path>/val/<class>/*``. ``path`` is for the user."""
    return data("imagenet", augment=augment, pipeline="imagenet", eval_split="val", **changes)


def model(name: str, *, settings: dict | None = None, **changes) -> ConfigDict:
    """A ``model`` block; ``settings`` are attributes of the network, such as ``drop_path_rate``."""
    block = {
        "name": name,
        "settings": settings or {},
        "dtype": "float32",
        "num_classes": placeholder(int),
        "init_from": "",
        "init_keep": (),
    }
    return _update(ConfigDict(block), changes)


def tiny_cnn() -> ConfigDict:
    """The network of the smoke presets: three convolutions of four channels and a matrix, compiled in a moment."""
    return model("plain_cnn", settings={"features": (4, 4, 4), "strides": (1, 2, 1), "dilations": (1, 1, 1)})


def optimizer(name: str, lr: float, *, schedule: dict | None = None, **changes) -> ConfigDict:
    """An ``optimizer`` block; ``schedule`` changes fields of its block of that name (default: cosine to 0)."""
    block = ConfigDict(
        {
            "name": name,
            "lr": lr,
            "momentum": 0.9,
            "nesterov": False,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "no_decay": (),
            "clip_norm": 0.0,
            "accumulate": 1,
            "schedule": {
                "name": "cosine",
                "warmup_epochs": 0.0,
                "warmup_lr": 0.0,
                "end_lr": 0.0,
                "milestones": (),
                "gamma": 0.1,
                "power": 0.9,
                "per_epoch": False,
            },
        }
    )
    _update(block.schedule, schedule or {})
    return _update(block, changes)


def quantization(family: str, weight_bits: int, input_bits: int, **changes) -> ConfigDict:
    """A ``quantization`` block (``engine/quantization.py``); 32 bits are float."""
    block = {
        "family": family,
        "weight_bits": weight_bits,
        "input_bits": input_bits,
        "gradient_bits": 32,
        "gradient": "uniform",
        "noise_bits": 32,
        "exponent": 0,
        "execution": "fake",
        "output_scale": placeholder(bool),
        "float_layers": (),
        "signed_inputs": (),
        "bit_rules": (),
    }
    return _update(ConfigDict(block), changes)


def ema(decay: float = 0.0, *, warmup: bool = False) -> ConfigDict:
    """An ``ema`` block: the moving average of the weights; decay 0 keeps none."""
    return ConfigDict({"decay": decay, "warmup": warmup})


def unknown_preset(preset: str, known: Iterable[str]) -> ConfigError:
    """The error for a preset that a configuration file doesn't have."""
    return unknown("preset", preset, known)


def finish(config: ConfigDict) -> ConfigDict:
    """The configuration locked: an override of a field that doesn't exist is an error."""
    return config.lock()


def _update(block: ConfigDict, changes: dict) -> ConfigDict:
    """Sets fields that exist already."""
    with block.unlocked():
        for name, value in changes.items():
            if name not in block:
                raise KeyError(f"there is no field '{name}'; there are {', '.join(block)}")
            block[name] = value
    return block
