"""The only door to torch-fidelity: its feature networks, filled from our own readers of weights.

torch-fidelity imports torchvision, whose registry build is for CUDA: beside CPU torch its extension does not load and
the import dies on "operator torchvision::nms does not exist". Declaring the two missing schemas before the first import
mends that (specs/dependencies.md section 3). Nothing here calls those operators.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hpc_gen.runtime.errors import UserError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: torch.library.Library | None = None  # an operator lives as long as the library object that declared it

FEATURE_LAYER = "2048"
SPATIAL_LAYER = "Mixed_6d.branch1x1"  # mixed_6/conv of TensorFlow's graph, after its ReLU: ADM's layer of sFID
LOGIT_LAYER = "logits_unbiased"  # the layer of the inception score: logits without the bias, as in the original code


def _has_operator(name: str) -> bool:
    try:
        getattr(torch.ops.torchvision, name)
    except (AttributeError, RuntimeError):
        return False
    return True


def _torchvision_extension() -> Path | None:
    """The compiled part of torchvision, found without importing torchvision."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [path for folder in folders or () for path in sorted(Path(folder).glob("_C*.so"))]
    return found[0] if found else None


def declare_torchvision_operators() -> bool:
    """Declare nms and qnms where torchvision's own extension cannot; returns whether that was needed.

    Only when torch has no CUDA, and only after trying the real extension: declaring beside one that loads clashes.
    """
    global _declared
    if torch.version.cuda is not None or _declared is not None or _has_operator("nms"):
        return _declared is not None
    extension = _torchvision_extension()
    if extension is not None:
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            pass  # a CUDA build beside CPU torch
        if _has_operator("nms"):
            return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared = library
    return True


@functools.cache
def _module(name: str) -> ModuleType:
    """A module of torch-fidelity; raises UserError when the package cannot be imported here."""
    declare_torchvision_operators()
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torch-fidelity cannot be imported ({error}); install the extra 'demo' of hpc-gen, or repair torchvision"
        ) from error


def version() -> str:
    """Version of torch-fidelity."""
    return str(_module("version").__version__)


@functools.cache
def _unfilled_inception() -> type[nn.Module]:
    base: type[nn.Module] = _module("feature_extractor_inceptionv3").FeatureExtractorInceptionV3

    class UnfilledInception(base):  # type: ignore[valid-type,misc]
        """torch-fidelity's network before its weights: it insists on loading some while it is built."""

        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            if not state_dict:
                return None  # the empty file that stands in for the download
            return super().load_state_dict(state_dict, strict=strict, assign=assign)

    return UnfilledInception


def _unfilled(layers: list[str]) -> nn.Module:
    """The network on the meta device, without weights."""
    empty = io.BytesIO()
    torch.save({}, empty)  # in memory only: torch-fidelity reads its weights file with full pickle
    empty.seek(0)
    with torch.device("meta"):
        return _unfilled_inception()("inception", layers, feature_extractor_weights_path=empty)


def inception(state: Mapping[str, Tensor], logits: bool) -> nn.Module:
    """torch-fidelity's FID network with the given weights, in eval mode, channels last (measured 1.3 times faster).

    forward: uint8 [N, 3, H, W] -> (features float32 [N, 2048],), with `logits` also float32 [N, 1008]. It resizes to
    299 x 299 as TensorFlow 1 does. Raises UserError when the weights do not fit.
    """
    network = _unfilled([FEATURE_LAYER, LOGIT_LAYER] if logits else [FEATURE_LAYER])
    if not logits:
        del network.fc
    try:
        network.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the weights do not fit torch-fidelity's Inception network ({reason}); use another file"
        ) from error
    network.requires_grad_(False)
    return network.eval().to(memory_format=torch.channels_last)


def convolution_shapes() -> dict[str, tuple[int, ...]]:
    """Convolution blocks (conv + batch norm) of the FID network: name -> shape of the filter, in registration order."""
    block = _module("feature_extractor_inceptionv3").BasicConv2d
    network = _unfilled([FEATURE_LAYER])
    return {name: tuple(part.conv.weight.shape) for name, part in network.named_modules() if isinstance(part, block)}


def clip(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    """torch-fidelity's CLIP image tower `name` with the given weights (OpenAI's keys), in eval mode, float32.

    forward: uint8 [N, 3, H, W] -> (embeddings float32 [N, D],); it resizes bilinearly as TensorFlow 1 does. Numbers are
    rounded to half precision as in the published files. Raises UserError when the weights do not fit.
    """
    module = _module("feature_extractor_clip")
    network = _bare(module.FeatureExtractorCLIP, name, "clip")
    try:
        network.model = module.build_model(dict(state), torch.float32)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the weights do not fit the image tower of {name} ({reason}); give OpenAI's file") from error
    network.resolution = network.model.visual.input_resolution
    network.requires_grad_(False)
    return network.eval()


def dinov2(name: str, model: nn.Module) -> nn.Module:
    """torch-fidelity's DINOv2 extractor around a network that maps normalised images to class tokens; eval, float32.

    Its own constructor can only download code and weights. forward: uint8 [N, 3, H, W] -> (float32 [N, D],).
    """
    network = _bare(_module("feature_extractor_dinov2").FeatureExtractorDinoV2, name, "dinov2")
    network.model = model
    network.requires_grad_(False)
    return network.eval()


def names_of(family: str) -> tuple[str, ...]:
    """Names of the networks of a family ("clip", "dinov2") that torch-fidelity knows."""
    return tuple(_module(f"feature_extractor_{family}").MODEL_METADATA)


def clip_sha256(name: str) -> str:
    """SHA-256 of OpenAI's published file of a CLIP network."""
    return str(_module("feature_extractor_clip").MODEL_METADATA[name]["hash"])


def _bare(kind: type[nn.Module], name: str, layer: str) -> Any:
    """An extractor before its weights, its own constructor left out: that would load or download them."""
    network: Any = kind.__new__(kind)
    _module("feature_extractor_base").FeatureExtractorBase.__init__(network, name, [layer])
    network.feature_extractor_internal_dtype = torch.float32
    return network
