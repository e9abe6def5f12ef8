"""Weights in and out: names, layouts, strictness, old spellings, position embeddings, files, malicious pickles."""

import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxvision.core import trees
from jaxvision.core.errors import ConfigError, DataError
from jaxvision.models import torch_import, zoo

ORACLES = Path(__file__).parents[1] / "oracles" / "vit_models"

# Small members of every family: zoo name, settings, image size.
SMALL = {
    "cifar_a": ("resnet20", {"depth": 8, "width_multiplier": 0.25}, 8),
    "cifar_b": ("resnet20", {"depth": 8, "width_multiplier": 0.25, "shortcut": "B"}, 8),
    "resnet": ("resnet50", {"stage_sizes": (1, 2, 1, 1), "width": 2}, 32),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "width": 8, "depth": 2, "num_heads": 2}, 32),
    "deit": ("deit_tiny_distilled_patch16_224", {"patch_size": 8, "width": 8, "depth": 1, "num_heads": 2}, 32),
    "swin": ("swin_tiny_patch4_window7_224",
             {"width": 4, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window": 4}, 32),
}  # fmt: skip


def small(case, num_classes=5):
    """Name, and variables with distinct random values."""
    name, settings, size = SMALL[case]
    shapes = zoo.variable_shapes(zoo.build(name, num_classes=num_classes, **settings), (size, size))
    rng = np.random.default_rng(0)
    return name, jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def assert_equal(one, other):
    one, other = trees.named_leaves(one), trees.named_leaves(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- names and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ORACLES.glob("keys_*.txt")), ids=lambda path: path.stem[5:])
