"""PyTorch state dicts in and out: names, layouts, strictness, old spellings, position embeddings."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxvision.core.errors import ConfigError, DataError
from jaxvision.models import torch_import, zoo
from tests.arrays import load
from tests.models import networks
from tests.models.networks import ORACLES, SMALL, assert_equal, small

# --- names and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ORACLES.glob("keys_*.txt")), ids=lambda path: path.stem[5:])
def test_names_and_shapes_are_timms(path):
    """Every full-size network exports exactly the keys and shapes that timm's checkpoint has."""
    name = path.stem[5:]
    shapes = zoo.variable_shapes(zoo.build(name, num_classes=1000), (224, 224))
    assert networks.exported_shapes(name, shapes) == networks.key_list(name)[0]


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


def test_deeplab_of_smp_before_2025():
    """The decoder was an ``nn.Sequential``, its parts numbered."""
    name, variables = small("deeplab")
    state = torch_import.export_state_dict(name, variables)
    assert {"encoder.layer1.0.conv1.weight", "decoder.aspp.convs.4.2.running_var", "decoder.aspp.project.0.weight",
            "decoder.conv.weight", "decoder.bn.bias", "segmentation_head.0.bias"} <= state.keys()  # fmt: skip
    old = {"decoder.aspp.": "decoder.0.", "decoder.conv.": "decoder.1.", "decoder.bn.": "decoder.2."}
    pattern = "|".join(map(re.escape, old))
    theirs = {re.sub(pattern, lambda match: old[match[0]], key): value for key, value in state.items()}
    assert len(theirs.keys() - state.keys()) == 6 * 5 + 5
    assert_equal(torch_import.convert(name, theirs, variables), variables)
    assert torch_import.classifier_size(name, theirs) == 5
    _, more = small("deeplab", num_classes=9)
    with pytest.raises(DataError, match=r"'segmentation_head\.0' has 5 classes, the model deeplabv3_resnet50 9"):
        torch_import.convert(name, theirs, more)


def test_a_classifiers_weights_are_deeplabs_encoder():
    name, variables = small("deeplab")
    settings = {key: value for key, value in SMALL["deeplab"][1].items() if key in ("stage_sizes", "width")}
    shapes = zoo.variable_shapes(zoo.build("resnet50", num_classes=7, **settings), (32, 32))
    classifier = jax.tree.map(lambda leaf: np.full(leaf.shape, 2.0, np.float32), shapes)
    state = torch_import.export_state_dict("resnet50", classifier)
    assert "fc.weight" in state
    made = torch_import.convert(name, state, variables, keep=("decoder", "segmentation_head"))
    for collection in ("params", "batch_stats"):
        assert all(np.all(leaf == 2) for leaf in jax.tree.leaves(made[collection]["encoder"]))
        assert_equal(made[collection]["decoder"], variables[collection]["decoder"])
    assert_equal(made["params"]["segmentation_head_0"], variables["params"]["segmentation_head_0"])
    with pytest.raises(DataError, match=r"37 missing \(segmentation_head|37 missing \(decoder"):
        torch_import.convert(name, state, variables)
    with pytest.raises(DataError, match="no classifier"):
        torch_import.classifier_size(name, state)


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
    oracle = load(ORACLES / f"pos_embed_resample_{number}.npz")
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
