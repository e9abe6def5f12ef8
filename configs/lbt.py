"""LBT: weights, inputs and gradients in low-bit fixed point; the interval controller beside its baselines.

    python -m jaxvision.main --config=configs/lbt.py
        handwritten digits, a small ResNet at W4A4: every arm at 4, 3 and 2 gradient bits, three seeds, one table
    python -m jaxvision.main --config=configs/lbt.py:cifar100_resnet20 --config.data.path=DIR
        the paper's recipe at 4/4/4; DIR holds train.npz and test.npz
    python -m jaxvision.main --config=configs/lbt.py:cifar10_subset --config.data.path=DIR/NAME_{split}.npz \\
        --config.model.init_from=resnet20.safetensors
        a few thousand real CIFAR-10 images: float, W and A, min-max and the controller from the same trained weights
    python -m jaxvision.main --config=configs/lbt.py:imagenet_resnet18 --config.data.path=DIR
        DIR holds train/<class>/* and val/<class>/*

Presets: ``smoke`` (seconds), ``cifar100_resnet20``, ``cifar10_resnet20``, ``cifar10_subset``,
``imagenet_resnet{18,34,50}``, ``imagenet_mobilenet_v2``.

Fields beside those of ``configs/common.py``:

    seeds          one training each, of every arm and setting; they start from the same variables
    epochs, eval_every_epochs (0: at the end only)
    arms           float, wa (weights and inputs only), fixed (constant gamma), dsgc, whole_error, piecewise, lbt
    gradient_bits  a training for each width, 2 to 8 (piecewise: from 3); one program serves all
    lr_grid        rates to choose from on held-out images (data.validation_size), each arm and width its own; ():
                   optimizer.lr
    scale_lr       of Adam, for the intervals s and u; it follows the optimizer's schedule
    first_last     fp, or 8bit: first layer W and G, last layer W, A and G in 8 bits
    interval       alphas (a training for each), beta, start (quantile, search as released, or one), start_images (0:
                   the first batch), freeze_epochs (gamma stays from then on; 0: never)
    fixed_gammas   of arm fixed
    search         of dsgc and whole_error: every (steps), points (gammas tried), rate_factors (of dsgc: 1.0 scales
                   the rate by max(exp(-20 d), 0.1), 0.0 doesn't)
    reestimate_batches  training batches over which batch statistics are averaged anew after each arm, weights frozen,
                   before the arm is judged (Nagel et al. 2022; 0: the running ones of training are kept); the accuracy
                   with the running ones is logged and reported beside it
    export         the arm whose network is written, "": none: the first seed of its first width and setting at their
                   chosen rate, as quantized.safetensors (for jaxvision.tools.export) and integers.safetensors
    how            trainings of an arm: map, one after the other; vmap, at once; unroll, written out (engine/seeds.py);
                   call, one program called for each member (one device)
    quantization   of ``engine/quantization.py`` (noise_bits for all arms, exponent for piecewise; products: those of
                   attention with quantized operands, their gradients stay float); downsampling convolutions stay float
                   with --config.quantization.float_layers="('downsample',)", integers compute with
                   --config.quantization.execution=int
"""

from ml_collections import ConfigDict

from configs import common

ARMS = ("float", "wa", "fixed", "dsgc", "whole_error", "piecewise", "lbt")
IMAGENET = {f"imagenet_{name}": name for name in ("resnet18", "resnet34", "resnet50", "mobilenet_v2")}
PRESETS = ("smoke", "cifar100_resnet20", "cifar10_resnet20", "cifar10_subset", *IMAGENET)

# The depthwise layers stay float; expansions and the last 1x1 convolution read linear bottlenecks, which have signs.
DEPTHWISE = (r"^features_1/conv_0_0/", r"/conv_1_0/")
BOTTLENECK_READERS = (r"^features_([2-9]|1[0-7])/conv_0_0/", r"^features_18_0/")


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    if preset == "":
        return digits()
    if preset == "smoke":
        return smoke()
    if preset in ("cifar100_resnet20", "cifar10_resnet20"):
        return cifar(100 if preset.startswith("cifar100") else 10)
    if preset == "cifar10_subset":
        return cifar10_subset()
    if preset in IMAGENET:
        return imagenet(IMAGENET[preset])
    raise common.unknown_preset(preset, PRESETS)


def base(data: ConfigDict, model: ConfigDict, optimizer: ConfigDict, **engine) -> ConfigDict:
    """All fields with the released code's values, 4/4/4."""
    config = common.engine(**engine)
    config.method = "lbt"
    config.seeds = (0,)
    config.epochs = 1.0
    config.eval_every_epochs = 1
    config.arms = ("lbt",)
    config.gradient_bits = (4,)
    config.lr_grid = ()
    config.scale_lr = 1e-5
    config.first_last = "fp"
    config.interval = ConfigDict(
        {"alphas": (1e-3,), "beta": 1e-3, "start": "quantile", "start_images": 0, "freeze_epochs": 0.0}
    )
    config.fixed_gammas = (1.0,)
    config.search = ConfigDict({"every": 100, "points": 96, "rate_factors": (0.0,)})
    config.reestimate_batches = 0
    config.export, config.how = "", "vmap"
    config.data, config.model, config.optimizer = data, model, optimizer
    config.quantization = common.quantization("lbt", 4, 4)
    config.quantization.products = ()
    # The arms say how gradients are quantized, gradient_bits says how finely.
    del config.quantization.gradient, config.quantization.gradient_bits
    return config


