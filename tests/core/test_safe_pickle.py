"""Nothing that a pickle names runs, whatever opcode names it; damage and huge claims end in one DataError."""

import contextlib
import copyreg
import io
import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest

from jaxvision.core import numpy_pickle, safe_pickle
from jaxvision.core.errors import DataError
from jaxvision.core.numpy_pickle import load_numpy_dict


class _Call:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self._what = (function, args)

    def __reduce__(self):
        return self._what


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _attacks(mark: str) -> dict[str, bytes]:
    """Pickles that make the file ``mark`` when the ordinary reader reads them."""
    command = f"touch '{mark}'"
    code = f"open({mark!r}, 'w').close()"
    call_args = b"(" + _text(command) + b"t"
    attacks = {f"reduce{n}": pickle.dumps(_Call(os.system, command), protocol=n) for n in range(6)}
    attacks |= {
        "eval": pickle.dumps({"a": [_Call(eval, code)]}),
        "exec": pickle.dumps(_Call(exec, code), protocol=0),
        "inst": b"(S'" + command.encode().replace(b"'", b'"') + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + _text(command) + b"o.",
        "global": b"cos\nsystem\n" + call_args + b"R.",
        "stack_global": b"\x80\x04" + _text("os") + _text("system") + b"\x93" + call_args + b"R.",
        "dotted": b"\x80\x04" + _text("builtins") + _text("eval.__call__") + b"\x93(" + _text(code) + b"tR.",
        "memo": b"cos\nsystem\nq\x00" + call_args + b"R0h\x00" + call_args + b"R.",
        "in_array_arguments": pickle.dumps(_Call(np.array, _Call(os.system, command))),
        "in_reconstruct": (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\ncos\nsystem\n" + call_args + b"RC\x01btR."
        ),
        "in_array_state": (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01cos\nsystem\n"
            + call_args
            + b"RttC\x00tb."
        ),
        "setstate": pickle.dumps(_SetState(code)),
        "as_key": b"}cos\nsystem\n" + call_args + b"RNs.",
    }
    return attacks


class _SetState:
    """BUILD calls ``__setstate__``, here of an object whose class runs code in it."""

    def __init__(self, code):
        self.code = code

    def __setstate__(self, state):
        exec(state["code"])


NAMES = sorted(_attacks("x"))


@pytest.mark.parametrize("name", NAMES)
def test_attack_is_refused_and_nothing_runs(name, tmp_path):
    mark = tmp_path / "ran"
    path = tmp_path / "data.pkl"
    path.write_bytes(_attacks(str(mark))[name])
    with pytest.raises(DataError) as error:
        load_numpy_dict(path)
    assert not mark.exists()
    assert str(path) in str(error.value) and "refused" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_attack_is_inert_where_unknown_names_are_skipped(name, tmp_path):
    mark = tmp_path / "ran"
    numpy = numpy_pickle.NumpyHandlers(1000)
    with contextlib.suppress(DataError):  # such as a place holder as a key
        safe_pickle.load(_attacks(str(mark))[name], allowed=numpy.allowed, build=numpy.build, skip_unknown=True)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["reduce0", "reduce5", "inst", "obj", "stack_global", "eval", "as_key"])
def test_the_ordinary_reader_would_run_them(name, tmp_path):
    """So that the tests above can fail."""
    mark = tmp_path / "ran"
    with contextlib.suppress(TypeError):
        pickle.loads(_attacks(str(mark))[name])
    assert mark.exists()


def test_message_names_what_was_asked():
    with pytest.raises(DataError, match=r"^weights\.pkl asks to run os\.system; refused$"):
        safe_pickle.load(b"cos\nsystem\n)R.", allowed={}, name="weights.pkl")


def test_message_is_safe_for_a_terminal():
    with pytest.raises(DataError) as error:
        safe_pickle.load(b"cos\x1b[2J\n" + b"s" * 5000 + b"\n.", allowed={})
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 300


def _handler(*args):
    return ["called", *args]


@pytest.mark.parametrize(
    "content",
    [
        b"cm\nf\n}X\x08\x00\x00\x00__code__Nsb.",  # BUILD with a state: attributes of the handler
        b"cm\nf\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.",  # BUILD with a slot state
        b"cm\nf\n)R}X\x01\x00\x00\x00aNsb.",  # attributes of what the handler made
        b"cm\nf\nNNs.",  # an item of the handler
        b"cm\nf\nNa.",
        b"]N)R.",  # calls something that is no name
        b"]X\x01\x00\x00\x00aNs.",  # an item of a list by name
        b"X\x01\x00\x00\x00a)R.",
        b"\x80\x02cm\nf\n)}X\x01\x00\x00\x00aNs\x92.",  # keywords
    ],
)
def test_handlers_cant_be_changed_or_called_otherwise(content):
    before = (_handler.__code__, _handler.__defaults__, dict(vars(_handler)))
    with pytest.raises(DataError):
        safe_pickle.load(content, allowed={("m", "f"): _handler})
    assert (_handler.__code__, _handler.__defaults__, dict(vars(_handler))) == before


