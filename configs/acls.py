"""ACLS: adaptive and conditional label smoothing, beside other calibration losses, each with temperature scaling.

    python -m jaxvision.main --config=configs/acls.py
        noisy handwritten digits, a network of four layers, four seeds; expected: ACLS at margin 6 has about a third of
        cross-entropy's ECE (3 of 9 %) at the same accuracy, so has cross-entropy at its temperature
    python -m jaxvision.main --config=configs/acls.py:clean_digits
        the same without noise, where cross-entropy is calibrated and ACLS is not
    python -m jaxvision.main --config=configs/acls.py:cifar10_subset --config.data.path='DIR/cifar10_{split}.npz'
        a few thousand real images
    python -m jaxvision.main --config=configs/acls.py:cifar10_resnet50 --config.data.path=DIR
        the paper's recipe; DIR holds train.npz and test.npz
    python -m jaxvision.main --config=configs/acls.py:shapes_segmentation
        pixels instead of images: drawn scenes, borders without a label; the table of logits says which margins are
        passed at all
    python -m jaxvision.main --config=configs/acls.py --config.arms="('ce','my_package.my_module:my_loss(strength=2)')"
        a loss of one's own: a function (logits, labels, *, where=None, strength=1.0) that returns one number

Presets: ``smoke`` (seconds), ``clean_digits``, ``shapes_segmentation``, ``cifar10_subset``,
``{cifar10,tiny_imagenet}_resnet{50,101}``, ``imagenet_resnet50``, ``cub_resnet50``, ``voc_deeplabv3``. Fields:
``configs/calibration.py``.
"""

from ml_collections import ConfigDict

from configs import calibration, common

ARMS = (
    "ce",
    "label_smoothing",
    "focal",
    "mbls",
    "mixup",
    "acls(margin=(4,6,8,10))",
    "acls(margin=10,reference=min)",
)
CLEAN_ARMS = ("ce", "mbls", "acls(margin=(6,10))")
PAPER_ARMS = ("ce", "mbls", "acls")
SCENE_ARMS = ("ce", "mbls", "acls(margin=(4,6,10))")
"""The paper's margin for segmentation, 10, and lower ones that a small network passes."""
CIFAR = {f"cifar10_resnet{depth}": f"resnet{depth}_cifar" for depth in (50, 101)}
TINY = {f"tiny_imagenet_resnet{depth}": f"resnet{depth}_tiny_imagenet" for depth in (50, 101)}
OTHERS = {
    "imagenet_resnet50": calibration.imagenet,
    "cub_resnet50": calibration.cub,
    "voc_deeplabv3": calibration.voc,
}
PRESETS = ("smoke", "clean_digits", "shapes_segmentation", "cifar10_subset", *CIFAR, *TINY, *OTHERS)


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    if preset == "":
        return common.finish(calibration.digits("acls", ARMS))
    if preset == "smoke":
        return smoke()
    if preset == "clean_digits":
        return common.finish(calibration.digits("acls", CLEAN_ARMS, noise=0.0))
    if preset == "shapes_segmentation":
        return common.finish(calibration.scenes("acls", SCENE_ARMS))
    if preset == "cifar10_subset":
        return common.finish(calibration.cifar10_subset("acls", ("ce", "mbls", "mixup", "acls")))
    if preset in CIFAR:
        return common.finish(calibration.cifar("acls", PAPER_ARMS, CIFAR[preset]))
    if preset in TINY:
        return common.finish(calibration.tiny_imagenet("acls", PAPER_ARMS, TINY[preset]))
    if preset in OTHERS:
        return common.finish(OTHERS[preset]("acls", PAPER_ARMS))
    raise common.unknown_preset(preset, PRESETS)


def smoke() -> ConfigDict:
    """Cross-entropy and two margins, low enough to be passed."""
    config = calibration.digits("acls", ())
    return common.finish(calibration.smoke(config, ("ce", "acls(margin=(0.1,0.5))")))
