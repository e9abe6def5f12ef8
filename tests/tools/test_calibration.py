"""The calibration command: formats, validation splits, what it writes, and one sentence for every mistake."""

import json
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxvision.benchmarks import calibration_metrics
from jaxvision.metrics.calibration_rows import Rows
from jaxvision.metrics.calibration_scaling import fit_temperature
from jaxvision.metrics.calibration_scan import measure
from jaxvision.tools import calibration, calibration_sets
from tests.core import test_torch_file as torch_file


def example(rows=400, classes=6, seed=0, sharpness=4.0):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, classes)) * 2
    p = np.exp(logits)
    p /= p.sum(-1, keepdims=True)
    labels = (p.cumsum(-1) < generator.random((rows, 1))).sum(-1)
    return (logits * sharpness / 2).astype(np.float32), np.minimum(labels, classes - 1)


def command(capsys, *arguments, simulations=10):
    code = calibration.main([*map(str, arguments), "--simulations", str(simulations)])
    found = capsys.readouterr()
    return code, found.out, found.err


def refused(capsys, *arguments):
    code, _, err = command(capsys, *arguments)
    assert code == 64
    assert err.count("calibration: ") == 1 and "Traceback" not in err
    return err.split("calibration: ")[1]


def numbers(directory):
    return json.loads((directory / "calibration.json").read_text())


def test_everything_in_one_npz(tmp_path, capsys):
    logits, labels = example()
    val_logits, val_labels = example(seed=1)
    path, to = tmp_path / "logits.npz", tmp_path / "out"
    ood = example(seed=2, sharpness=0.5)[0]
    np.savez(path, logits=logits, labels=labels, val_logits=val_logits, val_labels=val_labels, ood_logits=ood)
    code, out, err = command(capsys, path, "--to", to, "--vector", simulations=40)
    assert code == 0
    assert "400 rows x 6 classes of float32" in err
    assert "took" in out and "peak memory" in out
    found = numbers(to)
    fitted = fit_temperature(Rows.of(val_logits, val_labels))
    name = f"T = {fitted.value:.3f}"
    assert list(found) == ["as given", name, "vector scaling"]
    for key, scaling in (("as given", 1.0), (name, 1 / fitted.value)):
        expected = measure(Rows.of(logits * np.float32(scaling), labels)).values
        for metric, value in expected.items():
            np.testing.assert_allclose(found[key]["metrics"][metric]["value"], value, rtol=1e-5, err_msg=metric)
    assert 0.5 < found["as given"]["ood"]["auroc_entropy"] <= 1
    ece = {key: found[key]["metrics"]["ece"] for key in found}
    assert ece["as given"]["p_value"] < 0.05 and ece[name]["value"] < ece["as given"]["value"]
    text = (to / "report.md").read_text()
    assert "| ECE (%) |" in text and "AUROC" in text and "as given: over-confident" in text
    for figure in ("reliability", "confidence"):
        assert (to / "figures" / f"{figure}.png").stat().st_size > 5000


def written(folder, kind, logits, labels):
    path = folder / f"logits.{kind.split()[0]}"
    if kind == "npz compressed":
        np.savez_compressed(path, logits=logits, labels=labels)
    elif kind == "safetensors bfloat16":
        safetensors.numpy.save_file({"logits": logits.astype(ml_dtypes.bfloat16), "labels": labels}, path)
    elif kind == "safetensors":
        safetensors.numpy.save_file({"logits": logits, "labels": labels}, path)
    else:
        np.savez(path, logits=logits, labels=labels)
    return path


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "safetensors", "safetensors bfloat16"])
def test_formats(tmp_path, capsys, monkeypatch, kind):
    logits, labels = example()
    logits = logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    # Several blocks.
    monkeypatch.setattr("jaxvision.metrics.calibration_rows.BLOCK", 300)
    code, _, err = command(capsys, written(tmp_path, kind, logits, labels), "--to", tmp_path / "out", simulations=0)
    assert code == 0, err
    found = numbers(tmp_path / "out")["as given"]["metrics"]
    for metric, value in measure(Rows.of(logits, labels)).values.items():
        np.testing.assert_allclose(found[metric]["value"], value, rtol=1e-6, err_msg=metric)
        assert found[metric].keys() == {"value"}


