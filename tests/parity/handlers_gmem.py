"""Golden handlers of METHOD gmem. Everything is built from the case's own config; no number of a case is known here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from golden_compare import Produced
from golden_files import Case, OfficialModel
from golden_handling import ModelFacts, handles, handles_official
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_gen.config.experiment import OptimizerConfig
from hpc_gen.data.table import Table
from hpc_gen.diffusion import flow
from hpc_gen.diffusion.flow_solvers import StochasticSampler, ode_grid, sde_grid
from hpc_gen.methods.gmem.bank import LowRankBank, as_condition, interpolated, mixed
from hpc_gen.methods.gmem.config import GmemConfig, GuidanceInterval, SamplingSettings
from hpc_gen.methods.gmem.model import QK_LAYER_NORM_EPS, RMSNorm, make_norm, rotary_tables, rotate
from hpc_gen.methods.gmem.objective import Gmem, projection_errors, velocity_errors
from hpc_gen.methods.gmem.recipe import SIZES
from hpc_gen.methods.gmem.sampler import guided_velocity, solution
from hpc_gen.methods.gmem.weights import import_flat, official_list
from hpc_gen.nn.embeddings import sincos_positions, timestep_features
from hpc_gen.nn.posterior import LatentScale
from hpc_gen.training.ema import update_ema_
from hpc_gen.training.optimizers import RoleOptimizer
from shard_tools.stats import channel_statistics

LINEAR = flow.LinearPath()
NORM = 1.5  # of the diffusion in paths_grids_forms, as its record says
FORMS = {"inccreasing-decreasing": "increasing-decreasing", "SBDM": "sbdm"}  # the reference's spelling


def _config(neutral: Mapping[str, Any], **more: Any) -> GmemConfig:
    """The method's config from the neutral words of a case."""
    words = {
        "mlp_ratio": "mlp_ratio",
        "qk_norm": "qk_norm",
        "swiglu": "swiglu",
        "rope": "rope",
        "rms_norm": "rms_norm",
        "learn_sigma": "learn_sigma",
        "repr_tap_after_block": "repr_after_block",
        "snippet_dim": "snippet_dim",
        "projector_hidden": "projector_hidden",
        "repr_dim": "repr_dim",
    }
    given = {ours: neutral[theirs] for theirs, ours in words.items() if theirs in neutral}
    return GmemConfig(
        image_size=neutral["latent_size"],
        tokenizer_stride=1,
        channels=neutral["latent_channels"],
        patch_size=neutral["patch_size"],
        hidden=neutral["hidden"],
        depth=neutral["depth"],
        heads=neutral["heads"],
        shift=not neutral.get("adaln_without_shift", False),
        **{"horizontal_flip": False, **given, **more},
    )


def _method(case: Case, tensors: Mapping[str, Tensor], **more: Any) -> Gmem:
    """The method with the case's weights: built on the meta device, materialised, loaded with strict keys.

    A case without a projector among its weights is built with one of its own sizes, which nothing reads.
    """
    parameters = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    neutral = dict(case.record["config"]["neutral"])
    last = parameters.get("projector.0.4.weight")
    if last is not None:
        neutral.setdefault("projector_hidden", last.shape[1])
        neutral.setdefault("repr_dim", last.shape[0])
    method = Gmem(_config(neutral, **more))
    method.model.to_empty(device="cpu")
    import_flat(method.model, parameters, source=str(case.json_path.with_suffix(".safetensors")))
    return method


def _gradients(method: Gmem) -> dict[str, Tensor]:
    return {f"grad.{name}": p.grad for name, p in method.model.named_parameters() if p.grad is not None}


@handles("gmem", "backbone")
def backbone(case: Case) -> Produced:
    """Velocity with a snippet and with the null snippet; gradients of a weighted sum."""
    tensors = case.tensors()
    method = _method(case, tensors)
    x, snippet = (tensors[name].clone().requires_grad_() for name in ("in.x", "in.snippet"))
    velocity = method.model(x, tensors["in.t"], snippet)
    (velocity * tensors["in.loss_weight"]).sum().backward()
    with torch.no_grad():
        null = method.model(tensors["in.x"], tensors["in.t"], torch.zeros_like(tensors["in.snippet"]))
    out = {"out.velocity": velocity.detach(), "out.velocity_null_snippet": null}
    return Produced({**out, "grad.x": x.grad, "grad.c": snippet.grad, **_gradients(method)})


