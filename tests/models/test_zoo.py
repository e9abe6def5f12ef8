"""Names, settings and preprocessing of the networks; full-size shapes without computing anything."""

import jax
import jax.numpy as jnp
import pytest

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError
from jaxvision.models import zoo


@pytest.mark.parametrize(
    ("name", "family", "count"),
    [
        ("resnet20", "cifar_resnet", 269_722 + 90 * 65),
        ("resnet50", "resnet", 25_557_032 - 900 * 2049),
        ("resnet18_tiny_imagenet", "resnet", 11_173_962 - 10 * 513 + 100 * 2049),
        ("wrn26_10_cifar", "wide_resnet", 36_539_124),
        ("densenet121_tiny_imagenet", "densenet", 7_151_048 - 100 * 1025),
        ("mobilenet_v2", "mobilenet_v2", 3_504_872 - 900 * 1281),
        ("mbv2_searched", "mbv2_searched", 2_824_264 - 900 * 2049),
        ("autoformer", "autoformer", 5_921_032 - 900 * 193),
        ("vit_small_patch16_224", "vit", 22_050_664 - 900 * 385),
        ("deit_tiny_distilled_patch16_224", "vit", 5_910_800 - 2 * 900 * 193),
        ("swin_tiny_patch4_window7_224", "swin", 28_288_354 - 900 * 769),
    ],
)
def test_build_at_full_size_with_100_classes(name, family, count):
    """Counts: those of the originals, with the classifier exchanged."""
    info = zoo.spec(name)
    assert info.family == family
    model = zoo.build(name, num_classes=100)
    shapes = zoo.variable_shapes(model, info.input_size)
    assert trees.count_parameters(shapes["params"]) == count
    image = jnp.zeros((2, *info.input_size, 3))
    logits = jax.eval_shape(lambda v: model.apply(v, image, train=False), shapes)
    assert (logits.shape, logits.dtype) == ((2, 100), jnp.float32)


def test_every_entry_is_complete_and_builds():
    assert {"resnet110", "resnet101", "deit_tiny_patch16_224", "swin_base_patch4_window7_224"} <= set(zoo.names())
    assert list(zoo.names()) == sorted(zoo.names())
    for name in zoo.names():
        info = zoo.spec(name)
        assert isinstance(zoo.build(name, num_classes=3), zoo.CLASSES[info.family])
        assert len(info.mean) == len(info.std) == 3 and len(info.input_size) == 2
        assert 0.8 < info.crop_fraction <= 1
        assert info.interpolation in ("bilinear", "bicubic")
        assert info.naming in ("akamaster", "torchvision", "timm", "flsd", "nats_bench", "smp", "reactnet")
        assert info.dense == (info.family == "deeplab" or name == "plain_cnn_dense")


def test_preprocessing_of_the_published_weights():
    """igq_vit.md section 4, torchvision's V1 recipe, and the README of the CIFAR weights."""
    assert zoo.spec("resnet20") == zoo.Spec("cifar_resnet", "akamaster", (32, 32), (0.485, 0.456, 0.406),
                                            (0.229, 0.224, 0.225))  # fmt: skip
    assert zoo.spec("resnet50").crop_fraction == 0.875
    vit, deit, swin = (
        zoo.spec(name) for name in ("vit_base_patch16_224", "deit_small_patch16_224", "swin_small_patch4_window7_224")
    )
    assert (vit.mean, vit.std, vit.crop_fraction) == ((0.5,) * 3, (0.5,) * 3, 0.9)
    assert (deit.mean, deit.crop_fraction, deit.interpolation) == ((0.485, 0.456, 0.406), 0.875, "bicubic")
    assert (swin.mean, swin.crop_fraction) == ((0.485, 0.456, 0.406), 0.9)


def test_overrides_reach_the_network():
    model = zoo.build("resnet50", num_classes=7, stem="cifar", stage_sizes=(1, 1, 1, 1), dtype="bfloat16")
    assert (model.stem, model.num_classes, model.block) == ("cifar", 7, "bottleneck")
    assert zoo.build("vit_tiny_patch16_224", num_classes=7, depth=1).depth == 1


def test_the_cifar_network_of_lbt_and_trs_is_a_setting():
    """lbt.md, section 3: option A, BatchNorm1d(64) before the dense layer, Kaiming normal over the fan-in."""
    model = zoo.build("resnet20", num_classes=100, final_norm=True)
    assert model.shortcut == "A"
    shapes = zoo.variable_shapes(model, (32, 32))
    assert shapes["params"]["bn2"]["scale"].shape == shapes["batch_stats"]["bn2"]["var"].shape == (64,)
    assert trees.count_parameters(shapes["params"]) == 269_722 + 90 * 65 + 2 * 64
    small = zoo.build("resnet20", num_classes=100, final_norm=True, depth=8)
    params = jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert jnp.std(params["linear"]["kernel"]) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert jnp.std(params["layer3_0"]["conv2"]["kernel"]) == pytest.approx((2 / 576) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.build("resnet500", num_classes=10), "model='resnet500' is unknown; did you mean 'resnet50'"),
        (lambda: zoo.spec("deit_tiny_patch16_244"), "did you mean 'deit_tiny_patch16_224'"),
        (lambda: zoo.build("resnet20", num_classes=10, widht_multiplier=2), "did you mean 'width_multiplier'"),
        (lambda: zoo.build("resnet20", num_classes=10, parent=None), "setting of resnet20='parent' is unknown"),
        (lambda: zoo.build("resnet20", num_classes=0), "num_classes=0"),
        (lambda: zoo.build("resnet20", num_classes="ten"), "num_classes='ten'"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