def digits() -> ConfigDict:
    """Every arm on 8x8 digits with an 8-layer ResNet: 7 epochs, 140 steps (section 10 of the specification)."""
    config = base(
        common.digits(batch_size=64, eval_batch_size=250),
        common.model("resnet20", settings={"depth": 8}),
        common.optimizer("sgd", 0.1, weight_decay=1e-4),
        log_every=10,
        save_every=140,
    )
    config.seeds = (0, 1, 2)
    config.epochs = 7.0
    config.eval_every_epochs = 0
    config.arms, config.gradient_bits, config.fixed_gammas = ARMS, (4, 3, 2), (1.0, 0.8, 0.6)
    config.interval.alphas = (1e-3, 1e-2)
    config.search.every = 20
    config.how = "call"
    return common.finish(config)


def smoke() -> ConfigDict:
    """Two arms for a few steps, on four layers of which two are quantized.

    Eight devices sum in another order than one, so that codes flip: with these values they flip without consequences.
    """
    config = digits()
    with config.unlocked():
        config.seeds = (0, 1)
        config.epochs = 0.3
        config.arms = ("dsgc", "lbt")
        config.model = common.tiny_cnn()
        config.gradient_bits, config.interval.alphas = (4, 3), (0.2,)
        config.search.every, config.search.points, config.interval.start = 4, 3, "one"
        config.data.eval_batch_size = 128
        config.optimizer.lr = 1e-4
        config.log_every, config.save_every = 3, 6
        config.tensorboard, config.how = False, "vmap"
    return config


def cifar(num_classes: int) -> ConfigDict:
    """The released recipe: 160 epochs, rate 0.1 divided by 10 after 80 and 120, decay on everything but s and u.

    Second-hand numbers for CIFAR-100 at 4/4/4: 65.0 % against 61.1 % for min-max. It flips before it crops, here after:
    crops are uniform on both sides, so the images have the same distribution. It keeps the last, smaller batch of an
    epoch; batches have one size here, so 80 of the 50,000 images, other ones each time, sit out an epoch.
    """
    config = base(
        common.cifar(num_classes, eval_batch_size=100),
        common.model("resnet20", settings={"final_norm": True}),
        common.optimizer("sgd", 0.1, weight_decay=1e-4, schedule={"name": "multistep", "milestones": (80.0, 120.0)}),
        log_every=100,
        save_every=3900,
    )
    config.epochs = 160.0
    config.eval_every_epochs = 5
    return common.finish(config)


def cifar10_subset() -> ConfigDict:
    """From trained float weights, 4/4/4 and 4/4/3: training on in float, with W and A quantized, with min-max
    gradients and with the controller.

    Each arm and width has its own best of two rates, chosen on 512 held-out training images; three seeds. 61 steps are
    few, so the controller's step is 10 times the paper's: gamma can go 0.6 from where it starts. 36 short trainings
    show how gradients fare and whether an arm is harmed; they are no measure of 160 epochs from scratch.
    """
    config = base(
        common.cifar(10, batch_size=64, eval_batch_size=128, validation_size=512),
        common.model("resnet20"),
        common.optimizer("sgd", 0.01, weight_decay=1e-4),
        log_every=10,
        save_every=100,
    )
    config.seeds = (0, 1, 2)
    config.epochs = 1.2  # 61 steps
    config.eval_every_epochs = 0
    config.arms, config.gradient_bits = ("float", "wa", "fixed", "lbt"), (4, 3)
    config.lr_grid = (0.01, 0.03)
    config.interval.beta = 1e-2
    config.how = "call"
    return common.finish(config)


def imagenet(name: str) -> ConfigDict:
    """4/4/4 from scratch. Paper, top-1 at 4/4/4 (min-max): ResNet-18 67.1 (63.3), ResNet-34 69.2 (62.9) %; at 5/5/5:
    ResNet-50 72.2 (69.5), MobileNetV2 69.0 (68.0) %.

    MobileNetV2 as in the authors' toolbox: 150 epochs, rate 0.05 to 0 along a cosine. The ResNets' recipe isn't
    published; this is the one in the comments of the toolbox's configuration.
    """
    mobile = name == "mobilenet_v2"
    schedule = {"name": "cosine"} if mobile else {"name": "multistep", "milestones": (30.0, 60.0, 90.0)}
    lr, decay = (0.05, 4e-5) if mobile else (0.1, 1e-4)
    config = base(
        common.imagenet(batch_size=256, eval_batch_size=256),
        common.model(name),
        common.optimizer("sgd", lr, weight_decay=decay, schedule=schedule),
        log_every=100,
        save_every=5000,
    )
    config.epochs = 150.0 if mobile else 120.0
    config.interval.start_images = 64
    if mobile:
        config.interval.alphas = (1e-4,)
        config.quantization.float_layers, config.quantization.signed_inputs = DEPTHWISE, BOTTLENECK_READERS
    return common.finish(config)
