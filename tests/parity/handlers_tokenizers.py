"""Golden handlers of the tokenizers of gmem and digit: DINOv2 in both uses, the VQGAN of MAGE, k-means.

A case's weights go through a file and the tokenizer of that name, so that what encodes tables is what is compared.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_compare import Produced
from golden_files import Case, GoldenError, OfficialModel
from golden_handling import ModelFacts, constants, handles, handles_official, known_keys
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.config.dinov2 import PATCH, Dinov2Architecture
from hpc_gen.config.vqgan import VqganConfig
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers import dinov2, vqgan
from hpc_gen.tokenizers.dinov2_model import GMEM_GRID, Dinov2, positions_of
from hpc_gen.tokenizers.kmeans import Centroids, lloyd
from hpc_gen.tokenizers.vqgan_model import VqganModel


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def _file(weights: Mapping[str, Tensor]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        write_tensors(path, dict(weights), {})
        yield path


GMEM_DINO = {"patch": 14, "mlp_ratio": 4, "layerscale": True, "norm_eps": 1e-6, "gelu": "exact"}
DIGIT_DINO = {"patch": 14, "mlp_ratio": 4, "layerscale": True, "ln_eps": 1e-6}
VQGAN_WORDS = ("ch", "ch_mult", "num_res_blocks", "z_channels", "n_embed")
VQGAN_CONSTANTS = {"norm": "GroupNorm(32, eps 1e-6)", "act": "swish", "attention": "none"}


@handles("gmem", "dino_snippet")
@torch.no_grad()
def gmem_dino(case: Case) -> Produced:
    """Preprocessed pixels, resampled positions, class and patch tokens, and the reference's own view of novel images."""
    tensors, words = case.tensors(), case.record["config"]["neutral"]
    known_keys(words, ("embed", "depth", "heads", "native_image", "used_grid", *GMEM_DINO), "config.neutral")
    constants(words, {**GMEM_DINO, "used_grid": GMEM_GRID}, "config.neutral")
    table = words["native_image"] // PATCH
    sizes = Dinov2Architecture(width=words["embed"], depth=words["depth"], heads=words["heads"], position_grid=table)
    pixels = tensors["in.image_u8"]
    grid = words["used_grid"] * (pixels.shape[-1] // dinov2.NATIVE)  # images of 512 pixels have 32 x 32 tokens
    config = {"architecture": sizes, "grid": grid, "positions": "gmem", "precision": "float32"}
    with _file(_below(tensors, "param.")) as path:
        tokenizer = dinov2.Dinov2Tokenizer(path, dinov2=config)
    columns, seen = tokenizer.encode(pixels), tokenizer.prepare(pixels)
    # where the notes of the case cut the input: "out.preprocessed_crop is [:, :, 60:92, 100:132] of ..."
    cut = re.search(r"\[:, :, (\d+):(\d+), (\d+):(\d+)\]", case.record["notes"])
    if cut is None:
        raise GoldenError("the notes do not say which part of the input out.preprocessed_crop is")
    top, bottom, left, right = map(int, cut.groups())
    return Produced(
        {
            "out.preprocessed_crop": seen[:, :, top:bottom, left:right],
            "out.preprocessed_mean_std": torch.stack([seen.mean(), seen.std()]),
            "out.pos_embed_resampled": positions_of(tokenizer.model.pos_embed, words["used_grid"], "gmem"),
            "out.cls_token": columns["cls_tokens"],
            "out.snippet": F.normalize(tokenizer.snippets(pixels), dim=-1),
            "out.patch_tokens": columns["representations"],
            "out.cls_token_novel_image_path_of_reference": tokenizer.snippets(pixels, legacy_range=True),
        }
    )


@handles("digit", "dino_tokenizer")
@torch.no_grad()
def digit_dino(case: Case) -> Produced:
    """Input of the blocks, features of the inner block, and codes, by DiGIT's rule of positions and by the hub's."""
    tensors, words = case.tensors(), case.record["config"]
    free = ("hidden", "depth", "heads", "registers", "pos_grid", "codes", "layer_from_end")
    known_keys(words, (*free, "block_index_used", *DIGIT_DINO), "config")
    constants(words, DIGIT_DINO, "config")
    inner = words["depth"] - words["layer_from_end"]
    constants(words, {"block_index_used": inner, "codes": tensors["param.centroids"].shape[1]}, "config")
    sizes = Dinov2Architecture(
        width=words["hidden"],
        depth=words["depth"],
        heads=words["heads"],
        registers=words["registers"],
        position_grid=words["pos_grid"],
    )
    pixels = tensors["in.image_u8"].permute(0, 3, 1, 2).contiguous()
    out: dict[str, Tensor] = {}
    with _file(_below(tensors, "param.pretrained_encoder.")) as path:
        Centroids(tensors["param.centroids"].T.contiguous()).write(path.parent / "km.npy")
        config = {
            "architecture": sizes, "columns": ["features", "codes"], "flip": False, "precision": "float32",
            "layer_from_end": words["layer_from_end"], "centroids": str(path.parent / "km.npy"),
        }  # fmt: skip
        for rule, ending in (("digit", "16x16"), ("hub", "hub_variant")):
            tokenizer = dinov2.Dinov2Tokenizer(path, dinov2={**config, "positions": rule})
            positions = positions_of(tokenizer.model.pos_embed, 16, rule)
            columns = tokenizer.encode(pixels)
            out[f"out.pos_embed_{ending}"] = positions
            if rule == "hub":
                out["out.codes_hub_variant"] = columns["codes"]
                continue
            seen = tokenizer.prepare(pixels)
            out["out.pixels_224_sample"] = seen[:, :, ::16, ::16]
            out["out.tokens_in"] = tokenizer.model.embed(seen, positions)[:, :8]
            out["out.features"], out["out.codes"] = columns["features"], columns["codes"]
    return Produced(out)


@handles("digit", "vqgan_roundtrip")
@torch.no_grad()
def digit_vqgan(case: Case) -> Produced:
    """Vectors before the codebook, codes, entries, the loss of training, decoded images; and the tokenizer's own view."""
    tensors, words = case.tensors(), case.record["config"]
    known_keys(words, (*VQGAN_WORDS, "resolution", *VQGAN_CONSTANTS), "config")
    constants(words, {**VQGAN_CONSTANTS, "resolution": tensors["in.image"].shape[-1]}, "config")
    config = VqganConfig(
        ch=words["ch"],
        ch_mult=words["ch_mult"],
        num_res_blocks=words["num_res_blocks"],
        z_channels=words["z_channels"],
        codes=words["n_embed"],
    )
    with _file(_below(tensors, "param.vqgan.")) as path:
        tokenizer = vqgan.Vqgan(path, vqgan=config)
    z = tokenizer.model.encoder(tensors["in.image"])
    found = tokenizer.model.quantize(z)
    return Produced(
        {
            "out.z": z,
            "out.codes": tokenizer.model.encode(tensors["in.image"]),
            "out.z_q": found.entries,
            "out.emb_loss": found.loss,
            "out.recon": tokenizer.model.decode(found.codes),
        }
    )


@handles("digit", "kmeans_lloyd")
def digit_kmeans(case: Case) -> Produced:
    """Lloyd's iterations from the given start, by faiss and by torch alike, then the assignment."""
    tensors, words = case.tensors(), case.record["config"]
    known_keys(words, ("points", "dim", "codes", "iterations", "reference"), "config")
    constants(words, dict(zip(("points", "dim"), tensors["in.features"].shape, strict=True)), "config")
    points, start = tensors["in.features"].numpy(), tensors["in.init_centroids"].numpy()
    steps: dict[str, list[Any]] = {
        backend: list(lloyd(points, start, words["codes"], words["iterations"], backend=backend))
        for backend in ("faiss", "torch")
    }
    ours, theirs = (steps[backend][-1].centroids for backend in ("torch", "faiss"))
    if not np.allclose(ours, theirs, rtol=0, atol=2e-5):
        raise GoldenError("faiss and torch part ways")
    if "out.objective_default_init" in tensors:
        # The yardstick of the case's notes: from a random start of our own, a final objective within 5 percent.
        wanted = tensors["out.objective_default_init"]
        own = list(lloyd(points, None, words["codes"], len(wanted), backend="faiss"))
        if not np.isclose(own[-1].objective, float(wanted[-1]), rtol=0.05):
            raise GoldenError("our own start leads to another objective than the reference's")
    centroids = torch.from_numpy(theirs)
    return Produced(
        {
            "out.centroids": centroids,
            "out.assign": Centroids(centroids).assign(tensors["in.features"]),
            "out.objective": torch.tensor([step.objective for step in steps["faiss"]], dtype=torch.float64),
        }
    )


def _facts(model: nn.Module) -> ModelFacts:
    parameters = dict(model.named_parameters())
    return ModelFacts(
        state_dict={name: tuple(value.shape) for name, value in model.state_dict().items()},
        buffers=tuple(name for name, _ in model.named_buffers()),
        frozen=tuple(name for name, parameter in parameters.items() if not parameter.requires_grad),
        num_params=sum(parameter.numel() for parameter in parameters.values()),
        num_trainable=sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
    )


@handles_official("gmem", "dinov2_*")
@handles_official("digit", "dinov2_*")
def official_dinov2(model: OfficialModel) -> ModelFacts:
    """DINOv2 with and without registers."""
    with torch.device("meta"):
        return _facts(Dinov2(dinov2.PRESETS[model.name.removeprefix("dinov2_")]))


@handles_official("digit", "vqgan_jax_strongaug")
def official_vqgan(model: OfficialModel) -> ModelFacts:
    """MAGE's VQGAN."""
    with torch.device("meta"):
        return _facts(VqganModel(vqgan.PRESETS["mage"]))