@handles("gmem", "backbone_guidance")
@torch.no_grad()
def backbone_guidance(case: Case) -> Produced:
    """Guidance inside, before and after the interval, and everywhere; the second half of the input is never read."""
    tensors, words = case.tensors(), case.record["config"]["guidance"]
    method = _method(case, tensors)
    x = tensors["in.x_doubled"].chunk(2)[0]
    snippet, null = tensors["in.snippet_doubled"].chunk(2)
    inside = GuidanceInterval(
        scale=words["cfg_scale"], start=words["cfg_interval_start"], end=words["cfg_interval_end"]
    )
    out = {}
    for name in tensors:
        if not name.startswith("out."):
            continue
        kind, _, time = name.removeprefix("out.").partition("_t")
        guidance = inside if kind == "interval" else GuidanceInterval(scale=words["cfg_scale"])
        t_B = torch.full((len(x),), float(time))
        v = guided_velocity(method.model, snippet, null, guidance)(x, t_B)
        out[name] = torch.cat([v, v])
    return Produced(out)


class _Step:
    """One optimizer step's worth of a case's inputs, as the objective takes them."""

    def __init__(self, method: Gmem, tensors: Mapping[str, Tensor], index: int | None = None) -> None:
        def of(name: str) -> Tensor:
            return tensors[f"in.{name}"] if index is None else tensors[f"in.{name}"][index]

        dropout = method.config.snippet_dropout
        # a draw at or above the dropout keeps the element
        keep = torch.where(of("dropout_keep_mask").bool(), 1.0, 0.0)
        self.batch = {
            "latents": of("x1_latent"),
            "cls_tokens": of("snippet_raw"),
            "representations": of("repr_target"),
        }
        # times are given, so the draws are what the sigmoid takes back to them
        self.draws = {"t": torch.logit(of("t").double()).float(), "noise": of("x0_noise"), "keep": keep}
        self.t = of("t")
        assert 0 < dropout < 1


@handles("gmem", "loss_terms")
def loss_terms(case: Case) -> Produced:
    """All terms through the method's objective, their gradients, and both outputs of the network."""
    tensors = case.tensors()
    words = case.record["config"]["loss"]
    method = _method(
        case,
        tensors,
        projection_weight=words["proj_loss_weight"],
        cosine_loss=words["use_cosine_loss"],
        snippet_dropout=words["snippet_dropout"],
        lognormal_times=False,
    )
    step = _Step(method, tensors)
    draws = {**step.draws, "t": step.t}
    turn = method.turns(0, 0)[0]
    terms, counts = method.objective(turn, step.batch, draws).terms, method.counts(turn, step.batch, draws)
    total = sum(term.weight * term.sum / counts[name] for name, term in terms.items())
    assert isinstance(total, Tensor)
    total.backward()
    gradients = _gradients(method)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    with torch.no_grad():
        x_t, target = flow.interpolate(LINEAR, draws["noise"], step.batch["latents"], step.t)
        condition = method.training_condition(step.batch, draws)
        velocity, projected = method.model.with_representations(x_t, step.t, condition)
        errors = velocity_errors(velocity, target, cosine=True)
        assert projected is not None
        projection = projection_errors(projected, step.batch["representations"]).mean()
    out = {"out.mse_per_sample": errors["mse"], "out.cos_per_sample": errors["cosine"], "out.proj": projection}
    out |= {"out.total": total.detach(), "out.pred": velocity, "out.repr_pred": projected, "out.grad_norm": norm}
    return Produced({**out, **gradients})


@handles("gmem", "train_steps")
def train_steps(case: Case) -> Produced:
    """Some steps of clipped AdamW and the average after each, with our optimizer and our average."""
    tensors = case.tensors()
    method = _method(case, tensors, lognormal_times=False)
    groups = method.parameter_groups("denoiser")
    config = OptimizerConfig(lr=2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, clip=1.0)
    optimizer = RoleOptimizer(method.model, groups, config)
    named = dict(method.model.named_parameters())
    average = {name: p.detach().clone() for name, p in named.items()}
    losses, norms = [], []
    for index in range(case.record["config"]["steps"]):
        step = _Step(method, tensors, index)
        draws = {**step.draws, "t": step.t}
        turn = method.turns(0, 0)[0]
        terms, counts = method.objective(turn, step.batch, draws).terms, method.counts(turn, step.batch, draws)
        total = sum(term.weight * term.sum / counts[name] for name, term in terms.items())
        assert isinstance(total, Tensor)
        method.model.zero_grad()
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(method.model.parameters(), 1.0).detach())
        optimizer.step(2e-4)
        with torch.no_grad():
            trained = [name for name, p in named.items() if p.requires_grad]
            update_ema_([average[name] for name in trained], [named[name].detach() for name in trained], 0.9999)
        losses.append(total.detach())
    out = {"out.loss": torch.stack(losses), "out.grad_norm_before_clip": torch.stack(norms)}
    for name in tensors:
        place, _, key = name.removeprefix("out.").partition(".")
        if name.startswith("out.") and place in ("final", "ema"):
            out[name] = (named if place == "final" else average)[key].detach()
    return Produced(out)


