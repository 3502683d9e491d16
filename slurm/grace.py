"""The grace contract: does a preemption leave time to finish the step, agree, and save? Told at submit and at start."""

from __future__ import annotations

from hpc_gen.runtime.errors import HpcGenError
from hpc_gen.runtime.progress import format_duration
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.stages import save_interval
from hpc_gen.stages.run_setup import load_run
from hpc_gen.stages.save_interval import Cost

NOT_MEASURED = "not measured yet whether a save fits into the grace time of {grace_s:g} s; later starts will tell"


def fits(cost: Cost, grace_s: float) -> bool:
    """Whether the state is saved before the kill, at worst."""
    return cost.leave_s <= grace_s


def sentence(run: RunFolder, grace_s: float) -> str:
    """What the measurements of earlier attempts say; and where a save does not fit, what would."""
    try:
        train = load_run(run).experiment.train
        cost = save_interval.cost(run, train.global_batch) if train is not None else None
    except (HpcGenError, ValueError, OSError) as error:
        return f"the grace time cannot be judged: {error}"
    if cost is None or train is None:
        return NOT_MEASURED.format(grace_s=grace_s)
    return judge(cost, grace_s, train.save_every)


def judge(cost: Cost, grace_s: float, save_every: int | None) -> str:
    """The sentence for a measured cost; `save_every`: images between saves, None: each attempt chooses."""
    parts = (
        f"a step of {cost.step_s:.2g} s, a save under way and one more of {cost.save_s:.2g} s each: "
        f"{cost.leave_s:.1f} s at worst"
    )
    if fits(cost, grace_s):
        return f"a preemption leaves time to save: {parts}, of {grace_s:g} s of grace"
    interval_s = save_every / cost.images_per_s if save_every is not None else None
    lost = (
        f"up to {format_duration(interval_s)} of training"
        if interval_s is not None
        else "what came after the last save"
    )
    most = ["fewer images per save"] if save_every is not None else []
    likely = f"{cost.step_s + cost.save_s:.1f} s"
    hint = (
        f"most saves fit (they take {likely}), one that meets a save under way does not"
        if cost.step_s + cost.save_s <= grace_s
        else f"even a single save takes {likely}"
    )
    ways = [
        f"a grace time of {cost.leave_s:.0f} s (GraceTime of the partition)",
        "more ranks, which share a save",
        *most,
    ]
    return (
        f"A PREEMPTION MAY COME TOO FAST TO SAVE: {parts}, and the grace is {grace_s:g} s; {hint}. Then {lost} is done "
        f"again. What would help: {', or '.join(ways)}"
    )
