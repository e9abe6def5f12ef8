from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.data import augment, transforms
from jaxvision.data.folder import FolderSource
from jaxvision.data.pipeline import EvalBatches, TrainBatches
from jaxvision.data.rand_augment import RandAugment
from jaxvision.data.sources import ArraySource

BATCH_TRANSFORM = transforms.compose(
    transforms.random_crop_with_padding(4),
    transforms.random_horizontal_flip(),
    transforms.normalize((0.5,) * 3, (0.25,) * 3),
    transforms.random_erasing(0.5),
    transforms.cutout(4),
)
EXAMPLE_TRANSFORM = transforms.compose(
    augment.RandomResizedCrop(12),
    augment.random_horizontal_flip(),
    RandAugment(),
    augment.color_jitter(0.4, 0.4, 0.4, 0.1),
)


def array_source(n=30):
    image = np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    image[:, 0, 0, 0] = np.arange(n)
    return ArraySource(image, np.arange(n) % 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(1)
    for i in range(12):
        (root / f"class{i % 3}").mkdir(exist_ok=True)
        size = tuple(generator.integers(14, 40, 2))
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"class{i % 3}/{i}.png")
    return root


def paths(folder):
    """The two paths, each with all of its augmentation."""
    return {
        "array": lambda **o: TrainBatches(array_source(), 12, seed=1, transform=BATCH_TRANSFORM, **o),
        "folder": lambda **o: TrainBatches(
            FolderSource(folder), 12, seed=1, example_transform=EXAMPLE_TRANSFORM, transform=BATCH_TRANSFORM, **o
        ),
        "array by example": lambda **o: TrainBatches(
            array_source(), 12, seed=1, example_transform=EXAMPLE_TRANSFORM, transform=BATCH_TRANSFORM, **o
        ),
    }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("path", ["array", "folder", "array by example"])
def test_shards_concatenated_are_the_batch_augmentation_included(folder, path):
    batches = paths(folder)[path]()
    for step in (0, 1, 5):
        whole = batches.batch_at(step)
        assert len(whole["image"]) == 12 and whole["image"].dtype == np.float32 and whole["label"].dtype == np.int32
        for count in (2, 3, 12):
            parts = [batches.batch_at(step, i, count) for i in range(count)]
            assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


@pytest.mark.parametrize("path", ["array", "folder", "array by example"])
def test_resumed_equals_uninterrupted(folder, path):
    run = paths(folder)[path]()
    uninterrupted = [run.batch_at(step) for step in range(6)]
    fresh = paths(folder)[path]()
    for step in (5, 3, 4, 0):
        assert_equal(fresh.batch_at(step), uninterrupted[step])
    assert not np.array_equal(uninterrupted[0]["image"], uninterrupted[3]["image"])


@pytest.mark.parametrize("path", ["folder", "array by example"])
def test_threads_change_nothing(folder, path):
    alone, many = paths(folder)[path](num_threads=0), paths(folder)[path]()
    with ThreadPoolExecutor(4) as pool:  # several callers at once, as read-ahead does
        for step, batch in enumerate(pool.map(many.batch_at, range(4))):
            assert_equal(batch, alone.batch_at(step))


@pytest.mark.parametrize("path", ["array", "folder"])
def test_seed_and_stream_change_the_augmentation_of_the_same_example(folder, path):
    def images(**options):
        make = TrainBatches(
            array_source(12) if path == "array" else FolderSource(folder),
            12,
            shuffle=False,
            transform=BATCH_TRANSFORM if path == "array" else None,
            example_transform=EXAMPLE_TRANSFORM if path == "folder" else None,
            **options,
        )
        return make.batch_at(0)["image"]

    base = images(seed=0)
    np.testing.assert_array_equal(base, images(seed=0))
    for other in (images(seed=1), images(seed=0, stream="other")):
        assert all(not np.array_equal(a, b) for a, b in zip(base, other))


@pytest.mark.parametrize("options", [{"transform": BATCH_TRANSFORM}, {"example_transform": EXAMPLE_TRANSFORM}])
def test_the_next_epoch_augments_the_same_example_anew(options):
    batches = TrainBatches(array_source(12), 12, seed=0, shuffle=False, **options)
    first, second = batches.batch_at(0), batches.batch_at(1)
    np.testing.assert_array_equal(first["label"], second["label"])
    assert all(not np.array_equal(a, b) for a, b in zip(first["image"], second["image"]))


def test_rows_of_a_batch_are_augmented_independently():
    image = np.tile(np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), (12, 1, 1, 1))
    same = ArraySource(image, np.arange(12))
    for options in ({"transform": BATCH_TRANSFORM}, {"example_transform": EXAMPLE_TRANSFORM}):
        batch = TrainBatches(same, 12, seed=0, **options).batch_at(0)["image"]
        assert len({row.tobytes() for row in batch}) >= 11