def test_allowed_names_call_their_handler():
    allowed = {("m", "f"): _handler, ("m", "c"): "constant"}
    for content in (b"cm\nf\n(K\x01cm\nc\ntR.", b"(K\x01cm\nc\nim\nf\n.", b"(cm\nf\nK\x01cm\nc\no."):
        assert safe_pickle.load(content, allowed=allowed) == ["called", 1, "constant"]


def test_extension_codes_are_refused(tmp_path):
    mark = tmp_path / "ran"
    copyreg.add_extension("os", "system", 241)
    try:
        content = b"\x82\xf1(" + _text(f"touch '{mark}'") + b"tR."
        pickle.loads(content)
        assert mark.exists()  # and now the function is in copyreg's cache, which find_class never sees
        mark.unlink()
        with pytest.raises(DataError, match="refused"):
            safe_pickle.load(content, allowed={})
        assert not mark.exists()
    finally:
        copyreg.remove_extension("os", "system", 241)


def test_persistent_ids_need_a_loader():
    content = _text("id") + b"Q."
    with pytest.raises(DataError, match="from outside; refused"):
        safe_pickle.load(content, allowed={})
    assert safe_pickle.load(content, allowed={}, persistent_load=lambda pid: pid + "!") == "id!"


HUGE = {
    "memo": b"Nr\xfe\xff\xff\x7f.",
    "bytes": b"\x8e" + struct.pack("<Q", 1 << 60) + b"abc.",
    "bytes4": b"B" + struct.pack("<I", 0xFFFFFFF0) + b"abc.",
    "string": b"T" + struct.pack("<i", 0x7FFFFFF0) + b"abc.",
    "text": b"\x8d" + struct.pack("<Q", 1 << 60) + b"abc.",
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "integer": b"\x8b" + struct.pack("<i", 0x7FFFFFF0) + b"\x01.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "array": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftC\x01btR"
        b"(K\x01(J\xff\xff\xff\x7ft" + b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR\x89C\x03abctb."
    ),
    "again_and_again": (
        b"(" + _text("x" * 100_000) + b"q\x00" + b"c_codecs\nencode\nq\x01" + b"h\x01(h\x00U\x06latin1tR" * 1000 + b"t."
    ),
}


@pytest.mark.parametrize("name", sorted(HUGE))
@pytest.mark.parametrize("as_file", [False, True])
def test_huge_claims_allocate_little(name, as_file, tmp_path):
    path = tmp_path / "data.pkl"
    path.write_bytes(HUGE[name])
    numpy = numpy_pickle.NumpyHandlers(len(HUGE[name]))
    tracemalloc.start()
    try:
        with open(path, "rb") as file:
            content = file if as_file else HUGE[name]
            safe_pickle.load(content, allowed=numpy.allowed, build=numpy.build, encoding="bytes")
    except DataError:
        pass
    else:
        assert name in ("memo", "frame")  # harmless claims
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_keys_that_take_forever_to_hash_are_refused():
    nested = b")" + b"2\x86" * 60  # a pair of itself, 60 times: 2**60 leaves
    started = time.monotonic()
    for content in (b"}" + nested + b"Ns.", b"\x8f(" + nested + b"\x90.", b"(" + nested + b"\x91."):
        with pytest.raises(DataError, match="can't be a key"):
            safe_pickle.load(content, allowed={})
    assert time.monotonic() - started < 2


def test_short_flat_tuples_are_keys():
    value = {("cifar10", 777): 1, (): {(1, None, b"x")}}
    assert safe_pickle.load(pickle.dumps(value, 4), allowed={}) == value
    for key in (("a",) * 5, ((1,),)):
        with pytest.raises(DataError, match="a tuple can't be a key"):
            safe_pickle.load(pickle.dumps({key: 1}, 4), allowed={})


