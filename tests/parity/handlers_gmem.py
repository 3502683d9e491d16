"""Golden handlers of METHOD gmem. Everything is built from the case's own config; no number of a case is known here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from golden_compare import Produced
from golden_files import Case, GoldenError, OfficialModel
from golden_handling import ModelFacts, constants, handles, handles_official, known_keys
from torch import Tensor, nn

from hpc_gen.config.experiment import OptimizerConfig
from hpc_gen.diffusion import flow
from hpc_gen.diffusion.flow_solvers import StochasticSampler, ode_grid, sde_grid
from hpc_gen.methods.gmem.config import GmemConfig, GuidanceInterval, SamplingSettings
from hpc_gen.methods.gmem.model import QK_LAYER_NORM_EPS, RMSNorm, make_norm, rotary_tables, rotate
from hpc_gen.methods.gmem.objective import Gmem, projection_errors, velocity_errors
from hpc_gen.methods.gmem.recipe import SIZES
from hpc_gen.methods.gmem.sampler import guided_velocity, solution
from hpc_gen.methods.gmem.weights import import_flat, official_list
from hpc_gen.nn.embeddings import sincos_positions, timestep_features
from hpc_gen.tokenizers.kl_vae_model import Norm
from hpc_gen.training.ema import update_ema_
from hpc_gen.training.optimizers import RoleOptimizer

LINEAR = flow.LinearPath()
FORMS = {"inccreasing-decreasing": "increasing-decreasing"}  # the reference's spelling
SIZE_WORDS = (
    "latent_size", "latent_channels", "patch_size", "hidden", "depth", "heads", "adaln_without_shift", "num_classes",
)  # fmt: skip
SAME_WORDS = {
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
NUMBER = r"[0-9.]+(?:e-?[0-9]+)?"


def _config(neutral: Mapping[str, Any], **more: Any) -> GmemConfig:
    """The method's config from the neutral words of a case."""
    known_keys(neutral, (*SIZE_WORDS, *SAME_WORDS), "config.neutral")
    given = {ours: neutral[theirs] for theirs, ours in SAME_WORDS.items() if theirs in neutral}
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


def _method(case: Case, tensors: Mapping[str, Tensor], projects: bool = False, **more: Any) -> Gmem:
    """The method with the case's weights: built on the meta device, materialised, loaded with strict keys.

    Sizes of a projector that the config does not tell are those of the weights. Without `projects` nothing reads it,
    so a network may end before the block that it taps. Labels condition the network whose weights have a table of them.
    """
    parameters = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    known_keys(case.record["config"], ("neutral", "reference", "guidance", "loss", "sampler", *STEP_WORDS), "config")
    neutral = dict(case.record["config"]["neutral"])
    last, table = parameters.get("projector.0.4.weight"), parameters.get("y_embedder.embedding_table.weight")
    if last is not None:
        neutral.setdefault("projector_hidden", last.shape[1])
        neutral.setdefault("repr_dim", last.shape[0])
    if not projects:
        neutral["repr_tap_after_block"] = min(neutral.get("repr_tap_after_block", 1), neutral["depth"])
    num_classes = 0 if table is None else len(table) - 1
    if num_classes != neutral.get("num_classes", num_classes):
        raise GoldenError(f"the weights hold {num_classes} classes, the config {neutral['num_classes']}")
    if num_classes:
        more["condition"] = "class"
    method = Gmem(_config(neutral, **more), num_classes)
    method.model.to_empty(device="cpu")
    import_flat(method.model, parameters, source=str(case.json_path.with_suffix(".safetensors")))
    return method


