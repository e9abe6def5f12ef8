"""The benchmark's release becomes one table: means over seeds, in product order; nothing in a file is run."""

import bz2
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from jaxvision.core.errors import DataError
from jaxvision.data import prepare_nas_bench_201 as release
from jaxvision.methods.az_nas import table
from jaxvision.models import nas_bench_201
from jaxvision.tools import prepare_data
from tests.arrays import load

SPLITS = {"cifar10": ("ori-test",), "cifar10-valid": ("x-valid", "ori-test")}
SEEDS = {"cifar10-valid": [777, 888], "cifar10": [777, 888, 999], "cifar100": [777], "ImageNet16-120": [888]}


def results(index, draw):
    """What a file of the release holds of 200 epochs: as ``ArchResults.state_dict`` writes it."""
    operations, every = nas_bench_201.from_index(index), OrderedDict()
    params = float(nas_bench_201.parameters(operations, num_classes=10)) / 1e6
    for dataset, seeds in SEEDS.items():
        for seed in seeds:
            splits = SPLITS.get(dataset, ("ori-test", "x-valid", "x-test"))
            accuracies = {f"{split}@{epoch}": draw.uniform(10, 90) for split in splits for epoch in (0, 199)}
            every[dataset, seed] = {"name": dataset, "params": np.float64(params), "eval_acc1es": accuracies}
    text = nas_bench_201.to_string(operations)
    return {"arch_index": 7, "arch_str": text, "all_results": every, "dataset_seed": SEEDS, "clear_net_done": True}


def write(folder, name, value):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pickle.pbz2").write_bytes(bz2.compress(pickle.dumps(value, protocol=4)))


@pytest.fixture(scope="module")
def records():
    """A record for every architecture, the last one first."""
    draw, params = np.random.default_rng(0), table.parameters()
    made = []
    for index in reversed(range(nas_bench_201.NUM_ARCHITECTURES)):
        accuracies = dict.fromkeys(release.RESULTS, float(draw.uniform(10, 90))) | {"cifar10_test": index / 200}
        text = nas_bench_201.to_string(nas_bench_201.from_index(index))
        made.append(release.Record(text, accuracies, float(params[index])))
    return made


def test_a_file_of_the_release_is_read_as_means_over_seeds(tmp_path):
    value = results(11663, np.random.default_rng(1))
    write(tmp_path / "simple", "000042", {"12": {}, "200": value})
    write(tmp_path / "simple", "meta", {"meta_archs": []})
    (record,) = release.read_release(tmp_path / "simple", total=1)
    assert record.architecture == nas_bench_201.to_string(nas_bench_201.from_index(11663))
    assert record.params == pytest.approx(1_073_466, abs=1e-3)
    for column, (dataset, split) in release.RESULTS.items():
        each = [value["all_results"][dataset, seed]["eval_acc1es"][f"{split}@199"] for seed in SEEDS[dataset]]
        assert record.accuracies[column] == pytest.approx(np.mean(each), rel=1e-12)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello", "is no bz2 file or is damaged"),
        (bz2.compress(pickle.dumps({"200": 1}))[:-9], "was cut short"),
        (bz2.compress(bytes(1 << 25)), "unpacks to more than any file"),
        (bz2.compress(pickle.dumps(Evil())), "asks to run builtins.print; refused"),
        (bz2.compress(pickle.dumps({"12": {}})), "is no result of 200 epochs"),
        (bz2.compress(pickle.dumps([1])), "is no result of 200 epochs"),
    ],
)
def test_a_bad_file_is_named(content, says, tmp_path, capsys):
    (tmp_path / "000000.pickle.pbz2").write_bytes(content)
    code = prepare_data.main(["nas_bench_201", "--from", str(tmp_path), "--to", str(tmp_path / "to.npz")])
    error = capsys.readouterr().err
    assert code == 64 and says in error and "000000.pickle.pbz2" in error and not (tmp_path / "to.npz").exists()