@handles("gmem", "position_tables")
def position_tables(case: Case) -> Produced:
    """Rotary and fixed tables, time features, and every norm on inputs so small that a wrong eps shows."""
    tensors, words = case.tensors(), case.record["config"]["neutral"]
    cos_NK, sin_NK = rotary_tables(words["head_dim"], words["grid"])
    xl = words["xl"]
    xl_cos, xl_sin = rotary_tables(xl["head_dim"], xl["grid"])
    small = tensors["in.small_activations"]
    rms = RMSNorm(small.shape[1])
    rms.weight = nn.Parameter(tensors["in.norm_weight"])
    group = F.group_norm(small.reshape(2, 64, 2, 1), 32, rms.weight, eps=1e-6)
    layer = nn.LayerNorm(small.shape[1], eps=QK_LAYER_NORM_EPS)
    layer.weight = rms.weight
    with torch.no_grad():
        out = {
            "out.freqs_cos": cos_NK,
            "out.freqs_sin": sin_NK,
            "out.q_rotated": rotate(tensors["in.q"], cos_NK, sin_NK),
            "out.pos_embed": sincos_positions(words["hidden"], words["grid"])[0],
            "out.timestep_features": timestep_features(tensors["in.t"]),
            f"out.xl_freqs_cos_row{xl['row']}": xl_cos[xl["row"]],
            f"out.xl_freqs_sin_row{xl['row']}": xl_sin[xl["row"]],
            f"out.xl_pos_embed_row{xl['row']}": sincos_positions(xl["hidden"], xl["grid"])[0, xl["row"]],
            "out.rms_norm_small": rms(small),
            "out.layer_norm_noaffine_small": make_norm(small.shape[1], rms=False)(small),
            "out.qk_layer_norm_small": layer(small),
            "out.group_norm_small": group,
        }
    return Produced(out)


