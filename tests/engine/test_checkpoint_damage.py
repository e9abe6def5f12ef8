import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxvision.core.errors import StorageError
from jaxvision.engine.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
STEPS = (10, 20, 30)


def payload_of(step):
    rng = np.random.default_rng(step)
    return {
        "state": {"w": rng.normal(size=(40, 25)).astype(np.float32), "zeros": np.zeros(300, np.float32)},
        "codes": rng.integers(0, 256, (60, 60)).astype(np.uint8),
        "step": np.array(step, np.int32),
    }


TEMPLATE = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), payload_of(0))


def open_(directory, **options):
    return Checkpoints(directory, **{"keep_last": 3, "keep_best": 0, "best_mode": "max", **options})


def restored_step(directory):
    """Restores, and checks that what comes back is exactly what that step saved."""
    with open_(directory) as checkpoints:
        restored = checkpoints.restore(TEMPLATE)
    assert restored.meta == {"rows": restored.step * 2}
    jax.tree.map(np.testing.assert_array_equal, restored.payload, payload_of(restored.step))
    return restored.step


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with open_(directory) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, payload_of(step), score=step / 100, meta={"rows": step * 2})
    return directory


@pytest.fixture
def directory(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def array_files(folder):
    return [path for path in files_of(folder / "payload") if path.parent.name == "d"]


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_pristine_has_array_files(pristine, caplog):
    assert restored_step(pristine) == 30
    assert sum(path.stat().st_size for path in array_files(pristine / "30")) > 4000
    assert not caplog.records


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.98])
def test_one_flipped_byte_in_each_file(pristine, tmp_path, fraction):
    fell_back = []
    for number, name in enumerate(path.relative_to(pristine) for path in files_of(pristine / "30")):
        copy = Path(shutil.copytree(pristine, tmp_path / str(number) / "checkpoints"))
        flip(copy / name, int((copy / name).stat().st_size * fraction))
        step = restored_step(copy)  # a byte that nothing reads may be any
        assert step in (20, 30)
        fell_back.append(step == 20)
        assert (copy.parent / "quarantine" / "step_30").exists() == (step == 20)
    assert sum(fell_back) >= 4


def test_one_flipped_byte_that_orbax_alone_would_restore(pristine, tmp_path, caplog):
    codes = payload_of(30)["codes"].tobytes()  # random bytes, which lie in the file as they are
    (name,) = (path.relative_to(pristine) for path in array_files(pristine / "30") if codes in path.read_bytes())
    first = (pristine / name).read_bytes().index(codes)
    for offset in (0, 1, 1800, 3599):
        copy = Path(shutil.copytree(pristine, tmp_path / str(offset) / "checkpoints"))
        flip(copy / name, first + offset)
        assert restored_step(copy) == 20
    messages = [record.getMessage() for record in caplog.records]
    assert ["leaf 'codes' doesn't have the bytes that were saved" in message for message in messages] == [True] * 4


def test_one_flipped_byte_anywhere_in_the_arrays(pristine, tmp_path):
    largest = max(array_files(pristine / "30"), key=lambda path: path.stat().st_size).relative_to(pristine)
    steps = []
    for number, place in enumerate(np.random.default_rng(0).uniform(size=25)):
        copy = Path(shutil.copytree(pristine, tmp_path / str(number) / "checkpoints"))
        flip(copy / largest, int((pristine / largest).stat().st_size * place))
        steps.append(restored_step(copy))
    assert set(steps) <= {20, 30}  # a few bytes are in no array
    assert steps.count(20) >= 18


