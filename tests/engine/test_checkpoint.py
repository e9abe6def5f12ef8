import logging
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvision.core import struct
from jaxvision.core.errors import ConfigError, StorageError
from jaxvision.core.trees import named_leaves
from jaxvision.engine import checkpoint, manifest
from jaxvision.engine.checkpoint import Checkpoints
from tests.devices import environment

ROOT = Path(__file__).parents[2]


def template(tree, sharding=None):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def open_(directory, **options):
    return Checkpoints(directory, **{"keep_last": 2, "keep_best": 0, "best_mode": "max", **options})


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (name, left), right in zip(named_leaves(actual).items(), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        assert left.tobytes() == right.tobytes(), name


class Pair(NamedTuple):
    first: object
    second: object


@struct.dataclass
class Holder:
    step: object
    params: object


def every_kind():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 64, dtype=np.uint32)
    arrays = {
        "float32": rng.normal(size=(3, 5)).astype(np.float32),
        "float32_any_bits": bits.view(np.float32),  # NaNs with payloads, denormals, infinities
        "negative_zero": np.full((4,), -0.0, np.float32),
        "float64": rng.normal(size=3),
        "float16": rng.normal(size=3).astype(np.float16),
        "bfloat16": jnp.bfloat16(1.5) * np.ones(7, jnp.bfloat16),
        "float8": np.arange(4).astype(jnp.float8_e4m3fn),
        "int4": np.arange(-8, 8).astype(jnp.int4).reshape(4, 4),
        "uint4": np.arange(16).astype(jnp.uint4),
        "int8": rng.integers(-128, 128, (2, 3, 4)).astype(np.int8),
        "uint8": rng.integers(0, 256, 9).astype(np.uint8),
        "int64": np.array([2**40, -1]),
        "uint32": bits,
        "bool": np.array([[True], [False]]),
        "complex64": np.array([1 - 2j], np.complex64),
        "scalar": np.array(3, np.int32),
        "scalar_bool": np.array(True),
        "no_elements": np.zeros((0, 3), np.float32),
        "fortran": np.asfortranarray(rng.normal(size=(4, 6)).astype(np.float32)),
        "strided": rng.normal(size=(8, 6)).astype(np.float32)[::2, ::-3],
    }
    return {
        "state": Holder(np.array(7, np.int32), {"block_0": {"kernel": arrays["int8"]}, "empty": {}, "none": None}),
        "opt": Pair(None, (arrays["scalar"], Pair({}, [arrays["bfloat16"]]))),
        "name with/slash.and dot": arrays["bool"],
        **arrays,
    }


def test_round_trip_bit_for_bit_on_the_host(tmp_path):
    payload = every_kind()
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(5, payload, score=0.25, meta={"rows": 3, "nested": [1, None, "ü"], "x": 0.1})
        checkpoints.wait()
        restored = checkpoints.restore(template(payload))
    assert restored.step == 5
    assert restored.meta == {"rows": 3, "nested": [1, None, "ü"], "x": 0.1}
    assert_same_bits(restored.payload, payload)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored.payload))


def test_round_trip_bit_for_bit_on_the_device(tmp_path):
    payload = {name: leaf for name, leaf in every_kind().items() if name not in ("float64", "int64")}
    payload = jax.tree.map(jnp.asarray, payload)
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, payload)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with open_(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(template(payload, sharding))
    assert (restored.step, restored.meta) == (0, {})
    assert_same_bits(restored.payload, payload)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored.payload))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_payload_may_be_donated_or_changed_after_save(tmp_path, asynchronous):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    state, host = {"w": jnp.arange(50_000.0), "n": jnp.int32(3)}, np.arange(1000)
    with open_(tmp_path / "checkpoints", keep_last=9, asynchronous=asynchronous) as checkpoints:
        expected = {}
        for number in range(1, 5):
            expected[number] = {"state": jax.tree.map(np.array, state), "host": host.copy()}
            checkpoints.save(number, {"state": state, "host": host}, meta={"number": number})
            donated, state = state, step(state)
            host[:] = -number
            assert donated["w"].is_deleted()
        checkpoints.wait()
        for number, payload in expected.items():
            loaded = checkpoints.load(number, template(payload))
            assert loaded.meta == {"number": number}
            assert_same_bits(loaded.payload, payload)