def test_two_npy_files_dense_and_ignored(tmp_path, capsys):
    logits, labels = example()
    dense = np.where(np.arange(400) % 4 == 0, 255, labels).reshape(4, 10, 10).astype(np.uint8)
    np.save(tmp_path / "z.npy", logits.reshape(4, 10, 10, 6))
    np.save(tmp_path / "y.npy", dense)
    arguments = (tmp_path / "z.npy", "--labels", tmp_path / "y.npy", "--to", tmp_path / "out")
    assert "label 255 of row 0" in refused(capsys, *arguments)
    assert command(capsys, *arguments, "--ignore", 255)[0] == 0
    assert numbers(tmp_path / "out")["as given"]["rows"] == 300
    assert command(capsys, *arguments, "--ignore", 255, "--batch_averages", 3)[0] == 0
    found = numbers(tmp_path / "out")["as given"]["batch_averages"]
    parts = (slice(0, 300), slice(300, 400))
    kept = [[rows[part][np.arange(400)[part] % 4 > 0] for rows in (logits, labels)] for part in parts]
    expected = np.average([measure(Rows.of(*pair)).values["ece"] for pair in kept], weights=[225, 75])
    assert found["ece"] == pytest.approx(expected)
    assert f"| ECE (%) | {100 * expected:.2f} |" in (tmp_path / "out" / "report.md").read_text()
    assert "give the labels with --labels FILE" in refused(capsys, tmp_path / "z.npy")


def test_probabilities_are_told_apart(tmp_path, capsys):
    logits, labels = example()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    path = tmp_path / "p.npz"
    np.savez(path, logits=p, labels=labels)
    assert "are probabilities" in refused(capsys, path)
    arguments = (path, "--probabilities", "--hold_out", 0.3, "--temperature", "exact", "--to", tmp_path / "out")
    assert command(capsys, *arguments)[0] == 0
    found = numbers(tmp_path / "out")
    given, scaled = found.values()
    kept = np.random.default_rng(0).permutation(400) >= 120
    assert given["rows"] == scaled["rows"] == 280
    expected = measure(Rows.of(logits[kept], labels[kept])).values
    np.testing.assert_allclose(given["metrics"]["ece"]["value"], expected["ece"], rtol=1e-5)
    np.testing.assert_allclose(given["metrics"]["nll"]["value"], expected["nll"], rtol=1e-5)
    fitted = fit_temperature(Rows.of(logits[~kept], labels[~kept]))
    np.testing.assert_allclose(float(list(found)[1].removeprefix("T = ")), fitted.value, atol=1e-3)


