"""Golden handlers of METHOD energy. Everything is built from the case's own config; no number of a case is known here.

The neutral config speaks the reference's words (latent, in_channels, T, steps, cfg_scale); the cases run through the
public protocol of the method (draws in, loss terms or samples out) with the case's tensors in place of draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from golden_compare import Produced
from golden_files import Case, GoldenError, OfficialModel
from golden_handling import ModelFacts, constants, handles, handles_official, known_keys
from numpy.typing import NDArray
from torch import Tensor

from hpc_gen.diffusion.gaussian import GaussianDiffusion, linear_betas, named_betas
from hpc_gen.methods.energy.config import EnergyConfig, EnergyHeadConfig, SamplingSettings
from hpc_gen.methods.energy.inner import (
    INNER_STEPS_SAMPLING,
    INNER_STEPS_TRAINING,
    Descent,
    InnerTrace,
    descend,
    descend_with_graph,
    inner_step_counts,
    signal_bound,
)
from hpc_gen.methods.energy.losses import (
    contrastive_errors,
    landscape_of,
    negatives,
    refinement_errors,
    refinement_path,
)
from hpc_gen.methods.energy.objective import EnergyDiffusion
from hpc_gen.methods.energy.recipe import ENTRY, SIZES, decay_groups
from hpc_gen.methods.energy.sampler import evaluation_layout, guided
from hpc_gen.methods.energy.weights import import_flat, official_list
from hpc_gen.methods.protocol import TableFacts
from hpc_gen.runtime.randomness import Draw

TURN = 0


def _parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}


# The reference's words that a case may use. Those of the second line do not change what a case computes: the step size
# is in the weights, the rest is how the weights were made, what is logged, and what the reference never uses.
NEUTRAL_WORDS = (
    "hidden", "depth", "heads", "latent", "in_channels", "num_classes", "T", "mlp_ratio", "patch_size",
    "steps", "cfg_scale", "clip_denoised", "use_energy", "use_innerloop_opt", "always_accept_opt_steps",
    "energy_gradient_multiplier", "linear_then_mean", "mcmc_step_size", "learnable_mcmc_step_size",
    "mcmc_refinement_loss_scale", "supervise_energy_landscape", "contrasive_loss_scale",
)  # fmt: skip
INERT_WORDS = (
    "head_scale",
    "class_dropout_prob",
    "log_energy_accept_rate",
    "wandb_log_mse_only",
    "mcmc_step_size_lr_multiplier",
)


def _config(case: Case, parameters: Mapping[str, Tensor], batch: int = 1) -> EnergyConfig:
    """The method's config from the neutral words of the case; losses are coupled over a whole `batch`, as there."""
    neutral: dict[str, Any] = case.record["config"]["neutral"]
    reference: dict[str, Any] = case.record["config"].get("reference", {})
    known_keys(neutral, (*NEUTRAL_WORDS, *INERT_WORDS), "config.neutral")
    constants(reference, {"learn_sigma": False}, "config.reference")
    return EnergyConfig(
        variant="energy" if neutral.get("use_energy") else "standard",
        energy=_head(neutral, case.record, batch) if neutral.get("use_energy") else EnergyHeadConfig(),
        input="latents",
        image_size=neutral["latent"],
        tokenizer_stride=1,
        channels=neutral["in_channels"],
        # The reference picks its patch size by model name and ignores the option, so the weights know it.
        patch_size=parameters["dit.x_embedder.proj.weight"].shape[-1],
        hidden=neutral["hidden"],
        depth=neutral["depth"],
        heads=neutral["heads"],
        mlp_ratio=neutral.get("mlp_ratio", reference.get("mlp_ratio", 4.0)),
        num_classes=neutral["num_classes"],
        diffusion_timesteps=neutral["T"],
    )


