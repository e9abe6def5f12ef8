"""Plain supervised classification: the float baseline from which the other methods start.

    python -m jaxvision.main --config=configs/classification.py
        handwritten digits, a small ResNet
    python -m jaxvision.main --config=configs/classification.py:cifar10_resnet20 --config.data.path=DIR
        the published recipe; DIR holds train.npz and test.npz
    python -m jaxvision.main --config=configs/classification.py:imagenet_deit_s --config.data.path=DIR
        DIR holds train/<class>/* and val/<class>/*
    python -m jaxvision.main --config=configs/classification.py:imagenet_autoformer --config.data.path=DIR \\
            --config.model.settings.architecture=E192-H4R3.5-...
        what an architecture search found; likewise imagenet_mbv2_searched with settings.structure
    ... --config.epochs=0 --config.model.init_from=FILE
        evaluates weights without training

Presets: ``smoke`` (seconds), ``{cifar10,cifar100}_resnet{20,32,44,56}``, ``imagenet_resnet50``,
``imagenet_deit_{t,s,b}``, ``imagenet_mbv2_searched``, ``imagenet_autoformer``.
"""

from ml_collections import ConfigDict

from configs import common
from jaxvision.models import autoformer_architecture, mbv2_structure

CIFAR = {f"cifar{k}_resnet{depth}": (k, depth) for k in (10, 100) for depth in (20, 32, 44, 56)}
DEIT = {f"imagenet_deit_{size[0]}": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}

# timm's and DeiT's rule: no decay on biases, gains, position embedding and class token.
VIT_NO_DECAY = (r"(^|/)(bias|scale)$", r"(^|/)(pos_embed|cls_token)$")

PRESETS = ("smoke", *CIFAR, "imagenet_resnet50", *DEIT, "imagenet_mbv2_searched", "imagenet_autoformer")


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    if preset == "":
        return digits()
    if preset == "smoke":
        return smoke()
    if preset in CIFAR:
        return cifar(*CIFAR[preset])
    if preset == "imagenet_resnet50":
        return imagenet_resnet50()
    if preset in DEIT:
        return imagenet_deit(DEIT[preset])
    if preset == "imagenet_mbv2_searched":
        return imagenet_mbv2_searched()
    if preset == "imagenet_autoformer":
        return imagenet_autoformer()
    raise common.unknown_preset(preset, PRESETS)


def base(data: ConfigDict, model: ConfigDict, optimizer: ConfigDict, **engine) -> ConfigDict:
    """All fields, with the parts that not every preset uses switched off."""
    config = common.engine(**engine)
    config.method = "classification"
    config.epochs = 1.0
    config.eval_every_epochs = 1
    config.data, config.model, config.optimizer = data, model, optimizer
    config.label_smoothing = 0.0
    config.mix = ConfigDict({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "prob": 1.0, "switch_prob": 0.5})
    config.ema = common.ema()
    return config


def digits() -> ConfigDict:
    """An 8-layer ResNet on 8x8 digits."""
    config = base(
        common.digits(batch_size=64, eval_batch_size=250, augment={"crop_padding": 1}),
        common.model("resnet20", settings={"depth": 8}),
        common.optimizer("sgd", 0.1, nesterov=True, weight_decay=5e-4, schedule={"warmup_epochs": 1.0}),
        log_every=20,
    )
    config.epochs = 40.0
    config.eval_every_epochs = 5
    return common.finish(config)


def smoke() -> ConfigDict:
    """Every part of the recipe for a few steps, on a network of four layers."""
    config = base(
        common.digits(batch_size=64, eval_batch_size=128, augment={"crop_padding": 1, "erasing": 0.25}),
        common.tiny_cnn(),
        common.optimizer(
            "adamw", 3e-3, weight_decay=0.05, no_decay=(r"(^|/)(bias|scale)$",), clip_norm=1.0, accumulate=2
        ),
        log_every=5,
        save_every=10,
        tensorboard=False,
    )
    config.label_smoothing = 0.1
    config.mix.mixup_alpha, config.mix.cutmix_alpha = 0.8, 1.0
    config.ema = common.ema(0.9, warmup=True)
    return common.finish(config)


def cifar(num_classes: int, depth: int) -> ConfigDict:
    """200 epochs, rate 0.1 divided by 10 after 100 and 150 (github.com/akamaster/pytorch_resnet_cifar10).

    Expected on CIFAR-10, from that page: 91.7 (ResNet-20), 92.6 (32), 93.1 (44), 93.4 (56) % test accuracy. The same
    recipe is used for CIFAR-100.
    """
    config = base(
        common.cifar(num_classes),
        common.model(f"resnet{depth}"),
        common.optimizer("sgd", 0.1, weight_decay=1e-4, schedule={"name": "multistep", "milestones": (100.0, 150.0)}),
        log_every=100,
        save_every=3900,
    )
    config.epochs = 200.0
    config.eval_every_epochs = 5
    return common.finish(config)


