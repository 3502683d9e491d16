"""Import and export of official weights: strict keys and shapes, all or nothing."""

from __future__ import annotations

import pytest
import torch

from hpc_gen.methods.energy.config import EnergyConfig
from hpc_gen.methods.energy.model import PureDiffusion, initialise
from hpc_gen.methods.energy.weights import export_flat, import_flat, official_list
from hpc_gen.runtime.errors import DataError

CONFIG = EnergyConfig(
    input="latents", image_size=32, tokenizer_stride=8, channels=4, patch_size=2, hidden=16, depth=2, heads=2
)


def network(seed: int) -> PureDiffusion:
    with torch.device("meta"):
        model = PureDiffusion(CONFIG, 5)
    model.to_empty(device="cpu")
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def test_round_trip_is_exact() -> None:
    source, target = network(0), network(1)
    flat = export_flat(source)
    import_flat(target, flat)
    assert list(flat) == list(target.state_dict())
    assert all(torch.equal(flat[name], value) for name, value in target.state_dict().items())
    flat["dit.x_embedder.proj.weight"].zero_()  # a copy: the model keeps its own
    assert source.dit.x_embedder.proj.weight.any()


def test_import_fills_every_value_of_an_empty_model() -> None:
    with torch.device("meta"):
        target = PureDiffusion(CONFIG, 5)
    target.to_empty(device="cpu")
    for value in target.state_dict().values():
        value.fill_(float("nan"))
    import_flat(target, export_flat(network(0)))
    assert not any(value.isnan().any() for value in target.state_dict().values())


def test_values_are_cast_to_the_model() -> None:
    target = network(1)
    import_flat(target, {name: value.double() for name, value in export_flat(network(0)).items()})
    assert target.alpha.dtype == torch.float32
    assert torch.equal(target.dit.pos_embed, network(0).dit.pos_embed)


def test_frozen_and_trained_stay_what_they_are() -> None:
    target = network(1)
    import_flat(target, export_flat(network(0)))
    assert [name for name, p in target.named_parameters() if not p.requires_grad] == ["dit.pos_embed"]


@pytest.mark.parametrize(
    ("drop", "add", "words"),
    [
        (["alpha"], {}, "file.pt lack 'alpha'"),
        ([], {"dit.energy_layer.energy_head.0.weight": 1}, "unknown 'dit.energy_layer"),
        (
            [f"dit.blocks.1.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
            {},
            "lack 'dit.blocks.1",
        ),
        (["alpha"], {f"x{i}": 1 for i in range(7)}, "and 2 more"),
    ],
)
def test_other_keys_are_refused_and_nothing_is_changed(drop: list[str], add: dict[str, int], words: str) -> None:
    target = network(1)
    before = export_flat(target)
    flat = {name: value for name, value in export_flat(network(0)).items() if name not in drop}
    flat |= {name: torch.zeros(size) for name, size in add.items()}
    with pytest.raises(DataError, match=words):
        import_flat(target, flat, source="file.pt")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape", "key"),
    [
        ("dit.pos_embed", (1, 16, 16), r"method\.image_size"),
        ("dit.x_embedder.proj.weight", (16, 4, 1, 1), r"method\.patch_size"),
        ("dit.y_embedder.embedding_table.weight", (1001, 16), r"method\.num_classes"),
        ("dit.final_layer.linear.bias", (4,), r"method\.channels"),
        ("dit.blocks.1.mlp.fc1.bias", (32,), r"method\.mlp_ratio"),
        ("dit.blocks.0.attn.qkv.weight", (24, 8), r"method\.hidden"),
    ],
)
def test_other_shapes_are_refused_by_config_key_and_nothing_is_changed(
    name: str, shape: tuple[int, ...], key: str
) -> None:
    target = network(1)
    before = export_flat(target)
    flat = {**export_flat(network(0)), name: torch.zeros(shape)}
    with pytest.raises(DataError, match=f"'{name}'.*{key}"):
        import_flat(target, flat)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_official_list_counts_parameters_and_not_buffers() -> None:
    listed = official_list(CONFIG, 5)
    numbers = {name: torch.Size(shape).numel() for name, shape in listed.state_dict.items()}
    assert (listed.buffers, listed.frozen) == (("alpha",), ("dit.pos_embed",))
    assert listed.num_params == sum(numbers.values()) - 1
    assert listed.num_trainable == listed.num_params - numbers["dit.pos_embed"]
