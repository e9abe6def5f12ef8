"""Weight files: PyTorch's and ours, strictness, damage, malicious pickles."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.models import torch_import, weight_file
from tests.models.networks import assert_equal, small

# --- foreign files -------------------------------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def mark(*parts):
    return b"(" + b"".join(parts) + b"t"


def write_torch_file(path, tensors, wrap=()):
    """What ``torch.save`` writes for a dict of float32 tensors inside the dicts named in ``wrap``, by hand."""
    body, storages = b"", {}
    for index, (name, value) in enumerate(tensors.items()):
        storages[index] = np.ascontiguousarray(value, np.float32).tobytes()
        strides = [stride // value.itemsize for stride in np.ascontiguousarray(value).strides]
        storage = mark(text("storage"), b"ctorch\nFloatStorage\n", text(str(index)), text("cpu"), number(value.size))
        sizes, steps = mark(*map(number, value.shape)), mark(*map(number, strides))
        hooks = b"ccollections\nOrderedDict\n)R"
        arguments = mark(storage + b"Q", number(0), sizes, steps, b"\x89", hooks)
        body += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    content = b"}(" + body + b"u"
    for key in reversed(wrap):
        content = b"}(" + text(key) + content + text("epoch") + number(3) + b"u"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content + b".")
        for index, data in storages.items():
            archive.writestr(f"archive/data/{index}", data)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize(
    ("suffix", "prefix", "wrap"),
    [("pth", "", ()), ("pt", "module.", ("state_dict",)), ("ckpt", "", ("net",)), ("safetensors", "module.", ())],
)
def test_foreign_files_are_unwrapped_and_load(tmp_path, suffix, prefix, wrap):
    name, variables = small("cifar_a")
    state = {prefix + key: value for key, value in torch_import.export_state_dict(name, variables).items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(state, path, {"format": "pt"})
    else:
        write_torch_file(path, state, wrap)
    assert weight_file.read_state_dict(path).keys() == {key.removeprefix("module.") for key in state}
    assert_equal(weight_file.load_pretrained(path, name, variables), variables)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("packed", [False, True])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, packed):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = pickle.dumps({"state_dict": Attack(marker)}, protocol=2)
    if packed:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", content)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"refused|no file that torch\.save wrote"):
        weight_file.read_state_dict(path)
    with pytest.raises(DataError):
        weight_file.read_state_dict(path, skip_unknown=True)
    assert not marker.exists()
    pickle.loads(content)  # the attack is a real one: the ordinary reader runs it
    assert marker.exists()


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        weight_file.read_state_dict(tmp_path / "absent.pth")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"hello")
    with pytest.raises(DataError, match="can't be read as safetensors"):
        weight_file.read_state_dict(damaged)
    other = tmp_path / "weights.h5"
    other.write_bytes(b"")
    with pytest.raises(DataError, match=r"ends in '\.h5'"):
        weight_file.read_state_dict(other)
    write_torch_file(tmp_path / "nested.pth", {"a": np.ones(2, np.float32)}, ("teacher",))
    with pytest.raises(DataError, match="holds no state dict"):
        weight_file.read_state_dict(tmp_path / "nested.pth")


# --- our files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cifar_b", "swin"])
def test_our_files_round_trip(tmp_path, case):
    name, variables = small(case)
    path = tmp_path / "deep" / "weights.safetensors"
    weight_file.save_variables(path, variables, {"model": name, "num_classes": 5})
    assert weight_file.read_metadata(path) == {"format": "jaxvision", "model": name, "num_classes": "5"}
    assert_equal(weight_file.load_variables(path, variables), variables)
    assert_equal(weight_file.load_pretrained(path, name, variables), variables)
    assert os.listdir(path.parent) == ["weights.safetensors"]
    with pytest.raises(DataError, match=f"holds a {name}, not a resnet56"):
        weight_file.load_pretrained(path, "resnet56", variables)


def test_our_files_are_strict(tmp_path):
    name, variables = small("cifar_a")
    path = tmp_path / "weights.safetensors"
    weight_file.save_variables(path, variables, {"model": name, "num_classes": 5})
    _, more = small("cifar_a", num_classes=9)
    with pytest.raises(DataError, match=r"params/linear/bias is \(5,\) in the file, \(9,\) in the model"):
        weight_file.load_variables(path, more)
    with pytest.raises(DataError, match=r"batch_stats/bn1/mean is .* in the file, absent in the model"):
        weight_file.load_variables(path, {"params": variables["params"]})
    with pytest.raises(DataError, match=r"weights\.safetensors: .*'linear' has 5 classes"):
        weight_file.load_pretrained(path, name, more)
    bits = {"bits": '{"layer1_0/conv1/kernel": [2, null]}'}
    weight_file.save_variables(path, variables, {"model": name, "num_classes": 5, **bits})
    with pytest.raises(DataError, match=r"holds a network quantized to W2A32, .*; give float weights"):
        weight_file.load_pretrained(path, name, variables)
    save_file({"w": np.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DataError, match="no jaxvision weight file"):
        weight_file.load_variables(tmp_path / "foreign.safetensors", variables)


def test_saving_mistakes(tmp_path):
    _, variables = small("cifar_a")
    with pytest.raises(ConfigError, match="needs model and num_classes"):
        weight_file.save_variables(tmp_path / "w.safetensors", variables, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        weight_file.save_variables(tmp_path / "file" / "w.safetensors", variables, {"model": "m", "num_classes": 1})
