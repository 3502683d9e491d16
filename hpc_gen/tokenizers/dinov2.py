"""DINOv2 as a tokenizer: snippets and patch features (GMem), features of an inner block and their codes (DiGIT).

Facts: specs/gmem.md section 3.3, specs/digit.md section 3. One forward pass gives all columns that are asked for, of
each image and of its mirror image (features of a mirrored image are not the mirrored features).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from hpc_gen.config.dinov2 import PATCH, Dinov2Architecture, Dinov2Config
from hpc_gen.data.ptshard import content_sha256
from hpc_gen.runtime import tensor_files
from hpc_gen.runtime.errors import DataError, UserError, nearest
from hpc_gen.tokenizers.batches import BATCH, in_batches
from hpc_gen.tokenizers.dinov2_model import Dinov2, positions_of
from hpc_gen.tokenizers.kmeans import Centroids
from hpc_gen.tokenizers.official import DINOV2, load_strict, read_official

FLIP = "_flip"  # suffix of the columns of the mirror image
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained with
ARCHITECTURE_KEY = "hpc_gen.dinov2"
CPU = torch.device("cpu")
NATIVE = 256  # pixels for which both references are written; other sides in whole multiples


def _sizes(width: int, depth: int, heads: int, swiglu: bool = False) -> tuple[Dinov2Architecture, Dinov2Architecture]:
    plain = Dinov2Architecture(width=width, depth=depth, heads=heads, swiglu=swiglu)
    return plain, plain.model_copy(update={"registers": 4})


_S, _B, _L, _G = _sizes(384, 12, 6), _sizes(768, 12, 12), _sizes(1024, 24, 16), _sizes(1536, 40, 24, swiglu=True)

PRESETS: dict[str, Dinov2Architecture] = {
    "vits14": _S[0],
    "vitb14": _B[0],
    "vitl14": _L[0],
    "vitg14": _G[0],
    "vits14_reg4": _S[1],
    "vitb14_reg4": _B[1],
    "vitl14_reg4": _L[1],
    "vitg14_reg4": _G[1],
}


class Dinov2Tokenizer:
    """A frozen Dinov2 in float32 with the columns that the section `dinov2` asks for. It decodes nothing."""

    name = "dinov2"

    def __init__(
        self,
        weights: str | Path,
        *,
        workspace: Path = Path(),
        device: torch.device = CPU,
        sha256: str | None = None,
        preset: str | None = None,
        dinov2: Dinov2Config | Mapping[str, Any] | None = None,
    ) -> None:
        """Read `weights` (relative to `workspace`): an official file or an import of it, and the centroids if any.

        Raises UserError for settings that do not fit, DataError for files that are not what they should be.
        """
        path = workspace / weights
        self.config = _typed(dinov2)
        flat = read_official(path, DINOV2, sha256)
        sizes = _architecture(path, self.config.architecture, preset)
        with torch.device("meta"):
            self.model = Dinov2(sizes)
        self.model.to_empty(device=CPU)
        load_strict(self.model, flat, path, DINOV2, "choose another tokenizer.preset (width, depth, registers)")
        self.weights_sha256 = content_sha256(self.model.state_dict())
        self.model.eval().requires_grad_(False).to(device)
        rule = self.config.positions
        self._positions = positions_of(self.model.pos_embed.detach().cpu(), self.config.grid, rule).to(device)
        self.centroids: Centroids | None = None
        if self.config.centroids is not None:
            file = workspace / self.config.centroids
            self.centroids = Centroids.read(file, sizes.width, self.config.centroids_sha256, device)
        if self._inner_wanted and self.config.layer_from_end > sizes.depth:
            raise UserError(
                f"tokenizer.dinov2.layer_from_end = {self.config.layer_from_end}, but the network has {sizes.depth} "
                f"blocks; give 1 to {sizes.depth}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns asked for, each followed by that of the mirror image."""
        endings = ("", FLIP) if self.config.flip else ("",)
        return tuple(name + ending for name in self.config.columns for ending in endings)

    @property
    def identity(self) -> dict[str, Any]:
        """Sizes, hash of the tensors' content, rule, columns; of inner features the block, of codes the centroids."""
        config = self.config
        found: dict[str, Any] = {
            "name": self.name,
            "architecture": self.model.sizes.model_dump(mode="json"),
            "weights_sha256": self.weights_sha256,
            "columns": list(self.columns),
            "grid": config.grid,
            "positions": config.positions,
            "precision": config.precision,
        }
        if config.compute is not None:
            found["compute"] = config.compute
        if self._inner_wanted:
            found["layer_from_end"] = config.layer_from_end
        if self.centroids is not None:
            found["centroids"] = {"codes": len(self.centroids), "content": self.centroids.content}
        return found

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, 3, H, H] -> the columns on the CPU.

        cls_tokens float32 [N, D] (not normalised), representations and features [N, G*G, D] in the precision asked for,
        codes int32 [N, G*G], row by row. As with the autoencoder, a row's bytes depend on its own pixels alone. Raises
        DataError for features that are not finite in that precision.
        """
        self._check_pixels(pixels)
        columns: dict[str, Tensor] = {}
        for ending, each in (("", pixels), (FLIP, pixels.flip(-1))):
            if ending and not self.config.flip:
                continue
            found = in_batches(self._columns_of, each, self._batch)
            columns |= {name + ending: self._stored(name, column) for name, column in found.items()}
        return {name: columns[name] for name in self.columns}

    def on_device(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [N, 3, H, H] -> the columns of these images (not of their mirror images), on the network's device.

        What `encode` gives: on a CPU with as many threads to the bit, on a GPU to rounding, for there all images are
        one forward pass. An autocast around it changes nothing. Values that are not finite are handed on: to look would
        wait for the device.
        """
        self._check_pixels(pixels)
        alone = self._device.type == "cpu"
        found = in_batches(self._columns_of, pixels, self._batch) if alone else self._columns_of(pixels)
        return {name: _rounded(name, column, self.config.precision) for name, column in found.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """Refused: features have no way back to pixels."""
        raise UserError(
            "the tokenizer dinov2 decodes nothing; name the one whose latents the method makes (kl_vae, vqgan), and "
            "dinov2 in encode.also"
        )

    @torch.no_grad()
    def snippets(self, pixels: Tensor, legacy_range: bool = False) -> Tensor:
        """Class tokens of images, float32 [N, D] on the CPU, not normalised, of uint8 [N, 3, H, H].

        `legacy_range`: as GMem's reference sees novel images, whose pixels it passes in [0, 1] where [-1, 1] is
        expected (specs/gmem.md section 5.4).
        """
        self._check_pixels(pixels)

        def of_batch(part: Tensor) -> dict[str, Tensor]:
            depth = self.model.sizes.depth
            images = self.prepare(part, legacy_range)
            return {"cls_tokens": self._tokens(images, [depth])[depth][:, 0]}

        return in_batches(of_batch, pixels, self._batch)["cls_tokens"]

    def prepare(self, pixels: Tensor, legacy_range: bool = False) -> Tensor:
        """uint8 [N, 3, H, H] -> what the network sees, float32 [N, 3, 14 G, 14 G] on its device.

        [0, 1], ImageNet's mean and std, then bicubic without antialias to 14 times the grid, as both references do.
        """
        values = pixels.to(self._device, torch.float32) / 255.0
        if legacy_range:
            values = (values + 1) / 2
        mean = values.new_tensor(MEAN).view(-1, 1, 1)
        images = (values - mean) / values.new_tensor(STD).view(-1, 1, 1)
        side = PATCH * self.config.grid
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, size=(side, side), mode="bicubic", align_corners=False)

    @torch.no_grad()
    def _columns_of(self, pixels: Tensor) -> dict[str, Tensor]:
        depth, prefix, wanted = self.model.sizes.depth, self.model.num_prefix, self.config.columns
        inner = depth - self.config.layer_from_end + 1
        after = [depth] if "cls_tokens" in wanted or "representations" in wanted else []
        after += [inner] if self._inner_wanted else []
        tokens = self._tokens(self.prepare(pixels), after)
        columns: dict[str, Tensor] = {}
        if "cls_tokens" in wanted:
            columns["cls_tokens"] = tokens[depth][:, 0]
        if "representations" in wanted:
            columns["representations"] = tokens[depth][:, prefix:]
        if "features" in wanted:
            columns["features"] = tokens[inner][:, prefix:]
        if "codes" in wanted:
            assert self.centroids is not None  # Dinov2Config
            columns["codes"] = self.centroids.assign(tokens[inner][:, prefix:]).to(torch.int32)
        return columns

    def _tokens(self, images: Tensor, after: list[int]) -> dict[int, Tensor]:
        """Tokens of the network after these blocks, float32; its matrix products in the format of `compute` alone."""
        half = self.config.compute == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            tokens = self.model(images, self._positions, after)
        return {number: each.float() for number, each in tokens.items()}

    def _stored(self, name: str, column: Tensor) -> Tensor:
        rounded = _rounded(name, column, self.config.precision)
        if rounded.dtype != column.dtype and not bool(torch.isfinite(rounded).all()):
            raise DataError(f"{name} are not finite in {self.config.precision}; set tokenizer.dinov2.precision=float32")
        return rounded

    @property
    def _inner_wanted(self) -> bool:
        return "features" in self.config.columns or "codes" in self.config.columns

    @property
    def _batch(self) -> int:
        """Images of one forward pass: one on a CPU, where the place of a token among all decides the last bits."""
        return 1 if self._device.type == "cpu" else BATCH

    @property
    def _device(self) -> torch.device:
        return self.model.pos_embed.device

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
            raise DataError(
                f"dinov2 encodes uint8 pixels [N, 3, H, W], got {pixels.dtype} {list(pixels.shape)}; set "
                "encode.channels to 3"
            )
        height, width = pixels.shape[2:]
        side = PATCH * self.config.grid
        if height != width or (height != side and height % NATIVE and not self.config.any_size):
            raise DataError(
                f"dinov2 sees images of {NATIVE} x {NATIVE} pixels (or a multiple), scaled to {side}, or of {side} x "
                f"{side}, got {height} x {width}; set encode.image_size to one of these, or "
                "tokenizer.dinov2.any_size to true"
            )


