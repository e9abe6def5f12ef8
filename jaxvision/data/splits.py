"""Which examples are kept and which are held out: the rules of published code, on NumPy's legacy streams, which are
frozen for good.

Each function returns indices int64 into the data set.
"""

import numpy as np

from jaxvision.core.errors import ConfigError


def shuffled(num_examples: int, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation examples of CIFAR: 0 ... N - 1 shuffled, the first ones for validation.

    Source: ``calibrate/data/cifar10.py`` of RankMixup (and of MbLS and focal_calibration before it), where N = 50,000
    and ``validation`` = 5,000.
    """
    _check_seed(seed)
    if not 0 < validation < num_examples:
        raise ConfigError(f"validation_size={validation} is not between 0 and the {num_examples} examples; use that")
    order = np.arange(num_examples)
    np.random.RandomState(seed).shuffle(order)
    return order[validation:], order[:validation]


def per_class(labels: np.ndarray, validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation examples of Tiny-ImageNet: in each class shuffled, the last ones for validation.

    The classes in the order in which they first occur; one stream for all.

    Args:
      labels: int [N].
      validation: how many of all classes together, the same number of each; 50 times 200 in the papers.
      seed: 1 in ACLS.

    Raises:
      ConfigError: not divisible, or a class that has no more than that.

    Source: ``get_train_val_loader`` in ``calibrate/data/tiny_imagenet.py`` of ACLS and RankMixup.
    """
    _check_seed(seed)
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    each, rest = divmod(validation, len(classes))
    if rest or not each:
        raise ConfigError(f"validation_size={validation} is no multiple of the {len(classes)} classes; use one")
    if counts.min() <= each:
        scarce = int(classes[counts.argmin()])
        raise ConfigError(
            f"validation_size={validation} takes {each} of each class, but class {scarce} has only {counts.min()} "
            "examples; use a smaller one"
        )
    random = np.random.RandomState(seed)
    train, held_out = [], []
    for label in classes[np.argsort(first)]:
        members = np.flatnonzero(labels == label)
        random.shuffle(members)
        train.append(members[:-each])
        held_out.append(members[-each:])
    return np.concatenate(train), np.concatenate(held_out)


def long_tail_counts(num_examples: int, num_classes: int, imbalance: float) -> np.ndarray:
    """Images that are kept of each class, int64 [K]: ``int(N / K * imbalance^(c / (K - 1)))``.

    Args:
      num_examples: N, of the balanced set.
      num_classes: K, at least 2.
      imbalance: images of the last class over those of the first, in (0, 1].

    Raises:
      ConfigError: an imbalance out of range, or one that leaves a class empty.
    """
    if not 0 < imbalance <= 1 or num_classes < 2:
        raise ConfigError(
            f"imbalance={imbalance} of {num_classes} classes: it must be in (0, 1], and 2 classes or more"
        )
    most = num_examples / num_classes
    # Python's floats and not NumPy's powers: the official integers hang on the last bit.
    counts = [int(most * imbalance ** (label / (num_classes - 1.0))) for label in range(num_classes)]
    if not min(counts):
        raise ConfigError(f"imbalance={imbalance} leaves class {counts.index(0)} without images; use a larger one")
    return np.array(counts)


def long_tail(labels: np.ndarray, num_classes: int, imbalance: float, seed: int = 0) -> np.ndarray:
    """The examples of a long-tailed set: of each class in order, shuffled, the first :func:`long_tail_counts`.

    Source: ``calibrate/data/cifar10_LT.py`` and ``cifar100_LT.py`` of RankMixup (seed 0; imbalance 0.1, 0.02, 0.01).

    Raises:
      ConfigError: as there, or a class that has fewer images than are to be kept.
    """
    _check_seed(seed)
    counts = long_tail_counts(len(labels), num_classes, imbalance)
    there = np.bincount(labels, minlength=num_classes)
    if (there < counts).any():
        label = int(np.flatnonzero(there < counts)[0])
        raise ConfigError(
            f"imbalance={imbalance} keeps {counts[label]} images of class {label}, which has {there[label]}; "
            "the formula is for sets with equally many of each class"
        )
    random = np.random.RandomState(seed)
    kept = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        random.shuffle(members)
        kept.append(members[:count])
    return np.concatenate(kept)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} of a split must be a whole number from 0 to 2^32 - 1")
