"""Files out of what people download, a folder, a tar or a zip, under names of our choice; and its checksum."""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxvision.core.errors import DataError
from jaxvision.data.prepare_files import digest, member_path, open_tar, read_bytes
from jaxvision.data.prepare_journal import Item
from jaxvision.data.trees import hidden

_END = bytes(tarfile.BLOCKSIZE)
_MAX_FILE = 1 << 28  # bytes; the largest file of a data set that comes file by file has 15 MB

Select = Callable[[PurePosixPath], str | None]
"""The name below the target of a file of the source, or None for one that isn't needed."""


def tar_members(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, each with a safe name; and the check that the archive doesn't end too early."""
    try:
        for member in archive:
            path = member_path(name, member)
            if member.isfile() and not path.name.startswith("."):
                yield member
        archive.fileobj.seek(archive.offset)
        end = archive.fileobj.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} is damaged ({error}); download it again") from error
    if end != _END:
        raise DataError(f"{name} has no end mark: it was cut short or is damaged; download it again")


def archive_items(source: Path, select: Select) -> Iterator[Item]:
    """The selected files of a folder, of a tar (compressed or not) or of a zip, in the order in which they lie there.

    Raises:
      DataError: the source is missing or damaged, or holds what leads out of its folder.
    """
    if source.is_dir():
        yield from _folder_items(source, select)
    elif not source.is_file():
        raise DataError(f"{source} doesn't exist; give the archive or the folder unpacked from it")
    elif zipfile.is_zipfile(source):
        yield from _zip_items(source, select)
    else:
        yield from _tar_items(source, select)


def check_official(path: Path, md5: str, archives: dict[str, str], allow_other: bool) -> bool:
    """Whether the MD5 is one of the official files', by name.

    Raises:
      DataError: it isn't and ``allow_other`` is False.
    """
    official = md5 in archives.values()
    if not official and not allow_other:
        names = " or ".join(archives)
        raise DataError(
            f"{path} has MD5 {md5}, the official file {' or '.join(archives.values())}: download {names} again, "
            "or give --allow_other if it is meant to be another one"
        )
    return official


def describe_source(source: Path, archives: dict[str, str], allow_other: bool) -> dict[str, Any]:
    """A manifest's entry for the source: an archive's digest and whether it is the official one; a folder's name.

    Raises:
      DataError: as :func:`check_official`.
    """
    if not source.is_file():
        return {"name": source.name, "sha256": None, "official": None}
    official = check_official(source, digest(source, "md5"), archives, allow_other)
    return {"name": source.name, "sha256": digest(source), "official": official}


def _folder_items(source: Path, select: Select) -> Iterator[Item]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} can't be listed: {error.strerror}") from error

    for current, below, names in os.walk(source, onerror=fail, followlinks=True):
        below[:] = sorted(name for name in below if not hidden(name))
        for name in sorted(names):
            file = Path(current) / name
            chosen = None if hidden(name) else select(PurePosixPath(file.relative_to(source).as_posix()))
            if chosen is not None:
                yield Item(chosen, _size(file), lambda file=file: read_bytes(file), str(file))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from error


def _tar_items(source: Path, select: Select) -> Iterator[Item]:
    with open_tar(source) as archive:
        for member in tar_members(archive, str(source)):
            chosen, origin = select(member_path(str(source), member)), f"{source}:{member.name}"
            if chosen is None:
                continue
            _check_size(origin, member.size)

            def read(member: tarfile.TarInfo = member, origin: str = origin) -> bytes:
                try:
                    return archive.extractfile(member).read()
                except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                    raise DataError(f"{origin} can't be read ({error}); download the archive again") from error

            yield Item(chosen, member.size, read, origin)


def _zip_items(source: Path, select: Select) -> Iterator[Item]:
    damaged = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error)
    try:
        archive = zipfile.ZipFile(source)
    except damaged as error:
        raise DataError(f"{source} is damaged ({error}); download it again") from error
    with archive:
        for member in archive.infolist():
            path, origin = PurePosixPath(member.filename), f"{source}:{member.filename}"
            if path.is_absolute() or ".." in path.parts:
                raise DataError(f"{source} holds {member.filename!a}, which leads out of its folder; refused")
            chosen = None if member.is_dir() or any(map(hidden, path.parts)) else select(path)
            if chosen is None:
                continue
            _check_size(origin, member.file_size)

            def read(member: zipfile.ZipInfo = member, origin: str = origin) -> bytes:
                try:
                    return archive.read(member)
                except damaged as error:
                    raise DataError(f"{origin} can't be read ({error}); download the archive again") from error

            yield Item(chosen, member.file_size, read, origin)


def _check_size(origin: str, size: int) -> None:
    if size > _MAX_FILE:
        raise DataError(f"{origin} has {size} bytes, more than any file of the data set; give the official archive")