def imagenet_resnet50() -> ConfigDict:
    """torchvision's recipe (references/classification, version 1 weights): 90 epochs, expected 76.1 % top-1.

    The rate is 0.1 for a batch of 256 and follows the batch size.
    """
    data = common.imagenet(batch_size=256)
    lr = data.get_ref("batch_size").to_float() * 0.1 / 256
    config = base(
        data,
        common.model("resnet50"),
        common.optimizer(
            "sgd",
            lr,
            weight_decay=1e-4,
            schedule={"name": "multistep", "milestones": (30.0, 60.0), "per_epoch": True},
        ),
        log_every=100,
        save_every=5000,
    )
    config.epochs = 90.0
    return common.finish(config)


def imagenet_deit(name: str) -> ConfigDict:
    """DeiT (Touvron et al. 2021, table 9): 300 epochs, expected 72.2 (T), 79.8 (S), 81.8 (B) % top-1.

    Two parts of the official code are not here: repeated augmentation (each image three times a batch), and the ten
    epochs at the last rate that follow the 300. The rate is 5e-4 for a batch of 512 and follows the batch size.
    """
    model = common.model(name, dtype="bfloat16", settings={"drop_path_rate": 0.1})
    config = imagenet_vit(model, batch_size=1024, epochs=300.0, warmup_epochs=5.0)
    config.ema = common.ema(0.99996)
    return common.finish(config)


def imagenet_vit(model: ConfigDict, *, batch_size: int, epochs: float, warmup_epochs: float) -> ConfigDict:
    """What DeiT and those who follow it share. The rate is 5e-4 for a batch of 512 and follows the batch size."""
    data = common.imagenet({"rand_augment": 9.0, "erasing": 0.25}, batch_size=batch_size)
    lr = data.get_ref("batch_size").to_float() * 5e-4 / 512
    schedule = {"name": "timm_cosine", "warmup_lr": 1e-6, "end_lr": 1e-5, "per_epoch": True}
    optimizer = common.optimizer(
        "adamw",
        lr,
        weight_decay=0.05,
        no_decay=VIT_NO_DECAY,
        schedule={**schedule, "warmup_epochs": warmup_epochs},
    )
    config = base(data, model, optimizer, log_every=100, save_every=2500)
    config.epochs = epochs
    config.label_smoothing = 0.1
    config.mix.mixup_alpha, config.mix.cutmix_alpha = 0.8, 1.0
    return config


def imagenet_mbv2_searched() -> ConfigDict:
    """AZ-NAS's (Lee and Ham 2024) simple recipe for a MobileNetV2-type structure: 150 epochs, no teacher.

    ``model.settings.structure`` is the structure to train; the default is the one from which the search starts. The
    published accuracies (78.6 % at 450 million multiply-adds) come from the long recipe: 480 epochs at a quarter of the
    rate, mixup 0.2, random erasing, and three parts that are not here: a teacher (EfficientNet-B3) for logits and stage
    features, AutoAugment, lighting noise. The rate is 0.4 for a batch of 256 and follows the batch size.
    """
    data = common.imagenet({"jitter": 0.4}, batch_size=512)
    lr = data.get_ref("batch_size").to_float() * 0.4 / 256
    config = base(
        data,
        common.model("mbv2_searched", settings={"structure": mbv2_structure.INITIAL, "use_se": True}),
        common.optimizer(
            "sgd",
            lr,
            nesterov=True,
            weight_decay=4e-5,
            no_decay=(r"(^|/)(bias|scale)$",),
            schedule={"warmup_epochs": 5.0},
        ),
        log_every=100,
        save_every=2500,
    )
    config.epochs = 150.0
    config.label_smoothing = 0.1
    return common.finish(config)


def imagenet_autoformer() -> ConfigDict:
    """AutoFormer's recipe for a found subnet, trained alone: 500 epochs; expected 76.1 % top-1 for the default.

    ``model.settings.architecture`` is the subnet to train; the default is AZ-NAS's released one of 5.9 million
    parameters. Networks of the space B train for 300 epochs (``--config.epochs=300``). Repeated augmentation (each
    image three times a batch) is not here. The rate is 5e-4 for a batch of 512 and follows the batch size.
    """
    settings = {"architecture": autoformer_architecture.TINY, "drop_path_rate": 0.1}
    model = common.model("autoformer", dtype="bfloat16", settings=settings)
    return common.finish(imagenet_vit(model, batch_size=2048, epochs=500.0, warmup_epochs=20.0))
