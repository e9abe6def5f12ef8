"""PyTorch checkpoints, written here opcode by opcode as ``torch.save`` writes them; PyTorch itself isn't needed."""

import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from jaxvision.core.errors import DataError
from jaxvision.core.safe_pickle import Placeholder
from jaxvision.core.torch_file import MAGIC, read_torch_checkpoint


class Name(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Any
    args: tuple
    state: Any = None


class Pid(NamedTuple):
    value: tuple


def dump(value: Any) -> bytes:
    """A pickle of protocol 2, with the opcodes that PyTorch's files have."""
    return b"\x80\x02" + _emit(value) + b"."


def _emit(value: Any) -> bytes:
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        build = b"" if value.state is None else _emit(value.state) + b"b"
        return _emit(value.function) + _emit(value.args) + b"R" + build
    if isinstance(value, Pid):
        return _emit(value.value) + b"Q"
    if isinstance(value, dict):
        return b"}(" + b"".join(_emit(key) + _emit(item) for key, item in value.items()) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_emit, value)) + b"e"
    return pickle.dumps(value, protocol=2)[2:-1]


KINDS = {
    "float32": "Float",
    "float64": "Double",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}
ORDERED = Call(Name("collections", "OrderedDict"), ())


def storage(key: str, numel: int, kind: str = "Float", *more: Any, module: str = "torch") -> Pid:
    return Pid(("storage", Name(module, f"{kind}Storage"), key, "cpu", numel, *more))


def tensor(memory: Any, offset: int, size: tuple, stride: tuple) -> Call:
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), (memory, offset, size, stride, False, ORDERED))


