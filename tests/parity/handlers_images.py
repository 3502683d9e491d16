"""Golden handlers of image preparation that belongs to no one method: crops, resizes, value ranges, grids."""

from __future__ import annotations

import re

import numpy as np
import torch
from golden_compare import Produced
from golden_files import Case
from golden_handling import constants, handles, known_keys
from PIL import Image
from torch import Tensor

from hpc_gen.data.crops import crop, short_side
from hpc_gen.data.images import normalize, to_pixels, truncated_pixels
from hpc_gen.nn.posterior import LatentScale
from hpc_gen.sampling.images import grid


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.numpy())


def _hwc(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


@handles("dim", "center_crop")
def center_crop(case: Case) -> Produced:
    """The ADM crop at several sizes, and what the network sees of it."""
    tensors, out = case.tensors(), {}
    known_keys(case.record["config"], ("cases",), "config")
    for sizes in case.record["config"]["cases"]:
        known_keys(sizes, ("width", "height", "size"), "config.cases")
        name = f"{sizes['width']}x{sizes['height']}_to_{sizes['size']}"
        cropped = crop("adm", _image(tensors[f"in.{name}"]), sizes["size"])
        out[f"out.{name}"] = _hwc(cropped)
        out[f"out.{name}_network_input"] = normalize(to_pixels(cropped))
    return Produced(out)


@handles("digit", "image_prep")
def image_prep(case: Case) -> Produced:
    """Validation, probe and reference images, and the first step of the feature dump; names tell the sizes."""
    tensors, config = case.tensors(), case.record["config"]
    known_keys(config, ("input_size",), "config")
    image, size = _image(tensors["in.image_u8"]), config["input_size"]
    out = {}
    for name in tensors:
        if found := re.fullmatch(r"out\.(?:probe_)?val_(\d+)(?:_bicubic_center)?", name):
            out[name] = to_pixels(crop("short_bicubic", image, int(found[1]), size))
        elif found := re.fullmatch(r"out\.fid_ref_bilinear_(\d+)", name):
            out[name] = _hwc(crop("short_bilinear", image, int(found[1])))
        elif found := re.fullmatch(r"out\.resize_(\d+)_bicubic", name):
            out[name] = _hwc(short_side(image, int(found[1]), Image.Resampling.BICUBIC))
    return Produced(out)


@handles("gmem", "image_ops")
def image_ops(case: Case) -> Produced:
    """Both crops, value ranges, the grid, decoded images, and the scale of latents."""
    tensors, config = case.tensors(), case.record["config"]
    known_keys(config, ("sizes", "grid", "latent_multiplier"), "config")
    known_keys(config["grid"], ("columns", "background", "order"), "config.grid")
    constants(config["grid"], {"background": "black", "order": "row-major"}, "config.grid")
    out: dict[str, Tensor] = {}
    for name, sizes in config["sizes"].items():
        known_keys(sizes, ("w", "h", "size"), f"config.sizes.{name}")
        image = _image(tensors[f"in.{name}"])
        assert image.size == (sizes["w"], sizes["h"])
        out[f"out.adm_crop.{name}"] = _hwc(crop("adm", image, sizes["size"]))
        out[f"out.resize_crop_01.{name}"] = to_pixels(crop("short_bilinear", image, sizes["size"])) / 255.0
    first = next(iter(config["sizes"]))  # the case shows the value range on its first image
    normalised = normalize(to_pixels(_image(out[f"out.adm_crop.{first}"])))
    out |= {"out.normalised_pm1": normalised, "out.normalised_pm1_flipped": normalised.flip(-1)}
    tiles = tensors["in.grid_tiles"].permute(0, 3, 1, 2).contiguous()
    out["out.grid"] = _hwc(grid(tiles, config["grid"]["columns"], gap=0, background=0))
    out["out.decoded_uint8"] = truncated_pixels(tensors["in.decoded"]).permute(0, 2, 3, 1)
    mean, std = (tensors[f"in.latent_{name}"].flatten() for name in ("mean", "std"))
    scale = LatentScale(tuple((config["latent_multiplier"] / std).tolist()), tuple(mean.tolist()))
    out["out.latent_normalised"] = scale.normalise(tensors["in.decoded"])
    out["out.latent_denormalised"] = scale.restore(tensors["in.decoded"])
    return Produced(out)
