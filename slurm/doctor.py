"""What `hpc-gen doctor --cluster NAME` looks at: the profile, and whether this cluster can serve it."""

from __future__ import annotations

import re
from pathlib import Path

from hpc_gen.config.errors import ConfigError
from hpc_gen.runtime.doctor import Check
from hpc_gen.runtime.errors import UserError
from slurm import profiles
from slurm.commands import Commands

OLDEST = (22, 5)


def examine(cluster: str, workspace: Path, overrides: list[str], commands: Commands) -> list[Check]:
    """One check per thing; those that need an answer of the controller are left out where it gives none."""
    try:
        profile = profiles.load(cluster, workspace, overrides)
    except (ConfigError, UserError) as error:
        return [Check("cluster", "profile", False, str(error), "nothing can be submitted to this cluster", True)]
    found = [Check("cluster", "profile", True, f"{cluster}: {profile.description or 'no description'}", "")]
    found.append(_image(profile))
    try:
        version, partitions = commands.version(), commands.partitions()
    except UserError as error:
        return [
            *found,
            Check("cluster", "controller", False, str(error), "nothing can be submitted from this machine", True),
        ]
    found.append(_version(version))
    wanted = profile.partition
    names = [each.name for each in partitions]
    chosen = next((each for each in partitions if each.name == wanted or (wanted is None and each.default)), None)
    if chosen is None:
        detail = f"'{wanted}' is not one of {', '.join(names)}" if wanted else "no default partition"
        found.append(Check("cluster", "partition", False, detail, "choose one with --set partition=NAME", True))
    else:
        gpus = f", {chosen.gpus} GPUs" if chosen.gpus else ""
        limit = f", up to {chosen.limit_min} min" if chosen.limit_min else ""
        detail = f"{chosen.name}: {chosen.nodes} nodes of {chosen.cpus} CPUs{gpus}{limit}"
        found.append(Check("cluster", "partition", chosen.up, detail, "it is down", True))
    accounting = commands.accounting()
    meaning = "status knows of ended jobs only what they noted themselves"
    found.append(Check("cluster", "accounting", accounting is None, accounting or "sacct answers", meaning))
    return found


def _image(profile: profiles.ClusterProfile) -> Check:
    runtime = profile.runtime
    if runtime.kind == "none":
        return Check("cluster", "runtime", True, "the Python that submits; the nodes must see its folder", "", True)
    here = runtime.kind == "pyxis" or "${" in str(runtime.image) or Path(str(runtime.image)).exists()
    detail = f"{runtime.kind}, {runtime.image}{'' if here else ' is not there'}"
    return Check("cluster", "runtime", here, detail, "build the image with `hpc-gen containers build`", True)


def _version(text: str) -> Check:
    numbers = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    fine = numbers >= OLDEST
    return Check(
        "cluster", "controller", fine, f"Slurm {text}", f"older than {OLDEST[0]}.{OLDEST[1]:02d}: never tried", True
    )