def test_names_and_shapes_are_timms(path):
    """Every full-size network exports exactly the keys and shapes that timm's checkpoint has."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#")]
    expected = {name: tuple(int(n) for n in shape.split(",")) for name, shape in rows}
    name = path.stem[5:]
    shapes = zoo.variable_shapes(zoo.build(name, num_classes=1000), (224, 224))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), shapes)
    assert {key: value.shape for key, value in torch_import.export_state_dict(name, zeros).items()} == expected


def test_there_are_key_lists_of_every_transformer_family():
    names = {path.stem[5:].split("_")[0] for path in ORACLES.glob("keys_*.txt")}
    assert names == {"vit", "deit", "swin"}


def test_resnet_names_are_torchvisions():
    name, variables = small("resnet")
    state = torch_import.export_state_dict(name, variables)
    for key, shape in {
        "conv1.weight": (2, 3, 7, 7),
        "bn1.running_mean": (2,),
        "layer1.0.conv3.weight": (8, 2, 1, 1),
        "layer1.0.downsample.0.weight": (8, 2, 1, 1),
        "layer1.0.downsample.1.running_var": (8,),
        "layer2.1.bn3.bias": (16,),
        "fc.weight": (5, 64),
        "fc.bias": (5,),
    }.items():
        assert state[key].shape == shape
    assert not any("kernel" in key or "scale" in key or "_0" in key for key in state)


def test_layouts_are_transposed_axis_by_axis():
    name, variables = small("cifar_b")
    state = torch_import.export_state_dict(name, variables)
    kernel = variables["params"]["layer2_0"]["conv1"]["kernel"]
    for o, i, y, x in [(0, 1, 2, 0), (3, 0, 1, 2), (7, 3, 0, 1)]:
        assert state["layer2.0.conv1.weight"][o, i, y, x] == kernel[y, x, i, o]
    assert state["linear.weight"][4, 2] == variables["params"]["linear"]["kernel"][2, 4]
    assert state["layer2.0.shortcut.0.weight"].shape == (8, 4, 1, 1)
    np.testing.assert_array_equal(state["bn1.running_var"], variables["batch_stats"]["bn1"]["var"])


@pytest.mark.parametrize("case", SMALL)
def test_round_trip(case):
    name, variables = small(case)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    state = torch_import.export_state_dict(name, variables)
    assert all(value.flags.c_contiguous for value in state.values())
    state["bn1.num_batches_tracked"] = np.int64(3)
    assert_equal(torch_import.convert(name, state, shapes), variables)


def test_half_precision_becomes_the_templates_dtype():
    name, variables = small("cifar_a")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        state = {key: value.astype(dtype) for key, value in torch_import.export_state_dict(name, variables).items()}
        expected = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype).astype(np.float32), variables)
        assert_equal(torch_import.convert(name, state, variables), expected)


# --- older spellings -----------------------------------------------------------------------------------------------


def test_old_swin_checkpoints():
    """Patch merging at the end of a stage, ``head`` instead of ``head.fc``, buffers among the weights."""
    name, variables = small("swin")
    old = {}
    for key, value in torch_import.export_state_dict(name, variables).items():
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
    assert "layers.0.downsample.reduction.weight" in old and "head.weight" in old
    old["layers.1.blocks.1.attn_mask"] = np.zeros((4, 16, 16), np.float32)
    old["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    assert_equal(torch_import.convert(name, old, variables), variables)
    assert torch_import.classifier_size(name, old) == 5


def test_sister_spellings_of_resnets():
    name, variables = small("resnet")
    state = torch_import.export_state_dict(name, variables)
    theirs = {key.replace("downsample", "shortcut").replace("fc.", "linear."): v for key, v in state.items()}
    assert theirs.keys() != state.keys()
    assert_equal(torch_import.convert(name, theirs, variables), variables)
    with pytest.raises(DataError, match=r"'fc\.weight' twice"):
        torch_import.convert(name, {**state, "linear.weight": state["fc.weight"]}, variables)


# --- strictness ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_listed():
    name, variables = small("cifar_a")
    state = torch_import.export_state_dict(name, variables)
    del state["bn1.running_var"], state["layer3.0.conv2.weight"]
    state["extra.weight"] = np.zeros(3, np.float32)
    state["layer1.0.conv1.weight"] = np.zeros((4, 4, 5, 5), np.float32)
    with pytest.raises(DataError) as caught:
        torch_import.convert(name, state, variables)
    message = str(caught.value)
    assert "2 missing" in message and "bn1.running_var" in message and "layer3.0.conv2.weight" in message
    assert "1 unexpected (extra.weight)" in message
    assert "1 of another shape (layer1.0.conv1.weight (5, 5, 4, 4) for (3, 3, 4, 4))" in message


def test_a_matrix_in_the_wrong_layout_is_refused():
    name, variables = small("vit")
    state = torch_import.export_state_dict(name, variables)
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].T
    with pytest.raises(DataError, match=r"1 of another shape \(blocks\.0\.mlp\.fc1\.weight"):
        torch_import.convert(name, state, variables)


@pytest.mark.parametrize(("case", "module"), [("cifar_a", "linear"), ("resnet", "fc"), ("swin", "head.fc")])
def test_another_number_of_classes_has_its_own_hint(case, module):
    name, variables = small(case)
    state = torch_import.export_state_dict(name, variables)
    assert torch_import.classifier_size(name, state) == 5
    _, more = small(case, num_classes=9)
    with pytest.raises(DataError, match=f"'{module}' has 5 classes, the model {name} 9: set num_classes=5, or"):
        torch_import.convert(name, state, more)
    kept = torch_import.convert(name, state, more, keep=(module,))
    head = module.split(".")[0]
    assert_equal(kept["params"][head], more["params"][head])
    rest = {key: value for key, value in kept["params"].items() if key != head}
    assert_equal(rest, {key: value for key, value in variables["params"].items() if key != head})


def test_keep_and_drop_are_checked():
    name, variables = small("cifar_a")
    state = torch_import.export_state_dict(name, variables)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    with pytest.raises(ConfigError, match=r"linear\.\w+ is to be kept, but the template has only its shape"):
        torch_import.convert(name, state, shapes, keep=("linear",))
    with pytest.raises(ConfigError, match="keep names 'lin', but resnet20 has no such"):
        torch_import.convert(name, state, variables, keep=("lin",))
    with pytest.raises(ConfigError, match="drop names 'teacher', but the checkpoint has no such"):
        torch_import.convert(name, state, variables, drop=("teacher",))
    more = {**state, "teacher.w": np.zeros(2, np.float32)}
    assert_equal(torch_import.convert(name, more, variables, drop=("teacher",)), variables)
    with pytest.raises(DataError, match=r"1 missing \(bn1.weight\)"):
        torch_import.convert(name, state, variables, drop=("bn1.weight",))
    with pytest.raises(DataError, match="no classifier"):
        torch_import.classifier_size(name, {"conv1.weight": state["conv1.weight"]})


# --- position embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_position_embedding_resize_is_timms(number):
    oracle = np.load(ORACLES / f"pos_embed_resample_{number}.npz")
    old, new = (tuple(int(n) for n in oracle[key]) for key in ("old_grid", "new_grid"))
    resized = torch_import.resize_pos_embed(oracle["pos_embed"], old, new, int(oracle["num_prefix"]))
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, oracle["expected"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", ["vit", "deit"])
def test_position_embedding_of_another_resolution_is_resized(case):
    name, variables = small(case)
    _, settings, _ = SMALL[case]
    prefix = 2 if case == "deit" else 1
    model = zoo.build(name, num_classes=5, **settings)
    larger = torch_import.convert(
        name, torch_import.export_state_dict(name, variables), zoo.variable_shapes(model, (48, 48))
    )
    source = variables["params"]["pos_embed"]
    assert larger["params"]["pos_embed"].shape == (1, prefix + 36, 8)
    np.testing.assert_array_equal(
        larger["params"]["pos_embed"], torch_import.resize_pos_embed(source, (4, 4), (6, 6), prefix)
    )
    np.testing.assert_array_equal(larger["params"]["pos_embed"][:, :prefix], source[:, :prefix])


def test_position_embedding_needs_a_grid_that_is_no_square():
    name, variables = small("vit")
    state = torch_import.export_state_dict(name, variables)
    template = zoo.variable_shapes(zoo.build(name, num_classes=5, **SMALL["vit"][1]), (24, 40))
    with pytest.raises(DataError, match="15 patches is no square"):
        torch_import.convert(name, state, template)
    made = torch_import.convert(name, state, template, grid=(3, 5))
    expected = torch_import.resize_pos_embed(state["pos_embed"], (4, 4), (3, 5), 1)
    np.testing.assert_array_equal(made["params"]["pos_embed"], expected)


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
    assert torch_import.read_state_dict(path).keys() == {key.removeprefix("module.") for key in state}
    assert_equal(torch_import.load_pretrained(path, name, variables), variables)


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
        torch_import.read_state_dict(path)
    with pytest.raises(DataError):
        torch_import.read_state_dict(path, skip_unknown=True)
    assert not marker.exists()
    pickle.loads(content)  # the attack is a real one: the ordinary reader runs it
    assert marker.exists()


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        torch_import.read_state_dict(tmp_path / "absent.pth")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"hello")
    with pytest.raises(DataError, match="can't be read as safetensors"):
        torch_import.read_state_dict(damaged)
    other = tmp_path / "weights.h5"
    other.write_bytes(b"")
    with pytest.raises(DataError, match=r"ends in '\.h5'"):
        torch_import.read_state_dict(other)
    write_torch_file(tmp_path / "nested.pth", {"a": np.ones(2, np.float32)}, ("teacher",))
    with pytest.raises(DataError, match="holds no state dict"):
        torch_import.read_state_dict(tmp_path / "nested.pth")


# --- our files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["cifar_b", "swin"])
def test_our_files_round_trip(tmp_path, case):
    name, variables = small(case)
    path = tmp_path / "deep" / "weights.safetensors"
    torch_import.save_variables(path, variables, {"model": name, "num_classes": 5})
    assert torch_import.read_metadata(path) == {"format": "jaxvision", "model": name, "num_classes": "5"}
    assert_equal(torch_import.load_variables(path, variables), variables)
    assert_equal(torch_import.load_pretrained(path, name, variables), variables)
    assert os.listdir(path.parent) == ["weights.safetensors"]
    with pytest.raises(DataError, match=f"holds a {name}, not a resnet56"):
        torch_import.load_pretrained(path, "resnet56", variables)


def test_our_files_are_strict(tmp_path):
    name, variables = small("cifar_a")
    path = tmp_path / "weights.safetensors"
    torch_import.save_variables(path, variables, {"model": name, "num_classes": 5})
    _, more = small("cifar_a", num_classes=9)
    with pytest.raises(DataError, match=r"params/linear/bias is \(5,\) in the file, \(9,\) in the model"):
        torch_import.load_variables(path, more)
    with pytest.raises(DataError, match=r"batch_stats/bn1/mean is .* in the file, absent in the model"):
        torch_import.load_variables(path, {"params": variables["params"]})
    with pytest.raises(DataError, match=r"weights\.safetensors: .*'linear' has 5 classes"):
        torch_import.load_pretrained(path, name, more)
    save_file({"w": np.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DataError, match="no jaxvision weight file"):
        torch_import.load_variables(tmp_path / "foreign.safetensors", variables)


def test_saving_mistakes(tmp_path):
    _, variables = small("cifar_a")
    with pytest.raises(ConfigError, match="needs model and num_classes"):
        torch_import.save_variables(tmp_path / "w.safetensors", variables, {})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        torch_import.save_variables(tmp_path / "file" / "w.safetensors", variables, {"model": "m", "num_classes": 1})