def _head(neutral: Mapping[str, Any], record: Mapping[str, Any], batch: int) -> EnergyHeadConfig:
    """The energy variant as the reference has it: its clamp, its refinement loss, whole batches as groups."""
    learnable = neutral.get("learnable_mcmc_step_size", False)
    supervised = neutral.get("supervise_energy_landscape", False)
    # The reference's contrast walks with its step size when that is learnable, else with a constant.
    contrastive_step = None if learnable else record.get("step_size", 0.01)
    return EnergyHeadConfig(
        grad_multiplier=neutral.get("energy_gradient_multiplier", 1.0),
        linear_then_mean=neutral.get("linear_then_mean", False),
        step_size=neutral.get("mcmc_step_size", 0.01),
        learnable_step_size=learnable,
        refinement_weight=neutral.get("mcmc_refinement_loss_scale", 0.1),
        refinement="reference",
        # The reference takes every step of this loss only where sampling has the inner loop.
        refinement_test=learnable and not neutral.get("use_innerloop_opt", False),
        contrastive_weight=neutral.get("contrasive_loss_scale", 0.05) if supervised else 0.0,
        contrastive_step_size=contrastive_step,
        always_accept=_always_accepts(neutral),
        inner_clamp="signal",
        step_group=batch,
    )


def _always_accepts(neutral: Mapping[str, Any]) -> bool:
    """The reference skips the acceptance test only where both flags are set."""
    return bool(neutral.get("use_innerloop_opt", False) and neutral.get("always_accept_opt_steps", False))


def _method(case: Case, tensors: Mapping[str, Tensor]) -> EnergyDiffusion:
    """The method with the case's weights: built on the meta device, materialised, loaded with strict keys."""
    parameters = _parameters(tensors)
    batch = len(next((tensors[name] for name in ("in.x0", "in.x", "in.y") if name in tensors), [0]))
    method = ENTRY.build(_config(case, parameters, batch), TableFacts())
    assert isinstance(method, EnergyDiffusion)
    method.model.to_empty(device="cpu")
    import_flat(method.model, parameters, source=str(case.json_path.with_suffix(".safetensors")))
    return method


def _gradients(method: EnergyDiffusion) -> dict[str, Tensor]:
    named = method.model.named_parameters()
    return {f"grad.{name}": p.grad for name, p in named if p.grad is not None}


@handles("energy", "pd_forward")
def pd_forward(case: Case) -> Produced:
    """Noise prediction, energy, gradients of the prediction's mean square, guidance on 3 and on all channels."""
    tensors = case.tensors()
    method = _method(case, tensors)
    x = tensors["in.x"].clone().requires_grad_()
    energies: dict[str, Tensor] = {}
    if method.config.variant == "energy":
        energy, epsilon = method.model.energy_and_noise(x, tensors["in.t"], tensors["in.y"])
        alone = method.model.energy(tensors["in.x"], tensors["in.t"], tensors["in.y"])
        energies = {"out.energy": energy[:, None], "out.energy_only": alone[:, None]}
    else:
        epsilon = method.model(x, tensors["in.t"], tensors["in.y"])
    mean_square = epsilon.square().mean()
    mean_square.backward()
    out = {**energies, "out.eps": epsilon, "out.mean_sq": mean_square, "grad.in.x": x.grad, **_gradients(method)}
    if "in.cfg_x" in tensors:
        with torch.no_grad():
            raw = method.model(tensors["in.cfg_x"], tensors["in.cfg_t"], tensors["in.cfg_y"])
        half = guided(*raw.chunk(2), tensors["in.cfg_scale"].item())
        out["out.cfg_all"] = torch.cat([half, half])
        # The reference's quirk, which our sampler does not have: only the first three channels are guided.
        out["out.cfg_first3"] = torch.cat([torch.cat([half, half])[:, :3], raw[:, 3:]], dim=1)
    return Produced(out)


