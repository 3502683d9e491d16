"""Golden handlers of METHOD gmem about its data: memory banks, interpolated snippets, shards of latents."""

from __future__ import annotations

from pathlib import Path

import torch
from golden_compare import Produced
from golden_files import Case, GoldenError
from golden_handling import constants, handles, known_keys

from hpc_gen.data.table import Table
from hpc_gen.methods.gmem.bank import LowRankBank, as_condition, interpolated, mixed
from hpc_gen.methods.gmem.config import GmemConfig
from hpc_gen.methods.gmem.objective import Gmem
from hpc_gen.nn.posterior import LatentScale
from shard_tools.stats import channel_statistics


@handles("gmem", "memory_bank")
def memory_bank(case: Case) -> Produced:
    """Rows, appended rows and interpolations of the full and of the low-rank bank."""
    tensors, words = case.tensors(), case.record["config"]["neutral"]
    known_keys(words, ("rows", "dim", "rank", "i", "j", "alpha"), "config.neutral")
    constants(words, dict(zip(("rows", "dim"), tensors["in.bank"].shape, strict=True)), "config.neutral")
    bank, index, new = tensors["in.bank"], tensors["in.index"], tensors["in.new_snippet"]
    i, j, alpha = words["i"], words["j"], words["alpha"]
    between = mixed(bank, i, j, alpha)
    low = LowRankBank.of(bank, words["rank"])
    coefficients = mixed(low.coefficients, i, j, alpha)
    grown = low.appended(low.project(new)).appended(coefficients)
    return Produced(
        {
            "out.full.rows": bank[index],
            "out.full.condition": as_condition(bank[index]),
            "out.full.add_exact": torch.cat([bank, new[None]])[-1],
            "out.full.add_interpolated": between,
            "out.full.get_interpolated": between,
            "out.lowrank.rows": low.rows(index),
            "out.lowrank.reconstruction": low.decode(low.coefficients),
            "out.lowrank.mean": low.mean.reshape(tensors["out.lowrank.mean"].shape),
            "out.lowrank.singular_values": low.singular_values,
            "out.lowrank.gram_basis": low.basis.T @ low.basis,
            "out.lowrank.gram_coeff": low.coefficients.T @ low.coefficients,
            "out.lowrank.projected_row": grown.rows(torch.tensor(words["rows"])),
            "out.lowrank.interpolated_row": grown.rows(torch.tensor(words["rows"] + 1)),
            "out.lowrank.interpolated_coeff_decoded": low.decode(coefficients),
        }
    )


@handles("gmem", "snippet_interpolation")
def snippet_interpolation(case: Case) -> Produced:
    """The four methods over equally spaced alphas, each result of length 1; two raw ones; equal ends."""
    tensors, words = case.tensors(), case.record["config"]["neutral"]
    known_keys(words, ("steps", "dim"), "config.neutral")
    a, b = tensors["in.a"], tensors["in.b"]
    alphas = torch.linspace(0, 1, words["steps"])
    masks = tensors["in.mask_take_a"].bool()
    out = {
        f"out.{name}": as_condition(interpolated(a, b, alphas, name, masks))  # type: ignore[arg-type]
        for name in ("linear", "spherical", "concat", "mask")
    }
    for name in tensors:
        if name.startswith("out.raw_"):
            method, _, alpha = name.removeprefix("out.raw_").rpartition("_")
            out[name] = interpolated(a, b, torch.tensor([float(alpha)]), method)[0]  # type: ignore[arg-type]
    out["out.spherical_same"] = as_condition(interpolated(a, a, alphas, "spherical"))
    return Produced(out)


@handles("gmem", "latent_dataset")
def latent_dataset(case: Case) -> Produced:
    """Rows of the reference's shards by our reader, their statistics, and the versions that its three coins chose."""
    tensors = case.tensors()
    # the shards as the config lists them: "FOLDER/FILE (7 items)"
    folders = {str(Path(text.partition(" (")[0]).parent) for text in case.record["config"]["shards"]}
    if len(folders) != 1:
        raise GoldenError(f"the shards lie in {sorted(folders)}, not in one folder")
    table = Table.open(case.json_path.parent / folders.pop())
    if len(case.record["config"]["shards"]) != len(table.index.shards):
        raise GoldenError(f"the folder holds {len(table.index.shards)} shards, the config lists others")
    found = channel_statistics(table, "latents")
    mean, std = (torch.tensor(found[key], dtype=torch.float64).float() for key in ("mean", "std_unbiased"))
    shape = {name: info.shape for name, info in table.index.columns.items()}
    config = GmemConfig(
        image_size=shape["latents"][1],
        tokenizer_stride=1,
        channels=shape["latents"][0],
        hidden=8,
        depth=1,
        heads=2,
        repr_after_block=1,
        snippet_dim=shape["cls_tokens"][0],
        repr_dim=shape["representations"][1],
        snippet_dropout=0.0,
        independent_flips=True,
    )
    scale = LatentScale(tuple((1 / std).tolist()), tuple(mean.tolist()))
    method = Gmem(config, scale=scale)
    batch = table.read(tensors["in.item_index"].numpy(), [*method.columns(), "labels"])
    # a coin below a half takes the mirrored version
    latent, representation, snippet = tensors["in.use_unflipped(latent,repr,cls)"].float().unbind(1)
    draws = {"flip": latent, "flip_representation": representation, "flip_snippet": snippet}
    draws["noise"] = torch.zeros(len(latent), *config.input_shape)
    versions = {
        "latent": method.training_input(batch, draws),
        "repr": method._chosen(batch, "representations", draws, "flip_representation"),
        "cls": method._chosen(batch, "cls_tokens", draws, "flip_snippet"),
        "label": batch["labels"][:, None],
    }
    out = {"out.mean": mean.view(1, -1, 1, 1), "out.std": std.view(1, -1, 1, 1)}
    for name in tensors:
        if name.startswith("out.item"):
            item, _, key = name.removeprefix("out.item").partition(".")
            out[name] = versions[key][int(item)].to(tensors[name].dtype)
    return Produced(out)
