"""Images inside archives: tar (of class folders, of one class each, or WebDataset samples) and EDM's dataset zip.

Archives are read in place, an image by its offset, so an encode may ask for them in any order; compressed tars have no
offsets and are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from hpc_gen.data.archive_ends import bytes_after_zip, first_byte_after_tar
from hpc_gen.data.images import IMAGE_SUFFIXES
from hpc_gen.runtime.errors import DataError, UserError, reason
from shard_tools.split import SPLIT_NAMES, TRAIN, Source, Split

LISTING = "dataset.json"  # of an EDM zip: {"labels": [[name, number], ...]} or {"labels": null}


@dataclass(frozen=True)
class Member:
    """One file inside a tar: which tar, its name there, and where its bytes lie."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes. Raises DataError when the tar is shorter than it was."""
        try:
            with self.tar.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise DataError(f"{self.tar}: {self.name} cannot be read ({error.strerror})") from error
        if len(data) != self.size:
            raise DataError(f"{self.tar}: {self.name} is cut short")
        return data


def tar_members(path: Path) -> list[Member]:
    """Every file of an uncompressed tar, in order. Raises DataError when it is damaged, cut short or compressed."""
    members: list[Member] = []
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.isreg():
                    members.append(Member(path, entry.name.removeprefix("./"), entry.offset_data, entry.size))
            end = archive.offset
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b" or path.suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst")
        fix = "it is compressed: unpack it to a plain .tar, which has offsets" if packed else "fetch it again"
        raise DataError(f"{path} cannot be read as a tar ({error}); {fix}") from error
    if members and members[-1].offset + members[-1].size > size:
        raise DataError(f"{path} ends inside {members[-1].name}; it is cut short: fetch it again")
    if not members:
        raise DataError(f"{path} holds no file; fetch it again")
    _check_end(path, end)
    return members


def _check_end(path: Path, end: int) -> None:
    """Raise DataError unless the end mark stands where tarfile stopped: it takes a damaged header for the end."""
    with path.open("rb") as stream:
        stream.seek(end)
        block = stream.read(tarfile.BLOCKSIZE)
        more = first_byte_after_tar(stream, end)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} has no end mark; it is cut short: fetch it again")
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged at byte {end:,}, where a header should stand; fetch it again")
    if more is not None:
        raise DataError(
            f"{path} has its end mark at byte {end:,} and more at byte {more:,}: of tars put together only the first "
            "would be read; give them as separate files"
        )


def open_tar(path: Path, background: Sequence[int]) -> Source:
    """A .tar, or a folder of them (below train/ and validation/ or val/ where it has these).

    Classes: the number in KEY.cls beside KEY.jpg (WebDataset), else the first folder inside the tar, else the name of
    the tar itself (the layout of ImageNet). A first folder train, validation or val names the split.
    """
    found: dict[str, list[Member]] = {}
    for split, tar in _tars(path):
        for member in tar_members(tar):
            head, _, rest = member.name.partition("/")
            named = SPLIT_NAMES.get(head) if rest else None
            inner = member if named is None else Member(tar, rest, member.offset, member.size)
            found.setdefault(named or split, []).append(inner)
    content = hashlib.sha256()
    images: dict[str, list[Member]] = {}
    skipped: Counter[str] = Counter()
    for split, members in sorted(found.items()):
        images[split] = [member for member in members if _is_image(member.name)]
        others = [member for member in members if not _is_image(member.name)]
        skipped["not an image file"] += sum(not _is_label(member.name) for member in others)
        for member in members:
            content.update(f"{split}/{member.name} {member.size}\n".encode())
    by_key = {_key(member): member for members in found.values() for member in members if _is_label(member.name)}
    if not by_key:
        images = _without_common_folder(images)
    classes_of = {split: [_class_of(member, by_key) for member in members] for split, members in images.items()}
    names, numbers = _numbered({each for classes in classes_of.values() for each in classes}, bool(by_key), path)
    splits: dict[str, Split] = {}
    for split, members in images.items():
        labels = [numbers[each] for each in classes_of[split]]
        ids = [f"{split}/{member.tar.stem}/{member.name}" for member in members]
        splits[split] = Split.of_files(ids, labels, _reader(members), background)
    return Source("tar", names, splits, content.hexdigest(), {name: n for name, n in skipped.items() if n})


def _without_common_folder(images: dict[str, list[Member]]) -> dict[str, list[Member]]:
    """Names without the folder in which the whole of a tar was packed, as in "my_set/cat/1.png"."""
    names = [member.name for own in images.values() for member in own]
    heads = {name.split("/", 1)[0] if name.count("/") > 1 else None for name in names}
    if len(heads) != 1 or None in heads:
        return images
    return {split: [replace(m, name=m.name.split("/", 1)[1]) for m in own] for split, own in images.items()}


