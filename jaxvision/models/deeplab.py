"""DeepLabV3 (Chen et al. 2017, arXiv:1706.05587) on a ResNet, as segmentation_models.pytorch ("SMP") builds it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxvision.core.errors import ConfigError, unknown
from jaxvision.core.types import Tap, no_tap, scoped
from jaxvision.models import resnet
from jaxvision.models.heads import resize_corners, scaled_logits
from jaxvision.models.layers import BatchNorm, Conv, Dropout, global_avg_pool
from jaxvision.models.resnet import ResNet

PRESETS: dict[str, dict[str, Any]] = {f"deeplabv3_{name}": resnet.PRESETS[name] for name in ("resnet50", "resnet101")}


def _layers(norm: Callable[..., nn.Module], dtype: Any, train: bool, tap: Tap) -> Callable[..., jax.Array]:
    """Makes convolution, normalisation and ReLU by the PyTorch names of the first two, in the calling module."""

    def layer(x: jax.Array, name: str, norm_name: str, features: int, size: int = 1, dilation: int = 1) -> jax.Array:
        conv = Conv(
            features, size, padding=dilation * (size // 2), dilation=dilation, use_bias=False,
            kernel_init=nn.initializers.he_uniform(), dtype=dtype, name=name.replace(".", "_"),
        )  # fmt: skip
        return nn.relu(norm(dtype=dtype, name=norm_name.replace(".", "_"))(conv(tap(name, x)), train=train))

    return layer


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: [B, H, W, C] -> [B, H, W, features].

    Side by side a 1x1 convolution, a 3x3 one for each of ``rates`` (its dilation), and a 1x1 of the mean of all
    pixels, given to each pixel; one after another along the channels in this order; then 1x1 and dropout. Each
    convolution without bias, with normalisation and ReLU. Training needs the rng ``"dropout"``.

    Attributes:
      rates: dilations, in pixels of the map.
      dropout: rate behind the last ReLU.
      norm: makes the normalisation layers: ``norm(dtype=, name=)`` and call with ``train=``. That of the mean sees B
        values a channel.
    """

    features: int = 256
    rates: tuple[int, ...] = (12, 24, 36)
    dropout: float = 0.5
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        layer = _layers(self.norm, self.dtype, train, tap)
        maps = [layer(x, "convs.0.0", "convs.0.1", self.features)]
        for number, rate in enumerate(self.rates, 1):
            maps.append(layer(x, f"convs.{number}.0", f"convs.{number}.1", self.features, 3, rate))
        number = len(self.rates) + 1  # its layer 0 is the mean
        mean = layer(global_avg_pool(x)[:, None, None], f"convs.{number}.1", f"convs.{number}.2", self.features)
        maps.append(jnp.broadcast_to(mean, maps[0].shape))
        x = layer(jnp.concatenate(maps, -1), "project.0", "project.1", self.features)
        return Dropout(self.dropout, name="project_3")(x, train)


class Decoder(nn.Module):
    """``relu(bn(conv(ASPP x)))``, conv 3x3: [B, H, W, C] -> [B, H, W, features]. Attributes as in :class:`ASPP`."""

    features: int = 256
    rates: tuple[int, ...] = (12, 24, 36)
    dropout: float = 0.5
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        aspp = ASPP(self.features, self.rates, self.dropout, self.norm, self.dtype, name="aspp")
        x = aspp(x, train, scoped(tap, "aspp"))
        return _layers(self.norm, self.dtype, train, tap)(x, "conv", "bn", self.features, 3)


class DeepLabV3(nn.Module):
    """[B, H, W, C] float32 -> logits of each pixel [B, H, W, num_classes] float32.

    ``encoder`` (a :class:`ResNet` without head, dilated to ``output_stride``), :class:`Decoder`, a 1x1 convolution
    with bias (``segmentation_head.0``), bilinear resize to the size of the images with aligned corners. There is no
    auxiliary head. Decoder kernels start Kaiming uniform, those of the head Xavier uniform, biases 0. Taps see the
    input of every convolution under its SMP name (``decoder.aspp.convs.1.0``). ``torch_import.convert`` takes a
    torchvision ResNet's weights as the encoder's, with ``keep=("decoder", "segmentation_head")``.

    Attributes:
      num_classes: 0 returns the decoder's features [B, H / output_stride, W / output_stride, channels] float32.
      block, stage_sizes, width, stem: of the encoder, see :class:`ResNet`.
      output_stride: of the encoder: 4 (stems "cifar" and "tiny_imagenet": 1) times 8, 4, 2 or 1. Stages that may
        not stride any more are dilated, the first block of each too (SMP; torchvision leaves the first as it was).
      channels: of the decoder.
      rates: dilations of the :class:`ASPP`; (12, 24, 36) is for output stride 8, its authors halve it at 16.
      dropout: rate behind the ASPP.
      temp: divides the logits.
      norm: makes the normalisation layers: ``norm(dtype=, scale_init=, name=)`` and call with ``train=``.

    Raises:
      ConfigError: an unknown block or stem, an output stride that the encoder can't have, rates or channels below 1.
    """

    num_classes: int
    block: str = "bottleneck"
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    stem: str = "imagenet"
    output_stride: int = 8
    channels: int = 256
    rates: tuple[int, ...] = (12, 24, 36)
    dropout: float = 0.5
    temp: float = 1.0
    norm: Callable[..., nn.Module] = BatchNorm
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, tap: Tap = no_tap) -> jax.Array:
        size = x.shape[1:3]
        encoder = ResNet(
            0, self.block, self.stage_sizes, self.width, self.stem, features=True, dilate_first_block=True,
            replace_stride_with_dilation=self._dilated_stages(), norm=self.norm, dtype=self.dtype, name="encoder",
        )  # fmt: skip
        x = encoder(x, train, scoped(tap, "encoder"))[-1]
        decoder = Decoder(self.channels, self.rates, self.dropout, self.norm, self.dtype, name="decoder")
        x = decoder(x, train, scoped(tap, "decoder"))
        if not self.num_classes:
            return x.astype(jnp.float32)
        head = Conv(
            self.num_classes, 1, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.zeros,
            dtype=self.dtype, name="segmentation_head_0",
        )  # fmt: skip
        return resize_corners(scaled_logits(head(tap("segmentation_head.0", x)), self.temp), size)

    def _dilated_stages(self) -> tuple[bool, ...]:
        """Which of the stages 2-4 are dilated instead of strided."""
        if self.stem not in resnet.STEMS:
            raise unknown("stem", self.stem, resnet.STEMS)
        finest = 4 if self.stem == "imagenet" else 1
        strides = [finest * 2**strided for strided in range(4)]
        if self.output_stride not in strides:
            raise ConfigError(f"output_stride={self.output_stride} must be one of {strides} with stem={self.stem!r}")
        if self.channels < 1 or min(self.rates, default=1) < 1:
            raise ConfigError(f"channels={self.channels} and rates={self.rates!r} must be at least 1")
        strided = strides.index(self.output_stride)
        return tuple(stage >= strided for stage in range(3))