def write_zip(path: Path, value: Any, storages: dict[str, np.ndarray], order: str = "little", **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("weights/data.pkl", dump(value))
        archive.writestr("weights/byteorder", order)
        for key, array in storages.items():
            archive.writestr(f"weights/data/{key}", array.tobytes())
        archive.writestr("weights/version", "3\n")
        archive.writestr("weights/.data/serialization_id", "0" * 40)
    return path


def write_legacy(path: Path, value: Any, storages: dict[str, np.ndarray], little: bool = True) -> Path:
    head = [MAGIC, 1001, {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}]
    content = b"".join(pickle.dumps(item, protocol=2) for item in head)
    content += dump(value) + dump(sorted(storages))
    for key in sorted(storages):
        content += struct.pack("<q" if little else ">q", storages[key].size) + storages[key].tobytes()
    path.write_bytes(content)
    return path


WRITERS = {"zip": write_zip, "legacy": write_legacy}
both_formats = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
BASE = np.arange(24, dtype=np.float32)


@both_formats
@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype(write, dtype, tmp_path):
    data = np.array([0, 1, 1, 0, 1, 0]).astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    value = {"w": tensor(storage("0", 6, KINDS[dtype]), 0, (2, 3), (3, 1)), "kind": Name("torch", dtype)}
    found = read_torch_checkpoint(write(tmp_path / "w.pth", value, {"0": data}))
    np.testing.assert_array_equal(found["w"], data.reshape(2, 3))
    assert found["w"].dtype == data.dtype == found["kind"]


@both_formats
def test_views_of_one_storage(write, tmp_path):
    """A transpose, a slice, a strided slice, an expanded row, a scalar, an empty tensor: each as PyTorch sees it."""
    memory = storage("7", 24)
    value = {
        "transposed": tensor(memory, 0, (6, 4), (1, 6)),
        "slice": tensor(memory, 8, (2, 4), (6, 1)),
        "strided": tensor(memory, 1, (3, 2, 2), (2, 12, 6)),
        "expanded": tensor(memory, 3, (5, 2), (0, 1)),
        "scalar": tensor(memory, 23, (), ()),
        "empty": tensor(memory, 24, (0, 4), (4, 1)),
    }
    found = read_torch_checkpoint(write(tmp_path / "w.pth", value, {"7": BASE}))
    np.testing.assert_array_equal(found["transposed"], BASE.reshape(4, 6).T)
    np.testing.assert_array_equal(found["slice"], BASE.reshape(4, 6)[1:3, 2:])
    expected = [[[1 + 2 * i + 12 * j + 6 * k for k in range(2)] for j in range(2)] for i in range(3)]
    np.testing.assert_array_equal(found["strided"], expected)
    np.testing.assert_array_equal(found["expanded"], [[3, 4]] * 5)
    assert found["scalar"].shape == () and found["scalar"] == 23 and found["empty"].shape == (0, 4)
    assert np.shares_memory(found["transposed"], found["slice"])
    with pytest.raises(ValueError, match="read-only"):
        found["slice"][:] = 0


@both_formats
def test_containers_and_parameters(write, tmp_path):
    weight = tensor(storage("0", 24), 0, (24,), (1,))
    parameter = Call(Name("torch._utils", "_rebuild_parameter"), (weight, True, ORDERED))
    state = Call(Name("collections", "OrderedDict"), (), {"_metadata": ORDERED})
    value = {
        "model": {"fc.weight": parameter, "meta": state},
        "epoch": 3,
        "best": 0.75,
        "betas": (0.9, 0.999),
        "groups": [{"lr": 0.1, "params": [0, 1], "flag": True, "none": None}],
        "size": Call(Name("torch", "Size"), ([2, 3],)),
        "device": Call(Name("torch", "device"), ("cuda", 0)),
        "milestones": Call(Name("collections", "Counter"), ({30: 1},)),
        "cuda": tensor(storage("1", 2, "Half", module="torch.cuda"), 0, (2,), (1,)),
    }
    found = read_torch_checkpoint(write(tmp_path / "w.pth", value, {"0": BASE, "1": np.ones(2, np.float16)}))
    np.testing.assert_array_equal(found["model"].pop("fc.weight"), BASE)
    np.testing.assert_array_equal(found.pop("cuda"), np.ones(2, np.float16))
    assert found == {
        "model": {"meta": {}},
        "epoch": 3,
        "best": 0.75,
        "betas": (0.9, 0.999),
        "groups": [{"lr": 0.1, "params": [0, 1], "flag": True, "none": None}],
        "size": (2, 3),
        "device": "cuda:0",
        "milestones": {30: 1},
    }


def test_untyped_storage_of_float8(tmp_path):
    data = np.arange(4).astype(ml_dtypes.float8_e4m3fn)
    memory = storage("0", 4, "Untyped", module="torch.storage")
    call = Call(
        Name("torch._utils", "_rebuild_tensor_v3"),
        (memory, 1, (3,), (1,), False, ORDERED, Name("torch", "float8_e4m3fn")),
    )
    found = read_torch_checkpoint(write_zip(tmp_path / "w.pth", {"w": call}, {"0": data}))
    np.testing.assert_array_equal(found["w"].astype(np.float32), [1, 2, 3])


def test_big_endian_machines(tmp_path):
    value = {"w": tensor(storage("0", 24), 0, (24,), (1,))}
    swapped = {"0": BASE.byteswap()}
    for path in (
        write_zip(tmp_path / "zip.pth", value, swapped, order="big"),
        write_legacy(tmp_path / "legacy.pth", value, swapped, little=False),
    ):
        np.testing.assert_array_equal(read_torch_checkpoint(path)["w"], BASE)


def test_legacy_storage_view(tmp_path):
    """Before PyTorch 0.4 a storage could be a part of another."""
    value = {"w": tensor(storage("0", 24, "Float", ("0view", 4, 6)), 1, (5,), (1,))}
    found = read_torch_checkpoint(write_legacy(tmp_path / "w.pth", value, {"0": BASE}))
    np.testing.assert_array_equal(found["w"], [5, 6, 7, 8, 9])


@both_formats
def test_unknown_names_are_refused_or_skipped(write, tmp_path):
    weight = tensor(storage("0", 24), 0, (24,), (1,))
    args = Call(Name("argparse", "Namespace"), (), {"lr": 0.1})
    path = write(tmp_path / "w.pth", {"model": {"w": weight}, "args": args}, {"0": BASE})
    with pytest.raises(DataError, match=r"w\.pth asks to run argparse\.Namespace; refused"):
        read_torch_checkpoint(path)
    found = read_torch_checkpoint(path, skip_unknown=True)
    np.testing.assert_array_equal(found["model"]["w"], BASE)
    assert isinstance(found["args"], Placeholder)
    assert (found["args"].name, found["args"].state) == ("argparse.Namespace", {"lr": 0.1})


@both_formats
@pytest.mark.parametrize("where", ["value", "size", "storage type", "parameter", "key"])
def test_code_is_never_run(write, where, tmp_path):
    mark = tmp_path / "ran"
    attack = Call(Name("os", "system"), (f"touch '{mark}'",))
    weight = tensor(storage("0", 24), 0, (24,), (1,))
    value = {
        "value": {"a": attack, "w": weight},
        "size": {"w": tensor(storage("0", 24), 0, attack, (1,))},
        "storage type": {"w": tensor(Pid(("storage", attack, "0", "cpu", 24)), 0, (24,), (1,))},
        "parameter": {"w": Call(Name("torch._utils", "_rebuild_parameter"), (attack, True, ORDERED)), "v": weight},
        "key": {"w": weight, attack: 1},
    }[where]
    path = write(tmp_path / "w.pth", value, {"0": BASE})
    with pytest.raises(DataError, match=r"asks to run os\.system; refused"):
        read_torch_checkpoint(path)
    if where in ("value", "parameter"):
        found = read_torch_checkpoint(path, skip_unknown=True)
        assert any(isinstance(item, Placeholder) for item in found.values())
    assert not mark.exists()
    pickle.loads(dump(attack))
    assert mark.exists()  # the attack is a real one


def test_pickled_network_says_what_to_save(tmp_path):
    net = Call(Name("torch.nn.modules.linear", "Linear"), (), {"training": True})
    path = write_zip(tmp_path / "w.pth", net, {})
    with pytest.raises(DataError, match=r"asks to run torch\.nn\.modules\.linear\.Linear; refused"):
        read_torch_checkpoint(path)
    with pytest.raises(DataError, match=r"holds a torch\.nn\.modules\.linear\.Linear.*save model\.state_dict\(\)"):
        read_torch_checkpoint(path, skip_unknown=True)


@both_formats
@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((25,), (1,), 0), ((24,), (1,), 1), ((2, 13), (12, 1), 0), ((3,), (-1,), 2), ((3,), (1,), -1), ((2,), (1, 1), 0)],
)
def test_tensors_outside_their_storage(write, size, stride, offset, tmp_path):
    path = write(tmp_path / "w.pth", {"w": tensor(storage("0", 24), offset, size, stride)}, {"0": BASE})
    with pytest.raises(DataError, match=r"outside its storage|wrong size or stride"):
        read_torch_checkpoint(path)