@handles("gmem", "paths_grids_forms")
def paths_grids_forms(case: Case) -> Produced:
    """Grids, coefficients, forms, conversions, weighted losses, and the interval of every combination."""
    tensors = case.tensors()
    t, x, output, noise = (tensors[f"in.{name}"] for name in ("t", "x", "model_out", "x0_noise"))
    out = {"out.lognorm_t": flow.lognormal_times(tensors["in.normals"])}
    for name in tensors:
        if name.startswith("out.ode_n"):
            points, _, shift = name.removeprefix("out.ode_n").partition("_shift")
            out[name] = ode_grid(int(points), float(shift))
    grid = sde_grid(50, 0.004)
    out |= {"out.sde_n50_last0.004": grid, "out.sde_dt": grid[1] - grid[0]}
    for name, path in flow.PATHS.items():
        (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
        mean, variance = flow.drift(path, x, t)
        x_t, u_t = flow.interpolate(path, noise, x, t)
        found = {"alpha": alpha, "d_alpha": d_alpha, "sigma": sigma, "d_sigma": d_sigma, "x_t": x_t, "u_t": u_t}
        found |= {"drift_mean": mean, "drift_var": variance.expand_as(x)}
        found |= {"score_from_velocity": flow.score_of_velocity(path, output, x, t)}
        found |= {"noise_from_velocity": flow.noise_of_velocity(path, output, x, t)}
        found |= {"velocity_from_score": flow.velocity_of_score(path, output, x, t)}
        out |= {f"out.{name}.{key}": value for key, value in found.items()}
        for key in tensors:
            if key.startswith(f"out.{name}.diffusion."):
                form = key.rpartition(".")[2]
                out[key] = flow.Diffusion(path, FORMS.get(form, form), NORM)(x, t)
    for prediction in ("noise", "score"):
        for weight in ("none", "velocity", "likelihood"):
            errors = flow.prediction_errors(LINEAR, prediction, weight, output, noise, _noisy(x, noise, t), t)
            out[f"out.loss.{prediction}.{weight}"] = errors
    return Produced(out, {"config.intervals": [_interval(each) for each in case.record["config"]["intervals"]]})


def _noisy(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return flow.interpolate(LINEAR, noise, x, t)[0]


def _interval(words: Mapping[str, Any]) -> dict[str, Any]:
    path = flow.PATHS[words["path"].lower()]
    form = FORMS.get(words["form"], words["form"])
    begin, end = flow.interval(
        path, words["prediction"], form, words["sde"], words["last_step_size"], words["sample_eps"]
    )
    return {**words, "t0": begin, "t1": end}


def _guidance(words: Mapping[str, Any] | None) -> GuidanceInterval:
    if words is None:
        return GuidanceInterval()
    return GuidanceInterval(scale=words["scale"], start=words.get("start", 0.0), end=words.get("end"))


@handles("gmem", "ode")
@torch.no_grad()
def ode(case: Case) -> Produced:
    """All states on the grid, the noise first."""
    tensors, words = case.tensors(), case.record["config"]["sampler"]
    method = _method(case, tensors)
    settings = SamplingSettings(
        mode="ode",
        method=words["method"],
        points=words["grid_points"],
        shift=words["timestep_shift"],
        atol=words["atol"],
        rtol=words["rtol"],
        guidance=_guidance(words["guidance"]),
    )
    snippet, x = tensors["in.snippet"], tensors["in.x_init"]
    velocity = guided_velocity(method.model, snippet, torch.zeros_like(snippet), settings.guidance)
    states = solution(velocity, x, settings, lambda k: x, lambda: None)
    grid = ode_grid(settings.points, settings.shift)
    return Produced({"out.t_grid": grid, "out.trajectory": torch.stack([x, *states])})


@handles("gmem", "sde")
@torch.no_grad()
def sde(case: Case) -> Produced:
    """The state after each step of every variant, with the case's noise."""
    tensors, words = case.tensors(), case.record["config"]["sampler"]
    method = _method(case, tensors)
    snippet, x = tensors["in.snippet"], tensors["in.x_init"]
    velocity = guided_velocity(method.model, snippet, torch.zeros_like(snippet), _guidance(words["guidance"]))
    out = {}
    for name, variant in words["variants"].items():
        form = FORMS.get(variant["form"], variant["form"])
        last = (variant["last"] or "none").lower()
        diffusion = flow.Diffusion(LINEAR, form, variant.get("norm", 1.0))
        sampler = StochasticSampler(LINEAR, diffusion, variant["method"].lower(), last, variant.get("last_size", 0.0))
        states = sampler(velocity, x, words["num_steps"], lambda k: tensors["in.step_noise"][k], lambda: None)
        out[f"out.{name}"] = torch.stack(list(states))
    return Produced(out)


@handles("gmem", "memory_bank")
def memory_bank(case: Case) -> Produced:
    """Rows, appended rows and interpolations of the full and of the low-rank bank."""
    tensors, words = case.tensors(), case.record["config"]["neutral"]
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
    table = Table.open(case.json_path.parent / "latent_shards")
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


@handles_official("gmem", "gmem/*")
@handles_official("gmem", "lightningdit/*")
def official(model: OfficialModel) -> ModelFacts:
    """Backbones by the name `FAMILY/LightningDiT-SIZE/PATCH/PIXELS[/qknorm]`."""
    family, name, patch, pixels, *rest = model.name.split("/")
    config = GmemConfig(
        **SIZES[name.removeprefix("LightningDiT-")],
        patch_size=int(patch),
        image_size=int(pixels),
        qk_norm="qknorm" in rest,
        condition="class" if family == "lightningdit" else "snippet",
    )
    found = official_list(config, num_classes=1000 if family == "lightningdit" else 0)
    if "qknorm" in rest:  # the record holds only the keys that the switch adds
        plain = official_list(config.model_copy(update={"qk_norm": False})).state_dict
        added = {name: shape for name, shape in found.state_dict.items() if name not in plain}
        return ModelFacts(added, (), (), found.num_params, found.num_trainable)
    return ModelFacts(found.state_dict, found.buffers, found.frozen, found.num_params, found.num_trainable)