def _conditions(method: Gmem, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A case's snippets or labels, and the null condition like them."""
    if method.config.condition == "class":
        return tensors["in.y"], torch.full_like(tensors["in.y"], method.num_classes)
    return tensors["in.snippet"], torch.zeros_like(tensors["in.snippet"])


def _form(word: str) -> str:
    return FORMS.get(word, word).lower()


def _gradients(method: Gmem) -> dict[str, Tensor]:
    return {f"grad.{name}": p.grad for name, p in method.model.named_parameters() if p.grad is not None}


@handles("gmem", "backbone")
def backbone(case: Case) -> Produced:
    """Velocity with a condition and with the null one; gradients of a weighted sum."""
    tensors = case.tensors()
    method = _method(case, tensors)
    condition, null = _conditions(method, tensors)
    x, condition = tensors["in.x"].clone().requires_grad_(), condition.clone()
    if condition.is_floating_point():
        condition.requires_grad_()
    velocity = method.model(x, tensors["in.t"], condition)
    (velocity * tensors["in.loss_weight"]).sum().backward()
    with torch.no_grad():
        out = {"out.velocity": velocity.detach()}
        for name in tensors:
            if name.startswith("out.velocity_null"):
                out[name] = method.model(tensors["in.x"], tensors["in.t"], null)
    gradients = {"grad.x": x.grad, "grad.c": condition.grad}
    return Produced({**out, **{k: v for k, v in gradients.items() if v is not None}, **_gradients(method)})


@handles("gmem", "backbone_guidance")
@torch.no_grad()
def backbone_guidance(case: Case) -> Produced:
    """Guidance inside, before and after the interval, and everywhere; the second half of the input is never read."""
    tensors, words = case.tensors(), case.record["config"]["guidance"]
    interval = ("cfg_interval_start", "cfg_interval_end")
    known_keys(words, ("cfg_scale", *interval, "t_values", "t_compare"), "config.guidance")
    method = _method(case, tensors)
    x = tensors["in.x_doubled"].chunk(2)[0]
    snippet, null = tensors["in.snippet_doubled"].chunk(2)
    scale = words["cfg_scale"]
    inside = {"scale": scale, "start": words.get(interval[0]) or 0.0, "end": words.get(interval[1])}
    guidances = {"interval": GuidanceInterval(**inside), "full": GuidanceInterval(scale=scale)}
    out = {}
    for name in tensors:
        if found := re.fullmatch(rf"out\.(interval|full)_t({NUMBER})", name):
            t_B = torch.full((len(x),), float(found[2]))
            v = guided_velocity(method.model, snippet, null, guidances[found[1]])(x, t_B)
            out[name] = torch.cat([v, v])
    return Produced(out)


def _step_inputs(
    method: Gmem, tensors: Mapping[str, Tensor], index: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Batch and draws of one optimizer step, as the objective takes them; `index`: which of several."""

    def of(name: str) -> Tensor:
        return tensors[f"in.{name}"] if index is None else tensors[f"in.{name}"][index]

    batch = {"latents": of("x1_latent"), "cls_tokens": of("snippet_raw"), "representations": of("repr_target")}
    draws = {"t": of("t"), "noise": of("x0_noise")}
    if method.config.snippet_dropout > 0:
        # a draw at or above the dropout keeps the element
        draws["keep"] = torch.where(of("dropout_keep_mask").bool(), 1.0, 0.0)
    return batch, draws


def _total(method: Gmem, batch: Mapping[str, Tensor], draws: Mapping[str, Tensor]) -> Tensor:
    """The training loss as the engine weighs its terms."""
    turn = method.turns(0, 0)[0]
    terms, counts = method.objective(turn, batch, draws).terms, method.counts(turn, batch, draws)
    total = sum(term.weight * term.sum / counts[name] for name, term in terms.items())
    assert isinstance(total, Tensor)
    return total


@handles("gmem", "loss_terms")
def loss_terms(case: Case) -> Produced:
    """All terms through the method's objective, their gradients, and both outputs of the network."""
    tensors = case.tensors()
    words = case.record["config"]["loss"]
    known_keys(words, ("proj_loss_weight", "use_cosine_loss", "snippet_dropout"), "config.loss")
    method = _method(
        case,
        tensors,
        projects=True,
        projection_weight=words["proj_loss_weight"],
        cosine_loss=words["use_cosine_loss"],
        snippet_dropout=words["snippet_dropout"],
        lognormal_times=False,  # times are given
    )
    batch, draws = _step_inputs(method, tensors)
    total = _total(method, batch, draws)
    total.backward()
    gradients = _gradients(method)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    if not method.config.projects:  # where nothing trains the projector, the reference's gradients are zero
        untrained = (name for name in tensors if name.startswith("grad.projector."))
        gradients |= {name: torch.zeros_like(tensors[name]) for name in untrained}
    with torch.no_grad():
        x_t, target = flow.interpolate(LINEAR, draws["noise"], batch["latents"], draws["t"])
        condition = method.training_condition(batch, draws)
        velocity, projected = method.model.with_representations(x_t, draws["t"], condition)
        errors = velocity_errors(velocity, target, cosine=True)
        assert projected is not None
        projection = projection_errors(projected, batch["representations"]).mean()
    out = {"out.mse_per_sample": errors["mse"], "out.cos_per_sample": errors["cosine"], "out.proj": projection}
    out |= {"out.total": total.detach(), "out.pred": velocity, "out.repr_pred": projected, "out.grad_norm": norm}
    return Produced({**out, **gradients})


# What the shipped case says in words alone; a case with other numbers names them in its config.
STEP_WORDS = {
    "steps": None, "lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0,
    "ema_decay": 0.9999,
}  # fmt: skip


@handles("gmem", "train_steps")
def train_steps(case: Case) -> Produced:
    """Some steps of clipped AdamW and the average after each, with our optimizer and our average."""
    tensors, config = case.tensors(), case.record["config"]
    words = {**STEP_WORDS, **{key: value for key, value in config.items() if key in STEP_WORDS}}
    loss = config.get("loss", {})
    known_keys(loss, ("proj_loss_weight", "use_cosine_loss", "snippet_dropout"), "config.loss")
    method = _method(
        case,
        tensors,
        projects=True,
        lognormal_times=False,
        projection_weight=loss.get("proj_loss_weight", 0.5),
        cosine_loss=loss.get("use_cosine_loss", True),
        snippet_dropout=loss.get("snippet_dropout", 0.4),
    )
    optimizer_config = OptimizerConfig(**{key: words[key] for key in ("lr", "betas", "eps", "weight_decay", "clip")})
    optimizer = RoleOptimizer(method.model, method.parameter_groups("denoiser"), optimizer_config)
    named = dict(method.model.named_parameters())
    average = {name: p.detach().clone() for name, p in named.items()}
    losses, norms = [], []
    for index in range(config["steps"]):
        total = _total(method, *_step_inputs(method, tensors, index))
        method.model.zero_grad()
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(method.model.parameters(), words["clip"]).detach())
        optimizer.step(words["lr"])
        with torch.no_grad():
            trained = [name for name, p in named.items() if p.requires_grad]
            decay = words["ema_decay"]
            update_ema_([average[name] for name in trained], [named[name].detach() for name in trained], decay)
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
    known_keys(words, ("head_dim", "grid", "hidden", "xl"), "config.neutral")
    cos_NK, sin_NK = rotary_tables(words["head_dim"], words["grid"])
    small = tensors["in.small_activations"]
    rms, group = RMSNorm(small.shape[1]), Norm(small.shape[1])
    weight = nn.Parameter(tensors["in.norm_weight"])
    layer = nn.LayerNorm(small.shape[1], eps=QK_LAYER_NORM_EPS)
    rms.weight = layer.weight = group.weight = weight
    with torch.no_grad():
        out = {
            "out.freqs_cos": cos_NK,
            "out.freqs_sin": sin_NK,
            "out.q_rotated": rotate(tensors["in.q"], cos_NK, sin_NK),
            "out.pos_embed": sincos_positions(words["hidden"], words["grid"])[0],
            "out.timestep_features": timestep_features(tensors["in.t"]),
            "out.rms_norm_small": rms(small),
            "out.layer_norm_noaffine_small": make_norm(small.shape[1], rms=False)(small),
            "out.qk_layer_norm_small": layer(small),
            "out.group_norm_small": group(small.reshape(tensors["out.group_norm_small"].shape)),
        }
    if "xl" in words:
        xl = words["xl"]
        known_keys(xl, ("head_dim", "grid", "hidden", "row"), "config.neutral.xl")
        xl_cos, xl_sin = rotary_tables(xl["head_dim"], xl["grid"])
        out[f"out.xl_freqs_cos_row{xl['row']}"] = xl_cos[xl["row"]]
        out[f"out.xl_freqs_sin_row{xl['row']}"] = xl_sin[xl["row"]]
        out[f"out.xl_pos_embed_row{xl['row']}"] = sincos_positions(xl["hidden"], xl["grid"])[0, xl["row"]]
    return Produced(out)


@handles("gmem", "paths_grids_forms")
def paths_grids_forms(case: Case) -> Produced:
    """Grids, coefficients, forms, conversions, weighted losses, and the interval of every combination."""
    tensors, config = case.tensors(), case.record["config"]
    known_keys(config, ("intervals", "norm", "time_shift", "velocity_note", "eps_note"), "config")
    t, x, output, noise = (tensors[f"in.{name}"] for name in ("t", "x", "model_out", "x0_noise"))
    out = {"out.lognorm_t": flow.lognormal_times(tensors["in.normals"])}
    for name in tensors:
        if found := re.fullmatch(rf"out\.ode_n(\d+)_shift({NUMBER})", name):
            out[name] = ode_grid(int(found[1]), float(found[2]))
        elif found := re.fullmatch(rf"out\.sde_n(\d+)_last({NUMBER})", name):
            grid = out[name] = sde_grid(int(found[1]), float(found[2]))
            out["out.sde_dt"] = grid[1] - grid[0]
        elif found := re.fullmatch(r"out\.loss\.(noise|score)\.(none|velocity|likelihood)", name):
            prediction: Any = found[1]
            weight: Any = found[2]
            x_t = flow.interpolate(LINEAR, noise, x, t)[0]
            out[name] = flow.prediction_errors(LINEAR, prediction, weight, output, noise, x_t, t)
    for name, path in flow.PATHS.items():
        (alpha, d_alpha), (sigma, d_sigma) = path.alpha(t), path.sigma(t)
        mean, variance = flow.drift(path, x, t)
        x_t, u_t = flow.interpolate(path, noise, x, t)
        found_here = {"alpha": alpha, "d_alpha": d_alpha, "sigma": sigma, "d_sigma": d_sigma, "x_t": x_t, "u_t": u_t}
        found_here |= {"drift_mean": mean, "drift_var": variance.expand_as(x)}
        found_here |= {"score_from_velocity": flow.score_of_velocity(path, output, x, t)}
        found_here |= {"noise_from_velocity": flow.noise_of_velocity(path, output, x, t)}
        found_here |= {"velocity_from_score": flow.velocity_of_score(path, output, x, t)}
        out |= {f"out.{name}.{key}": value for key, value in found_here.items()}
        for key in tensors:
            if key.startswith(f"out.{name}.diffusion."):
                out[key] = flow.Diffusion(path, _form(key.rpartition(".")[2]), _norm(case))(x, t)
    return Produced(out, {"config.intervals": [_interval(each) for each in config["intervals"]]})


def _norm(case: Case) -> float:
    """Factor of the diffusion: the config's, else the one that the case names in words ("norm 1.5")."""
    found = re.search(rf"\bnorm ({NUMBER})", case.record.get("what", ""))
    if found is None and "norm" not in case.record["config"]:
        raise GoldenError("the case names no norm of its diffusion forms")
    return float(case.record["config"].get("norm", found and found[1]))


def _interval(words: Mapping[str, Any]) -> dict[str, Any]:
    path = flow.PATHS[words["path"].lower()]
    prediction, last = words["prediction"], words["last_step_size"]
    begin, end = flow.interval(path, prediction, _form(words["form"]), words["sde"], last, words["sample_eps"])
    return {**words, "t0": begin, "t1": end}


def _guidance(words: Mapping[str, Any] | None) -> GuidanceInterval:
    """The reference guides only where the scale is above 1."""
    known_keys(words or {}, ("scale", "start", "end"), "config.sampler.guidance")
    if words is None or words["scale"] <= 1:
        return GuidanceInterval()
    return GuidanceInterval(scale=words["scale"], start=words.get("start", 0.0), end=words.get("end"))


ODE_WORDS = ("kind", "method", "grid_points", "solver_steps", "timestep_shift", "atol", "rtol", "reverse", "guidance")
SDE_WORDS = ("kind", "num_steps", "noisy_steps", "variants", "guidance")
VARIANT_WORDS = ("name", "path", "method", "form", "last", "last_size", "norm")
SOLVERS = {"heun2": "heun"}  # torchdiffeq's name


@handles("gmem", "ode")
@torch.no_grad()
def ode(case: Case) -> Produced:
    """All states on the grid, the noise first."""
    tensors, words = case.tensors(), case.record["config"]["sampler"]
    known_keys(words, ODE_WORDS, "config.sampler")
    constants(words, {"kind": "ode", "reverse": False, "solver_steps": words["grid_points"] - 1}, "config.sampler")
    method, solver = _method(case, tensors), words["method"].lower()
    settings = SamplingSettings(
        mode="ode",
        method=SOLVERS.get(solver, solver),
        points=words["grid_points"],
        shift=words.get("timestep_shift", 0.0),
        atol=words["atol"],
        rtol=words["rtol"],
        guidance=_guidance(words.get("guidance")),
    )
    x = tensors["in.x_init"]
    velocity = guided_velocity(method.model, *_conditions(method, tensors), settings.guidance)
    states = solution(velocity, x, settings, lambda k: x, lambda: None)
    grid = ode_grid(settings.points, settings.shift)
    return Produced({"out.t_grid": grid, "out.trajectory": torch.stack([x, *states])})


@handles("gmem", "sde")
@torch.no_grad()
def sde(case: Case) -> Produced:
    """The state after each step of every variant, with the case's noise."""
    tensors, words = case.tensors(), case.record["config"]["sampler"]
    known_keys(words, SDE_WORDS, "config.sampler")
    constants(words, {"kind": "sde", "noisy_steps": words["num_steps"] - 1}, "config.sampler")
    method, x = _method(case, tensors), tensors["in.x_init"]
    guidance = _guidance(words.get("guidance"))
    velocity = guided_velocity(method.model, *_conditions(method, tensors), guidance)
    out = {}
    for name, variant in words["variants"].items():
        known_keys(variant, VARIANT_WORDS, f"config.sampler.variants.{name}")
        path, last = flow.PATHS[variant.get("path", "linear").lower()], (variant["last"] or "none").lower()
        diffusion = flow.Diffusion(path, _form(variant["form"]), variant.get("norm", 1.0))
        size = 0.0 if last == "none" else variant["last_size"]
        sampler = StochasticSampler(path, diffusion, variant["method"].lower(), last, size)
        states = sampler(velocity, x, words["num_steps"], lambda k: tensors["in.step_noise"][k], lambda: None)
        out[f"out.{name}"] = torch.stack(list(states))
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