@handles("energy", "pd_loss")
def pd_loss(case: Case) -> Produced:
    """The training loss through the method's objective, and the gradient of every parameter."""
    tensors = case.tensors()
    method = _method(case, tensors)
    x0, t, y, noise = (tensors[f"in.{name}"] for name in ("x0", "t", "y", "noise"))
    with torch.no_grad():
        x_t, per_sample = method.noise_errors(x0, t, y, noise)
    turn = method.turns(0, 0)[TURN]
    batch = {"latents": x0, "labels": y}
    draws = {"t": t, "noise": noise, "drop": torch.ones(len(t))}  # a draw of 1 drops no label
    term = method.objective(turn, batch, draws).terms["mse"]
    loss = term.sum / method.counts(turn, batch, draws)["mse"]
    loss.backward()
    gradients = _gradients(method)
    without = [name for name, p in method.model.named_parameters() if p.grad is None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
    out = {"out.x_t": x_t, "out.loss_per_sample": per_sample, "out.loss": loss, "out.grad_norm": norm}
    out["out.num_params_without_grad"] = torch.tensor([len(without)]).reshape(
        tensors["out.num_params_without_grad"].shape
    )
    return Produced({**out, **gradients}, {"params_without_grad": without})


class CaseDraws:
    """The case's noise in place of hpc_gen.runtime.randomness.Draws; asks that shapes are what the sampler says."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def take(self, name: str, draw: Draw, k: int = 0) -> Tensor:
        """`x_T`, or row k of the step noise."""
        assert name in ("x_T", "step_noise"), name
        value = self.tensors["in.init_noise"] if name == "x_T" else self.tensors["in.step_noise"][k]
        assert tuple(value.shape[1:]) == draw.shape, f"{name}: {list(value.shape[1:])} is not {draw.shape}"
        return value


@handles("energy", "pd_loss_contrastive")
def pd_loss_contrastive(case: Case) -> Produced:
    """The negatives' chain, the contrast, and its gradients."""
    tensors = case.tensors()
    method = _method(case, tensors)
    config = method.config.energy
    names = ("x0", "t", "y", "noise", "neg_perturbation")
    arguments: Any = (method.model, method.diffusion, config, *(tensors[f"in.{name}"] for name in names))
    steps = inner_step_counts(tensors["in.t"], method.diffusion.num_timesteps, INNER_STEPS_SAMPLING, config.step_group)
    if steps.tolist() != [case.record["steps"]] * len(steps):
        raise AssertionError(f"the chain makes {steps.tolist()} steps, the reference makes {case.record['steps']}")
    start, walked = negatives(*arguments)
    per_sample = contrastive_errors(*arguments)
    per_sample.mean().backward()
    out = {"out.x_neg_noisy": start, "out.x_neg_opt": walked, "out.loss_per_sample": per_sample}
    return Produced({**out, "out.loss": per_sample.mean(), **_gradients(method)})


@handles("energy", "pd_loss_refinement")
def pd_loss_refinement(case: Case) -> Produced:
    """The walk with its graph, the refinement loss, and its gradients (the step size's among them)."""
    tensors = case.tensors()
    method = _method(case, tensors)
    config = method.config.energy
    x0, t, y, noise = (tensors[f"in.{name}"] for name in ("x0", "t", "y", "noise"))
    start, refined, energies = refinement_path(method.model, method.diffusion, config, x0, t, y, noise)
    counts = inner_step_counts(t, method.diffusion.num_timesteps, INNER_STEPS_TRAINING, config.step_group)
    (loss,) = refinement_errors(energies, counts, config)
    loss.backward()
    out = {"out.x_noisy": start, "out.x_refined": refined, "out.energy_trajectory": energies[..., None]}
    return Produced({**out, "out.loss": loss, **_gradients(method)})


@handles("energy", "pd_loss_total")
def pd_loss_total(case: Case) -> Produced:
    """The whole training loss through the method's objective, weighted as the engine weights it."""
    tensors = case.tensors()
    method = _method(case, tensors)
    turn = method.turns(0, 0)[TURN]
    order = ("t", "noise", "contrastive_noise", "perturbation", "refinement_noise")
    drawn = sorted(name for name in tensors if name.startswith("in.draw_"))
    wanted = [name for name in order if name in method.draws(turn)]  # a loss that is off draws nothing
    draws = {name: tensors[given] for name, given in zip(wanted, drawn, strict=True)}
    draws["drop"] = torch.ones(len(draws["t"]))  # a draw of 1 drops no label
    if {*method.draws(turn)} != {*draws}:
        raise AssertionError(f"the method draws {sorted(method.draws(turn))}, the case has {sorted(draws)}")
    batch = {"latents": tensors["in.x0"], "labels": tensors["in.y"]}
    counts, terms = method.counts(turn, batch, draws), method.objective(turn, batch, draws).terms
    means = {name: term.sum / counts[name] for name, term in terms.items()}
    total = torch.stack([terms[name].weight * mean for name, mean in means.items()]).sum()
    total.backward()
    names = {"mse": "mse_loss", "contrastive": "energy_loss", "refinement": "opt_refinement_loss"}
    parts = {f"out.{theirs}": means.get(ours, torch.zeros(())) for ours, theirs in names.items()}
    return Produced({"out.total_loss": total, **parts, **_gradients(method)})


@handles("energy", "pd_opt_step")
def pd_opt_step(case: Case) -> Produced:
    """The inner loop: with the acceptance test, without it, and uphill; step counts and what the test counts."""
    tensors = case.tensors()
    method = _method(case, tensors)
    x, t, y = (tensors[f"in.{name}"] for name in ("x", "t", "y"))
    landscape, bound = landscape_of(method.model, t, y), signal_bound(method.diffusion, t, x)
    size = method.model.alpha
    out = {}
    for suffix, always in (("", False), ("_always", True)):
        trace = InnerTrace()
        counts = torch.full_like(t, case.record["steps"])
        out[f"out.x{suffix}"] = descend(landscape, x, counts, Descent(size, always), bound=bound, trace=trace)
        out[f"out.accepted{suffix}"] = torch.tensor(int(trace.accepted))
        out[f"out.total{suffix}"] = torch.tensor(int(trace.tested))
    for name, value in tensors.items():
        match = re.fullmatch(r"out\.(energy_trajectory|x_ascent)_(\d+)(_always)?", name)
        if match is None:
            continue
        counts, always = torch.full_like(t, int(match[2])), match[3] is not None
        if match[1] == "x_ascent":
            out[name] = descend(landscape, x, counts, Descent(size, always, uphill=True), bound=bound)
        elif always:
            with torch.no_grad():
                out[name] = descend_with_graph(landscape, x, counts, Descent(size), bound=bound)[1].view_as(value)
        else:
            every = (torch.full_like(t, k) for k in range(int(match[2])))
            visited = [descend(landscape, x, each, Descent(size), bound=bound) for each in every]
            out[name] = torch.stack([landscape.energy(each).detach() for each in visited]).view_as(value)
    return Produced(out)


@handles("energy", "pd_sample_std", "pd_sample_std_cfg", "pd_sample_energy", "pd_sample_energy_mcmc")
def pd_sample(case: Case) -> Produced:
    """The respaced ancestral chain, guided when the case has a scale, with the inner loop where the case has it."""
    tensors = case.tensors()
    neutral = case.record["config"]["neutral"]
    method = _method(case, tensors)
    scale = neutral.get("cfg_scale", 1.0)  # with guidance the reference leaves the inner loop out
    settings = SamplingSettings(
        steps=neutral["steps"],
        guidance=scale,
        clip_denoised=neutral.get("clip_denoised", True),
        inner_loop=bool(neutral.get("use_innerloop_opt") and neutral.get("use_energy") and scale == 1.0),
        inner_t="index",
        inner_clamp="signal",
        always_accept=_always_accepts(neutral),
    )
    if "in.timestep_map" in tensors:
        ours, theirs = (
            method.diffusion.respaced(settings.steps).timestep_map,
            tensors["in.timestep_map"].tolist(),
        )
        if ours != theirs:
            raise AssertionError(f"the chain keeps timesteps {ours}, the reference keeps {theirs}")
    polls: list[int] = []
    arguments: Any = ({"labels": tensors["in.y"]}, CaseDraws(tensors), settings, lambda: polls.append(1))
    states = list(method.trajectory(*arguments))
    if len(polls) < len(states):
        raise AssertionError(f"the sampler polled {len(polls)} times in {len(states)} steps")
    curves = method.take_curves()
    out = {"out.trajectory": torch.stack(states), "out.sample": method.generate(*arguments)}
    rate = curves.get("energy_accept_rate")  # where no step was tested, both counts are 0
    out["out.accepted"] = torch.tensor(int(rate.sums[0]) if rate else 0)
    out["out.total"] = torch.tensor(int(rate.counts[0]) if rate else 0)
    return Produced(out)


# Tables of the reference that follow from alpha_bar, which we have no name for.
DERIVED_TABLES: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "alphas_cumprod_prev": lambda bar: np.append(1.0, bar[:-1]),
    "alphas_cumprod_next": lambda bar: np.append(bar[1:], 0.0),
    "log_one_minus_alphas_cumprod": lambda bar: np.log(1.0 - bar),
}