@both_formats
@pytest.mark.parametrize(
    "value",
    [
        {"w": tensor(storage("0", 24), 0, (1 << 40,), (0,))},
        {"w": tensor(storage("0", 24), 0, (1 << 62, 1 << 62), (0, 0))},
        {"w": tensor(storage("0", 24), 0, (1 << 62, 0, 1 << 62), (0, 0, 0))},
        {"w": tensor(storage("0", 1 << 50), 0, (1 << 50,), (1,))},
    ],
)
def test_huge_claims_allocate_little(write, value, tmp_path):
    path = write(tmp_path / "w.pth", value, {"0": BASE})
    tracemalloc.start()
    with pytest.raises(DataError):
        read_torch_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_zip_that_unfolds_is_refused(tmp_path):
    value = {"w": tensor(storage("0", 10**6), 0, (10**6,), (1,))}
    packed = write_zip(tmp_path / "w.pth", value, {"0": np.zeros(10**6, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 10_000
    with pytest.raises(DataError, match="was packed again"):
        read_torch_checkpoint(packed)


@both_formats
def test_storage_of_another_type_or_size(write, tmp_path):
    value = {"a": tensor(storage("0", 24), 0, (1,), (1,)), "b": tensor(storage("0", 24, "Double"), 0, (1,), (1,))}
    with pytest.raises(DataError, match=r"a storage of|a storage holds"):
        read_torch_checkpoint(write(tmp_path / "w.pth", value, {"0": BASE}))
    value = {"a": tensor(storage("0", 25), 0, (1,), (1,))}
    with pytest.raises(DataError, match=r"a storage of|a storage holds"):
        read_torch_checkpoint(write(tmp_path / "w.pth", value, {"0": BASE}))


def test_missing_storage(tmp_path):
    value = {"a": tensor(storage("9", 24), 0, (24,), (1,))}
    with pytest.raises(DataError, match="the storage 9 is missing"):
        read_torch_checkpoint(write_zip(tmp_path / "w.pth", value, {"0": BASE}))
    with pytest.raises(DataError, match="don't match"):
        read_torch_checkpoint(write_legacy(tmp_path / "w.pth", value, {"0": BASE}))


@both_formats
def test_damage_ends_in_a_clear_error(write, tmp_path):
    """Cut anywhere: refused. A changed byte: refused, or (the older format has no checksum) another number."""
    whole = write(tmp_path / "w.pth", {"w": tensor(storage("0", 24), 0, (4, 6), (6, 1)), "n": 3}, {"0": BASE})
    content = whole.read_bytes()
    path = tmp_path / "damaged.pth"
    for end in range(0, len(content), 5):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"damaged\.pth"):
            read_torch_checkpoint(path)
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] ^= int(draw.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_torch_checkpoint(path, skip_unknown=True)
        except DataError:
            refused += 1
    assert refused > 100


def test_other_files(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(DataError, match=r"w\.pth can't be read: No such file"):
        read_torch_checkpoint(path)
    for content in (b"", b"<html>404</html>", np.random.default_rng(0).bytes(1000)):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"w\.pth can't be read"):
            read_torch_checkpoint(path)
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(DataError, match=r"no file that torch\.save wrote"):
        read_torch_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/cat.jpg", b"")
    with pytest.raises(DataError, match=r"without one data\.pkl"):
        read_torch_checkpoint(path)
    with pytest.raises(DataError, match="holds a list"):
        read_torch_checkpoint(write_zip(path, [1, 2], {}))