@pytest.mark.parametrize(("n", "b", "shards"), [(12, 4, 2), (13, 4, 4), (30, 6, 3), (5, 5, 1), (7, 2, 2)])
@pytest.mark.parametrize("by_example", [False, True])
def test_train_epoch_has_every_example_at_most_once(n, b, shards, by_example):
    keep = (lambda example, generator: example) if by_example else None
    batches = TrainBatches(array_source(n), b, seed=0, example_transform=keep)
    for epoch in range(2):
        seen = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            for shard in range(shards):
                seen += batches.batch_at(step, shard, shards)["image"][:, 0, 0, 0].tolist()
        assert len(seen) == len(set(seen)) == n // b * b


@pytest.mark.parametrize("n", [1, 5, 8, 13])
@pytest.mark.parametrize(("b", "shards"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (16, 8)])
@pytest.mark.parametrize("by_example", [False, True])
def test_evaluation_has_every_example_exactly_once(n, b, shards, by_example):
    keep = (lambda example, generator: example) if by_example else None
    source = array_source(n)
    batches = EvalBatches(source, b, example_transform=keep)
    assert batches.num_examples == n and batches.num_batches == -(-n // b) and batches.batch_size == b
    seen = []
    for i in range(batches.num_batches):
        whole = batches.batch_at(i)
        assert whole["image"].shape == (b, 16, 16, 3) and whole["mask"].dtype == np.float32
        parts = [batches.batch_at(i, shard, shards) for shard in range(shards)]
        assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})
        seen += whole["image"][whole["mask"] == 1, 0, 0, 0].tolist()
        for row in whole["image"][whole["mask"] == 0]:
            np.testing.assert_array_equal(row, whole["image"][0])
    assert seen == list(range(n))


def test_evaluation_of_a_folder(folder):
    source = FolderSource(folder)
    resize = augment.RandomResizedCrop(8, scale=(1.0, 1.0))

    def fixed(example, generator):
        return resize(example, np.random.default_rng(0))

    batches = EvalBatches(source, 5, example_transform=fixed)
    labels = [batches.batch_at(i) for i in range(3)]
    joined = np.concatenate([batch["label"][batch["mask"] == 1] for batch in labels])
    np.testing.assert_array_equal(joined, source.labels)


def test_differing_sizes_without_a_transform_are_explained(folder):
    with pytest.raises(DataError, match=r"different 'image' shapes.*example_transform"):
        TrainBatches(FolderSource(folder), 12, seed=0).batch_at(0)


def test_randomness_in_evaluation_is_refused():
    for options in ({"transform": transforms.random_horizontal_flip()}, {"example_transform": EXAMPLE_TRANSFORM}):
        with pytest.raises(ConfigError, match="evaluation must be deterministic"):
            EvalBatches(array_source(), 4, **options).batch_at(0)


def test_mistakes():
    with pytest.raises(ConfigError, match="batch_size=31 is larger than the data set with its 30 examples"):
        TrainBatches(array_source(), 31, seed=0)
    with pytest.raises(ConfigError, match="batch_size=0"):
        EvalBatches(array_source(), 0)
    with pytest.raises(ConfigError, match="split evenly over 5 hosts"):
        TrainBatches(array_source(), 12, seed=0).batch_at(0, 0, 5)
    with pytest.raises(IndexError, match=r"batch 8 is outside 0..7"):
        EvalBatches(array_source(), 4).batch_at(8)
    image = np.zeros((4, 8, 8, 3), np.uint8)
    source = ArraySource(image, np.arange(4), extra={"mask": np.zeros(4)})
    with pytest.raises(DataError, match="leaf 'mask'"):
        EvalBatches(source, 4).batch_at(0)


def test_a_damaged_file_is_named_through_threads_and_grain(folder, tmp_path):
    for i in range(3):
        (tmp_path / f"c{i}").mkdir()
        (tmp_path / f"c{i}/x.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    (tmp_path / "c1/x.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"c1/x.png can't be decoded"):
        TrainBatches(FolderSource(tmp_path), 3, seed=0, example_transform=EXAMPLE_TRANSFORM).batch_at(0)


def test_without_dropping_batches_run_across_epochs():
    batches = TrainBatches(array_source(5), 4, seed=0, drop_remainder=False)
    stream = np.concatenate([batches.batch_at(step)["image"][:, 0, 0, 0] for step in range(5)])
    for epoch in range(4):
        assert sorted(stream[epoch * 5 : epoch * 5 + 5].tolist()) == [0, 1, 2, 3, 4]
