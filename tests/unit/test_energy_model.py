"""The DiT of methods/energy: counts, shapes, initialisation, gradients, independence of samples."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.model import PureDiffusion, initialise
from hpc_gen.methods.energy.recipe import SIZES
from hpc_gen.methods.energy.weights import official_list
from hpc_gen.nn.embeddings import sincos_positions, timestep_features

CLASSES = 3


def config(**change: object) -> EnergyConfig:
    base = {"input": "latents", "image_size": 8, "tokenizer_stride": 1, "channels": 3, "patch_size": 2}
    return EnergyConfig(**{**base, "hidden": 16, "depth": 2, "heads": 2, "diffusion_timesteps": 50, **change})


def network(seed: int = 0, random_zeros: bool = True, **change: object) -> PureDiffusion:
    """A materialised network; the parameters that start at zero are redrawn, else nothing passes the gates."""
    with torch.device("meta"):
        model = PureDiffusion(config(**change), CLASSES)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    initialise(model, generator)
    if random_zeros:
        for parameter in model.parameters():
            if not parameter.any():
                parameter.data.normal_(0.0, 0.1, generator=generator)
    return model.eval()


def inputs(model: PureDiffusion, batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    side = model.dit.grid * model.dit.patch_size
    x = torch.randn(batch, model.dit.channels, side, side, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.randint(0, 50, (batch,), generator=generator)
    return x, t, torch.arange(batch) % (CLASSES + 1)


@pytest.mark.parametrize(
    ("size", "image_size", "total", "trainable"),
    [
        ("small", 256, 32_957_200, 32_858_896),
        ("small", 64, 32_865_040, 32_858_896),
        ("base", 256, 130_500_112, 130_303_504),
        ("base", 64, 130_315_792, 130_303_504),
        ("large", 256, 458_086_416, 457_824_272),
        ("large", 64, 457_840_656, 457_824_272),
        ("xlarge", 256, 675_111_184, 674_816_272),
        ("xlarge", 64, 674_834_704, 674_816_272),
    ],
)
def test_published_parameter_counts(size: str, image_size: int, total: int, trainable: int) -> None:
    ours = official_list(EnergyConfig(image_size=image_size, channels=16, **SIZES[size]), num_classes=1000)
    assert (ours.num_params, ours.num_trainable) == (total, trainable)


def test_demo_model_is_small() -> None:
    demo = EnergyConfig(input="pixels", image_size=16, channels=1, patch_size=2, hidden=128, depth=4, heads=4)
    assert 1.1e6 < official_list(demo, num_classes=10).num_params < 1.3e6


@pytest.mark.parametrize(("patch", "channels", "side"), [(1, 16, 4), (2, 1, 16), (2, 3, 8), (4, 3, 8), (8, 1, 8)])
def test_output_has_the_shape_of_the_input(patch: int, channels: int, side: int) -> None:
    model = network(patch_size=patch, channels=channels, image_size=side)
    x, t, y = inputs(model)
    assert model(x, t, y).shape == x.shape == (4, channels, side, side)
    assert model.dit.x_embedder.proj.weight.shape == (16, channels, patch, patch)
    assert model.dit.final_layer.linear.out_features == patch * patch * channels
    assert model.dit.pos_embed.shape == (1, (side // patch) ** 2, 16)


def test_unpatchify_puts_each_value_where_its_patch_came_from() -> None:
    model = network(patch_size=2, channels=3, image_size=6)
    image = torch.arange(2 * 3 * 36, dtype=torch.float32).view(2, 3, 6, 6)
    patches = image.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, G, G, P, P]
    tokens = patches.permute(0, 2, 3, 4, 5, 1).reshape(2, 9, 12)
    assert torch.equal(model.dit.unpatchify(tokens), image)


def test_state_dict_keys_are_the_reference_names() -> None:
    keys = list(network().state_dict())
    assert keys[:4] == ["alpha", "dit.pos_embed", "dit.x_embedder.proj.weight", "dit.x_embedder.proj.bias"]
    assert keys[-1] == "dit.final_layer.adaLN_modulation.1.bias"
    assert [name for name, _ in network().named_buffers()] == ["alpha"]
    assert [n for n, p in network().named_parameters() if not p.requires_grad] == ["dit.pos_embed"]


def test_initialisation() -> None:
    model = network(random_zeros=False, hidden=64, heads=4, patch_size=2)
    values = model.state_dict()
    assert not any(value.isnan().any() for value in values.values())
    zero = {name for name, value in values.items() if not value.any()}
    must_be_zero = {n for n in values if n.endswith(".bias") or "adaLN" in n or "final_layer" in n}
    assert zero == must_be_zero
    assert values["alpha"].item() == pytest.approx(0.01)
    for name in ("dit.y_embedder.embedding_table.weight", "dit.t_embedder.mlp.0.weight", "dit.t_embedder.mlp.2.weight"):
        assert values[name].std().item() == pytest.approx(0.02, rel=0.2), name
    for name, fan_in, fan_out in (
        ("dit.blocks.0.attn.qkv.weight", 64, 192),
        ("dit.blocks.1.mlp.fc1.weight", 64, 256),
        ("dit.x_embedder.proj.weight", 12, 64),  # as the linear map of a 2 x 2 x 3 patch
    ):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert 0.9 * bound < values[name].abs().max().item() <= bound, name
        assert values[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15), name
    assert not model(*inputs(model)).any()  # nothing but zero until training moves the gates


def test_initialisation_depends_on_the_generator_only() -> None:
    first, second, other = network(seed=3), network(seed=3), network(seed=4)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.dit.x_embedder.proj.weight, other.dit.x_embedder.proj.weight)


def test_positions_encode_column_then_row() -> None:
    table = sincos_positions(16, 5)
    assert table.shape == (1, 25, 16) and table.dtype == torch.float32
    grid = table.view(5, 5, 16)
    assert torch.equal(grid[0, 3, :8], grid[4, 3, :8])  # the first half knows the column only
    assert torch.equal(grid[2, 0, 8:], grid[2, 4, 8:])  # the second half knows the row only
    assert torch.equal(grid[2, 3, :8], grid[3, 2, 8:])
    assert grid[0, 3, 0].item() == pytest.approx(math.sin(3)) and grid[0, 3, 4].item() == pytest.approx(math.cos(3))
    assert grid[0, 3, 1].item() == pytest.approx(math.sin(3 * 10000**-0.25))


def test_timestep_features_are_cosines_then_sines_of_the_raw_index() -> None:
    features = timestep_features(torch.tensor([0, 499]))
    assert features.shape == (2, 256) and features.dtype == torch.float32
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert features[1, 0].item() == pytest.approx(math.cos(499), abs=1e-4)
    assert features[1, 128].item() == pytest.approx(math.sin(499), abs=1e-4)
    assert features[1, 129].item() == pytest.approx(math.sin(499 * math.exp(-math.log(10000) / 128)), abs=1e-4)


def test_samples_do_not_see_each_other() -> None:
    model = network()
    x, t, y = inputs(model)
    whole = model(x, t, y)
    for i in range(len(x)):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        assert torch.allclose(whole[i : i + 1], alone, atol=1e-5)


def test_timestep_and_class_and_null_class_matter() -> None:
    model = network()
    x, t, y = inputs(model)
    base = model(x, t, y)
    assert (model(x, t + 1, y) - base).abs().max() > 1e-4
    assert (model(x, t, (y + 1) % (CLASSES + 1)) - base).abs().max() > 1e-4
    assert (model(x, t, torch.full_like(y, CLASSES)) - base)[:3].abs().max() > 1e-4


def test_module_mode_changes_nothing() -> None:
    model = network()
    x, t, y = inputs(model)
    assert torch.equal(model.eval()(x, t, y), model.train()(x, t, y))


def test_gradients_match_finite_differences() -> None:
    """Central differences in float64 along one random direction per parameter and along the input."""
    model = network(depth=1).double()
    x, t, y = inputs(model, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value() -> torch.Tensor:
        return (model(x, t, y) * weight).sum()

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | {"x": x}
    gradients = torch.autograd.grad(value(), list(trained.values()))
    step = 1e-5
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            parameter += step * direction
            above = value()
            parameter -= 2 * step * direction
            below = value()
            parameter += step * direction
        numeric = ((above - below) / (2 * step)).item()
        assert numeric == pytest.approx((gradient * direction).sum().item(), rel=1e-5, abs=1e-7), name
        assert numeric != 0, name