def test_restored_arrays_may_be_donated(tmp_path):
    payload = {"w": np.arange(10_000, dtype=np.float32)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, payload)
        state = checkpoints.restore(template(payload, sharding)).payload
        np.testing.assert_array_equal(step(step(state))["w"], payload["w"] + 2)


def test_save_returns_before_the_files_are_written(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint._write_folder
    monkeypatch.setattr(checkpoint, "_write_folder", lambda *arguments: (go.wait(60), write(*arguments)))
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)})
        assert checkpoints.steps() == []
        go.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_meta_is_copied_and_must_be_json(tmp_path):
    meta = {"rows": [1]}
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)}, meta=meta)
        meta["rows"].append(2)
        assert checkpoints.restore({"w": np.ones(3)}).meta == {"rows": [1]}
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(2, {"w": np.ones(3)}, meta={"rows": np.ones(3)})


def test_fresh_directory_is_none(tmp_path):
    with open_(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.restore({"w": np.ones(3)}) is None
        assert checkpoints.restore({"w": np.ones(3)}) is None
        assert checkpoints.steps() == []
        assert checkpoints.best_step() is None


@pytest.mark.parametrize(
    ("mode", "last", "best", "scores", "kept", "best_step"),
    [
        ("max", 2, 0, {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, [3, 4], 4),
        ("max", 1, 1, {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, [1, 4], 1),
        ("min", 1, 1, {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}, [2, 4], 2),
        ("max", 1, 2, {1: None, 2: 0.1, 3: None, 4: 0.3, 5: None}, [2, 4, 5], 4),
        ("min", 1, 3, {1: None, 2: float("nan"), 3: 0.5, 4: None}, [3, 4], 3),
        ("max", 1, 5, {1: None, 2: None, 3: None}, [3], None),
        ("max", 1, 1, {1: 0.5, 2: 0.5, 3: None}, [2, 3], 2),
        ("min", 2, 1, {1: -1.0, 2: -2.0, 3: 5.0, 4: float("inf")}, [2, 3, 4], 2),
    ],
)
def test_keeps_the_last_and_the_best(tmp_path, mode, last, best, scores, kept, best_step):
    options = {"keep_last": last, "keep_best": best, "best_mode": mode}
    for step, score in scores.items():  # each save by another object: the scores come from the manifests
        with open_(tmp_path / "checkpoints", **options) as checkpoints:
            checkpoints.save(step, {"w": np.full(2, step)}, score=score)
    with open_(tmp_path / "checkpoints", **options) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == best_step
        for step in kept:
            assert checkpoints.load(step, {"w": np.ones(2, int)}).payload["w"].tolist() == [step, step]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        [*map(str, kept), "LEDGER.json"]
    )


def test_template_as_a_function_of_the_step(tmp_path):
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"w": np.ones(3)})
        restored = checkpoints.restore(lambda step: {"w": jax.ShapeDtypeStruct((step,), np.float64)})
        assert restored.payload["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": np.ones(4, np.float32)}, r"'a/b' is float32 \[4\] here but float32 \[3\] there"),
        ({"b": np.ones(3, np.int32)}, r"'a/b' is int32 \[3\] here but float32 \[3\] there"),
        ({"c": np.ones(3, np.int32)}, r"'a/c' is int32 \[3\] here but missing there"),
        ({"b": None}, r"'a/b' is there but not here"),
    ],
)
def test_another_template_is_refused_and_moves_nothing(tmp_path, caplog, change, message):
    payload = {"a": {"b": np.ones(3, np.float32)}, "z": np.ones(2)}
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, payload)
        checkpoints.save(2, payload)
        for call in (checkpoints.restore, lambda tree: checkpoints.load(2, tree)):
            with pytest.raises(ConfigError, match=message):
                call({"a": payload["a"] | change, "z": payload["z"]})
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(payload).step == 2
    assert not (tmp_path / "quarantine").exists()
    assert not caplog.records


