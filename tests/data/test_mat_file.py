"""The MATLAB reader beside SciPy's, which it stands in for because that one crashes on damaged files."""

import struct
import zlib

import numpy as np
import pytest
from scipy.io import savemat

from jaxvision.core.errors import DataError
from jaxvision.data.mat_file import read_mat, read_structs

ARRAYS = {
    "X": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "labels_of": np.array([[1.5], [-2.0]]),
    "small": np.array([[7, 8, 9]], np.int16),
    "wide": np.arange(6, dtype=np.uint64).reshape(2, 3) << 40,
}


@pytest.mark.parametrize("compressed", [False, True])
def test_arrays_are_those_that_were_saved(compressed, tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {**ARRAYS, "text": "skipped", "cells": np.array([1, "a"], object)}, do_compression=compressed)
    found = read_mat(path, tuple(ARRAYS))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert read_mat(path, ("X",)).keys() == {"X"} and not read_mat(path, ("nothing",))


STRUCTS = np.array(
    [(3, "n03", np.eye(2)), (1001, "höhe", "x")], [("ID", object), ("WNID", object), ("more", object)]
).reshape(-1, 1)


@pytest.mark.parametrize("compressed", [False, True])
def test_structs_of_numbers_and_text(compressed, tmp_path):
    path = tmp_path / "a.mat"
    empty = np.array([(np.zeros((0, 0)), {"a": 1})], [("none", object), ("inner", object)])
    savemat(path, {"before": np.eye(3), "synsets": STRUCTS, "empty": empty}, do_compression=compressed)
    first, second = read_structs(path.read_bytes(), "a.mat", "synsets")
    assert first["ID"].item() == 3 and second["ID"].item() == 1001
    assert (first["WNID"], second["WNID"], second["more"]) == ("n03", "höhe", "x")
    np.testing.assert_array_equal(first["more"], np.eye(2))
    (only,) = read_structs(path.read_bytes(), "a.mat", "empty")
    assert only.keys() == {"none"} and not only["none"].size
    assert read_structs(path.read_bytes(), "a.mat", "nothing") is None
    with pytest.raises(DataError, match="'before' is no array of structs"):
        read_structs(path.read_bytes(), "a.mat", "before")


def test_damage_of_structs_ends_in_an_error_that_names_the_file_or_in_other_values(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"synsets": STRUCTS[:1]}, do_compression=False)
    content = path.read_bytes()
    for length in range(129, len(content)):
        with pytest.raises(DataError, match="a file is cut short or damaged"):
            read_structs(content[:length], "a file", "synsets")
    for position in range(128, len(content)):
        changed = content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :]
        try:
            read_structs(changed, "a file", "synsets")
        except DataError as error:
            assert str(error).startswith("a file is")


def element(kind, data, order):
    return struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_doubles_that_matlab_stores_in_fewer_bytes(order, tmp_path):
    """MATLAB writes whole-numbered doubles as bytes; and either byte order."""
    parts = [
        element(6, struct.pack(f"{order}II", 6, 0), order),
        element(5, struct.pack(f"{order}ii", 2, 3), order),
        element(1, b"y_of_it", order),
        element(2, bytes([1, 2, 3, 4, 5, 10]), order),
    ]
    matrix = element(14, b"".join(parts), order)
    head = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(f"{order}H", 0x0100) + (b"IM" if order == "<" else b"MI")
    (tmp_path / "a.mat").write_bytes(head + matrix)
    packed = zlib.compress(matrix)
    (tmp_path / "b.mat").write_bytes(head + struct.pack(f"{order}II", 15, len(packed)) + packed)
    for name in "ab":
        found = read_mat(tmp_path / f"{name}.mat", ("y_of_it",))["y_of_it"]
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, [[1, 3, 5], [2, 4, 10]])


def test_damage_never_gets_past_as_something_else(tmp_path):
    """Cut anywhere, or with a byte changed in a compressed file: an error that names the file, or the same arrays."""
    path = tmp_path / "a.mat"
    savemat(path, {"X": ARRAYS["X"]}, do_compression=True)
    content = path.read_bytes()
    for length in range(128, len(content)):
        path.write_bytes(content[:length])
        if length == 128:
            assert not read_mat(path, ("X",))
            continue
        with pytest.raises(DataError, match=r"a\.mat is cut short or damaged"):
            read_mat(path, ("X",))
    for position in range(128, len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x55]) + content[position + 1 :])
        try:
            found = read_mat(path, ("X",))
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert not found or np.array_equal(found["X"], ARRAYS["X"])


def test_values_that_are_no_real_numbers(tmp_path):
    savemat(tmp_path / "a.mat", {"X": np.array([[1 + 2j]])})
    with pytest.raises(DataError, match="'X' is no array of real numbers"):
        read_mat(tmp_path / "a.mat", ("X",))
    with pytest.raises(DataError, match="can't be read: No such file"):
        read_mat(tmp_path / "b.mat", ("X",))
