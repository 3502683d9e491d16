"""Every experiment of job_configs/ loads, is typed by its method, and builds the network that it promises."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from hpc_gen.config import loader
from hpc_gen.config.loader import Resolved
from hpc_gen.methods import registry
from hpc_gen.methods.energy.recipe import SIZES
from hpc_gen.methods.protocol import Method, TableFacts
from hpc_gen.stages import run_setup

FOLDER = Path(__file__).resolve().parents[2] / "job_configs"
FILES = sorted(FOLDER.glob("*/*.yaml"))
EDM = [path for path in FILES if path.parent.name == "energy" and path.stem.startswith("edm_")]

# specs/energy.md section 1: parameters of the energy variant, the fixed positions included
PARAMETERS = {
    ("base", 64): 130_599_938,
    ("base", 256): 130_784_258,
    ("large", 64): 458_350_594,
    ("large", 256): 458_596_354,
    ("xlarge", 64): 675_482_114,
    ("xlarge", 256): 675_758_594,
}
PREVIEW_ROWS = [781545, 1100424, 1254779, 306839, 842428, 565858, 303966, 317503]  # specs/gmem.md section 5.3
PREVIEW_LABELS = [0, 1, 2, 3, 430, 485, 605, 726, 850]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def resolved(path: Path) -> Resolved:
    return run_setup.typed(loader.load(path, []))


def built(found: Resolved) -> Method:
    """The method without its table, whose classes stand in for those of the config where it has none."""
    entry, config = registry.typed_config(found.experiment.method)
    return entry.build(config, TableFacts(num_classes=getattr(config, "num_classes", None) or 10))


def parameters(method: Method, role: str) -> int:
    return sum(p.numel() for p in method.roles()[role].parameters())


def size_of(path: Path) -> tuple[str, int]:
    """Backbone and image size that the file's name promises."""
    _, size, image = path.stem.split("_")
    return size, 256 if image == "default" else int(image)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_loads_is_typed_and_builds(path: Path) -> None:
    method = built(resolved(path))
    for module in method.roles().values():
        assert all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_its_head_says_what_to_type_and_expect(path: Path) -> None:
    head = "".join(line for line in path.read_text().splitlines(keepends=True)[:30] if line.startswith("#"))
    assert f"hpc-gen run job_configs/{path.parent.name}/{path.name}" in head
    assert "expected time:" in head and "expected result:" in head
    promised = re.search(r"([\d,]{9,}) parameters", head)
    if promised:
        assert int(promised[1].replace(",", "")) == parameters(built(resolved(path)), "denoiser")


def test_names_and_files_agree_and_no_two_experiments_share_a_run() -> None:
    names = [resolved(path).experiment.name for path in FILES]
    assert len(set(names)) == len(names)
    for path, name in zip(FILES, names, strict=True):
        stem = path.stem.replace("_", "-")
        assert name in (stem, f"{path.parent.name}-{stem}"), path


