"""The command, end to end on a ResNet-20 of random weights whose predictions NumPy works out."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxvision.tools import calibration, import_weights
from tests.arrays import load

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def random_state(seed=0):
    """A state dict as PyTorch names it: layers of ResNet-20 with random weights."""
    rng = np.random.default_rng(seed)
    state = {}

    def conv(name, outputs, inputs):
        state[f"{name}.weight"] = rng.standard_normal((outputs, inputs, 3, 3)) * (2 / (9 * inputs)) ** 0.5

    def norm(name, size):
        state[f"{name}.weight"] = rng.uniform(0.5, 1, size)
        state[f"{name}.bias"] = 0.2 * rng.standard_normal(size)
        state[f"{name}.running_mean"] = 0.2 * rng.standard_normal(size)
        state[f"{name}.running_var"] = rng.uniform(0.5, 2, size)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", 16, 3)
    norm("bn1", 16)
    inputs = 16
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            for layer in (1, 2):
                conv(f"layer{stage}.{block}.conv{layer}", width, inputs if layer == 1 else width)
                norm(f"layer{stage}.{block}.bn{layer}", width)
            inputs = width
    state["linear.weight"] = rng.standard_normal((10, 64))
    state["linear.bias"] = rng.standard_normal(10)
    return {key: value if value.ndim == 0 else value.astype(np.float32) for key, value in state.items()}


def reference(state, x):
    """akamaster's ResNet-20 in evaluation mode, float64, NCHW."""

    def conv(x, name, stride=1):
        kernel = state[f"{name}.weight"].astype(np.float64)
        x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))[:, :, ::stride, ::stride]
        return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

    def norm(x, name):
        scale, bias, mean, var = (
            state[f"{name}.{key}"].astype(np.float64)[:, None, None]
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(norm(conv(x, "conv1"), "bn1"), 0)
    for stage in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = np.maximum(norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1"), 0)
            y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = np.pad(x[:, :, ::2, ::2], ((0, 0), (quarter, quarter), (0, 0), (0, 0)))
            x = np.maximum(x + y, 0)
    return x.mean((2, 3)) @ state["linear.weight"].T.astype(np.float64) + state["linear.bias"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(random_state(), path)
    return path


def call(capsys, *arguments):
    """Exit code, stdout, stderr."""
    code = import_weights.main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_check_images_and_file(tmp_path, capsys, weights):
    """Top-1 and the logits' sum are the reference's, over more images than one batch holds."""
    state = load_file(weights)
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), np.uint8)
    predicted = np.argmax(reference(state, ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)), 1)
    labels = np.tile(predicted, 25)  # 150 images
    labels[::7] = (labels[::7] + 1) % 10
    right = int(np.sum(labels == np.tile(predicted, 25)))
    np.savez(tmp_path / "images.npz", image=np.tile(images, (25, 1, 1, 1)), label=labels.astype(np.uint8))

    converted = tmp_path / "out.safetensors"
    code, out, _ = call(capsys, "--from", weights, "--model", "resnet20", "--check", "--to", converted,
                        "--images", tmp_path / "images.npz")  # fmt: skip
    assert code == 0
    assert "resnet20: 269,722 parameters, 10 classes" in out
    assert "dropped keys: bn1.num_batches_tracked, " in out
    assert f"top-1: {right} of 150 right" in out and 100 < right < 150
    fixed = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    logits = reference(state, fixed.transpose(0, 3, 1, 2).astype(np.float64))
    printed = re.search(r"finite, sum (\S+), mean magnitude (\S+)", out)
    np.testing.assert_allclose(float(printed[1]), logits.sum(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(float(printed[2]), np.abs(logits).mean(), rtol=1e-3)

    code, again, _ = call(capsys, "--from", converted, "--model", "resnet20", "--images", tmp_path / "images.npz")
    assert code == 0 and f"top-1: {right} of 150 right" in again


def test_logits_for_the_calibration_tool(tmp_path, capsys, weights):
    state = load_file(weights)
    images = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "images.npz", image=images, label=np.arange(6, dtype=np.uint8))
    out = tmp_path / "logits.npz"
    images_flag = ("--images", tmp_path / "images.npz")
    code, printed, _ = call(capsys, "--from", weights, "--model", "resnet20", *images_flag, "--logits", out)
    assert code == 0 and f"wrote {out}" in printed
    expected = reference(state, ((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(load(out)["logits"], expected, rtol=1e-3, atol=1e-3)
    assert calibration.main([str(out), "--to", str(tmp_path / "report"), "--bins", "3", "--simulations", "0"]) == 0
    numbers = json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert numbers["as given"]["metrics"]["accuracy"]["value"] == np.mean(expected.argmax(-1) == np.arange(6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet20"), "nothing to do"),
        (("--model", "resnet_20", "--check"), "did you mean 'resnet20'"),
        (("--model", "resnet32", "--check"), "does not fit resnet32: 60 missing"),
        (("--model", "resnet20", "--num_classes", "100", "--check"), "has 10 classes, the model resnet20 100"),
        (("--model", "resnet20", "--to", "x.pth"), "must end in .safetensors"),
        (("--model", "resnet20", "--check", "--drop", "teacher"), "drop names 'teacher'"),
        (("--check",), "--model"),
        (("--model", "resnet20", "--check", "--num_classes", "ten"), "invalid int value"),
        (("--model", "resnet20", "--images", "absent.npz"), "absent.npz can't be read"),
        (("--model", "resnet20", "--to", "x.safetensors", "--beside_timm"), "what --check computes: give both"),
        (("--model", "resnet20", "--check", "--logits", "x.npz"), "--logits x.npz needs --images FILE.npz"),
        (("--model", "resnet20", "--images", "x.npz", "--logits", "x.pt"), "--logits x.pt must end in .npz"),
        (("--model", "deeplabv3_resnet50", "--images", "x.npz"), "deeplabv3_resnet50 labels their pixels"),
    ],
)
def test_mistakes_are_one_line_and_exit_64(capsys, weights, arguments, message):
    code, _, err = call(capsys, "--from", weights, *arguments)
    assert code == 64
    assert message in err
    assert err.startswith("import_weights: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": np.zeros((2, 28, 28, 3), np.uint8), "label": np.zeros(2, int)}, "(N, 32, 32, 3)"),
        ({"image": np.zeros((2, 32, 32, 3), np.float32), "label": np.zeros(2, int)}, "image` is float32"),
        ({"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.zeros(3, int)}, "label` is int64 (3,)"),
        ({"image": np.zeros((2, 32, 32, 3), np.uint8)}, "label is not a file in the archive"),
    ],
)
def test_image_files_that_do_not_fit(tmp_path, capsys, weights, arrays, message):
    np.savez(tmp_path / "images.npz", **arrays)
    code, _, err = call(capsys, "--from", weights, "--model", "resnet20", "--images", tmp_path / "images.npz")
    assert code == 64 and message in err and err.count("\n") == 1


def test_weights_that_are_not_finite(tmp_path, capsys):
    state = random_state()
    state["linear.bias"][3] = np.nan
    save_file(state, tmp_path / "nan.safetensors")
    code, _, err = call(capsys, "--from", tmp_path / "nan.safetensors", "--model", "resnet20", "--check")
    assert code == 64 and "not finite" in err


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("options", [(), ("--skip_unknown",)])
def test_a_malicious_pickle_is_refused(tmp_path, capsys, options):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"state_dict": Attack(marker)}))
    code, _, err = call(capsys, "--from", path, "--model", "resnet20", "--check", *options)
    assert code == 64 and err.count("\n") == 1
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_timms_weights_give_timms_logits(tmp_path, capsys):
    """PyTorch and timm (the extra ``bench``) are no dependency of the tests."""
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    module = timm.create_model(name, pretrained=False, num_classes=7)
    save_file({key: value.numpy() for key, value in module.state_dict().items()}, tmp_path / "vit.safetensors")
    options = ("--from", tmp_path / "vit.safetensors", "--model", name, "--check", "--beside_timm")
    code, out, _ = call(capsys, *options)
    assert code == 0
    assert float(re.search(r"largest difference to timm (\S+),", out)[1]) < 1e-5
    assert re.search(r"^timm .*-?\d\.\d{5}", out, re.MULTILINE)