def test_an_incomplete_release_is_refused(tmp_path, capsys):
    write(tmp_path, "000000", {"200": results(0, np.random.default_rng(1))})
    arguments = ["nas_bench_201", "--from", str(tmp_path), "--to", str(tmp_path / "to.npz")]
    assert prepare_data.main(arguments) == 64
    assert "holds 1 of 15,625 architectures; |none~0|+|none~0|none~1|+|none" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert prepare_data.main(["nas_bench_201", "--from", str(tmp_path / "empty"), *arguments[3:]]) == 64
    assert "holds no file like 000000.pickle.pbz2" in capsys.readouterr().err


def test_a_whole_release_becomes_a_table_in_product_order(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "read_release", lambda source, **options: records)
    path = tmp_path / "made" / "nb201.npz"
    assert prepare_data.main(["nas_bench_201", "--from", str(tmp_path), "--to", str(path)]) == 0
    assert "15,625 architectures" in capsys.readouterr().out
    arrays, read = load(path), table.read(path)
    assert set(arrays) == {"arch_ops", "params", *release.RESULTS}
    np.testing.assert_allclose(read.test["cifar10"], np.arange(15625) / 200, atol=0.0051)
    np.testing.assert_array_equal(arrays["arch_ops"][5338], nas_bench_201.from_index(5338))


def test_records_of_other_architectures_are_refused(records):
    params = [record.params for record in records]
    moved = [release.Record(r.architecture, r.accuracies, p) for r, p in zip(records, params[1:] + params[:1])]
    with pytest.raises(DataError, match="are not those of their strings"):
        table.pack(moved, "the release")
    with pytest.raises(DataError, match="more than once"):
        table.pack([*records, records[3]], "the release")


def test_a_table_of_the_wrong_length_or_order_is_refused(records, tmp_path):
    arrays = table.pack(records, "the release")
    path = tmp_path / "t.npz"

    def says(changed, match):
        np.savez(path, **changed)
        with pytest.raises(DataError, match=match):
            table.read(path)

    says({**arrays, "cifar10_test": arrays["cifar10_test"][:-1]}, r"'cifar10_test' is uint16 of shape \(15624,\)")
    says(
        {key: value[::-1] for key, value in arrays.items()},
        "row 1 has 316,346 parameters, architecture 1 has 73,306 .* another order",
    )
    swapped = np.arange(15625)
    swapped[[1, 5]] = 5, 1  # as many parameters, another edge
    says({key: value[swapped] for key, value in arrays.items()}, "row 1 has the operations")
    says({key: value for key, value in arrays.items() if key != "params"}, "has no array 'params'")
    path.write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"can't be read as an npz of plain arrays .*; make it with"):
        table.read(path)
    with pytest.raises(DataError, match="can't be read"):
        table.read(tmp_path / "nowhere.npz")


def test_a_table_of_other_shapes_types_or_units_is_refused(records, tmp_path):
    arrays, path = table.pack(records, "the release"), tmp_path / "t.npz"

    def says(name, value, match):
        np.savez(path, **{**arrays, name: value})
        with pytest.raises(DataError, match=match):
            table.read(path)

    test = arrays["cifar100_test"]
    says("cifar100_test", np.int64(3), r"column 'cifar100_test' is int64 of shape \(\), it must be integers \(15625,\)")
    says("cifar100_test", np.stack([test, test], 1), r"of shape \(15625, 2\)")
    says("arch_ops", arrays["arch_ops"][:, 0], r"column 'arch_ops' is int8 of shape \(15625,\), .* \(15625, 6\)")
    says("cifar100_test", np.where(test == test.max(), np.nan, test), "column 'cifar100_test' is float64")
    says("cifar100_test", test // 100, "column 'cifar100_test' reaches from 10 to 90, it must be .* in hundredths")
    says("cifar100_test", test.astype(int) - 2000, "reaches from -")
    np.save(tmp_path / "t.npy", test)
    with pytest.raises(DataError, match="is a single array, not an npz with arch_ops"):
        table.read(tmp_path / "t.npy")


def test_a_table_with_a_damaged_column_is_refused(records, tmp_path):
    path = tmp_path / "t.npz"
    np.savez_compressed(path, **table.pack(records, "the release"))
    content = bytearray(path.read_bytes())
    # Behind the header of the first column, arch_ops.
    content[80:120] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(DataError, match="can't be read as an npz of plain arrays"):
        table.read(path)
