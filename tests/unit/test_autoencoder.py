"""The method `autoencoder`: config, table, loss against the formula, gradients, reconstructions, export."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hpc_gen.data.images import normalize
from hpc_gen.data.table import Table
from hpc_gen.data.write import write_table
from hpc_gen.methods.autoencoder.config import AutoencoderConfig, ReconstructionSettings
from hpc_gen.methods.autoencoder.objective import ROLE, Autoencoder
from hpc_gen.methods.autoencoder.recipe import ENTRY
from hpc_gen.methods.autoencoder.weights import export_role, measure_scale
from hpc_gen.methods.materialise import materialise
from hpc_gen.methods.protocol import TableFacts
from hpc_gen.nn.posterior import kl_to_standard_normal, sample_moments
from hpc_gen.runtime.errors import DataError, DivergedError, UserError
from hpc_gen.runtime.randomness import Draws
from hpc_gen.runtime.tensor_files import write_tensors
from hpc_gen.tokenizers.kl_vae import KlVae
from hpc_gen.tokenizers.kl_vae_model import to_pixels

SMALL = {"ch": 32, "ch_mult": (1, 1), "num_res_blocks": 1, "resolution": 8, "z_channels": 2, "embed_dim": 3}
FACTS = TableFacts(columns={"pixels": ("uint8", (3, 8, 8)), "labels": ("int64", ())})


def config(**change: Any) -> AutoencoderConfig:
    architecture = {**SMALL, **change.pop("architecture", {})}
    return AutoencoderConfig.model_validate({"architecture": architecture, "image_size": 8, **change})


def method(**change: Any) -> Autoencoder:
    made = ENTRY.build(config(**change), FACTS)
    assert isinstance(made, Autoencoder)
    materialise(made, seed=0)
    return made


def pixels(num: int = 4, channels: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, 8, 8), generator=generator, dtype=torch.uint8)


def noise(num: int = 4) -> Tensor:
    return torch.randn(num, 3, 4, 4, generator=torch.Generator().manual_seed(2))


# ---------------------------------------------------------------- config and table


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 9}, "'method.image_size' = 9 is not a multiple of 2"),
        ({"architecture": {"in_channels": 4}}, "'method.architecture.in_channels' = 4"),
        ({"reconstruction": "l3"}, "'l1' or 'l2'"),
        ({"kl_weight": -1.0}, "greater than or equal to 0"),
        ({"architecture": {"attn_resolutions": (5,)}}, "attn_resolutions names 5"),
        ({"perceptual": 1.0}, "Extra inputs"),
    ],
)
def test_other_configs_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**change)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"moments": ("float16", (6, 4, 4))}, "no column 'pixels' .*moments.*encode.tokenizer.name=identity"),
        ({"pixels": ("uint8", (3, 16, 16))}, r"uint8 \[3, 16, 16\].*image_size = 8.*\[3, 8, 8\]"),
        ({"pixels": ("uint8", (1, 8, 8))}, r"in_channels = 3 need uint8 \[3, 8, 8\]"),
        ({"pixels": ("float32", (3, 8, 8))}, "holds float32"),
    ],
)
def test_other_tables_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ENTRY.build(config(), TableFacts(columns=columns))


def test_table_without_facts_is_not_checked() -> None:
    assert isinstance(ENTRY.build(config(), TableFacts()), Autoencoder)


# ---------------------------------------------------------------- the protocol


def test_every_parameter_is_in_one_group_and_every_unit_exists() -> None:
    made = method()
    groups = made.parameter_groups(ROLE)
    named = dict(made.model.named_parameters())
    assert sorted(name for group in groups for name in group.names) == sorted(named)
    assert groups[0].weight_decay == 0.0 and all(named[name].ndim == 1 for name in groups[0].names)
    assert groups[1].weight_decay is None and all(named[name].ndim == 4 for name in groups[1].names)
    plan = made.parallel_plan(ROLE)
    assert len(plan.fsdp_units) == 6 and not plan.differentiates_inside
    for unit in plan.fsdp_units:
        made.model.get_submodule(unit)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_objective_is_the_formula(kind: str) -> None:
    made = method(reconstruction=kind, kl_weight=0.5)
    turn = made.turns(0, 0)[0]
    batch, draws = {"pixels": pixels()}, {"posterior_noise": noise()}
    losses = made.objective(turn, batch, draws)
    x = batch["pixels"].float() / 127.5 - 1
    moments = made.model.encode(x)
    error = made.model.decode(sample_moments(moments, draws["posterior_noise"])) - x
    wanted = error.abs().mean() if kind == "l1" else error.square().mean()
    terms = losses.terms
    assert {name: term.count for name, term in terms.items()} == made.counts(turn, batch, draws)
    assert (terms["reconstruction"].sum / 4).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (terms["kl"].sum / 4).item() == pytest.approx(kl_to_standard_normal(moments).mean().item(), rel=1e-5)
    assert (terms["reconstruction"].weight, terms["kl"].weight) == (1.0, 0.5 / (3 * 8 * 8))
    # as in LDM: errors summed over the image + kl_weight * nats, here both divided by the values of an image
    total = sum(term.weight * term.sum / term.count for term in terms.values())
    summed = (error.abs() if kind == "l1" else error.square()).flatten(1).sum(1) + 0.5 * kl_to_standard_normal(moments)
    assert total.item() == pytest.approx(summed.mean().item() / (3 * 8 * 8), rel=1e-5)


def test_terms_add_up_however_the_batch_is_cut() -> None:
    made = method()
    turn, images, drawn = made.turns(0, 0)[0], pixels(), noise()
    whole = made.objective(turn, {"pixels": images}, {"posterior_noise": drawn}).terms
    cut = [slice(0, 1), slice(1, 4)]
    parts = [made.objective(turn, {"pixels": images[c]}, {"posterior_noise": drawn[c]}).terms for c in cut]
    for name, term in whole.items():
        assert sum(part[name].sum.item() for part in parts) == pytest.approx(term.sum.item(), rel=1e-5)
        assert sum(part[name].count for part in parts) == term.count == 4.0


def test_every_parameter_gets_a_gradient() -> None:
    made = method(kl_weight=1.0)
    terms = made.objective(made.turns(0, 0)[0], {"pixels": pixels()}, {"posterior_noise": noise()}).terms
    sum(term.weight * term.sum for term in terms.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.model.parameters())


def test_flip_mirrors_the_drawn_half() -> None:
    made = method(horizontal_flip=True)
    assert set(made.draws(made.turns(0, 0)[0])) == {"posterior_noise", "flip"}
    x = normalize(pixels(2))
    found = made.training_images({"pixels": pixels(2)}, {"flip": torch.tensor([0.2, 0.7])})
    assert torch.equal(found[0], x[0].flip(-1)) and torch.equal(found[1], x[1])
    assert set(method().draws(made.turns(0, 0)[0])) == {"posterior_noise"}


def test_draws_have_the_shape_of_the_latents() -> None:
    made = Autoencoder(config(image_size=16, architecture={"embed_dim": 5, "ch_mult": (1, 1, 1)}))
    assert made.draws(made.turns(0, 0)[0])["posterior_noise"].shape == (5, 4, 4)


@pytest.mark.parametrize("wrong", [pixels(channels=1), pixels().float(), pixels()[..., :4]])
def test_other_rows_are_refused(wrong: Tensor) -> None:
    made = method()
    with pytest.raises(DataError, match=r"column 'pixels' came as .* need uint8 \[3, 8, 8\]"):
        made.objective(made.turns(0, 0)[0], {"pixels": wrong}, {"posterior_noise": noise()})


# ---------------------------------------------------------------- reconstructions


class Rows:
    """A plan whose row i is image i of a tensor."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def labels(self, ids: Tensor) -> Tensor:
        raise AssertionError("an autoencoder needs no labels")

    def rows(self, ids: Tensor, columns: Any) -> dict[str, Tensor]:
        assert tuple(columns) == ("pixels",)
        return {"pixels": self.images[ids % len(self.images)]}