@handles("energy", "diffusion_tables")
def diffusion_tables(case: Case) -> Produced:
    """Every table of full and respaced chains, as named in the case's config."""
    config = case.record["config"]
    known_keys(config, ("schedules", "respaced"), "config")
    chains: dict[str, GaussianDiffusion] = {}
    for name, (schedule, num_timesteps) in config.get("schedules", {}).items():
        chains[name] = GaussianDiffusion(named_betas(schedule, num_timesteps))
    for name, (schedule, num_timesteps, spacing) in config.get("respaced", {}).items():
        chains[name] = GaussianDiffusion(named_betas(schedule, num_timesteps)).respaced(spacing)
    out = {}
    for name in case.tensors():
        _, chain, table = name.split(".")
        if chain not in chains:
            raise GoldenError(f"{name} belongs to no schedule of the case's config")
        derived = DERIVED_TABLES.get(table)
        found = derived(chains[chain].alphas_cumprod) if derived else getattr(chains[chain], table)
        out[name] = torch.from_numpy(np.asarray(found))
    return Produced(out)


@handles("energy", "schedules_misc")
def schedules_misc(case: Case) -> Produced:
    """Learning rates, EMA, evaluation layout, inner-loop steps and clamp, and weight-decay groups."""
    tensors, config = case.tensors(), case.record["config"]
    known_keys(config, ("lr", "ema_rate", "eval", "adaptive", "weight_decay"), "config")
    known_keys(config.get("adaptive", {}), ("T",), "config.adaptive")
    known_keys(config.get("eval", {}), ("num_images", "classes", "batch", "world", "steps"), "config.eval")
    out = {**_learning_rates(config.get("lr", {}), tensors), **_averages(config, tensors)}
    if "eval" in config:
        out.update(_evaluation(config["eval"]))
    if "adaptive" in config:
        num_timesteps = config["adaptive"]["T"]
        t = tensors["in.adaptive.t"]
        for name, base in (("sampling", INNER_STEPS_SAMPLING), ("training", INNER_STEPS_TRAINING)):
            out[f"out.adaptive.{name}"] = inner_step_counts(t.view(-1), num_timesteps, base, group=1).view(t.shape)
        diffusion = GaussianDiffusion(linear_betas(num_timesteps))
        every_t = torch.arange(num_timesteps)
        out["out.opt_clamp"] = signal_bound(diffusion, every_t, torch.zeros(1, dtype=torch.float64))
    groups = case.record.get("weight_decay_groups", {})
    return Produced(out, {"weight_decay_groups": {name: _regrouped(listed, config) for name, listed in groups.items()}})


