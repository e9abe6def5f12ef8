"""Data: sources of examples, and batches that are a pure function of seed and step.

    source = open_source("cifar10", path="data/cifar10", split="train")
    batches = TrainBatches(source, 128, seed=0, transform=compose(random_crop_with_padding(4), normalize(mean, std)))
    batch = batches.batch_at(step)

Importing this package reads no files, starts no backend and imports neither TensorFlow nor Grain.
"""

from jaxvision.data.catalog import open_source, source_names
from jaxvision.data.folder import FolderSource
from jaxvision.data.pipeline import EvalBatches, TrainBatches
from jaxvision.data.sources import ArraySource, Source, Subset, npz_source

__all__ = [
    "ArraySource",
    "EvalBatches",
    "FolderSource",
    "Source",
    "Subset",
    "TrainBatches",
    "npz_source",
    "open_source",
    "source_names",
]
