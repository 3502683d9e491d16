"""The VQGAN of MAGE as a tokenizer: codes of image and mirror image, codes to pixels (specs/digit.md section 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.data.ptshard import content_sha256
from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.tokenizers.batches import BATCH, in_batches
from hpc_gen.tokenizers.official import VQGAN, load_strict, read_official
from hpc_gen.tokenizers.vqgan_model import VqganModel, to_pixels

CPU = torch.device("cpu")
ARCHITECTURE_KEY = "hpc_gen.vqgan"

PRESETS: dict[str, VqganConfig] = {"mage": VqganConfig()}


class Vqgan:
    """A frozen VqganModel in float32."""

    name = "vqgan"
    columns = ("vq_codes", "vq_codes_flip")

    def __init__(
        self,
        weights: str | Path,
        *,
        workspace: Path = Path(),
        device: torch.device = CPU,
        sha256: str | None = None,
        preset: str | None = None,
        vqgan: VqganConfig | Mapping[str, Any] | None = None,
    ) -> None:
        """Read `weights` (relative to `workspace`): the official file or an import of it.

        Raises UserError for settings that do not fit, DataError for a file that is not what it should be.
        """
        path = workspace / weights
        flat = read_official(path, VQGAN, sha256)
        self.architecture = _architecture(path, vqgan, preset)
        with torch.device("meta"):
            self.model = VqganModel(self.architecture)
        self.model.to_empty(device=CPU)
        load_strict(self.model, flat, path, VQGAN, "change tokenizer.vqgan (ch, ch_mult, num_res_blocks, codes)")
        self.weights_sha256 = content_sha256(self.model.state_dict())
        self.model.eval().requires_grad_(False).to(device)

    @property
    def identity(self) -> dict[str, Any]:
        """Sizes and hash of the tensors' content."""
        return {
            "name": self.name,
            "architecture": self.architecture.model_dump(mode="json"),
            "weights_sha256": self.weights_sha256,
        }

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, 3, H, W] -> vq_codes and vq_codes_flip, int32 [N, h * w], row by row, on the CPU.

        A row's codes depend on its own pixels alone. Raises DataError for pixels of another kind.
        """
        self._check_pixels(pixels)
        found = [in_batches(self._codes_of, each)["codes"] for each in (pixels, pixels.flip(-1))]
        return dict(zip(self.columns, found, strict=True))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Integer codes [N, h * w] of a square image or [N, h, w] -> uint8 [N, 3, H, W] on the same device.

        Raises DataError for other shapes, and for codes outside the codebook.
        """
        side = round(latents.shape[-1] ** 0.5)
        square = latents.ndim == 2 and side * side == latents.shape[1]
        if latents.is_floating_point() or not (square or latents.ndim == 3):
            raise DataError(
                f"the VQGAN decodes integer codes [N, h * w] or [N, h, w], got {latents.dtype} {list(latents.shape)}"
            )
        low, high = (int(latents.min()), int(latents.max())) if latents.numel() else (0, 0)
        if low < 0 or high >= self.architecture.codes:
            raise DataError(
                f"codes run from {low} to {high}, the codebook has 0 to {self.architecture.codes - 1}; take special "
                "tokens off first"
            )
        maps = latents.view(-1, side, side) if square else latents
        images = [self.model.decode(part.to(self._device)) for part in maps.split(BATCH)]
        if not all(bool(torch.isfinite(each).all()) for each in images):
            raise DataError("decoded images are not finite; the weights are not those of a trained VQGAN")
        return torch.cat([to_pixels(each) for each in images]).to(latents.device)

    @property
    def _device(self) -> torch.device:
        return self.model.quantize.embedding.weight.device

    def _codes_of(self, pixels: Tensor) -> dict[str, Tensor]:
        z = self.model.encoder(pixels.to(self._device, torch.float32) / 255.0)
        # one image at a time: the place of a vector among all would decide the last bits of its distances
        codes = torch.cat([self.model.quantize.codes_of(each) for each in z.split(1)])
        return {"codes": codes.flatten(1).to(torch.int32)}

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
            raise DataError(
                f"the VQGAN encodes uint8 pixels [N, 3, H, W], got {pixels.dtype} {list(pixels.shape)}; set "
                "encode.channels to 3"
            )
        height, width = pixels.shape[2:]
        stride = self.architecture.stride
        if height % stride or width % stride or not height or not width:
            raise DataError(
                f"images of {height} x {width} pixels do not divide into codes of {stride} x {stride}; set "
                f"encode.image_size to a multiple of {stride}"
            )


def metadata_for(config: VqganConfig) -> dict[str, str]:
    """What an import says of itself."""
    return {ARCHITECTURE_KEY: json.dumps(config.model_dump(mode="json"), sort_keys=True)}


def _architecture(path: Path, given: VqganConfig | Mapping[str, Any] | None, preset: str | None) -> VqganConfig:
    """The config's, else the preset's, else the file's."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'{nearest(preset, PRESETS)}; known presets: {', '.join(PRESETS)}")
    if given is not None:
        try:
            return given if isinstance(given, VqganConfig) else VqganConfig.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["tokenizer.vqgan", *map(str, first["loc"])])
            raise UserError(f"{where} is refused: {first['msg']}; see docs/tokenizers.md for its keys") from error
    if preset is not None:
        return PRESETS[preset]
    said = tensor_files.metadata_of(path).get(ARCHITECTURE_KEY)
    if said is None:
        raise UserError(f"{path} does not say its sizes; set tokenizer.preset=mage or tokenizer.vqgan")
    try:
        return VqganConfig.model_validate_json(said)
    except ValueError as error:
        raise DataError(f"{path} says of itself what cannot be understood; import the weights again") from error
