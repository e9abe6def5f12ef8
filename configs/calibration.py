"""What the configurations of the calibration methods share: the fields, the small protocol, the published recipes.

Fields beside those of ``configs/common.py``:

    seeds       each trains every arm, from its own random network (or the same pretrained one)
    arms        rows of the table, in order: a loss of jaxvision/losses/registry.py with the numbers of ``losses``
                ("mbls"), with others ("acls(margin=8, reference=min)"), with several, a row each, in one program
                ("mrl(weight=(0, 0.1))"), or a function of one's own ("my_package.my_module:my_loss(strength=2)")
    losses      loss -> its hyper-parameters, as published for the data set; alpha of mixup, mrl and mndcg is that of
                the Beta distribution; of mrl and mndcg, per_sample draws from it for each image instead of each batch,
                mix is "mixup" or "cutmix", and layer "input" or "features" (in front of the classifier)
    epochs      of each arm; eval_every_epochs: 0: at the end
    choose      the networks that are reported: "last" of each training, or "best_validation", each member's own of the
                best accuracy on the validation images over all evaluations (the first of equal ones), which is the
                official protocol; test images are then looked at in the report alone
    num_bins    of all calibration errors
    simulations draws of the noise floors and resamples of the intervals; 0: neither
    temperature how it is fitted on the data.validation_size images that are held out: "exact"
                (the NLL's minimum), "grid_nll" or "grid_ece" (the papers' 0.1, 0.2, ... 10)
    ignore_labels   pixels of these labels are trained on but not measured; (0,) is the official protocol of VOC
    save_logits write logits_<arm>.npz, which jaxvision.tools.calibration reads; all pixels' would be gigabytes
    long_tail_groups    report the accuracies of head, medium and tail classes
    ood         source, path, split and options of out-of-distribution images, which the networks' confidence should
                tell from the test images ("": none)
    how         trainings of an arm: "map" one after the other, "vmap" at once, "unroll" written out (engine/seeds.py),
                "call" one program called for each member (one device)
"""

from ml_collections import ConfigDict

from configs import common
from jaxvision.losses import registry

CIFAR_STATISTICS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
NOISE = 0.35


def base(
    method: str, arms: tuple[str, ...], data: ConfigDict, model: ConfigDict, optimizer: ConfigDict, **engine
) -> ConfigDict:
    """All fields; losses with the numbers published for the data set, where there are such."""
    config = common.engine(**engine)
    config.method = method
    config.seeds = (0,)
    config.arms = arms
    config.losses = ConfigDict({name: spec.defaults(data.source) for name, spec in registry.LOSSES.items()})
    config.epochs, config.eval_every_epochs = 200.0, 1.0
    config.choose = "best_validation"
    config.data, config.model, config.optimizer = data, model, optimizer
    config.num_bins, config.simulations = 15, 200
    config.temperature = "exact"
    config.ignore_labels = ()
    config.save_logits, config.long_tail_groups = True, False
    config.ood = ConfigDict({"source": "", "path": "", "split": "test", "options": {}})
    config.how = "map"
    return config


def sgd(milestones: tuple[float, ...], lr: float = 0.1) -> ConfigDict:
    """The optimizer of both papers: momentum, decay of all parameters, gradients clipped to a norm of 2."""
    schedule = {"name": "multistep", "milestones": milestones}
    return common.optimizer("sgd", lr, weight_decay=5e-4, clip_norm=2.0, schedule=schedule)


def digits(method: str, arms: tuple[str, ...], *, noise: float = NOISE) -> ConfigDict:
    """Section 10 of the specifications: 500 training images, 250 to fit on, 1,047 to test on, 40 epochs, 4 layers."""
    config = base(
        method,
        arms,
        common.digits(
            options={"num_train": 750, "noise": noise},
            batch_size=64,
            eval_batch_size=250,
            train_size=500,
            validation_size=250,
        ),
        common.model("plain_cnn"),
        sgd((16.0, 24.0)),
        log_every=7,
        save_every=280,
    )
    config.seeds = (0, 1, 2, 3)
    config.epochs, config.eval_every_epochs = 40.0, 0.0
    config.choose = "last"
    config.how = "vmap"
    return config


def smoke(config: ConfigDict, arms: tuple[str, ...]) -> ConfigDict:
    """A small run made tiny: two seeds, seven steps, one layer."""
    config.seeds = (0, 1)
    config.arms = arms
    config.epochs = 0.9
    config.data.update({"train_size": 512, "validation_size": 128, "batch_size": 64, "eval_batch_size": 128})
    config.data.options.num_train = 640
    config.model.settings = ConfigDict({"features": (4,), "strides": (2,), "dilations": (1,)})
    config.optimizer.lr = 0.01
    config.log_every, config.save_every, config.tensorboard = 2, 4, False
    config.simulations = 20
    return config


def cifar10_subset(method: str, arms: tuple[str, ...]) -> ConfigDict:
    """A few thousand CIFAR-10 images, 500 of them to fit on; ``data.path`` has ``{split}`` for train and test."""
    config = base(
        method,
        arms,
        common.cifar(10, batch_size=128, eval_batch_size=256, validation_size=500),
        common.model("plain_cnn", settings={"features": (32, 64, 64, 128), "strides": (1, 2, 2, 2)}),
        sgd((16.0, 24.0)),
        log_every=25,
        save_every=250,
    )
    config.seeds = (0, 1, 2)
    config.epochs, config.eval_every_epochs = 40.0, 0.0
    config.choose = "last"
    config.how = "call"
    return config


