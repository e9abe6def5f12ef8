"""TensorFlow Datasets prepared as array_record, read without TensorFlow."""

from pathlib import Path

import numpy as np

from jaxvision.core.errors import DataError
from jaxvision.data.decode import NUM_THREADS, decode_image, first_line, map_threaded
from jaxvision.data.sources import Example, stack


class TfdsSource:
    """Images and labels of a ``tfds.data_source``, decoded by Pillow when they are read.

    Args:
      records: a random-access sequence of ``{"image": encoded bytes, "label": int}``.
      class_names: ``K`` names.
      channels: 1 or 3.
      name: what error messages call it.
    """

    in_memory = False

    def __init__(self, records, class_names: tuple[str, ...], channels: int, name: str):
        self._records = records
        self._channels = channels
        self._name = name
        self.class_names = class_names
        self.num_classes = len(class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[int(index)]
        image = decode_image(record["image"], f"{self._name}[{index}]", self._channels)
        return {"image": image, "label": np.int32(record["label"])}

    def take(self, indices: np.ndarray) -> Example:
        return stack(map_threaded(self.__getitem__, np.asarray(indices).tolist(), NUM_THREADS))


def tfds_source(name: str, split: str, data_dir: str | Path | None = None) -> TfdsSource:
    """An image-classification data set of TensorFlow Datasets, already prepared as array_record.

    Args:
      name: the tfds name, such as ``"imagenet2012"`` or ``"cifar10:3.0.2"``.
      split: such as ``"train"`` or ``"train[:90%]"``.
      data_dir: the tfds data folder; None means tfds's own default. Nothing is downloaded.

    Raises:
      DataError: if the data set isn't there, isn't array_record, lacks the split, or has no image and class label.
    """
    import tensorflow_datasets as tfds  # here, because the import takes a second

    label = f"tfds:{name} split '{split}'"
    folder = data_dir if data_dir is not None else "tfds's default folder"
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except (ValueError, NotImplementedError, OSError, AttributeError) as error:
        raise DataError(
            f"tfds:{name} is not in {folder} as array_record ({first_line(error)}); prepare it there with "
            f"`tfds build {name} --file_format=array_record`"
        ) from error
    if not builder.info.splits:
        raise DataError(
            f"tfds:{name} is not in {folder} as array_record; prepare it there with "
            f"`tfds build {name} --file_format=array_record`"
        )
    class_names, channels = _describe(tfds, builder.info.features, label)
    try:
        # Pillow decodes, not tfds: tfds would use OpenCV where it is installed, whose pixels differ.
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except (ValueError, KeyError) as error:
        raise DataError(
            f"tfds:{name} has no split '{split}'; it has {', '.join(sorted(builder.info.splits))}"
        ) from error
    except (NotImplementedError, AssertionError, OSError) as error:
        raise DataError(
            f"{label} can't be read from {folder} as array_record ({first_line(error)}); prepare it with "
            f"`tfds build {name} --file_format=array_record`"
        ) from error
    return TfdsSource(records, class_names, channels, label)


def _describe(tfds, features, label: str) -> tuple[tuple[str, ...], int]:
    """Class names and number of channels, from the data set's features."""
    for key, kind in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        if key not in features or not isinstance(features[key], kind):
            raise DataError(
                f"{label} has no '{key}' feature of the kind {kind.__name__} (it has {', '.join(features)}); "
                "only image classification data sets can be read"
            )
    return tuple(features["label"].names), int(features["image"].shape[-1])