def test_wrong_arguments(tmp_path):
    for options, message in (
        ({"keep_last": 0}, "keep_last=0"),
        ({"keep_best": -1}, "keep_best=-1"),
        ({"best_mode": "most"}, "best_mode='most'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_(tmp_path, **options)
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, {"w": np.ones(3)})
        checkpoints.wait()
        for step in (1, 2):
            with pytest.raises(ConfigError, match=f"step {step} can't be saved .* holds step 2"):
                checkpoints.save(step, {"w": np.ones(3)})
        for step in (-1, 10**9):
            with pytest.raises(ConfigError, match=f"step {step} can't be saved: steps lie"):
                checkpoints.save(step, {"w": np.ones(3)})
        with pytest.raises(ValueError, match="same name"):
            checkpoints.save(3, {"a/b": np.ones(3), "a": {"b": np.ones(3)}})
        with pytest.raises(TypeError, match="'a/b' of the payload is a str"):
            checkpoints.save(3, {"a": {"b": "text"}})
        assert checkpoints.steps() == [2]


def test_digest_tells_dtype_shape_and_bytes_apart():
    base = np.zeros(4, np.float32)
    others = [base.reshape(2, 2), base.astype(np.int32), base[:3], -base, base.view(np.uint8), base.reshape(4, 1)]
    assert len({manifest.digest(array) for array in [base, *others]}) == 7
    assert manifest.digest(base) == manifest.digest(base.copy())
    assert manifest.digest(np.arange(6).reshape(2, 3).T) == manifest.digest(np.array([[0, 3], [1, 4], [2, 5]]))


@pytest.fixture
def small_files_only():
    """A file system that refuses more than 20,000 bytes in a file, arrays' files included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(on):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if on else soft, hard))

    yield limit
    limit(False)


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "restore", "close", "exit", "inline"])
def test_a_failed_write_is_one_sentence_and_keeps_the_older_ones(tmp_path, small_files_only, surfaces_at):
    small, large = {"w": np.ones(8)}, {"w": np.random.default_rng(0).normal(size=40_000)}
    checkpoints = open_(tmp_path / "checkpoints", keep_last=1, asynchronous=surfaces_at != "inline")
    checkpoints.save(1, small)
    checkpoints.wait()
    small_files_only(True)
    with pytest.raises(StorageError, match=r"step 2 can't be written to .*: File too large; the older ones") as raised:
        checkpoints.save(2, large)
        if surfaces_at == "exit":
            with checkpoints:
                pass
        calls = {"wait": checkpoints.wait, "close": checkpoints.close}
        calls["save"] = lambda: checkpoints.save(3, small)
        calls["restore"] = lambda: checkpoints.restore(small)
        calls[surfaces_at]()
    small_files_only(False)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "LEDGER.json"]
    if surfaces_at not in ("close", "exit"):
        checkpoints.save(3, large)
        checkpoints.close()
    with open_(tmp_path / "checkpoints") as checkpoints:
        step, expected = (1, small) if surfaces_at in ("close", "exit") else (3, large)
        restored = checkpoints.restore(template(expected))
        assert restored.step == step
        assert_same_bits(restored.payload, expected)


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_full_disk_while_committing(tmp_path, monkeypatch, call):
    payload = {"w": np.ones(8)}

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with open_(tmp_path / "checkpoints", keep_last=1) as checkpoints:
        checkpoints.save(1, payload)
        checkpoints.wait()
        monkeypatch.setattr(os, call, full)
        checkpoints.save(2, payload)
        with pytest.raises(StorageError, match=r"step 2 can't be written to .*: No space left on device"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.restore(payload).step in (1, 2)
        checkpoints.save(3, payload)
        checkpoints.wait()
        assert checkpoints.steps() == [3]


def test_a_failed_save_does_not_hide_the_error_under_way(tmp_path, small_files_only, caplog):
    large = {"w": np.random.default_rng(0).normal(size=40_000)}
    with pytest.raises(ZeroDivisionError), open_(tmp_path / "checkpoints") as checkpoints:
        small_files_only(True)
        checkpoints.save(1, large)
        raise ZeroDivisionError
    assert "File too large" in caplog.text
    small_files_only(False)
    with open_(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(large) is None


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for directory in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "deeper"):
        for call in (lambda it: it.save(1, {"w": np.ones(3)}), lambda it: it.restore({"w": np.ones(3)})):
            with open_(directory) as checkpoints, pytest.raises(StorageError, match=r"can't be written: .*; use"):
                call(checkpoints)


SHARDED = """
import logging, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxvision.engine.checkpoint import Checkpoints
logging.basicConfig(level=logging.INFO)
logging.getLogger("jax").setLevel(logging.WARNING)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
split, copied, other = NamedSharding(mesh, P("data")), NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
host = {"a": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32), "b": np.arange(128).reshape(8, 16) % 7}
host["b"] = host["b"].astype(jnp.int4)
step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), tree), donate_argnums=0)
with Checkpoints(sys.argv[1], keep_last=3, keep_best=0) as checkpoints:
    for number, saved in enumerate((split, copied, other)):
        state = jax.device_put(host, saved)
        checkpoints.save(number, state)
        step(state)
    for number in range(3):
        for wanted in (split, copied, other, jax.sharding.SingleDeviceSharding(jax.devices()[5])):
            template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wanted), host)
            checkpoints.wait()
            loaded = checkpoints.load(number, template).payload
            for name, leaf in loaded.items():
                assert leaf.sharding == wanted and leaf.dtype == host[name].dtype
                assert np.asarray(leaf).tobytes() == host[name].tobytes()
            after = step(loaded)
            assert (np.asarray(after["a"]) == host["a"] + 1).all()
    assert checkpoints.restore(template).step == 2
