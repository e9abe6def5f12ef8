"""IGQ-ViT: instance-aware group quantization of vision transformers after training, beside its baselines.

    python -m jaxvision.main --config=configs/igq_vit.py
        trains a small ViT on handwritten digits (three seeds), quantizes it with every method, prints one table
    python -m jaxvision.main --config=configs/igq_vit.py:imagenet_deit_s --config.model.init_from=FILE \\
        --config.data.path=DIR
        the paper's protocol: FILE is a timm checkpoint (safetensors), DIR holds train/<class>/* and val/<class>/*

Presets: ``smoke`` (seconds), ``imagenet_{vit_s,vit_b,deit_t,deit_s,deit_b,swin_t,swin_s,swin_b}``.

Fields beside those of ``configs/common.py``:

    seeds       networks to train, and draws of the calibration images
    methods     rows of the table: a baseline's name (``methods/igq_vit/baselines``), or igq<G> (G groups in every
                layer), igq_alloc<G> (the integer program under the budget of G groups); behind these, in this order,
                _scale (bounds refined), _pow2 (scales that are powers of two of one, so that one integer product
                serves all groups), _int (executed with int8 products instead of simulated)
    bits        W<weights>A<activations>; image_bits: of the image
    head_groups fixed groups for the channels of the classifier's input, whose one token has no range of an image's own
                (0: one quantizer, the published baselines' policy); for every method but ptq4vit
    train       epochs, where there is no ``model.init_from``; random_weights: True to quantize an untrained network
    calibration images: how many; sqnr_images: test images for the SQNR (0: none); observer_batch: images that the
                running observers (EMA) see at a time
    weights     method: percentile (the paper), mse, minmax, repq; epsilon: clipped percent, None: the best of
                0, 0.01, 0.1, 0.5, 1 by KL on the calibration images
    igq         max_groups, iters (EM steps), m_step, per_head, instance, clip_zero_point, candidates and context (of
                the allocation), sequential (IGQ's rows: calibrate each site on the network whose kernels and earlier
                sites are quantized), fp_bits (of the cost model)
    export      method and bits of the network to write as integers at the end ("": none)
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common

BASELINES = ("minmax", "ema", "percentile", "omse", "ptq4vit", "fqvit", "repq")
GROUPINGS = ("dynamic_tensor", "consecutive8", "peg8", "vsquant8", "kmeans8")
METHODS = (*BASELINES, *GROUPINGS, "igq8", "igq12", "igq_alloc8", "upper")
MORE = ("base_ptq", "repq_rows", "igq_alloc12", "igq8_scale", "upper_static")
"""Further rows, which the ImageNet presets have too."""

# The checkpoint whose float accuracy is the paper's (timm tags), and the crop that goes with it.
IMAGENET = {
    "imagenet_vit_s": "vit_small_patch16_224",  # augreg_in21k_ft_in1k
    "imagenet_vit_b": "vit_base_patch16_224",  # augreg_in21k_ft_in1k, not timm's default (augreg2)
    "imagenet_deit_t": "deit_tiny_patch16_224",  # fb_in1k
    "imagenet_deit_s": "deit_small_patch16_224",  # fb_in1k
    "imagenet_deit_b": "deit_base_patch16_224",  # fb_in1k
    "imagenet_swin_t": "swin_tiny_patch4_window7_224",  # ms_in1k
    "imagenet_swin_s": "swin_small_patch4_window7_224",  # ms_in1k, not timm's default (ms_in22k_ft_in1k)
    "imagenet_swin_b": "swin_base_patch4_window7_224",  # ms_in22k_ft_in1k
}

PRESETS = ("smoke", *IMAGENET)


def get_config(preset: str = "") -> ConfigDict:
    """The configuration of a preset."""
    if preset == "":
        return digits()
    if preset == "smoke":
        return smoke()
    if preset in IMAGENET:
        return imagenet(IMAGENET[preset])
    raise common.unknown_preset(preset, PRESETS)


def base(data: ConfigDict, model: ConfigDict, **engine) -> ConfigDict:
    """All fields with the paper's values."""
    config = common.engine(**engine)
    config.method = "igq_vit"
    config.seeds = (0, 1, 2)
    config.methods = METHODS
    config.bits = ("W4A4", "W6A6")
    config.image_bits = 8
    config.head_groups = 0
    config.data, config.model = data, model
    optimizer = common.optimizer("adamw", 1e-3, weight_decay=0.05)
    config.train = ConfigDict({"epochs": 0.0, "random_weights": False, "optimizer": optimizer})
    config.calibration = ConfigDict({"images": 32, "sqnr_images": 100, "observer_batch": 16})
    config.weights = ConfigDict({"method": "percentile", "granularity": "channel", "epsilon": placeholder(float)})
    config.igq = ConfigDict(
        {
            "max_groups": 16,
            "iters": 20,
            "m_step": "mean",
            "per_head": False,
            "instance": "image",
            "clip_zero_point": False,
            "candidates": (4, 6, 8, 10, 12, 16),
            "context": "float",
            "sequential": False,
            "fp_bits": 32,
        }
    )
    config.export = ConfigDict({"method": "igq_alloc8", "bits": "W4A4"})
    return config


def digits() -> ConfigDict:
    """Section 10.1 of the specification: 16x16 digits, 64 patches and a class token, 96 to 98 %.

    12 epochs instead of the specification's 18 keep the whole table to about six minutes; with 18 the effect at 3 bits
    is larger (``train.epochs=18.0``, ``train.optimizer.schedule.warmup_epochs=1.8``).
    """
    config = base(
        common.data("digits16", mean=(0.0,), std=(1.0,), batch_size=32, eval_batch_size=100),
        common.model(
            "vit_tiny_patch16_224",
            settings={
                "patch_size": 2,
                "width": 64,
                "depth": 4,
                "num_heads": 4,
                "weight_init": "fan_in",
                "position_init_std": 0.3,
            },
        ),
        log_every=60,
        save_every=40,
    )
    config.bits = ("W4A4", "W4A3", "W6A6")
    config.train.epochs = 12.0
    config.train.optimizer.clip_norm = 1.0
    # The same gradient in passes of 8 images, whose activations stay in a CPU's cache.
    config.train.optimizer.accumulate = 4
    config.train.optimizer.schedule.warmup_epochs = 1.2
    config.weights.method = "mse"
    return common.finish(config)


def smoke() -> ConfigDict:
    """Every part for a few seconds: one seed, hardly trained, few methods."""
    config = digits()
    with config.unlocked():
        config.seeds = (0,)
        config.train.epochs = 0.2
        config.train.optimizer.schedule.warmup_epochs = 0.1
        config.model.settings.depth = 1
        config.methods = ("minmax", "igq_alloc8", "upper")
        config.bits = ("W4A4",)
        config.data.eval_batch_size = 64
        config.calibration.images = 8
        config.calibration.sqnr_images = 64
        config.igq.candidates = (4, 8)
        config.igq.max_groups = 8
        config.tensorboard = False
    return config


def imagenet(name: str) -> ConfigDict:
    """32 training images, five draws, 50,000 validation images; W4A4 and W6A6; weights from ``model.init_from``."""
    config = base(common.imagenet(batch_size=32, eval_batch_size=64), common.model(name), save_every=1)
    config.seeds = (0, 1, 2, 3, 4)
    config.methods = (*METHODS, *MORE)
    config.calibration.sqnr_images = 64
    return common.finish(config)