def generate(made: Autoencoder, ids: list[int], **settings: Any) -> Tensor:
    given = torch.tensor(ids)
    conditions = made.conditions(given, Rows(pixels(channels=made.config.architecture.in_channels)))
    return made.generate(conditions, Draws(0, "sample", given), ReconstructionSettings(**settings), lambda: None)


def test_generated_images_are_reconstructions_of_the_rows() -> None:
    made = method()
    with torch.no_grad():
        wanted = to_pixels(made.model.decode(made.model.encode(normalize(pixels()))[:, :3]))
    assert torch.equal(generate(made, [0, 1, 2, 3]), wanted)
    assert torch.equal(generate(made, [2, 7])[0], generate(made, [2, 6])[0])


def test_a_draw_from_the_posterior_depends_on_the_id_alone() -> None:
    made = method()
    mean, drawn = generate(made, [1, 2]), generate(made, [1, 2], posterior="sample")
    assert not torch.equal(mean, drawn)
    assert torch.equal(drawn[1], generate(made, [3, 2], posterior="sample")[1])
    assert not torch.equal(drawn[1], generate(made, [1, 6], posterior="sample")[1])  # the same row, other noise


def test_original_beside_the_reconstruction() -> None:
    made = method()
    both = generate(made, [0, 1], beside_original=True)
    assert both.shape == (2, 3, 8, 16)
    assert torch.equal(both[..., :8], pixels()[:2]) and torch.equal(both[..., 8:], generate(made, [0, 1]))


