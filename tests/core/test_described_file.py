"""Bytes and the JSON file beside them: whole, together, and nothing that isn't announced."""

import json

import numpy as np
import pytest

from jaxvision.core import described_file
from jaxvision.core.errors import DataError

ENDINGS = (".bin", ".json")


@pytest.fixture
def path(tmp_path):
    described_file.save(tmp_path / "made" / "thing", ENDINGS, b"bytes", {"format": "f", "version": 1})
    return tmp_path / "made" / "thing"


def test_what_is_written_is_read(path):
    data, metadata = described_file.load(path, ENDINGS, "a thing")
    assert data == b"bytes" and metadata["format"] == "f"
    assert sorted(file.name for file in path.parent.iterdir()) == ["thing.bin", "thing.json"]
    described_file.check_format(metadata, "f", 1, "thing")
    with pytest.raises(DataError, match="this is no thing of format 'f' version 2, but 'f' version 1"):
        described_file.check_format(metadata, "f", 2, "thing")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("thing.bin", b"byte", "damaged or belongs to another model"),
        ("thing.json", b"{", "is not valid JSON"),
        ("thing.json", json.dumps([1]).encode(), "damaged or belongs to another model"),
        ("thing.bin", None, "thing.bin does not exist; a thing is a .json and a .bin file"),
        ("thing.json", None, "thing.json does not exist"),
    ],
)
def test_damage_is_one_sentence(path, name, content, message):
    file = path.parent / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        described_file.load(path, ENDINGS, "a thing")


def test_arrays_are_those_announced():
    arrays = {"codes": np.arange(3), "variables/params/a": np.ones(2)}
    announced = described_file.Announced(arrays, "thing")
    with pytest.raises(DataError, match="the thing has an array 'codes' that its JSON file doesn't mention"):
        announced.variables({})
    np.testing.assert_array_equal(announced.take("codes"), np.arange(3))
    with pytest.raises(DataError, match="the thing has no array 'codes', which its JSON file announces"):
        announced.take("codes")
    found = announced.variables({"variables/params/b/c": np.zeros(1)})
    assert list(found) == ["params"] and set(found["params"]) == {"a", "b"} and found["params"]["b"]["c"] == 0


def test_arrays_lie_in_c_order():
    transposed = np.arange(6).reshape(2, 3).T
    found = described_file.contiguous({"a": transposed, "b": np.float32(1)})
    assert found["a"].flags.c_contiguous and found["b"].shape == ()
    np.testing.assert_array_equal(found["a"], transposed)
