"""What looks at images for the metrics: networks, and the features of blocks of images as files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hpc_gen.config.evaluate import SECOND_LOOKS, EvaluateConfig
from hpc_gen.metrics import statistics
from hpc_gen.metrics.extractors import Extractor, ExtractorSpec, joined
from hpc_gen.metrics.moments import check_finite
from hpc_gen.metrics.statistics import Statistics
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError
from hpc_gen.stages.networks import extractor_spec

MAIN = "main"


@dataclass
class Look:
    """One network, and the metrics that compare its features; `key` is the place of its name in the config."""

    key: str
    spec: ExtractorSpec
    metrics: tuple[str, ...]
    statistics: Statistics | None = None
    _network: Extractor | None = field(default=None, repr=False)

    @property
    def spatial(self) -> bool:
        """Whether the spatial features of sFID are kept, too."""
        return "sfid" in self.metrics

    @property
    def prefix(self) -> str:
        """What its units' names and folders begin with; a second network's weights are part of them."""
        return "" if self.key == MAIN else f"{self.key}-{digest_of(dict(self.spec.description))[:8]}-"

    def facts(self) -> dict[str, Any]:
        """What determines the features besides the images and the batches."""
        found: dict[str, Any] = {"extractor": dict(self.spec.description)}
        return {**found, "spatial": True} if self.spatial else found

    def network(self, device: torch.device) -> Extractor:
        """The network, built when the first block needs it."""
        if self._network is None:
            self._network = self.spec.built(device, self.spatial)
        return self._network


def looks_of(config: EvaluateConfig, workspace: Path) -> list[Look]:
    """The networks that the metrics of a section need, the main one first.

    Raises UserError or DataError for missing or wrong weights, and for statistics of another network.
    """
    found: list[Look] = []
    own = tuple(name for name in config.metrics if name not in SECOND_LOOKS)
    if own:
        chosen = config.extractor
        spec = extractor_spec(chosen.name, chosen.weights, chosen.sha256, workspace)
        if "sfid" in own:
            spec.describe_spatial()
        found.append(Look(MAIN, spec, own))
    for metric, key in SECOND_LOOKS.items():
        if metric not in config.metrics:
            continue
        second = getattr(config, key)
        spec = extractor_spec(second.name, second.weights, second.sha256, workspace)
        stored = None
        if second.statistics is not None:
            stored = statistics.read(workspace / second.statistics)
            statistics.check_extractor(stored, spec.description, workspace / second.statistics)
        found.append(Look(key, spec, (metric,), stored))
    return found


def look_at(
    look: Look, images: Tensor, names: Sequence[str], batch: int, device: torch.device, poll: Callable[[], None]
) -> dict[str, Tensor]:
    """Features of a block of images uint8 [n, 3, H, W] as tensors of a file.

    `features` float32 [n, D], `hashes` int64 [n] of the pixels, `logits` and `spatial` where there are. Raises
    DataError naming an image whose features are not finite.
    """
    network, found = look.network(device), []
    for part in images.split(batch):
        poll()
        found.append(network(part))
    all_of_them = joined(found)
    check_finite(all_of_them.features, names)
    tensors = {"features": all_of_them.features, "hashes": pixel_hashes(images)}
    if all_of_them.logits is not None:
        tensors["logits"] = all_of_them.logits
    if all_of_them.spatial is not None:
        check_finite(all_of_them.spatial, names)
        tensors["spatial"] = all_of_them.spatial
    return tensors


def pixel_hashes(images: Tensor) -> Tensor:
    """63 bits of a hash of each image's pixels, int64 [n]: equal for equal images."""
    found = [hashlib.sha256(image.contiguous().numpy().tobytes()).digest()[:8] for image in images]
    return torch.tensor([int.from_bytes(each, "little") >> 1 for each in found], dtype=torch.int64)


def write_features(path: Path, tensors: Mapping[str, Tensor], ids: Sequence[int], fingerprint: str) -> None:
    """Write the features of a block, with what they were made of."""
    content = {**tensors, "ids": torch.tensor(list(ids))}
    commit.write_bytes(path, safetensors.torch.save(content, {"fingerprint": fingerprint}))


def read_features(path: Path, ids: Sequence[int], fingerprint: str) -> dict[str, Tensor]:
    """The features of a block. Raises DataError for a damaged file, or one made from other inputs."""
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run the evaluate stage again") from error
    if metadata.get("fingerprint") != fingerprint or tensors["ids"].tolist() != list(ids):
        raise DataError(f"{path} was made from other images or settings; run the evaluate stage again")
    return tensors


def sampled_name(look: Look) -> str:
    """File of the features in the folder of a block of samples whose images are not kept."""
    return f"{look.prefix}features.safetensors"


def sampled_fingerprint(plan_hash: str, look: Look, batch: int) -> str:
    """What determines these features: the plan, which holds threads and device, the network, the batches."""
    return digest_of([plan_hash, look.facts(), batch])


def digest_of(facts: Any) -> str:
    """SHA-256 of JSON facts."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