@pytest.mark.parametrize("held", [10, 1 << 28])
def test_a_separate_validation_file_and_the_papers_grid(tmp_path, capsys, monkeypatch, held):
    monkeypatch.setattr("jaxvision.tools.calibration_sets.HELD", held)
    for name, seed in (("test", 0), ("val", 1)):
        logits, labels = example(seed=seed)
        np.savez(tmp_path / f"{name}.npz", z=logits, y=labels)
    keys = ("--logits_key", "z", "--labels_key", "y", "--to", tmp_path / "out")
    arguments = (tmp_path / "test.npz", "--validation", tmp_path / "val.npz", "--temperature", "grid_ece", *keys)
    assert command(capsys, *arguments, "--all_classes")[0] == 0
    fitted = fit_temperature(Rows.of(*example(seed=1)), method="grid_ece")
    assert list(numbers(tmp_path / "out"))[1] == f"T = {fitted.value:.3f}"
    logits, labels = example()
    rows = np.random.default_rng(0).permutation(400)[:300]
    np.savez(tmp_path / "val.npz", z=logits[rows], y=labels[rows])
    message = refused(capsys, *arguments)
    assert "100% of the rows of z of" in message and "are among the rows that would be reported on" in message


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({"logit": np.zeros((9, 3)), "labels": np.zeros(9, int)}, (), "holds no array 'logits'; did you mean 'logit'?"),
        ({"logits": np.zeros((9, 3))}, (), "holds no array 'labels' (it holds: logits)"),
        ({"logits": np.zeros((9, 3)), "labels": np.zeros(8, int)}, (), "does not fit labels of shape (8,)"),
        ({"logits": np.zeros((9, 3)), "labels": np.zeros(9)}, (), "must be integers"),
        ({"logits": np.zeros((9, 3)), "labels": np.full(9, 3)}, (), "label 3 of row 0"),
        ({"logits": np.full((9, 3), np.nan), "labels": np.zeros(9, int)}, (), "row 0 of logits of"),
        ({"logits": np.zeros((0, 3)), "labels": np.zeros(0, int)}, (), "hold no row"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--bins", 10), "9 rows that count, fewer than 10 bins"),
        ({"logits": np.zeros((9, 1)), "labels": np.zeros(9, int)}, (), "at least 2"),
        ({"logits": np.zeros((9, 3), int), "labels": np.zeros(9, int)}, (), "are these predicted classes?"),
        ({"logits": np.zeros((9, 3), object), "labels": np.zeros(9, int)}, (), "Python objects"),
        ({"logits": np.zeros((9, 3), ml_dtypes.bfloat16), "labels": np.zeros(9, int)}, (), "lose the type of bfloat16"),
        ({"logits": np.zeros((9, 3), order="F"), "labels": np.zeros(9, int)}, (), "np.ascontiguousarray"),
        ({"logits": np.float32(3), "labels": np.zeros(9, int)}, (), "a single number"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--temperature", "exact"), "scaling needs a validation split"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--vector",), "scaling needs a validation split"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--hold_out", 1.5), "must lie between 0 and 1"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--hold_out", 0.5, "--validation", "x"), "exclude each other"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--bins", 0), "must be at least 1"),
        ({"logits": np.eye(9), "labels": np.arange(9)}, ("--batch_averages", 0), "must be at least 1"),
        (
            {"logits": np.eye(9), "labels": np.arange(9)},
            ("--batch_averages", 8, "--hold_out", 0.5),
            "--batch_averages and --hold_out exclude each other",
        ),
        (
            {"logits": np.eye(9), "labels": np.arange(9)},
            ("--temperature", "t"),
            "see python -m jaxvision.tools.calibration --help",
        ),
        (
            {"logits": 5 * np.eye(9), "labels": np.arange(9), "val_logits": np.eye(3), "val_labels": np.arange(3)},
            (),
            "have 3 classes, but",
        ),
        ({"logits": np.eye(9), "labels": np.arange(9), "val_logits": np.eye(9)}, (), "no array 'val_labels'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, arrays, arguments, message):
    path = tmp_path / "logits.npz"
    np.savez(path, **arrays)
    assert message in refused(capsys, path, "--to", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_empty_or_damaged(tmp_path, capsys):
    assert "is not a file" in refused(capsys, tmp_path / "none.npz")
    (tmp_path / "empty.npz").touch()
    assert "is empty" in refused(capsys, tmp_path / "empty.npz")
    (tmp_path / "logits.csv").write_text("1,2")
    assert "ends in '.csv'" in refused(capsys, tmp_path / "logits.csv")
    for suffix in ("npz", "npy", "safetensors", "pt"):
        (tmp_path / f"noise.{suffix}").write_bytes(bytes(range(256)) * 4)
        assert f"noise.{suffix}" in refused(capsys, tmp_path / f"noise.{suffix}")
    logits, labels = example()
    for kind in ("npz", "npz compressed"):
        path = written(tmp_path, kind, logits, labels)
        data = bytearray(path.read_bytes())
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("logits.npy").header_offset
        data[start + 1000] ^= 255
        path.write_bytes(data)
        assert "damaged" in refused(capsys, path)
    np.save(tmp_path / "cut.npy", logits)
    whole = (tmp_path / "cut.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-100])
    np.save(tmp_path / "y.npy", labels)
    assert "cut off" in refused(capsys, tmp_path / "cut.npy", "--labels", tmp_path / "y.npy")


def test_pytorch_files(tmp_path, capsys):
    logits, labels = example()
    # Tensors as torch.save writes them; the logits are a transposed view.
    storages = {"0": np.ascontiguousarray(logits.T), "1": labels}
    z = torch_file.tensor(torch_file.storage("0", logits.size), 0, logits.shape, (1, len(logits)))
    y = torch_file.tensor(torch_file.storage("1", labels.size, "Long"), 0, labels.shape, (1,))
    path = torch_file.write_zip(tmp_path / "logits.pt", {"logits": z, "labels": y}, storages)
    assert command(capsys, path, "--to", tmp_path / "out")[0] == 0
    found = numbers(tmp_path / "out")["as given"]["metrics"]["ece"]["value"]
    np.testing.assert_allclose(found, measure(Rows.of(logits, labels)).values["ece"], rtol=1e-6)


def test_memory_is_that_of_a_few_blocks(tmp_path, monkeypatch):
    """Three times the rows take 150 bytes more for each at most, not the 800 that a row of the file has."""
    monkeypatch.setattr("jaxvision.metrics.calibration_rows.BLOCK", 1 << 16)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    peaks = []
    for rows in (10_000, 30_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        logits, labels = calibration_metrics.write_example(folder, rows, 200)
        tracemalloc.start()
        options = calibration._parser().parse_args([str(logits), "--labels", str(labels), "--hold_out", "0.05"])
        sets = calibration_sets.open_sets(options, lambda line: None)
        assert measure(sets["test"].rows).top.total == 0.95 * rows
        assert fit_temperature(sets["validation"].logits, sets["test"].logits).rows == 0.05 * rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 150 * 20_000, peaks