@pytest.mark.parametrize("path", EDM, ids=name_of)
def test_the_published_sizes_have_the_published_counts(path: Path) -> None:
    size, image = size_of(path)
    found = resolved(path)
    config: Any = registry.typed_config(found.experiment.method)[1]
    assert {key: getattr(config, key) for key in SIZES[size]} == SIZES[size]
    assert config.input_shape == (16, image // 16, image // 16) and config.row_shape[0] == 32
    assert parameters(built(found), "denoiser") == PARAMETERS[size, image]


@pytest.mark.parametrize("path", EDM, ids=name_of)
def test_the_published_recipe(path: Path) -> None:
    """specs/energy.md section 5.4: what is the same in all of them, and what differs."""
    size, image = size_of(path)
    experiment = resolved(path).experiment
    train, method = experiment.train, experiment.method
    assert train is not None and experiment.encode is not None
    assert method["variant"] == "energy" and method["input"] == "moments" and method["horizontal_flip"] is True
    assert (method["diffusion_timesteps"], method["label_dropout"], method["num_classes"]) == (500, 0.1, 1000)
    assert method["energy"]["grad_multiplier"] == 1.0 and not method["energy"]["learnable_step_size"]
    assert train.optimizer.betas == (0.9, 0.95) and train.optimizer.weight_decay == 0.02 and train.optimizer.clip == 3.0
    assert train.ema["main"].decay == 0.9999 and train.schedule.kind == "cosine"
    epoch = 1_281_167 // train.global_batch * train.global_batch
    default = path.stem.endswith("default")
    epochs, warmup, batch, rate, step = (
        (80, 1, 256, 9e-6, 1e-3)
        if default
        else (2000, 100, 1024, 3.6e-5, 1e-3)
        if image == 64
        else (320, 16, 256, 3e-6, 1e-4)
    )
    assert train.total_images == epochs * epoch and train.schedule.warmup_images == warmup * epoch
    assert train.global_batch == batch and math.isclose(train.learning_rate, rate)
    assert method["energy"]["step_size"] == step
    settings = experiment.sample.settings if experiment.sample is not None else {}
    assert settings["steps"] == 250 and settings["guidance"] == 1.0 and settings["inner_loop"] is True
    if default:
        assert train.evaluate is not None and train.evaluate.num_images == 1000 and train.evaluate.batch == 32
        assert train.evaluate.settings == settings
        assert (settings["inner_t"], settings["inner_clamp"], settings["clip_denoised"]) == ("index", "signal", True)
    else:
        assert train.preview is not None and train.preview.labels == PREVIEW_LABELS
        assert train.preview.every_images == (25 if image == 64 else 20) * epoch and train.preview.settings == settings
        assert (settings["inner_t"], settings["inner_clamp"], settings["clip_denoised"]) == ("mapped", "off", None)


@pytest.mark.parametrize("path", EDM, ids=name_of)
def test_tables_and_references_are_made_by_these_very_files(path: Path) -> None:
    size, image = size_of(path)
    experiment = resolved(path).experiment
    encode, evaluate = experiment.encode, experiment.evaluate
    assert encode is not None and evaluate is not None
    assert encode.source == "folder" and encode.tokenizer.preset == "kl16" and encode.image_size == image
    assert encode.crop_size == (256 if image == 64 else None)
    reference = resolved(FOLDER / "energy" / f"imagenet{image}_reference.yaml").experiment
    assert reference.encode is not None and reference.stage_order() == ["encode"]
    assert reference.data.table == evaluate.reference.table
    assert (reference.encode.image_size, reference.encode.crop_size) == (encode.image_size, encode.crop_size)
    assert evaluate.kid_subset_size == 999 and set(evaluate.metrics) == {"fid", "kid", "prc", "isc"}


def test_the_latent_demo_reads_what_the_tokenizer_demo_exports() -> None:
    latent = resolved(FOLDER / "demo" / "emoji32_latent.yaml").experiment
    vae = resolved(FOLDER / "demo" / "emoji32_vae.yaml").experiment
    assert latent.encode is not None and vae.encode is not None
    weights = f"runs/{vae.name}/exports/autoencoder.safetensors"
    assert latent.encode.tokenizer.weights == weights
    assert f"hpc-gen weights export {vae.name} --to {weights}" in (FOLDER / "demo" / "emoji32_latent.yaml").read_text()
    assert latent.method["tokenizer_stride"] == 2 ** (len(vae.method["architecture"]["ch_mult"]) - 1)
    assert latent.method["channels"] == vae.method["architecture"]["embed_dim"]
    assert latent.evaluate is not None and latent.evaluate.reference.table == vae.data.validation_table
    assert (latent.encode.source, latent.encode.image_size) == (vae.encode.source, vae.encode.image_size)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_encoded_is_what_training_reads(path: Path) -> None:
    """Every column that the method reads is one that the encode stage of the same file makes."""
    experiment = resolved(path).experiment
    if experiment.encode is None or experiment.train is None:
        return
    made = {"labels"}
    for tokenizer in (experiment.encode.tokenizer, *(experiment.encode.also or {}).values()):
        if tokenizer.name == "dinov2":
            assert tokenizer.dinov2 is not None
            endings = ("", "_flip") if tokenizer.dinov2.flip else ("",)
            made |= {column + ending for column in tokenizer.dinov2.columns for ending in endings}
        else:
            made |= {"kl_vae": {"moments", "moments_flip"}, "identity": {"pixels"}}[tokenizer.name]
    assert set(built(resolved(path)).columns()) <= made


BANK = FOLDER / "gmem" / "bank.yaml"
GMEM = [path for path in FILES if path.parent.name == "gmem" and path != BANK]


@pytest.mark.parametrize("path", GMEM, ids=name_of)
def test_the_published_recipe_of_gmem(path: Path) -> None:
    """specs/gmem.md section 4: what all of them share, and their lengths."""
    experiment = resolved(path).experiment
    train, sample = experiment.train, experiment.sample
    assert train is not None and sample is not None and sample.num_images == 50_000
    assert (train.global_batch, train.optimizer.lr, train.optimizer.betas) == (1024, 2e-4, (0.9, 0.95))
    assert (train.optimizer.clip, train.optimizer.weight_decay, train.ema["main"].decay) == (1.0, 0.0, 0.9999)
    assert train.schedule.kind == "constant" and train.schedule.warmup_images == 0 and train.precision == "bf16"
    steps = {"sde_xl_512": 500_000, "lightningdit_xl_64ep": 80_000, "lightningdit_xl_800ep": 1_000_000}
    assert train.total_images == 1024 * steps.get(path.stem, 80_000 if path.stem.endswith("_b") else 200_000)
    method: Any = registry.typed_config(experiment.method)[1]
    assert method.swiglu and method.rope and method.rms_norm and not method.qk_norm and method.num_tokens == 256
    if method.condition == "snippet":
        assert (method.snippet_dropout, method.projection_weight, method.repr_after_block) == (0.4, 0.5, 4)
        assert sample.rows == "uniform"
        if experiment.encode is not None and experiment.encode.image_size == 256:
            preview = train.preview
            assert preview is not None and preview.rows == PREVIEW_ROWS and preview.ema is None
            assert (preview.every_images, preview.at_images) == (2000 * 1024, [1024])
            assert preview.settings["guidance"]["scale"] == 1.0 and preview.settings["mode"] == path.stem[:3]


def test_the_bank_alone_is_encoded_as_the_banks_of_trainings_are() -> None:
    """The same network, grid and crop as in the training's own table, so that its rows can be drawn and appended."""
    bank, training = (resolved(path).experiment for path in (BANK, FOLDER / "gmem" / "sde_xl.yaml"))
    assert bank.stage_order() == ["encode"] and bank.train is None and bank.data.table != training.data.table
    assert bank.encode is not None and training.encode is not None and training.encode.also is not None
    own, theirs = bank.encode.tokenizer, training.encode.also["dino"]
    assert own.dinov2 is not None and theirs.dinov2 is not None
    assert (own.weights, own.preset, own.dinov2.grid) == (theirs.weights, theirs.preset, theirs.dinov2.grid)
    assert own.dinov2.positions == theirs.dinov2.positions
    assert own.dinov2.columns == ["cls_tokens"] and not own.dinov2.flip
    for key in ("source", "source_path", "image_size", "crop", "crop_size", "short_side", "background"):
        assert getattr(bank.encode, key) == getattr(training.encode, key), key