LR_WORDS = ("schedule", "epochs", "warmup_epochs", "blr", "lr", "batch_per_gpu", "world", "grad_accu", "min_lr")


def _learning_rates(runs: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from hpc_gen.training.schedules import learning_rate, peak_learning_rate

    epoch_images = 2**20  # any length of an epoch gives the same rates; a power of two also gives the same last bits
    out = {}
    for name, run in runs.items():
        known_keys(run, LR_WORDS, f"config.lr.{name}")
        global_batch = run["batch_per_gpu"] * run["world"] * run["grad_accu"]
        peak = peak_learning_rate(lr=run.get("lr"), blr=run.get("blr"), global_batch=global_batch)
        rates = [
            learning_rate(
                epoch * epoch_images,
                peak=peak,
                warmup_images=run["warmup_epochs"] * epoch_images,
                total_images=run["epochs"] * epoch_images,
                kind=run["schedule"],
                min_lr=run["min_lr"],
            )
            for epoch in tensors[f"in.lr.{name}.epoch"].tolist()
        ]
        out[f"out.lr.{name}"] = torch.tensor(rates, dtype=torch.float64)
        out[f"out.lr.{name}.peak"] = torch.tensor(peak, dtype=torch.float64)
    return out


def _averages(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from hpc_gen.training.ema import update_ema_

    names = sorted(name for name in tensors if re.fullmatch(r"in\.ema\.init\d+", name))
    indices = [int(name.removeprefix("in.ema.init")) for name in names]
    averages = [tensors[name].clone() for name in names]
    step = 0
    while indices and f"in.ema.step{step}_{indices[0]}" in tensors:
        update_ema_(averages, [tensors[f"in.ema.step{step}_{i}"] for i in indices], config["ema_rate"])
        step += 1
    return {f"out.ema{i}": average for i, average in zip(indices, averages, strict=True)}


def _evaluation(layout: Mapping[str, int]) -> dict[str, Tensor]:
    out = {}
    for rank in range(layout["world"]):
        ids, labels = evaluation_layout(layout["num_images"], layout["classes"], layout["batch"], layout["world"], rank)
        if len(ids) != layout["steps"]:
            raise AssertionError(f"evaluation has {len(ids)} steps, the reference has {layout['steps']}")
        out[f"out.eval.ids_rank{rank}"], out[f"out.eval.labels_rank{rank}"] = ids, labels
    return out


def _regrouped(listed: list[dict[str, Any]], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups that we make of the case's own parameters.

    Some of these models do not exist here yet, so names are taken from the case, and dimensions from the kind of layer
    the name tells: biases and norms are vectors, the step size is a scalar, all other parameters have two or more.
    """
    from hpc_gen.config.train import OptimizerConfig

    decay = config.get("weight_decay", OptimizerConfig.model_fields["weight_decay"].default)
    groups = decay_groups((name, _num_dims(name)) for group in listed for name in group["params"])
    split = ((0.0, groups.undecayed), (decay, groups.decayed), (0.0, groups.step_size))
    return [{"weight_decay": value, "params": list(names)} for value, names in split]


def _num_dims(name: str) -> int:
    *_, module, leaf = ["", *name.split(".")]
    if leaf == "alpha":
        return 0
    return 1 if leaf == "bias" or re.search(r"(norm\d*|_ln)$", module) else 2


@handles("energy", "crop_resize")
def crop_resize(case: Case) -> Produced:
    """Centre crop, resize, conversion to a tensor, and its mirror image."""
    from PIL import Image

    from hpc_gen.data.images import center_crop, resize, to_rgb, to_tensor_normalized

    tensors, neutral = case.tensors(), case.record["config"]["neutral"]
    known_keys(neutral, ("img_size", "effective_img_size", "sizes_wh"), "config.neutral")
    out = {}
    for name, value in tensors.items():
        if not name.startswith("in.image"):
            continue
        number = name.removeprefix("in.image")
        cropped = center_crop(to_rgb(Image.fromarray(value.numpy())), neutral["img_size"])
        resized = resize(cropped, neutral["effective_img_size"])
        pixels = to_tensor_normalized(resized)
        out[f"out.crop{number}"] = torch.from_numpy(np.asarray(cropped).copy())
        out[f"out.resized{number}"] = torch.from_numpy(np.asarray(resized).copy())
        out[f"out.tensor{number}"], out[f"out.tensor_flip{number}"] = pixels, pixels.flip(-1)
    return Produced(out)


@handles_official("energy", "pure_diffusion_*")
def pure_diffusion(model: OfficialModel) -> ModelFacts:
    """A published size on KL16 latents (stride 16, 16 channels, 1000 ImageNet classes) at the record's image size."""
    config = model.record["config"]
    known_keys(config, ("img_size", "use_energy", "learnable_mcmc_step_size", "num_classes"), "config")
    size = model.name.split("_")[2]
    if size not in SIZES:
        raise GoldenError(f"'{model.name}' names size '{size}', known sizes: {', '.join(SIZES)}")
    ours = official_list(
        EnergyConfig(
            variant="energy" if config.get("use_energy") else "standard",
            energy=EnergyHeadConfig(learnable_step_size=config.get("learnable_mcmc_step_size", False)),
            input="latents",
            image_size=config["img_size"],
            channels=16,
            **SIZES[size],
        ),
        num_classes=config.get("num_classes", 1000),
    )
    return ModelFacts(ours.state_dict, ours.buffers, ours.frozen, ours.num_params, ours.num_trainable)