def _tars(path: Path) -> list[tuple[str, Path]]:
    """(split, tar) of a file or a folder, sorted."""
    if path.is_file():
        return [(TRAIN, path)]
    found = [(SPLIT_NAMES[name], tar) for name in sorted(SPLIT_NAMES) for tar in sorted((path / name).glob("*.tar"))]
    found += [(TRAIN, tar) for tar in sorted(path.glob("*.tar"))]
    if not found:
        raise UserError(f"{path} has no .tar files (nor in {path}/train/); check encode.source_path")
    return found


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _is_label(name: str) -> bool:
    return name.endswith(".cls")


def _key(member: Member) -> tuple[Path, str]:
    """What the files of one WebDataset sample share: the tar, and the path up to the first dot of the file's name."""
    folder, _, file = member.name.rpartition("/")
    return member.tar, f"{folder}/{file.partition('.')[0]}"


def _class_of(member: Member, labels: dict[tuple[Path, str], Member]) -> str:
    if labels:
        label = labels.get(_key(member))
        if label is None:
            raise DataError(f"{member.tar}: {member.name} has no label beside it (.cls), others have; fetch it again")
        text = label.read().decode("ascii", "replace").strip()
        if not text.isdecimal():
            raise DataError(f"{label.tar}: {label.name} holds {text[:20]!r}, not the number of a class")
        return text
    return member.name.partition("/")[0] if "/" in member.name else member.tar.stem


def _numbered(classes: set[str], are_numbers: bool, path: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    """Names of all classes, and the number of each; numbers keep themselves."""
    if not classes:
        raise UserError(f"{path} holds no images; check encode.source_path")
    if are_numbers:
        names = tuple(str(number) for number in range(max(int(each) for each in classes) + 1))
        return names, {each: int(each) for each in classes}
    names = tuple(sorted(classes))
    return names, {name: number for number, name in enumerate(names)}


def _reader(members: list[Member]) -> Callable[[int], bytes]:
    return lambda i: members[i].read()


def open_edm_zip(path: Path, background: Sequence[int]) -> Source:
    """The zip of EDM's dataset tool: images sorted by name, labels in dataset.json or none (specs/gdd.md section 7).

    Without labels all images are of one class, "all". `path`: the zip, or a folder that holds one.
    """
    if path.is_dir():
        zips = sorted(path.glob("*.zip"))
        if len(zips) != 1:
            raise UserError(f"{path} holds {len(zips)} zip files; name one in encode.source_path")
        path = zips[0]
    try:
        archive = zipfile.ZipFile(path)
        with path.open("rb") as stream:
            more = bytes_after_zip(stream)
        listing = json.loads(archive.read(LISTING)) if LISTING in archive.namelist() else {"labels": None}
        entries = sorted((info for info in archive.infolist() if _is_image(info.filename)), key=lambda i: i.filename)
    except Exception as error:  # zipfile, zlib and json raise a dozen kinds for damaged files
        raise DataError(f"{path} cannot be read as a data set zip ({reason(error)}); make it again") from error
    if more:
        raise DataError(f"{path} has {more:,} bytes after the end of the zip; make it again")
    if not entries:
        raise DataError(f"{path} holds no images; make it again")
    names = [info.filename for info in entries]
    labels = _edm_labels(path, listing, names)
    content = hashlib.sha256()
    for info, label in zip(entries, labels, strict=True):
        content.update(f"{info.filename} {info.CRC:08x} {label}\n".encode())
    classes = tuple(str(number) for number in range(max(labels) + 1)) if listing["labels"] is not None else ("all",)
    others = sum(not info.is_dir() for info in archive.infolist()) - len(entries) - (LISTING in archive.namelist())
    splits = {TRAIN: Split.of_files(names, labels, _zip_reader(archive, path, names), background)}
    return Source("edm_zip", classes, splits, content.hexdigest(), {"not an image file": others} if others else {})


def _edm_labels(path: Path, listing: object, names: list[str]) -> list[int]:
    """The label of every image. Raises DataError when dataset.json does not give one number for each."""
    given = listing.get("labels", listing) if isinstance(listing, dict) else listing
    if given is None:
        return [0] * len(names)
    try:
        numbers = {str(name): int(number) for name, number in given}
        labels = [numbers[name] for name in names]
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: {LISTING} does not give one class number for each image ({error!r}); make it again"
        ) from error
    if min(labels) < 0:
        raise DataError(f"{path}: {LISTING} has the label {min(labels)}; class numbers begin at 0")
    return labels


def _zip_reader(archive: zipfile.ZipFile, path: Path, names: list[str]) -> Callable[[int], bytes]:
    lock = threading.Lock()
    owner = os.getpid()
    opened = {owner: archive}  # a file position must not be shared with a forked process

    def read(i: int) -> bytes:
        try:
            with lock:
                mine = opened.get(os.getpid()) or opened.setdefault(os.getpid(), zipfile.ZipFile(path))
                return mine.read(names[i])
        except Exception as error:  # zipfile and zlib raise a dozen kinds for damaged files
            raise DataError(f"{path}: {names[i]} cannot be read ({reason(error)})") from error

    return read