def metadata_for(sizes: Dinov2Architecture) -> dict[str, str]:
    """What an import says of itself."""
    return {ARCHITECTURE_KEY: json.dumps(sizes.model_dump(mode="json"), sort_keys=True)}


def _typed(given: Dinov2Config | Mapping[str, Any] | None) -> Dinov2Config:
    try:
        return given if isinstance(given, Dinov2Config) else Dinov2Config.model_validate(dict(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["tokenizer.dinov2", *map(str, first["loc"])])
        raise UserError(f"{where} is refused: {first['msg']}; see docs/tokenizers.md for its keys") from error


def _architecture(path: Path, given: Dinov2Architecture | None, preset: str | None) -> Dinov2Architecture:
    """The config's, else the preset's, else the file's."""
    if preset is not None and preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}'{nearest(preset, PRESETS)}; known presets: {', '.join(PRESETS)}")
    if given is not None:
        return given
    if preset is not None:
        return PRESETS[preset]
    said = tensor_files.metadata_of(path).get(ARCHITECTURE_KEY)
    if said is None:
        raise UserError(
            f"{path} does not say which DINOv2 it is; set tokenizer.preset ({', '.join(PRESETS)}) or "
            "tokenizer.dinov2.architecture"
        )
    try:
        return Dinov2Architecture.model_validate_json(said)
    except ValueError as error:
        raise DataError(f"{path} says of itself what cannot be understood; import the weights again") from error


def _rounded(name: str, column: Tensor, precision: str) -> Tensor:
    """A column as it is stored."""
    return column.contiguous() if name in ("codes", "cls_tokens") else column.to(getattr(torch, precision)).contiguous()
