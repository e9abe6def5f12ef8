"""TRS: transition-rate scheduling for quantization-aware training, beside plain optimizers and other quantizers.

    python -m jaxvision.main --config=configs/trs.py
        handwritten digits: trains a small float network a seed, then quantizes it to one bit in a dozen ways
    python -m jaxvision.main --config=configs/trs.py:cifar100_resnet20 --config.data.path=DIR
        the paper's recipe, the float network included; DIR holds train.npz and test.npz
    python -m jaxvision.main --config=configs/trs.py:cifar10_subset --config.data.path='DIR/cifar10_{split}.npz' \\
        --config.model.init_from=FILE
        two bits on a few thousand images from pretrained weights, in half an hour
    python -m jaxvision.main --config=configs/trs.py:imagenet_resnet18 --config.data.path=DIR \\
        --config.model.init_from=FILE
        FILE is a torchvision (DeiT: timm) checkpoint, DIR holds train/<class>/* and val/<class>/*

Presets: ``smoke`` (seconds), ``cifar10_subset``, ``{cifar10,cifar100}_{resnet20,reactnet18}``,
``imagenet_{resnet18,mobilenet_v2,reactnet18,deit_t,deit_s}``. The step schedule of the paper's supplement:
``--config.optimizer.schedule.name=multistep --config.optimizer.schedule.milestones='(100.,200.,300.)'``.

Fields beside those of ``configs/common.py``:

    seeds       each trains a float network (or loads the same one) and every arm from it
    arms        rows of the table, in order: words joined by "_": an optimizer (sgd, adam, adamw, with a t: transition
                rates scheduled), a target rate, a rule (additive, momentum, multiplicative), a family of quantizers
                (lsq, ewgs, dorefa, pact, ...), dampening or freezing; adamt_1e-2, lsq, sgdt_additive
    baseline    the optimizer of arms that name none
    epochs      of each arm; eval_every_epochs: 0: at the end
    float       epochs and optimizer of the float network; quantized_inputs: it has the run's inputs and float weights,
                as ReActNet's first step (W32A1); unused where model.init_from is set
    grid        optimizer -> learning rates, which are the initial step sizes of transition-rate scheduling. With
                several, one is chosen on the data.validation_size images that are held out of the training split
    quantization  as in ``engine/quantization.py``; products: those of attention whose operands are quantized too, by
                regular expression, with the widths of both operands: (('q_k',(4,4)),('softmax_v',(4,4)))
    optimizer   of all quantized arms: momentum, nesterov, b1, b2, eps, weight_decay, scale_lr (of quantizer scales),
                accumulate, label_smoothing, schedule (of rates and targets alike)
    transition  target (the paper's factor), scale_with_bits (times the square root of the weights' bits), momentum,
                rule, eta, granularity ("tensor", "model", or "label": kernels that the same regular expression of
                labels finds first share a rate, others have their own), initial_rate, min_step_size, max_step_size
    dampening   weight; freezing: start and end of the threshold, momentum (of the frequency of oscillation)
    ewgs        arms of that family: every_epochs between two estimates of delta from the curvature of the loss (0.0:
                it stays 0.001; official: 10 on CIFAR, 1 on ImageNet), each the mean over batches with at most so many
                draws of random signs; a step of an estimate costs 2 draws more passes
    oscillation measure how often codes turn back in every arm: 11 bytes a latent weight
    reestimate_batches  training batches over which batch statistics are averaged anew after each arm, weights frozen,
                before the arm is judged (Nagel et al. 2022; 0: the running ones of training are kept); the accuracy
                with the running ones is logged and reported beside it
    calibration_images  training images that the scales are fitted to
    export      the arm whose network of the first seed is written ("": none): quantized.safetensors, which
                model.init_from takes again, and integers.safetensors with integers.json, codes for other programs with
                the normalisations folded in
    how         trainings of an arm: "map" one after the other, "vmap" at once, "unroll" written out (engine/seeds.py),
                "call" one program called for each member (one device)
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

BASELINES = ("lsq", "ewgs", "dorefa", "pact", "dampening", "freezing")
ARMS = ("sgd", "sgdt", "sgdt_1e-2", "sgdt_1e-2_additive", "adam", "adamt_1e-2", *BASELINES)
CIFAR = {"cifar10_resnet20": 10, "cifar100_resnet20": 100}
REACTNET = {"cifar10_reactnet18": 10, "cifar100_reactnet18": 100}
DEIT = {"imagenet_deit_t": "deit_tiny_patch16_224", "imagenet_deit_s": "deit_small_patch16_224"}
IMAGENET = ("imagenet_resnet18", "imagenet_mobilenet_v2", "imagenet_reactnet18")
PRESETS = ("smoke", "cifar10_subset", *CIFAR, *REACTNET, *IMAGENET, *DEIT)

# The statistics of the official code; the pretrained CIFAR weights in use elsewhere want ImageNet's.
CIFAR_STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    presets = {"": digits, "smoke": smoke, "cifar10_subset": cifar10_subset, "imagenet_resnet18": resnet18}
    presets |= {"imagenet_mobilenet_v2": mobilenet_v2, "imagenet_reactnet18": reactnet18}
    if preset in presets:
        return presets[preset]()
    if preset in CIFAR:
        return cifar(CIFAR[preset])
    if preset in REACTNET:
        return cifar_reactnet(REACTNET[preset])
    if preset in DEIT:
        return deit(DEIT[preset])
    raise common.unknown_preset(preset, PRESETS)


def base(data: ConfigDict, model: ConfigDict, quantization: ConfigDict, **engine) -> ConfigDict:
    """All fields with the values of the official code (``run.sh``)."""
    config = common.engine(**engine)
    config.method = "trs"
    config.seeds = (0, 1, 2)
    config.arms, config.baseline = ARMS, "sgd"
    config.epochs, config.eval_every_epochs = 400.0, 0.0
    config.data, config.model, config.quantization = data, model, quantization
    config.quantization.products = ()
    float_optimizer = common.optimizer("sgd", 0.1, weight_decay=1e-4, schedule={"per_epoch": True})
    config.float = ConfigDict({"epochs": 0.0, "quantized_inputs": False, "optimizer": float_optimizer})
    config.grid = ConfigDict({"sgd": (0.1,), "adam": (1e-3,), "adamw": (3e-4,)})
    config.optimizer = ConfigDict(
        {
            "momentum": 0.9,
            "nesterov": False,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 1e-4,
            "scale_lr": 1e-2,
            "accumulate": 1,
            "label_smoothing": 0.0,
            "schedule": common.optimizer("sgd", 0.1, schedule={"per_epoch": True}).schedule,
        }
    )
    config.transition = ConfigDict(
        {
            "target": 5e-3,
            "scale_with_bits": False,
            "momentum": 0.99,
            "rule": "momentum",
            "eta": placeholder(float),
            "granularity": "tensor",
            "labels": (),
            "initial_rate": placeholder(float),
            "min_step_size": placeholder(float),
            "max_step_size": placeholder(float),
        }
    )
    config.dampening = ConfigDict({"weight": 1e-3})
    config.freezing = ConfigDict({"start": 0.04, "end": 0.01, "momentum": 0.01})
    config.ewgs = ConfigDict({"every_epochs": 0.0, "batches": 3, "draws": 50})
    config.oscillation = True
    config.reestimate_batches = 0
    config.calibration_images = 256
    config.export = ""
    config.how = "map"
    return config


def digits() -> ConfigDict:
    """Section 10 of the specification: 600 training images, one bit, 360 steps, where rates of two bits saturate."""
    config = base(
        common.digits(batch_size=64, eval_batch_size=250, train_size=600, validation_size=697),
        common.model("resnet20", settings={"depth": 8, "width_multiplier": 0.5}),
        common.quantization("trs", 1, 1, float_layers=("^conv1/", "^linear/")),
        log_every=9,
        save_every=180,
    )
    config.epochs = 40.0
    config.float.epochs = 40.0
    config.grid.sgd, config.grid.adam = (0.1, 0.3, 1.0), (1e-3, 1e-2, 1e-1)
    config.transition.momentum = 0.9  # 0.99 remembers 100 steps, a third of this run
    config.export = "sgdt_1e-2"
    config.how = "vmap"
    return common.finish(config)


def smoke() -> ConfigDict:
    """Every part for a few steps: one seed, two rates, a plain and a scheduled arm, two quantized layers."""
    config = digits()
    with config.unlocked():
        config.seeds = (0,)
        config.arms = ("sgd", "adamt_1e-2")
        config.epochs = 0.5
        config.float.epochs = 0.5
        config.grid.sgd, config.grid.adam = (0.01, 0.02), (1e-3,)
        config.model = common.tiny_cnn()
        config.quantization.float_layers = ("^conv1/", "^fc/")
        config.data.update({"train_size": 512, "validation_size": 256})
        config.log_every, config.tensorboard = 2, False
        config.export = "adamt_1e-2"
    return config


def cifar10_subset() -> ConfigDict:
    """Two bits from pretrained weights on a few thousand CIFAR-10 images: SGDT against SGD, each at its own best rate.

    Three seeds, the same four rates for both, chosen on 500 images that are neither trained nor judged on. On 3,305
    images: 412 steps, as a controller wants several hundred, along a cosine of the step, as four epochs would be four
    values. 24 trainings of 0.22 processor seconds a step: some 23 minutes on two free cores.

    ``data.path`` holds ``{split}`` for train and test; ``model.init_from`` a ResNet-20 of
    github.com/akamaster/pytorch_resnet_cifar10, trained with ImageNet's statistics.
    """
    config = base(
        common.cifar(10, batch_size=32, eval_batch_size=256, validation_size=500),
        common.model("resnet20"),
        common.quantization("trs", 2, 2, float_layers=("^conv1/", "^linear/")),
        log_every=20,
        save_every=206,
    )
    config.arms = ("sgd", "sgdt")
    config.epochs = 4.0
    config.grid.sgd, config.grid.adam = (0.003, 0.01, 0.03, 0.1), (3e-4, 1e-3, 3e-3)
    config.optimizer.schedule.per_epoch = False
    config.transition.momentum = 0.9
    config.export = "sgdt"
    config.how = "call"
    return common.finish(config)


def cifar(num_classes: int, model: ConfigDict | None = None, quantization: ConfigDict | None = None) -> ConfigDict:
    """The official code's recipe: 400 epochs for the float network, 400 for each arm, from one rate."""
    config = base(
        common.cifar(num_classes, batch_size=256, eval_batch_size=100, **CIFAR_STATISTICS),
        model or common.model("resnet20", settings={"final_norm": True}),
        quantization or common.quantization("trs", 2, 2, float_layers=("^conv1/", "^linear/")),
        log_every=195,
        save_every=1950,
    )
    config.seeds = (0,)
    config.arms = ("sgd", "sgdt", "adam", "adamt")
    config.float.epochs = 400.0
    config.export = "sgdt"
    return common.finish(config)


