"""The network of the KL autoencoder: counts, keys, where attention sits, strides, gradients, initial values."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from hpc_gen.config.kl_vae import KlVaeConfig
from hpc_gen.tokenizers.kl_vae import PRESETS
from hpc_gen.tokenizers.kl_vae_model import CellAttention, Downsample, KlAutoencoder, Norm, initialise, to_pixels


def config(**change: object) -> KlVaeConfig:
    base = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "resolution": 16, "z_channels": 4, "embed_dim": 4}
    return KlVaeConfig.model_validate({**base, **change})


def network(seed: int = 0, **change: object) -> KlAutoencoder:
    with torch.device("meta"):
        model = KlAutoencoder(config(**change))
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(float("nan"))
    initialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def images(side: int = 16, batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("preset", "total", "encoder", "decoder", "keys"),
    [
        ("kl16", 66_456_019, 28_265_760, 38_188_931, 312),
        ("sd_f8", 83_653_863, None, None, 248),
        ("va_vae", 69_836_067, None, None, 342),
    ],
)
def test_published_counts(preset: str, total: int, encoder: int | None, decoder: int | None, keys: int) -> None:
    with torch.device("meta"):
        model = KlAutoencoder(PRESETS[preset].architecture)
    assert sum(p.numel() for p in model.parameters()) == total
    assert len(model.state_dict()) == keys and not list(model.buffers())
    if encoder is not None:
        assert sum(p.numel() for p in model.encoder.parameters()) == encoder
        assert sum(p.numel() for p in model.decoder.parameters()) == decoder


@pytest.mark.parametrize(("preset", "stride"), [("kl16", 16), ("sd_f8", 8), ("va_vae", 16)])
def test_published_strides(preset: str, stride: int) -> None:
    assert PRESETS[preset].architecture.stride == stride


@pytest.mark.parametrize(
    ("change", "side", "latent"),
    [
        ({}, 16, (4, 8, 8)),
        ({"ch_mult": (1,)}, 16, (4, 16, 16)),
        ({"ch_mult": (1, 1, 2), "embed_dim": 3}, 24, (3, 6, 6)),
        ({"in_channels": 1, "z_channels": 2}, 16, (4, 8, 8)),
    ],
)
def test_shapes(change: dict[str, object], side: int, latent: tuple[int, int, int]) -> None:
    model = network(**change)
    x = images(side, channels=model.config.in_channels)
    moments = model.encode(x)
    assert moments.shape == (2, 2 * latent[0], *latent[1:])
    assert model.decode(moments[:, : latent[0]]).shape == x.shape


def test_sides_need_not_be_equal() -> None:
    model = network(attn_resolutions=(8,), decoder_attention=True)
    moments = model.encode(torch.zeros(1, 3, 8, 24))
    assert moments.shape == (1, 8, 4, 12) and model.decode(moments[:, :4]).shape == (1, 3, 8, 24)


def attention_names(model: KlAutoencoder) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CellAttention)]


def test_attention_is_placed_by_the_nominal_resolution() -> None:
    middle = ["encoder.mid.attn_1", "decoder.mid.attn_1"]
    assert sorted(attention_names(network())) == sorted(middle)
    one_sided = network(ch_mult=(1, 1, 1), resolution=64, attn_resolutions=(32,))
    assert sorted(attention_names(one_sided)) == sorted([*middle, "encoder.down.1.attn.0"])
    both = network(ch_mult=(1, 1, 1), resolution=64, attn_resolutions=(32,), decoder_attention=True)
    extra = ["encoder.down.1.attn.0", "decoder.up.1.attn.0", "decoder.up.1.attn.1"]
    assert sorted(attention_names(both)) == sorted(middle + extra)


def test_every_parameter_is_reached() -> None:
    model = network(attn_resolutions=(8,), decoder_attention=True)
    moments = model.encode(images())
    (model.decode(moments[:, :4]).square().sum() + moments.square().sum()).backward()
    # the bias of a key adds one number to all scores of a query, which the softmax takes out again
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]
    assert [name for name in idle if not name.endswith("k.bias")] == []


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    layer = CellAttention(32).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    h = layer.norm(x)
    q, k, v = (conv(h).flatten(2) for conv in (layer.q, layer.k, layer.v))  # [B, C, N]
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(32), dim=2)
    mixed = torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape)
    assert torch.allclose(layer(x), x + layer.proj_out(mixed), atol=1e-12)


def test_downsampling_pads_right_and_bottom_only() -> None:
    layer = Downsample(1)
    with torch.no_grad():
        layer.conv.weight.zero_()[0, 0, 0, 0] = 1.0  # picks the upper left cell of each window
        layer.conv.bias.zero_()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])


def test_samples_do_not_see_each_other() -> None:
    model, x = network(), images(batch=3)
    whole = model.encode(x)
    assert torch.allclose(whole[1:2], model.encode(x[1:2]), atol=1e-6)


def test_gradients_match_finite_differences() -> None:
    """Central differences in float64 along one random direction per parameter."""
    model = network(attn_resolutions=(8,), decoder_attention=True).double()
    x = images().double()

    def value() -> torch.Tensor:
        moments = model.encode(x)
        return model.decode(moments[:, :4]).sin().sum() + moments.cos().sum()

    named = {name: p for name, p in model.named_parameters() if "block.0" not in name}
    gradients = torch.autograd.grad(value(), list(named.values()))
    step = 1e-6
    for (name, parameter), gradient in list(zip(named.items(), gradients, strict=True))[::9]:
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        with torch.no_grad():
            parameter += step * direction
            above = value()
            parameter -= 2 * step * direction
            below = value()
            parameter += step * direction
        assert ((above - below) / (2 * step)).item() == pytest.approx(
            (gradient * direction).sum().item(), rel=1e-4, abs=1e-4
        ), name


def test_initial_values() -> None:
    model = network()
    for name, module in model.named_modules():
        if isinstance(module, Norm):
            assert bool((module.weight == 1).all()) and not module.bias.any()
            assert (module.num_groups, module.eps) == (32, 1e-6)
        elif isinstance(module, torch.nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.abs().max().item() <= bound, name
            assert 0 < module.bias.abs().max().item() <= bound, name
    same, other = network(0).state_dict(), network(1).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not torch.equal(same["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_pixels_are_rounded_and_clipped() -> None:
    exact = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_pixels(exact.float() / 127.5 - 1), exact)
    assert to_pixels(torch.tensor([-3.0, 3.0, 0.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 255, 128]
    assert to_pixels(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ch": 48}, "ch = 48 is not a multiple of the 32 groups"),
        ({"resolution": 15}, "resolution = 15 cannot be halved 1 times"),
        ({"attn_resolutions": (12,)}, "attn_resolutions names 12, but .* 16, 8"),
        ({"ch_mult": ()}, "at least 1 item"),
        ({"embed_dim": 0}, "greater than or equal to 1"),
        ({"double_z": True}, "Extra inputs"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**change)