def test_containers_read_as_they_were():
    value = {"a": [1, 2.5, None, True, -3, 10**30], b"b": (1, (2,), ()), 3: {"x": {1, 2}}, None: frozenset({"y"})}
    for protocol in range(2, 6):
        allowed = {("builtins", "set"): set, ("__builtin__", "set"): set}
        allowed |= {(m, "frozenset"): frozenset for m in ("builtins", "__builtin__")}
        allowed["_codecs", "encode"] = lambda text, encoding: text.encode(encoding)
        assert safe_pickle.load(pickle.dumps(value, protocol=protocol), allowed=allowed) == value


def test_several_pickles_in_one_file_are_read_one_by_one():
    file = io.BytesIO(b"skip" + pickle.dumps([1]) + pickle.dumps({"a": 2}) + b"rest")
    file.seek(4)
    assert safe_pickle.load(file, allowed={}) == [1]
    assert safe_pickle.load(file, allowed={}) == {"a": 2}
    assert file.read() == b"rest"


def test_placeholders_keep_what_the_file_gave():
    content = (
        b"}" + _text("args") + b"clab.tools\nOptions\n(K\x07tR}" + _text("lr") + b"G?\xb9\x99\x99\x99\x99\x99\x9asbs."
    )
    found = safe_pickle.load(content, allowed={}, skip_unknown=True)["args"]
    assert (found.name, found.args, found.state) == ("lab.tools.Options", (7,), {"lr": 0.1})
    assert repr(found) == "Placeholder(lab.tools.Options)"


# numpy


def _python2_batch() -> tuple[bytes, np.ndarray]:
    """A batch as Python 2 wrote it: protocol 2, byte strings, numpy.core names, as in the CIFAR archives."""
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    string = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85" + string(b"b") + b"\x87R"
        b"(K\x01K\x03K\x04\x86cnumpy\ndtype\n"
        + string(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + string(pixels.tobytes())
        + b"tb"
    )
    names = b"](" + string(b"a.png") + string(b"b.png") + b"e"
    content = (
        b"\x80\x02}q\x01("
        + (string(b"data") + array + string(b"labels") + b"](K\x06K\x09K\x00e" + string(b"filenames") + names)
        + b"u."
    )
    return content, pixels


def test_python2_batch(tmp_path):
    content, pixels = _python2_batch()
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    for batch in (load_numpy_dict(path), load_numpy_dict(content)):
        assert list(batch) == ["data", "labels", "filenames"]
        np.testing.assert_array_equal(batch["data"], pixels)
        assert batch["data"].dtype == np.uint8 and batch["data"].flags.owndata and batch["data"].flags.writeable
        assert batch["labels"] == [6, 9, 0] and batch["filenames"] == [b"a.png", b"b.png"]


@pytest.mark.parametrize("protocol", range(5))
def test_arrays_of_this_numpy(protocol):
    value = {
        "c": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 2j]),
        "empty": np.zeros((0, 3), np.float32),
        "number": np.float32(1.5),
        "large": np.random.default_rng(0).integers(0, 256, 300_000, np.uint8),
    }
    found = load_numpy_dict(pickle.dumps(value, protocol=protocol))
    assert list(found) == list(value)
    for key, array in value.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    "value", [np.array([os.system], object), np.zeros(2, [("a", "f4")]), np.array(["text"]), np.zeros(2, "M8[s]")]
)
def test_arrays_of_other_things_are_refused(value):
    with pytest.raises(DataError):
        load_numpy_dict(pickle.dumps({"a": value}, protocol=2))


def test_an_array_cant_be_filled_twice():
    content, _ = _python2_batch()
    start = content.index(b"(K\x01K\x03K\x04")
    end = content.index(b"tb", content.index(b"\x89")) + 2
    with pytest.raises(DataError, match="filled twice"):
        load_numpy_dict(content[:end] + content[start:end] + content[end:])


def test_other_content_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds a list, not a dictionary"):
        load_numpy_dict(pickle.dumps([1]))
    with pytest.raises(DataError, match=r"nowhere\.pkl can't be read: No such file"):
        load_numpy_dict(tmp_path / "nowhere.pkl")
    with pytest.raises(DataError, match=r"it is damaged or of another kind"):
        load_numpy_dict(b"<html>404</html>")
    with pytest.raises(DataError):
        load_numpy_dict(b"")


def test_damage_never_ends_in_another_error():
    content, _ = _python2_batch()
    for end in range(len(content)):
        with pytest.raises(DataError):
            load_numpy_dict(content[:end])
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(content)
        for place in draw.integers(len(content), size=draw.integers(1, 4)):
            damaged[place] = draw.integers(256)
        try:
            load_numpy_dict(bytes(damaged))
        except DataError:
            refused += 1
    assert refused > 1000
