"""The ``data`` block for the calibration papers: published splits, long tails, dense batches, other data sets."""

import numpy as np
import pytest

from configs import common
from jaxvision.core.config import Config
from jaxvision.core.errors import ConfigError
from jaxvision.data import open_source, splits
from jaxvision.engine import datasets
from jaxvision.models import zoo
from tests.data import layouts

SPEC = zoo.spec("resnet20")


def block(made, **changes):
    values = made.to_dict()
    values["augment"].update(changes.pop("augment", {}))
    return Config({**values, "batch_size": 4, "eval_batch_size": 4, **changes}, "config.data")


def build(made, spec=SPEC, index=False, **changes):
    config = block(made, **changes)
    built = datasets.build_data(config, 0, spec, index=index)
    config.check_all_read()
    return built


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Thirty images of each of ten classes; every image holds its number."""
    root = tmp_path_factory.mktemp("cifar")
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 30))
    image = np.zeros((300, 8, 8, 3), np.uint8)
    image[..., 0], image[..., 1] = (np.arange(300) % 256)[:, None, None], (np.arange(300) // 256)[:, None, None]
    np.savez(root / "train.npz", image=image, label=label)
    np.savez(root / "test.npz", image=image[:40], label=label[:40])
    return root


def numbers(batches, count):
    """Which images of the split an evaluation reads, from their pixels."""
    rows = np.concatenate([batches.batch_at(i)["image"] for i in range(batches.num_batches)])[:count, 0, 0]
    mean, std = np.array(SPEC.mean[:2]), np.array(SPEC.std[:2])
    pixels = np.rint((rows[:, :2] * std + mean) * 255).astype(int)
    return pixels[:, 0] + 256 * pixels[:, 1]


def test_the_published_split(cifar):
    built = build(common.cifar(), path=str(cifar), validation_size=30, validation_rule="shuffle", validation_seed=5)
    train, validation = splits.shuffled(300, 30, 5)
    assert numbers(built.validation, 30).tolist() == np.sort(validation).tolist()
    assert numbers(built.train_examples, 270).tolist() == np.sort(train).tolist()
    few = build(common.cifar(), path=str(cifar), validation_size=30, validation_rule="shuffle", train_size=20)
    assert few.train_examples.num_examples == 20 and few.validation.num_examples == 30
    assert not set(numbers(few.train_examples, 20)) & set(numbers(few.validation, 30))
    each = build(common.cifar(), path=str(cifar), validation_size=50, validation_rule="per_class", train_size=100)
    assert np.bincount(each.validation.source.labels).tolist() == [5] * 10
    assert len(set(each.train_examples.source.labels)) == 10 and each.train_examples.num_examples == 100


def test_the_fixed_split_has_not_changed(cifar):
    built = build(common.cifar(), path=str(cifar), validation_size=30, train_size=100)
    order = np.random.RandomState(0).permutation(300)
    assert numbers(built.train_examples, 100).tolist() == np.sort(order[:100]).tolist()
    assert numbers(built.validation, 30).tolist() == np.sort(order[-30:]).tolist()


def test_a_validation_split_of_the_evaluation_split(cifar):
    """Training keeps all of its images; without training the tested ones are the same."""
    options = {"path": str(cifar), "validation_size": 10, "validation_rule": "eval"}
    built = build(common.cifar(), **options)
    order = np.random.RandomState(0).permutation(40)
    assert numbers(built.validation, 10).tolist() == np.sort(order[-10:]).tolist()
    assert numbers(built.eval, 30).tolist() == np.sort(order[:30]).tolist()
    assert built.train_examples.num_examples == 300
    alone = datasets.build_data(block(common.cifar(), **options), 0, SPEC, train=False)
    assert alone.eval.num_examples == 30 and alone.validation is None
    with pytest.raises(ConfigError, match="validation_size=40 don't fit into the 40 examples of the split 'test'"):
        build(common.cifar(), **{**options, "validation_size": 40})


def test_a_long_tail_sampled_class_by_class(cifar):
    made = common.cifar_long_tail(imbalance=0.1)
    built = build(made, path=str(cifar), source="npz", index=True)
    counts = splits.long_tail_counts(300, 10, 0.1)
    source = built.train.source
    np.testing.assert_array_equal(np.bincount(source.labels), counts)
    assert built.train.steps_per_epoch == 10 * counts.max() // 4 and built.eval.num_examples == 40
    for step in range(12):
        batch = built.train.batch_at(step)
        assert len(set(batch["label"].tolist())) == 1
        np.testing.assert_array_equal(source.labels[batch["index"]], batch["label"])
    held_out = build(made, path=str(cifar), class_aware=0, validation_size=20)
    assert held_out.train.steps_per_epoch == (counts.sum() - 20) // 4
    assert "index" not in held_out.train.batch_at(0)


def test_the_index_of_every_set(cifar):
    built = build(common.cifar(), path=str(cifar), validation_size=10, index=True)
    for batches in (built.eval, built.validation, built.train_examples):
        assert batches.batch_at(1)["index"].tolist() == [4, 5, 6, 7]
    batch = built.train.batch_at(2)
    np.testing.assert_array_equal(built.train.source.labels[batch["index"]], batch["label"])


def test_the_evaluation_split_can_have_a_normalisation_of_its_own(cifar):
    """As the official CIFAR-100 test loader has by mistake."""
    options = {"path": str(cifar), "validation_size": 10}
    same, other = build(common.cifar(), **options), build(common.cifar(), **options, eval_mean=(0.1, 0.2, 0.3))
    for name in ("validation", "train_examples"):
        np.testing.assert_array_equal(*(getattr(each, name).batch_at(0)["image"] for each in (same, other)))
    shift = (same.eval.batch_at(0)["image"] - other.eval.batch_at(0)["image"])[0, 0, 0]
    np.testing.assert_allclose(shift, (np.array([0.1, 0.2, 0.3]) - SPEC.mean) / SPEC.std, atol=1e-5)


def test_voc_and_scenes_give_dense_batches(tmp_path):
    layouts.write(tmp_path, layouts.voc2012())
    built = build(common.voc(), path=str(tmp_path), batch_size=2, size=24, eval_size=20)
    assert built.image_shape == (24, 24, 3) and built.num_classes == 21 and built.class_names[15] == "person"
    train, held_out = built.train.batch_at(0), built.eval.batch_at(0)
    assert train["image"].shape == (2, 24, 24, 3) and train["label_map"].shape == (2, 24, 24)
    assert held_out["image"].shape == (4, 20, 20, 3) and held_out["mask"].tolist() == [1, 1, 0, 0]
    assert train["image"].dtype == np.float32 and train["label_map"].dtype == np.uint8

    made = common.data("scenes", options={"n": 8, "size": 32}, augment={"crop_padding": 4, "flip": True})
    dense = build(made)
    batch = dense.train.batch_at(0)
    assert dense.num_classes == 7 and batch["label_map"].shape == (4, 32, 32) and "label" not in batch
    # what the crop brings in from outside is ignored, and is black before the normalisation
    black = np.isclose(batch["image"], -np.array(SPEC.mean) / SPEC.std, atol=1e-5).all(-1)
    assert black.any() and (batch["label_map"][black] == 255).all()


def test_cub_gives_squares(tmp_path):
    layouts.write(tmp_path, layouts.cub())
    built = build(common.cub(), zoo.spec("resnet50"), path=str(tmp_path), size=14)
    assert built.image_shape == (14, 14, 3) and built.train.batch_at(0)["image"].shape == (4, 14, 14, 3)
    assert built.eval.batch_at(1)["mask"].tolist() == [1, 1, 0, 0]


def test_tiny_imagenet_with_its_split(tmp_path):
    layouts.write(tmp_path, layouts.tiny_imagenet(8))
    built = build(common.tiny_imagenet(validation_size=6), path=str(tmp_path))
    assert np.bincount(built.validation.source.labels).tolist() == [2, 2, 2]
    assert built.train.steps_per_epoch == 7 and built.eval.num_examples == 6


def test_another_data_set_under_this_ones_preprocessing(cifar, tmp_path):
    layouts.svhn_mat(tmp_path / "test_32x32.mat", 6)
    data = build(common.cifar(), path=str(cifar))
    values = {"source": "svhn", "path": str(tmp_path), "options": {}, "split": "test"}
    config = Config(values, "config.ood")
    other = datasets.other_evaluation(config, data, 4)
    config.check_all_read()
    batch = other.batch_at(1)
    assert batch["image"].shape == (4, 8, 8, 3) and batch["mask"].tolist() == [1, 1, 0, 0]
    pixels = open_source("svhn", path=tmp_path, split="test")[4]["image"].astype(float).mean((0, 1)) / 255
    np.testing.assert_allclose(batch["image"][0].mean((0, 1)), (pixels - data.mean) / data.std, atol=0.02)
    digits = Config({"source": "digits", "path": "", "options": {}, "split": "test"}, "config.ood")
    with pytest.raises(ConfigError, match=r"config.ood.source='digits' has images of 1 channel\(s\)"):
        datasets.other_evaluation(digits, data, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation_rule": "shuffel"}, "config.data.validation_rule='shuffel' is not one of"),
        (
            {"validation_size": 33, "validation_rule": "per_class"},
            "validation_size=33 is no multiple of the 10 classes",
        ),
        ({"validation_seed": -1}, "config.data.validation_seed=-1"),
        ({"class_aware": 1.5}, "config.data.class_aware=1.5 must be a whole number"),
        ({"eval_size": 24}, "data.eval_size=24 is for the pipeline 'voc'"),
        ({"pipeline": "voc", "augment": {"crop_padding": 0}}, "needs examples with a label map"),
        ({"pipeline": "voc", "augment": {"crop_padding": 0, "erasing": 0.1}}, "config.data.augment.erasing=0.1"),
        ({"pipeline": "square"}, "config.data.augment.crop_padding=4 is for the pipeline 'array'"),
        ({"pipeline": "square", "augment": {"crop_padding": 0, "rand_augment": 9}}, "rand_augment=9"),
        ({"options": {"imbalance": 2.0}}, "imbalance=2.0 of 10 classes"),
        ({"options": {"imbalance": 0.001}}, "leaves class 5 without images"),
    ],
)
def test_mistakes(changes, says, cifar):
    with pytest.raises(ConfigError, match=says):
        build(common.cifar(), path=str(cifar), **changes)


def test_rand_augment_would_leave_the_label_maps_behind():
    made = common.data("scenes", options={"n": 4, "size": 32})
    with pytest.raises(ConfigError, match=r"rand_augment=9\.0 moves images but not their label maps"):
        build(made, augment={"rand_augment": 9.0})


def test_old_blocks_still_build(cifar):
    """A run directory of before holds a block without the newer fields."""
    values = block(common.cifar(), path=str(cifar)).to_dict()
    for name in ("validation_rule", "validation_seed", "class_aware", "eval_size", "eval_mean", "eval_std"):
        del values[name]
    built = datasets.build_data(Config(values, "config.data"), 0, SPEC)
    assert built.train.steps_per_epoch == 75