def binary_layers() -> ConfigDict:
    """ReActNet at W1A1: the 3x3 convolutions of the blocks; stem, 1x1 shortcuts and classifier float, as officially."""
    return common.quantization("reactnet", 1, 1, float_layers=("^conv1/", "/downsample_1/", "^fc/"))


def cifar_reactnet(num_classes: int) -> ConfigDict:
    """ReActNet-18 at W1A1 from a network with binary inputs and float weights (W32A1), as the paper's table has it.

    Epochs, rates and target of CIFAR's ResNet-20: the paper's for this network aren't published, nor is its stem.
    """
    config = cifar(num_classes, common.model("reactnet18_cifar"), binary_layers())
    with config.unlocked():
        config.float.quantized_inputs = True
    return config


def imagenet(model: ConfigDict, quantization: ConfigDict, data: ConfigDict | None = None) -> ConfigDict:
    """120 epochs of batch 256, as the paper's 600,000 iterations; the targets of ImageNet aren't published."""
    data = common.imagenet(batch_size=256) if data is None else data
    config = base(data, model, quantization, log_every=100, save_every=5000)
    config.seeds = (0,)
    config.arms = ("sgd", "sgdt", "adam", "adamt")
    config.epochs = 120.0
    config.calibration_images = 32
    config.oscillation = False
    config.export = "sgdt"
    return config


