"""The only door to torch-fidelity: its Inception network and its metric functions on features.

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


def kernel_distance(
    features: Tensor, reference: Tensor, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """torch-fidelity's KID (polynomial kernel, degree 3): mean and standard deviation over random subsets."""
    found = _module("metric_kid").kid_features_to_metric(
        features, reference, kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=seed, verbose=False
    )
    return float(found["kernel_inception_distance_mean"]), float(found["kernel_inception_distance_std"])


def precision_recall(features: Tensor, reference: Tensor, neighborhood: int) -> tuple[float, float]:
    """torch-fidelity's precision and recall of generated `features` against `reference`."""
    found = _module("metric_prc").prc_features_to_metric(
        features, reference, prc_neighborhood=neighborhood, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    return float(found["precision"]), float(found["recall"])


def inception_score(logits: Tensor, splits: int, seed: int) -> tuple[float, float]:
    """torch-fidelity's inception score: mean and standard deviation over splits of the shuffled images."""
    found = _module("metric_isc").isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    return float(found["inception_score_mean"]), float(found["inception_score_std"])