def test_grey_images_become_colour_ones() -> None:
    made = ENTRY.build(config(architecture={"in_channels": 1}), TableFacts())
    assert isinstance(made, Autoencoder)
    materialise(made, seed=0)
    found = generate(made, [0, 1])
    assert found.shape == (2, 3, 8, 8) and torch.equal(found[:, 0], found[:, 2])


def test_pixels_that_are_no_numbers_are_not_hidden() -> None:
    made = method()
    with torch.no_grad():
        made.model.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="not finite"):
        generate(made, [0])


# ---------------------------------------------------------------- scale and export


def test_scale_is_one_over_the_spread_of_drawn_latents() -> None:
    made = method()
    images = pixels(64)
    scale = measure_scale(made.model, images.split(10))
    with torch.no_grad():
        moments = made.model.encode(normalize(images)).double()
    drawn = sample_moments(moments.repeat(200, 1, 1, 1), torch.randn(64 * 200, 3, 4, 4, dtype=torch.float64))
    assert scale * drawn.std().item() == pytest.approx(1.0, abs=0.01)
    assert math.isclose(measure_scale(made.model, [images]), scale, rel_tol=1e-6)  # however they are cut


def test_latents_that_do_not_vary_have_no_scale() -> None:
    made = method()
    with pytest.raises(DataError, match="latents of 0 values .* have no scale"):
        measure_scale(made.model, [])
    with torch.no_grad():
        made.model.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="have the variance nan"):
        measure_scale(made.model, [pixels()])


def table(folder: Path, rows: int = 20) -> Table:
    columns = {"pixels": pixels(rows), "labels": torch.zeros(rows, dtype=torch.int64)}
    write_table(folder, columns, shard_rows=8, num_classes=1)
    return Table.open(folder)


def test_the_tokenizer_reads_an_export_back(tmp_path: Path) -> None:
    made = method()
    tensors, metadata = export_role(ROLE, made.model.state_dict(), made.config, table(tmp_path / "table"))
    write_tensors(tmp_path / "autoencoder.safetensors", tensors, metadata)
    read = KlVae("autoencoder.safetensors", workspace=tmp_path)
    assert read.architecture == made.config.architecture and read.shift == 0.0
    assert read.scale == pytest.approx(measure_scale(made.model, [pixels(20)]), rel=1e-6)
    assert metadata["hpc_gen.scale_rows"] == "20"
    moments = read.encode_float32(pixels())["moments"]
    with torch.no_grad():
        assert torch.allclose(moments, made.model.encode(normalize(pixels())), atol=1e-6)
    images = read.decode(moments[:, :3] * read.scale)
    assert (images.int() - generate(made, [0, 1, 2, 3]).int()).abs().max() <= 1
    assert ENTRY.export is not None
    again, same = ENTRY.export(ROLE, made.model.state_dict(), made.config, table(tmp_path / "again"))
    assert same == metadata and all(torch.equal(again[name], value) for name, value in tensors.items())


def test_without_a_table_the_export_names_no_scale(tmp_path: Path) -> None:
    made = method()
    write_tensors(tmp_path / "w.safetensors", *export_role(ROLE, made.model.state_dict(), made.config, None))
    with pytest.raises(UserError, match="does not say the scale"):
        KlVae("w.safetensors", workspace=tmp_path)
    assert KlVae("w.safetensors", workspace=tmp_path, scale=2.0).architecture == made.config.architecture


def test_other_roles_and_states_are_not_exported() -> None:
    made = method()
    with pytest.raises(UserError, match="no role 'generator'"):
        export_role("generator", made.model.state_dict(), made.config, None)
    state = {name: value for name, value in made.model.state_dict().items() if name != "quant_conv.bias"}
    with pytest.raises(DataError, match="role 'autoencoder' lacks 'quant_conv.bias'"):
        export_role(ROLE, state, made.config, None)