def resnet18() -> ConfigDict:
    """W2A2; first convolution and classifier float, the convolutions of the shortcuts quantized."""
    quantization = common.quantization("trs", 2, 2, float_layers=("^conv1/", "^fc/"))
    return common.finish(imagenet(common.model("resnet18"), quantization))


def reactnet18() -> ConfigDict:
    """ReActNet-18 at W1A1 from W32A1 weights, with cross-entropy.

    The paper trains with ReActNet's distributional loss (the probabilities of a float teacher); that isn't here.
    """
    return common.finish(imagenet(common.model("reactnet18"), binary_layers()))


def mobilenet_v2() -> ConfigDict:
    """W4A4; depthwise layers too. Inputs from linear bottlenecks are signed: our choice, the paper doesn't say."""
    quantization = common.quantization(
        "trs",
        4,
        4,
        float_layers=("^features_0_0/", "^classifier_1/"),
        signed_inputs=(r"^features_([2-9]|1\d)/conv_0_0/", "^features_18_0/"),
    )
    return common.finish(imagenet(common.model("mobilenet_v2"), quantization))


def deit(name: str) -> ConfigDict:
    """W3A3 with AdamW; patch embedding, head and the products of attention float.

    The paper doesn't give the quantizers of DeiT, nor say whether products are quantized: they are with
    ``--config.quantization.products="(('q_k',(3,3)),('softmax_v',(3,3)))"``. Ours: inputs signed, a learned scale of
    each layer's output, as no normalisation follows the layers of a transformer. Its data augmentation, without mixup
    and cutmix.
    """
    data = common.imagenet({"rand_augment": 9.0, "erasing": 0.25}, batch_size=512)
    floats = ("^patch_embed/", "^head/")
    quantization = common.quantization("trs", 3, 3, float_layers=floats, signed_inputs=(".",), output_scale=True)
    config = imagenet(common.model(name, settings={"drop_path_rate": 0.1}), quantization, data)
    config.arms, config.baseline = ("adamw", "adamwt"), "adamw"
    config.optimizer.update({"weight_decay": 0.05, "label_smoothing": 0.1})
    config.export = "adamwt"
    return common.finish(config)