def cifar(method: str, arms: tuple[str, ...], network: str, num_classes: int = 10) -> ConfigDict:
    """200 epochs, rate 0.1 divided by 10 after 80 and 120; the published split; temperatures by the grid.

    The official code drops the last, smaller batch of CIFAR-10 and keeps that of CIFAR-100; here batches have one size.
    """
    split = {"validation_size": 5000, "validation_rule": "shuffle", "validation_seed": 1}
    config = base(
        method,
        arms,
        common.cifar(num_classes, batch_size=128, eval_batch_size=500, **split, **CIFAR_STATISTICS),
        common.model(network),
        sgd((80.0, 120.0)),
        log_every=100,
        save_every=3510,
    )
    config.temperature = "grid_ece"
    return config


def cifar_long_tail(method: str, arms: tuple[str, ...], num_classes: int, imbalance: float) -> ConfigDict:
    """The recipe of CIFAR for ResNet-32 on long-tailed CIFAR with class-aware sampling, for all losses alike.

    The official code chooses networks and fits temperatures on the test images; here on 1,000 of the training images,
    which are long-tailed as these are.
    """
    config = cifar(method, arms, "resnet32", num_classes)
    options = {"batch_size": 128, "eval_batch_size": 500, "validation_size": 1000, **CIFAR_STATISTICS}
    config.data = common.cifar_long_tail(num_classes, imbalance, **options)
    config.long_tail_groups = True
    return config


def tiny_imagenet(method: str, arms: tuple[str, ...], network: str) -> ConfigDict:
    """100 epochs, rate 0.1 divided by 10 after 40 and 60, batches of 64; the split of ACLS."""
    config = base(
        method,
        arms,
        common.tiny_imagenet(batch_size=64, eval_batch_size=250),
        common.model(network),
        sgd((40.0, 60.0)),
        log_every=100,
        save_every=7030,
    )
    config.epochs = 100.0
    config.temperature = "grid_ece"
    return config


def cub(method: str, arms: tuple[str, ...]) -> ConfigDict:
    """CUB-200-2011 with batches of 32, as in the configuration of MbLS and RankMixup; the epochs are ours.

    It validates on the test images; here 594 training images are held out to fit on.
    """
    config = base(
        method,
        arms,
        common.cub(batch_size=32, eval_batch_size=64, validation_size=594),
        common.model("resnet50"),
        sgd((40.0, 80.0), lr=0.01),
        log_every=50,
        save_every=1680,
    )
    config.epochs = 100.0
    config.temperature = "grid_ece"
    return config


def voc(method: str, arms: tuple[str, ...]) -> ConfigDict:
    """DeepLabV3-ResNet-50 on VOC 2012 segmentation; background pixels aren't measured, as in the official code.

    It starts from ImageNet weights of a ResNet-50: ``model.init_from`` a torchvision file, ``model.init_keep``
    ``('decoder', 'segmentation_head')``. Rates and epochs are second-hand. 293 of the 1,464 training images are held
    out to fit on, as CALS does; the official code fits on what it reports. It averages the errors of batches of 8; here
    they are those of all pixels. Their logits, many gigabytes, aren't written. The last step is tested, as RankMixup's
    segmentation trainer does; that of MbLS takes the best validation mIoU.
    """
    config = base(
        method,
        arms,
        common.voc(batch_size=8, eval_batch_size=8, validation_size=293),
        common.model("deeplabv3_resnet50"),
        sgd((40.0, 80.0), lr=0.01),
        log_every=20,
        save_every=730,
    )
    config.epochs, config.eval_every_epochs, config.choose = 100.0, 5.0, "last"
    config.temperature = "grid_nll"
    config.ignore_labels = (0,)
    config.save_logits = False
    return config


def scenes(method: str, arms: tuple[str, ...]) -> ConfigDict:
    """Segmentation of drawn scenes of 32 x 32 pixels, seven classes, borders without a label; a dense network."""
    config = base(
        method,
        arms,
        common.data(
            "scenes",
            options={"size": 32},
            augment={"flip": True},
            train_size=256,
            validation_size=100,
            batch_size=16,
            eval_batch_size=50,
        ),
        common.model("plain_cnn_dense", settings={"features": (8, 16, 16, 16)}),
        sgd((4.0, 6.0)),
        log_every=16,
        save_every=160,
    )
    config.seeds = (0, 1, 2)
    config.epochs, config.eval_every_epochs = 10.0, 0.0
    config.choose = "last"
    config.save_logits = False
    config.how = "call"
    return config


def imagenet(method: str, arms: tuple[str, ...]) -> ConfigDict:
    """ResNet-50 with the recipe of CALS (AdamW, cosine, 200 epochs), whose baseline rows the ACLS paper shares.

    Of the 50,000 official validation images 10,000 are there to fit on and 40,000 to test on, as in the papers; which
    is a random order's choice, not the lists of CALS.
    """
    schedule = {"name": "cosine", "warmup_epochs": 1.0, "warmup_lr": 5e-7, "end_lr": 5e-6}
    split = {"validation_size": 10_000, "validation_rule": "eval"}
    config = base(
        method,
        arms,
        common.imagenet({"jitter": 0.4, "erasing": 0.25}, batch_size=256, **split),
        common.model("resnet50"),
        common.optimizer("adamw", 5e-4, weight_decay=0.05, clip_norm=2.0, schedule=schedule),
        log_every=100,
        save_every=5000,
    )
    config.temperature = "grid_ece"
    return config