@pytest.mark.parametrize("what", ["half", "empty", "deleted", "last byte"])
def test_each_file_truncated_or_deleted(pristine, tmp_path, what):
    lost = []
    for number, name in enumerate(path.relative_to(pristine) for path in files_of(pristine / "30")):
        copy = Path(shutil.copytree(pristine, tmp_path / str(number) / "checkpoints"))
        size = (copy / name).stat().st_size
        if what == "deleted":
            (copy / name).unlink()
        else:
            os.truncate(copy / name, {"half": size // 2, "empty": 0, "last byte": size - 1}[what])
        lost.append(restored_step(copy))
    assert set(lost) <= {20, 30}
    assert lost.count(20) >= 4


def damage_empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_manifest_deleted(folder):
    (folder / "manifest" / "metadata").unlink()


def damage_manifest_folder(folder):
    shutil.rmtree(folder / "manifest")


def damage_manifest_emptied(folder):
    (folder / "manifest" / "metadata").write_text("")


def damage_manifest_no_object(folder):
    (folder / "manifest" / "metadata").write_text("[1, 2]")


def damage_manifest_rows(folder):
    edit(folder, lambda value: value["body"]["meta"].update(rows=61))


def damage_manifest_score(folder):
    edit(folder, lambda value: value["body"].update(score=None))


def damage_manifest_digest(folder):
    edit(folder, lambda value: value["body"]["leaves"]["codes"].update(digest="0" * 64))


def damage_another_step(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "10", folder)


def damage_arrays_of_another_step(folder):
    shutil.rmtree(folder / "payload")
    shutil.copytree(folder.parent / "10" / "payload", folder / "payload")


def damage_payload_deleted(folder):
    shutil.rmtree(folder / "payload")


def edit(folder, change):
    path = folder / "manifest" / "metadata"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


DAMAGES = {
    damage_empty_folder: "manifest is missing",
    damage_manifest_deleted: "manifest is missing",
    damage_manifest_folder: "manifest is missing",
    damage_manifest_emptied: "manifest can't be parsed",
    damage_manifest_no_object: "manifest can't be parsed",
    damage_manifest_rows: "manifest was changed after it was written",
    damage_manifest_score: "manifest was changed after it was written",
    damage_manifest_digest: "manifest was changed after it was written",
    damage_another_step: "manifest is that of step 10",
    damage_arrays_of_another_step: "leaf 'codes' doesn't have the bytes that were saved",
    damage_payload_deleted: "arrays can't be loaded",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_to_the_newest_good_step_and_says_why(directory, caplog, damage):
    damage(directory / "30")
    damaged = [path.relative_to(directory / "30") for path in files_of(directory / "30")]
    assert restored_step(directory) == 20
    assert len(caplog.records) == 1
    record = caplog.records[0]
    assert (record.name, record.levelno) == ("jaxvision", logging.WARNING)
    assert DAMAGES[damage] in record.getMessage()
    assert f"moved to {directory.parent / 'quarantine' / 'step_30'}" in record.getMessage()
    assert "\n" not in record.getMessage()
    moved = directory.parent / "quarantine" / "step_30"
    assert [path.relative_to(moved) for path in files_of(moved)] == damaged
    assert names(directory) == ["10", "20", "LEDGER.json"]
    caplog.clear()
    assert restored_step(directory) == 20  # nothing left to say
    assert not caplog.records


def test_goes_on_saving_after_a_fall_back(directory):
    for round_ in range(3):
        with open_(directory) as checkpoints:
            damage_manifest_deleted(directory / "30")
            restored = checkpoints.restore(TEMPLATE)
            assert restored.step == 20
            assert checkpoints.best_step() == 20
            checkpoints.save(30, payload_of(30), score=0.1, meta={"rows": 60})
            checkpoints.wait()
            assert checkpoints.best_step() == 20  # by the new score of step 30
        assert names(directory.parent / "quarantine") == ["step_30", "step_30_1", "step_30_2"][: round_ + 1]
    assert restored_step(directory) == 30


def test_walks_past_several_damaged_steps(directory, caplog):
    damage_manifest_deleted(directory / "30")
    damage_empty_folder(directory / "20")
    assert restored_step(directory) == 10
    assert [record.getMessage().count("quarantine") for record in caplog.records] == [1, 1]
    assert names(directory.parent / "quarantine") == ["step_20", "step_30"]


def test_all_damaged_is_refused_again_and_again(directory):
    for step in STEPS:
        damage_manifest_deleted(directory / str(step))
    with open_(directory) as checkpoints:
        with pytest.raises(StorageError) as raised:
            checkpoints.restore(TEMPLATE)
        text = str(raised.value)
        assert all(f"step {step}: its manifest is missing" in text for step in STEPS)
        assert str(directory.parent / "quarantine") in text
        assert "\n" not in text
        with pytest.raises(StorageError, match="no step folder is left"):
            checkpoints.restore(TEMPLATE)
    with open_(directory) as checkpoints, pytest.raises(StorageError, match="no step folder is left"):
        checkpoints.restore(TEMPLATE)
    shutil.copytree(directory.parent / "quarantine" / "step_20", directory / "20")
    with open_(directory) as checkpoints, pytest.raises(StorageError, match="step 20: its manifest is missing"):
        checkpoints.restore(TEMPLATE)


def test_a_copy_put_back_is_taken(directory, pristine):
    for step in STEPS:
        shutil.rmtree(directory / str(step))
    with open_(directory) as checkpoints, pytest.raises(StorageError):
        checkpoints.restore(TEMPLATE)
    shutil.copytree(pristine / "20", directory / "20")
    assert restored_step(directory) == 20


def test_all_folders_deleted_is_refused(directory):
    for step in STEPS:
        shutil.rmtree(directory / str(step))
    with open_(directory) as checkpoints, pytest.raises(StorageError, match="step 30: its folder is gone; step 20: "):
        checkpoints.restore(TEMPLATE)


def test_the_newest_folder_deleted_is_said(directory, caplog):
    shutil.rmtree(directory / "30")
    assert restored_step(directory) == 20
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint {directory / '30'} can't be used: its folder is gone"
    ]
    caplog.clear()
    assert restored_step(directory) == 20
    assert not caplog.records


def test_an_empty_folder_is_no_fresh_start(tmp_path):
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with open_(tmp_path / "checkpoints") as checkpoints, pytest.raises(StorageError, match="step 5: its manifest is"):
        checkpoints.restore(TEMPLATE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"steps": 3}', "\x00\xff"])
def test_a_damaged_ledger(directory, caplog, text):
    (directory / "LEDGER.json").write_text(text)
    assert restored_step(directory) == 30
    assert [record.getMessage() for record in caplog.records] == [
        f"{directory / 'LEDGER.json'} can't be parsed; going by the folders that are there"
    ]
    assert json.loads((directory / "LEDGER.json").read_text()) == {"steps": list(STEPS)}
    for step in STEPS:
        shutil.rmtree(directory / str(step))
    (directory / "LEDGER.json").write_text(text)
    with open_(directory) as checkpoints, pytest.raises(StorageError, match="no step folder is left"):
        checkpoints.restore(TEMPLATE)


def test_a_deleted_ledger_is_made_again(directory, caplog):
    (directory / "LEDGER.json").unlink()
    assert restored_step(directory) == 30
    assert json.loads((directory / "LEDGER.json").read_text()) == {"steps": list(STEPS)}
    assert not caplog.records


def test_left_overs_of_a_kill_are_removed_and_other_files_kept(directory, caplog):
    for name in ("40.orbax-checkpoint-tmp", "40.orbax-checkpoint-tmp-1234", "5.deleted"):
        shutil.copytree(directory / "10", directory / name)
    (directory / "41.orbax-checkpoint-tmp").mkdir()
    (directory / "LEDGER.json.tmp").write_text("{")
    (directory / "notes").mkdir()
    (directory / "007").mkdir()
    (directory / "20260101120000").mkdir()
    (directory / "x.deleted").mkdir()
    with open_(directory) as checkpoints:
        assert checkpoints.steps() == list(STEPS)
    assert "5.deleted" in names(directory)  # looking changes nothing
    assert restored_step(directory) == 30
    with open_(directory) as checkpoints:
        checkpoints.save(40, payload_of(40), meta={"rows": 80})
    assert restored_step(directory) == 40
    assert names(directory) == ["007", "20", "20260101120000", "30", "40", "LEDGER.json", "notes", "x.deleted"]
    assert not caplog.records


def test_only_a_left_over_of_the_first_save_is_a_fresh_start(tmp_path, pristine):
    shutil.copytree(pristine / "10", tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp")
    with open_(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(TEMPLATE) is None
    assert names(tmp_path / "checkpoints") == []


def test_load_refuses_without_moving(directory):
    damage_manifest_rows(directory / "20")
    with open_(directory) as checkpoints:
        assert checkpoints.load(10, TEMPLATE).step == 10
        for step, message in ((20, "manifest was changed"), (25, "folder is gone")):
            with pytest.raises(StorageError, match=message):
                checkpoints.load(step, TEMPLATE)
        assert checkpoints.best_step() == 30
    assert names(directory) == ["10", "20", "30", "LEDGER.json"]


def test_an_unreadable_file_is_no_damage(directory, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: "manifest.ocdbt" not in str(path))  # root may read all
    with open_(directory) as checkpoints, pytest.raises(StorageError, match=r"manifest\.ocdbt can't be read: give"):
        checkpoints.restore(TEMPLATE)
    assert names(directory) == ["10", "20", "30", "LEDGER.json"]


def test_a_newer_format_is_no_damage(directory, monkeypatch):
    monkeypatch.setattr("jaxvision.engine.manifest.FORMAT", 2)
    with open_(directory) as checkpoints, pytest.raises(StorageError, match="has the checkpoint format 1, but this"):
        checkpoints.restore(TEMPLATE)
    assert names(directory) == ["10", "20", "30", "LEDGER.json"]


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import jax, numpy as np
from jaxvision.engine.checkpoint import Checkpoints

directory = Path(sys.argv[1])
large = np.random.default_rng(0).normal(size=300_000)

def child(ready):
    with Checkpoints(directory, keep_last=2, keep_best=1) as checkpoints:
        restored = checkpoints.restore({"w": jax.ShapeDtypeStruct(large.shape, large.dtype)})
        step = 0 if restored is None else restored.step
        ledger = directory / "LEDGER.json"
        assert step == max(json.loads(ledger.read_text())["steps"]) if ledger.exists() else restored is None
        if restored is not None:
            assert (restored.payload["w"] == large + step).all() and restored.meta == {"rows": step}
        assert not list(directory.glob("*.*-tmp*")) and not list(directory.glob("*.deleted"))
        os.write(ready, step.to_bytes(4, "little"))
        while True:
            step += 1
            checkpoints.save(step, {"w": large + step}, score=step % 5, meta={"rows": step})

steps = []
for round_ in range(7):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(write)
        finally:
            os._exit(1)
    os.close(write)
    steps.append(int.from_bytes(os.read(read, 4), "little"))
    os.close(read)
    time.sleep(random.Random(round_).uniform(0.1, 0.5))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the child failed by itself"
assert steps == sorted(steps) and steps[-1] > steps[1] > 0, steps
assert not (directory.parent / "quarantine").exists()
"""


def test_killed_while_saving(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
