"""Will it fit? Bytes and files that a stage is going to write, against what the file system has left.

Asked before a stage starts (`data.forecast`) and shown by `status` and --dry-run. Forecasts are about right, not exact:
they keep a stage of days from starting on a disk that has room for hours. Quotas of users and groups are not seen by
the system call behind it (statvfs). Starts no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hpc_gen.config import yaml_tree
from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.progress import count, format_bytes
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import save_interval
from hpc_gen.stages.units import Ledger
from hpc_gen.training.checkpoint import manifest

if TYPE_CHECKING:
    from torch import nn

    from hpc_gen.config.experiment import Experiment, TrainConfig
    from hpc_gen.methods.protocol import Method

NO_ROOM = "are free; free space"  # how the sentence of a refusal can be told
LOW_SHARE = 0.1  # of the file system; less than that left is worth a line
PNG_SHARE = 0.75  # of the raw bytes of an image; photographs take about that, noise all of them
FEATURE_BYTES = 4 * (2048 + 1008 + 2)  # per image where features are kept in its place: Inception's, hash and number
FILES_PER_CHECKPOINT = 3  # folder, manifest, metadata; one more per rank

ADVICE = {
    "encode": "encode fewer rows (encode.limit)",
    "train": "keep fewer checkpoints (train.keep_last, train.keep_every)",
    "sample": "draw fewer images (sample.num_images)",
}


@dataclass(frozen=True)
class Need:
    """What a stage is going to write: `bytes` None = nobody can tell yet."""

    bytes: int | None
    files: int


@dataclass(frozen=True)
class Room:
    """What a file system has left for this user, and its size; None: it does not limit the number of files."""

    free_bytes: int
    total_bytes: int
    free_files: int | None
    total_files: int | None


@runtime_checkable
class Forecasts(Protocol):
    """A worker of units that can tell what it is going to write."""

    def forecast(self) -> Need:
        """What is left to be written, and nothing is changed."""
        ...


def room(folder: Path) -> Room:
    """What is left where `folder` lies, or will lie."""
    while not folder.is_dir():
        folder = folder.parent
    found = os.statvfs(folder)
    limited = found.f_files > 0  # btrfs and some network file systems make files as they are needed
    return Room(
        free_bytes=found.f_bavail * found.f_frsize,
        total_bytes=found.f_blocks * found.f_frsize,
        free_files=found.f_favail if limited else None,
        total_files=found.f_files if limited else None,
    )


def check(stage: str, need: Need, folder: Path, mode: str, say: Callable[[str], None]) -> None:
    """Refuse a stage that cannot fit, with a UserError, when `mode` is 'refuse'; 'warn' says it; 'off' does not look.

    What fits but leaves less than a tenth of the file system is said in both modes.
    """
    if mode == "off":
        return
    here = room(folder)
    lacks_bytes = need.bytes is not None and need.bytes > here.free_bytes
    lacks_files = here.free_files is not None and need.files > here.free_files
    if lacks_bytes or lacks_files:
        left = format_bytes(here.free_bytes) if lacks_bytes or here.free_files is None else f"{here.free_files:,} files"
        sentence = (
            f"stage '{stage}' needs about {told(need)} in {folder}, but only {left} {NO_ROOM} (see "
            f"`hpc-gen gc`), or {ADVICE.get(stage, 'ask for less')}"
        )
        if mode == "refuse":
            raise UserError(f"{sentence}; data.forecast=warn starts it all the same")
        say(f"warning: {sentence}")
    elif low := _low(need, here):
        say(f"warning: stage '{stage}' will write about {told(need)}, which leaves {low} of the disk of {folder}")


def _low(need: Need, here: Room) -> str | None:
    """What remains afterwards, when that is less than a tenth of the whole."""
    left = here.free_bytes - (need.bytes or 0)
    if left < LOW_SHARE * here.total_bytes:
        return f"{left / here.total_bytes:.0%}"
    if here.free_files is not None and here.total_files is not None:
        files = here.free_files - need.files
        if files < LOW_SHARE * here.total_files:
            return f"{files / here.total_files:.0%} of the files"
    return None


def told(need: Need) -> str:
    """In words: "12.0 GB and 50,000 files"."""
    files = count(need.files, "file")
    return files if need.bytes is None else f"{format_bytes(need.bytes)} and {files}"


def line(stage: str, need: Need, folder: Path) -> str:
    """A forecast beside what is free, for `status` and --dry-run."""
    here = room(folder)
    unknown = " (how large is not known yet)" if need.bytes is None else ""
    files = f" and {here.free_files:,} files" if here.free_files is not None else ""
    return f"{stage} will write about {told(need)}{unknown}; {format_bytes(here.free_bytes)}{files} are free"


# ---------------------------------------------------------------- stages


def checkpoint_bytes(method: Method, modules: Mapping[str, nn.Module], num_averages: int) -> int:
    """Bytes of one checkpoint: weights and buffers; for what is trained two moments and each average, in fp32."""
    total = 0
    for role, module in modules.items():
        total += sum(value.numel() * value.element_size() for value in module.state_dict().values())
        if method.parameter_groups(role):
            parameters = list(module.parameters())
            total += 8 * sum(p.numel() for p in parameters if p.requires_grad)
            total += 4 * num_averages * sum(p.numel() for p in parameters)
    return total


def train_need(run: RunFolder, config: TrainConfig, size: int | None = None) -> Need | None:
    """What is left to write of the checkpoints that training keeps, one more in flight included.

    `size`: bytes of one checkpoint, None = that of the newest one; None is returned when there is none either, or
    nothing is left to train.
    """
    existing = _checkpoints(run)
    newest = max(existing, default=None)
    if size is None and newest is None:
        return None
    size = existing[newest] if size is None and newest is not None else size
    assert size is not None
    if newest is not None and newest >= config.end_images:
        return None
    kept = set(range(0, config.end_images + 1, config.keep_every)[1:]) if config.keep_every else set()
    step, end = config.save_every or save_interval.first(config), config.end_images
    last = {end, *range(end - end % step, 0, -step)[: config.keep_last]}
    number = len(kept | set(sorted(last)[-config.keep_last :])) + (config.validate is not None) + 1
    missing = max(1, number - len(existing))
    return Need(missing * size, missing * (FILES_PER_CHECKPOINT + config.ranks))


def _checkpoints(run: RunFolder) -> dict[int, int]:
    """images_seen -> bytes of the committed checkpoints."""
    found: dict[int, int] = {}
    for path in run.checkpoints.iterdir() if run.checkpoints.is_dir() else ():
        if path.name.isdigit():
            try:
                facts = manifest.read(path)
            except DataError:
                continue  # `checkpoints verify` names it; it is not counted as kept
            found[facts.images_seen] = sum(int(file["bytes"]) for file in facts.files.values())
    return found


def sample_need(run: RunFolder, experiment: Experiment) -> Need | None:
    """What is left to write of the images; None without a section 'sample', or when all blocks are there."""
    config = experiment.sample
    if config is None:
        return None
    blocks = -(-config.num_images // config.block_images)
    folder = run.ledger("sample")
    done = sorted(folder.glob("*.json")) if folder.is_dir() else []
    left = blocks - min(blocks, len(done))
    if not left:
        return None
    images = min(config.num_images, left * config.block_images)
    output = getattr(config, "output", "png")  # runs of before it could be chosen
    if output == "features":
        each = _feature_bytes(run, done[0].stem, config.block_images) if done else FEATURE_BYTES
        return Need(int(each * images), 5 * left)  # features, block.json, ledger and folder
    each = _measured(run, done[0].stem) if done else _image_bytes(experiment)
    if output == "npz" and each is not None:
        each += _raw_bytes(experiment) or each  # all of them once more, uncompressed
    return Need(None if each is None else int(each * images), images + 3 * left)  # block.json, ledger and folder


def _feature_bytes(run: RunFolder, unit: str, images: int) -> float:
    """Bytes of the features of an image, by a block that is there."""
    try:
        record = Ledger(run.ledger("sample"), run.path).record_of(unit) or {"files": {}}
    except DataError:
        return FEATURE_BYTES
    return sum(int(file["bytes"]) for file in record["files"].values()) / images


def _measured(run: RunFolder, unit: str) -> float | None:
    """Bytes of an image of a block that is there; None when its record does not tell."""
    try:
        record = Ledger(run.ledger("sample"), run.path).record_of(unit) or {"files": {}}
    except DataError:
        return None  # the stage says so when it comes to the block
    sizes = [int(file["bytes"]) for file in record["files"].values()]
    return sum(sizes) / (len(sizes) - 1) if len(sizes) > 1 else None


def _image_bytes(experiment: Experiment) -> float | None:
    """About the bytes of an image, from its side and channels; None when the config does not tell them."""
    raw = _raw_bytes(experiment)
    return None if raw is None else PNG_SHARE * raw + 100  # a hundred bytes of framing


def _raw_bytes(experiment: Experiment) -> float | None:
    """Bytes of the pixels of an image in colour; None when the config does not tell them."""
    encode, method = experiment.encode, experiment.method
    side = encode.image_size if encode is not None else method.get("image_size")
    return 3.0 * side * side if isinstance(side, int) else None


def stage_need(run: RunFolder, experiment: Experiment, stage: str) -> tuple[Need, Path] | None:
    """What can be told of a stage from config and run folder alone, and where it goes; None = nothing, or not yet."""
    need: Need | None = None
    if stage == "train" and experiment.train is not None:
        need = train_need(run, experiment.train)
    elif stage == "sample":
        need = sample_need(run, experiment)
    return (need, run.path) if need is not None else None


def of_run(run: RunFolder) -> list[str]:
    """The forecasts for `status`, a line each: what can be told without the typed experiment, which takes its time."""
    try:
        tree = yaml_tree.parse(run.config_path.read_text(encoding="utf-8"), str(run.config_path))[0]
    except (OSError, ValueError, ConfigError):
        return []  # whoever starts a stage is told so; `status` has other things to say
    sections: dict[str, Any] = {"train": None, "sample": None, "encode": None, "method": {}}
    for name in ("train", "sample", "encode"):  # as it stands in a run folder, with every default filled in
        if isinstance(tree.get(name), dict):
            sections[name] = SimpleNamespace(**tree[name])
    if (train := sections["train"]) is not None:
        train.end_images = tree["train"].get("stop_at_images") or tree["train"].get("total_images")
    experiment: Any = SimpleNamespace(**{**sections, "method": tree.get("method") or {}})
    found = []
    for name in tree.get("stages") or ("train", "sample"):
        try:
            told_of = stage_need(run, experiment, str(name))
        except AttributeError:
            continue  # made by another version, whose config has other keys; the stage itself will look
        if told_of is not None:
            found.append(line(str(name), *told_of))
    return found
