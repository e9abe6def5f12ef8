"""RankMixup: mixed images rank confidences, beside other calibration losses, each with temperature scaling.

    python -m jaxvision.main --config=configs/rankmixup.py
        noisy handwritten digits, a network of four layers, four seeds; weight 0 is the control: the same forward passes
        and batch statistics without the ranking loss; expected: MRL lowers the control's ECE (10 to 8 % at weight 0.1,
        to 7 % at 0.3) for a point or two of accuracy, M-NDCG at 0.1 doesn't
    python -m jaxvision.main --config=configs/rankmixup.py:cifar10_subset --config.data.path='DIR/cifar10_{split}.npz'
        a few thousand real images
    python -m jaxvision.main --config=configs/rankmixup.py:cifar100_resnet50 --config.data.path=DIR
        the paper's recipe; DIR holds train.npz and test.npz

    ... --config.ood.source=svhn --config.ood.path=DIR
        besides, how well each network's confidence tells SVHN from the test images

Presets: ``smoke`` (seconds), ``clean_digits``, ``cifar10_subset``,
``{cifar10,cifar100,tiny_imagenet}_{resnet50,resnet101,wrn26_10}``, ``{cifar10,cifar100}_lt_resnet32`` (long-tailed),
``imagenet_resnet50``, ``cub_resnet50``. Fields: ``configs/calibration.py``.
"""

from ml_collections import ConfigDict

from configs import calibration, common

ARMS = ("ce", "mbls", "mixup", "mrl(weight=(0,0.1,0.3))", "mndcg(weight=(0,0.1,1))")
SHORT_ARMS = ("ce", "mixup", "mrl(weight=(0,0.1))", "mndcg(weight=(0,0.1))")
PAPER_ARMS = ("ce", "mbls", "mixup", "mrl", "mndcg")
NETWORKS = ("resnet50", "resnet101", "wrn26_10")
CIFAR = {f"cifar{classes}_{name}": (f"{name}_cifar", classes) for classes in (10, 100) for name in NETWORKS}
LONG_TAIL = {"cifar10_lt_resnet32": (10, 0.1), "cifar100_lt_resnet32": (100, 0.01)}
TINY = {f"tiny_imagenet_{name}": f"{name}_tiny_imagenet" for name in NETWORKS}
PRESETS = (
    "smoke", "clean_digits", "cifar10_subset", *CIFAR, *LONG_TAIL, *TINY, "imagenet_resnet50", "cub_resnet50",
)  # fmt: skip


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    if preset == "":
        return common.finish(calibration.digits("rankmixup", ARMS))
    if preset == "smoke":
        return smoke()
    if preset == "clean_digits":
        return common.finish(calibration.digits("rankmixup", SHORT_ARMS, noise=0.0))
    if preset == "cifar10_subset":
        return common.finish(calibration.cifar10_subset("rankmixup", SHORT_ARMS))
    if preset in CIFAR:
        return recipe(calibration.cifar("rankmixup", PAPER_ARMS, *CIFAR[preset]))
    if preset in LONG_TAIL:
        return recipe(calibration.cifar_long_tail("rankmixup", PAPER_ARMS, *LONG_TAIL[preset]))
    if preset in TINY:
        return recipe(calibration.tiny_imagenet("rankmixup", PAPER_ARMS, TINY[preset]))
    if preset == "imagenet_resnet50":
        return imagenet()
    if preset == "cub_resnet50":
        return recipe(calibration.cub("rankmixup", PAPER_ARMS))
    raise common.unknown_preset(preset, PRESETS)


def recipe(config: ConfigDict) -> ConfigDict:
    """A recipe of the paper, whose official code smooths labels more than that of MbLS and ACLS."""
    config.losses.label_smoothing.epsilon = 0.2
    return common.finish(config)


def imagenet() -> ConfigDict:
    """The paper's numbers for ImageNet aren't published; alpha and margin are those of Tiny-ImageNet."""
    config = calibration.imagenet("rankmixup", PAPER_ARMS)
    config.losses.mrl.update({"alpha": 1.0, "margin": 1.0})
    config.losses.mndcg.alpha = 1.0
    return recipe(config)


def smoke() -> ConfigDict:
    """M-NDCG with its control."""
    config = calibration.digits("rankmixup", ())
    return common.finish(calibration.smoke(config, ("mndcg(weight=(0,1),num_views=2)",)))
