"""A real array_record data set, built and read in processes in which TensorFlow can't be imported."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxvision.core.errors import DataError
from jaxvision.data.pipeline import EvalBatches
from jaxvision.data.sources import Source
from jaxvision.data.tfds_source import TfdsSource, tfds_source

REPOSITORY = Path(__file__).parents[2]

BLOCK = """
import importlib.abc, importlib.machinery, sys
class Block(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    # A spec whose loader fails: libraries may look whether TensorFlow is there, but none can import it.
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None
    def create_module(self, spec):
        raise ImportError("TensorFlow is blocked")
    def exec_module(self, module):
        raise ImportError("TensorFlow is blocked")
sys.meta_path.insert(0, Block())
try:
    import tensorflow
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise AssertionError("the block doesn't block")
"""

BUILD = (
    BLOCK
    + """
import numpy as np, PIL.Image
import tensorflow_datasets as tfds

def build(name, channels, label, splits):
    def info(self):
        features = {"image": tfds.features.Image(shape=(None, None, channels)), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), description="tiny")
    def generate(n):
        for i in range(n):
            pixels = np.full((4, 5, 3), 10 * i, np.uint8)
            pixels[..., 0] += 1
            picture = PIL.Image.fromarray(pixels if channels == 3 else pixels[..., 0])
            yield i, {"image": picture, "label": i % 2}
    members = dict(
        VERSION=tfds.core.Version("1.0.0"),
        _info=info,
        _split_generators=lambda self, manager: {split: generate(n) for split, n in splits.items()},
        _generate_examples=lambda self: None,
        __module__=__name__,
    )
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), members)
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()

tfds.disable_progress_bar()
build("TinyColour", 3, tfds.features.ClassLabel(names=["even", "odd"]), {"train": 7, "test": 3})
build("TinyGrey", 1, tfds.features.ClassLabel(names=["even", "odd"]), {"train": 4})
build("TinyNumbers", 3, np.int64, {"train": 4})
"""
)

READ = (
    BLOCK
    + """
import json
import numpy as np
from jaxvision.data import TrainBatches, open_source
source = open_source("tfds:tiny_colour", path=sys.argv[1], split="train")
batch = TrainBatches(source, 7, seed=0, shuffle=False).batch_at(0)
from tensorflow_datasets import __version__
assert "tensorflow" not in sys.modules
print(json.dumps({"image": batch["image"].tolist(), "label": batch["label"].tolist(), "names": source.class_names}))
"""
)


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    python(BUILD, folder)
    return folder


def values(source):
    """tfds shuffles when it builds; the images' values say which example is which."""
    return [int(source[i]["image"][0, 0, -1]) for i in range(len(source))]


def test_reads_array_record_where_tensorflow_cannot_be_imported(data_dir):
    done = python(READ, data_dir)
    content = json.loads(done.stdout)
    image = np.array(content["image"])
    assert image.shape == (7, 4, 5, 3) and content["names"] == ["even", "odd"]
    assert sorted(image[:, 0, 0, 2].tolist()) == [0, 10, 20, 30, 40, 50, 60]
    np.testing.assert_array_equal(image[..., 0], image[..., 1] + 1)
    assert content["label"] == [value // 10 % 2 for value in image[:, 0, 0, 2].tolist()]
    assert done.stderr == ""  # no third-party warnings either


def test_is_a_source(data_dir):
    source = tfds_source("tiny_colour", "train", data_dir)
    assert isinstance(source, Source) and len(source) == 7 and source.num_classes == 2
    example = source[2]
    assert example["image"].dtype == np.uint8 and example["label"].dtype == np.int32
    taken = source.take(np.array([2, 2, 6]))
    np.testing.assert_array_equal(taken["image"][1], example["image"])
    assert sorted(values(tfds_source("tiny_colour", "test", data_dir))) == [0, 10, 20]
    parts = [values(tfds_source("tiny_colour", split, data_dir)) for split in ("train[:4]", "train[4:]")]
    assert parts[0] + parts[1] == values(source)
    grey = tfds_source("tiny_grey", "train", data_dir)
    assert grey[0]["image"].shape == (4, 5, 1)


def test_threads_and_batches(data_dir):
    source = tfds_source("tiny_colour", "train", data_dir)
    expected = values(source)
    order = np.random.default_rng(0).integers(0, 7, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        for index, example in zip(order, pool.map(source.__getitem__, order)):
            assert example["image"][0, 0, 2] == expected[index]
    batches = EvalBatches(source, 4)
    seen = [v for i in range(2) for b in [batches.batch_at(i)] for v in b["image"][b["mask"] == 1, 0, 0, 2].tolist()]
    assert seen == expected


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("tiny_colour", "tset", ("tfds:tiny_colour has no split 'tset'", "test, train")),
        ("tiny_colour", "train[", ("tfds:tiny_colour has no split 'train['",)),
        ("tiny_color", "train", ("tfds:tiny_color is not in", "tfds build tiny_color --file_format=array_record")),
        ("cifar10", "train", ("tfds:cifar10 is not in", "tfds build cifar10 --file_format=array_record")),
        ("tiny_numbers", "train", ("tfds:tiny_numbers", "'label' feature", "ClassLabel")),
    ],
)
def test_mistakes(data_dir, name, split, words):
    with pytest.raises(DataError) as error:
        tfds_source(name, split, data_dir)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_damaged_record_is_named():
    source = TfdsSource([{"image": b"broken", "label": 0}], ("a", "b"), 3, "tfds:x split 'train'")
    with pytest.raises(DataError, match=r"tfds:x split 'train'\[0\] can't be decoded"):
        source[0]