"""


def run(script, *arguments, **variables):
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_shardings_of_eight_devices_and_no_output(tmp_path):
    child = run(SHARDED, tmp_path / "checkpoints", **environment(8))
    output, _ = child.communicate(timeout=200)
    assert (child.returncode, output) == (0, "")


TWO_PROCESSES = """
import os, sys
import jax, numpy as np
me, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=me)
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxvision.core.errors import ConfigError, StorageError
from jaxvision.engine import checkpoint
from jaxvision.engine.checkpoint import Checkpoints
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
copied, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
host = {"w": np.arange(12, dtype=np.float32), "s": np.arange(8, dtype=np.int32).reshape(4, 2)}
shardings = {"w": copied, "s": split}
def build(factor):
    make = jax.make_array_from_callback
    return {k: make(v.shape, shardings[k], lambda i, v=v: (v * factor)[i]) for k, v in host.items()}
def template(swap=False):
    wanted = {"w": copied, "s": copied} if swap else shardings
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=wanted[k]) for k, v in host.items()}
def local(array):
    return [(s.index, np.asarray(s.data)) for s in array.addressable_shards]
with Checkpoints(directory, keep_last=2, keep_best=0) as checkpoints:
    assert checkpoints.restore(template()) is None
    for step in (1, 2, 3):
        checkpoints.save(step, build(step), score=float(step), meta={"rows": step})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3] and checkpoints.best_step() == 3
    checkpoints.wait()  # both have looked
    if me == 0:
        os.remove(os.path.join(directory, "3", "manifest", "metadata"))
    for swap in (False, True):
        restored = checkpoints.restore(template(swap))
        assert restored.step == 2 and restored.meta == {"rows": 2}
        for name, array in restored.payload.items():
            for index, data in local(array):
                assert (data == (host[name] * 2)[index]).all()
    try:
        checkpoints.restore({"w": template()["w"]})
        raise SystemExit("no error")
    except ConfigError as error:
        assert "'s'" in str(error)
    def fail(*arguments):
        raise OSError(28, "No space left on device")
    if me == 0:
        checkpoint._write_folder = fail
    checkpoints.save(3, build(3))
    try:
        checkpoints.wait()
        raise SystemExit("no error")
    except StorageError as error:
        assert ("No space left" in str(error)) == (me == 0), error
print("done", me)
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [run(TWO_PROCESSES, me, port, tmp_path / "checkpoints") for me in range(2)]
    try:
        outputs = [child.communicate(timeout=100)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert [child.returncode for child in children] == [0, 0], outputs
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["step_3"]


def test_absl_and_root_loggers_are_left_alone(tmp_path):
    before = [(logger.level, list(logger.filters), list(logger.handlers)) for logger in _foreign_loggers()]
    with open_(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)})
        checkpoints.restore({"w": np.ones(3)})
    after = [(logger.level, list(logger.filters), list(logger.handlers)) for logger in _foreign_loggers()]
    assert before == after


def _foreign_loggers():
    return logging.getLogger(), logging.getLogger("absl")
