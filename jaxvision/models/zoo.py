"""The networks by name: ``build("resnet50", num_classes=10, stem="cifar")``.

Names are torchvision's and timm's; the CIFAR networks of He et al. are ``resnet20`` ... ``resnet110``, with
``final_norm=True`` those of LBT and TRS. The calibration literature's end in ``_cifar`` and ``_tiny_imagenet``.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.models import (
    autoformer,
    cifar_resnet,
    deeplab,
    densenet,
    mbv2_searched,
    mobilenet_v2,
    nas_bench_201,
    plain_cnn,
    reactnet,
    resnet,
    swin,
    vit,
    wide_resnet,
)
from jaxvision.models.autoformer import AutoFormer
from jaxvision.models.cifar_resnet import CifarResNet
from jaxvision.models.deeplab import DeepLabV3
from jaxvision.models.densenet import DenseNet
from jaxvision.models.mbv2_searched import MBV2Searched
from jaxvision.models.mobilenet_v2 import MobileNetV2
from jaxvision.models.nas_bench_201 import NasBench201
from jaxvision.models.plain_cnn import PlainCNN
from jaxvision.models.reactnet import ReActNet
from jaxvision.models.resnet import ResNet
from jaxvision.models.swin import Swin
from jaxvision.models.vit import ViT
from jaxvision.models.wide_resnet import WideResNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What goes into a network, and where its published weights come from.

    Attributes:
      family: a key of ``CLASSES``.
      naming: whose state-dict names its weights have: "akamaster", "torchvision", "timm", "flsd"
        (torrvision/focal_calibration, and MbLS, CALS and RankMixup after it), "nats_bench" (D-X-Y/NATS-Bench) or "smp"
        (segmentation_models.pytorch), "reactnet" (liuzechun/ReActNet).
      input_size: (height, width) in pixels.
      mean, std: of the normalisation ``(pixel / 255 - mean) / std``, a channel each.
      crop_fraction: evaluation resizes the shorter side to ``floor(size / crop_fraction)`` and takes the centre.
      interpolation: of that resize, "bilinear" or "bicubic" (PIL, antialiased).
      dense: whether the logits are those of every pixel, [B, H, W, K], instead of the image's, [B, K].
    """

    family: str
    naming: str
    input_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    dense: bool = False


CLASSES: dict[str, type[nn.Module]] = {
    "cifar_resnet": CifarResNet,
    "resnet": ResNet,
    "wide_resnet": WideResNet,
    "densenet": DenseNet,
    "deeplab": DeepLabV3,
    "mobilenet_v2": MobileNetV2,
    "nas_bench_201": NasBench201,
    "mbv2_searched": MBV2Searched,
    "autoformer": AutoFormer,
    "plain_cnn": PlainCNN,
    "reactnet": ReActNet,
    "vit": ViT,
    "swin": Swin,
}


def _entries() -> dict[str, tuple[dict[str, Any], Spec]]:
    # The weights of akamaster/pytorch_resnet_cifar10 were trained with ImageNet's statistics.
    entries = {name: (kw, Spec("cifar_resnet", "akamaster", (32, 32))) for name, kw in cifar_resnet.PRESETS.items()}
    small = {"cifar": ((32, 32), CIFAR10_MEAN, CIFAR10_STD), "tiny_imagenet": ((64, 64), IMAGENET_MEAN, IMAGENET_STD)}
    for name, kw in resnet.PRESETS.items():
        entries[name] = kw, Spec("resnet", "torchvision", (224, 224), crop_fraction=0.875)
        for stem, (size, mean, std) in small.items():
            entries[f"{name}_{stem}"] = {**kw, "stem": stem}, Spec("resnet", "torchvision", size, mean, std)
    for stem, (size, mean, std) in small.items():
        for name, kw in wide_resnet.PRESETS.items():
            entries[f"{name}_{stem}"] = {**kw, "stem": stem}, Spec("wide_resnet", "flsd", size, mean, std)
        for name, kw in densenet.PRESETS.items():
            entries[f"{name}_{stem}"] = kw, Spec("densenet", "flsd", size, mean, std)
    for name, kw in deeplab.PRESETS.items():
        entries[name] = kw, Spec("deeplab", "smp", (512, 512), dense=True)
    for name, kw in mobilenet_v2.PRESETS.items():
        entries[name] = kw, Spec("mobilenet_v2", "torchvision", (224, 224), crop_fraction=0.875)
    for name, kw in reactnet.PRESETS.items():
        entries[name] = kw, Spec("reactnet", "reactnet", (224, 224), crop_fraction=0.875)
        size, mean, std = small["cifar"]
        entries[f"{name}_cifar"] = {**kw, "stem": "cifar"}, Spec("reactnet", "reactnet", size, mean, std)
    for name, kw in nas_bench_201.PRESETS.items():
        entries[name] = kw, Spec("nas_bench_201", "nats_bench", (32, 32), CIFAR10_MEAN, CIFAR10_STD)
    for name, kw in plain_cnn.PRESETS.items():
        dense = kw.get("dense", False)
        entries[name] = kw, Spec("plain_cnn", "torchvision", (32, 32), CIFAR10_MEAN, CIFAR10_STD, dense=dense)
    for family, module, naming in (("mbv2_searched", mbv2_searched, "torchvision"), ("autoformer", autoformer, "timm")):
        for name, kw in module.PRESETS.items():
            spec = Spec(family, naming, (224, 224), crop_fraction=0.875, interpolation="bicubic")
            entries[name] = kw, spec
    for family, module in (("vit", vit), ("swin", swin)):
        for name, kw in module.PRESETS.items():
            entries[name] = kw, Spec(family, "timm", **module.SPECS[name])
    return entries


MODELS: dict[str, tuple[dict[str, Any], Spec]] = _entries()


def names() -> tuple[str, ...]:
    """All names, sorted."""
    return tuple(sorted(MODELS))


def _entry(name: str) -> tuple[dict[str, Any], Spec]:
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def spec(name: str) -> Spec:
    """The :class:`Spec` of a network.

    Raises:
      ConfigError: an unknown name.
    """
    return _entry(name)[1]


def build(name: str, *, num_classes: int, **overrides: Any) -> nn.Module:
    """The network of that name, a linen module: ``apply(variables, images, train=, tap=) -> logits``.

    Args:
      name: of :func:`names`.
      num_classes: K.
      overrides: attributes of the class (``ResNet.stem``, ``ViT.depth``, ``dtype`` ...).

    Raises:
      ConfigError: an unknown name, an attribute that the class does not have, or fewer than one class.
    """
    settings, info = _entry(name)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ConfigError(f"num_classes={num_classes!r} must be a whole number of at least 1")
    module = CLASSES[info.family]
    fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name", "num_classes"}
    for key in overrides:
        if key not in fields:
            raise unknown(f"setting of {name}", key, fields)
    return module(**{**settings, "num_classes": num_classes, **overrides})


def variable_shapes(module: nn.Module, input_size: tuple[int, int], channels: int = 3) -> Any:
    """Shapes and dtypes of the module's variables for images [B, *input_size, channels]; computes nothing."""
    image = jax.ShapeDtypeStruct((1, *input_size, channels), jnp.float32)
    return jax.eval_shape(lambda image: module.init(jax.random.key(0), image), image)
