"""The page of the GMem bench: hardware, versions, config hash, command, table, and what the numbers leave out."""

from __future__ import annotations

import datetime
import re
import sys
from typing import Any

import facts
import torch
from gmem_sides import device_name, identity
from measure import Table

from hpc_gen.training.device_peak import peak_of

# key of a cell's numbers -> column and form
COLUMNS = {
    "images_per_s": ("images/s", "{:.1f}"),
    "step_ms": ("ms/step", "{:.1f}"),
    "tflops": ("TFLOP/s per device", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "allocated_gib": ("GiB allocated", "{:.1f}"),
    "reserved_gib": ("GiB reserved", "{:.1f}"),
    "compile_s": ("compile, s", "{:.0f}"),
    "graphs": ("graphs", "{}"),
}


def line(cell: Any) -> str:
    """For the terminal."""
    return f"{cell.name:<22} {cell.batch or '-':>5} " + (cell.told or " ".join(f"{v:>10}" for v in values(cell)))


def heading(bench: Any) -> str:
    """For the terminal: on what, and the columns."""
    told = "\n".join(f"{name:12} {value}" for name, value in head(bench))
    names = " ".join(f"{column.replace(' per device', ''):>10}" for column, _ in COLUMNS.values())
    return f"{told}\n{'cell':<22} {'batch':>5} {names}"


def values(cell: Any) -> list[str]:
    """The numbers of a cell as text; `-` for what is not known."""
    given = {key: cell.numbers.get(key) for key in COLUMNS}
    return ["-" if given[key] is None else form.format(given[key]) for key, (_, form) in COLUMNS.items()]


def head(bench: Any) -> list[tuple[str, str]]:
    """Where and with what."""
    device, ranks = bench.setting.device, bench.setting.ranks
    name, cuda = device_name(device), device.type == "cuda"
    peak = peak_of(name)
    told = f"{peak:g} TFLOP/s in dense bf16" if peak else "not known for this device: no MFU"
    total = f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f} GiB" if cuda else ""
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if cuda else ""
    built = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}{nccl}" if cuda else "none"
    rows = [("device", f"{ranks.world_size} x {name}{total}"), ("peak", told), ("CUDA", built)]
    return [("date", datetime.date.today().isoformat()), *rows, *facts.hardware(), ("config", identity(bench.setting))]


def file_name(bench: Any) -> str:
    """One page per kind of device and day; a later run replaces it."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(bench.setting.device).lower()).strip("-")
    several = f"{bench.setting.ranks.world_size}x-" if bench.setting.ranks.world_size > 1 else ""
    return f"gmem_{several}{name}_{datetime.date.today().isoformat()}.md"


def command(bench: Any) -> str:
    """As typed, without folders of the machine."""
    world, tail = bench.setting.ranks.world_size, []
    given = iter(sys.argv[1:])
    for word in given:
        if word in ("--folder", "--json"):
            next(given, None)
        elif not word.startswith(("--folder=", "--json=")):
            tail.append(word)
    start = f"torchrun --nproc-per-node {world}" if world > 1 else "python"
    return " ".join([start, "tests/bench/gpu/gmem_step.py", *tail])


def page(bench: Any, wrong: list[str], stood_in: bool) -> str:
    """The whole page."""
    sizes, setting = bench.setting.sizes, bench.setting
    rows = "\n".join(f"| {name} | {value} |" for name, value in head(bench))
    tables = [_training(bench)] + ([_sampling(bench)] if bench.samplers else [])
    check = bench.given.self_check
    title = f"GMem on {setting.ranks.world_size} x {device_name(setting.device)}"
    warning = "**Made with --self-check, at tiny size: its numbers mean nothing.**\n\n" if check else ""
    about = (
        f"LightningDiT of {sizes.depth} blocks of width {sizes.hidden}, {sizes.num_tokens} tokens, with projection and\n"
        f"cosine loss, bf16 autocast over fp32 masters, AdamW, clipping and one average; {bench.flops / 1e9:.1f} GFLOP per\n"
        "image, forward and backward, counted by hpc_gen/training/fake_step.py without what is recomputed. hpc-gen: its\n"
        f"engine and method, deterministic kernels {'on' if setting.deterministic else 'off'}, no TF32. plain: a re-statement of the reference's step\n"
        "(tests/bench/gpu/gmem_plain.py), free in its kernels. Rows lie in pinned memory; reading and drawing them is not\n"
        "part of it. Memory is rank 0's peak. compile: the first step less a later one. graphs: what was compiled."
    )
    notes = list(bench.notes) + [
        "; ".join(wrong) if wrong else "First losses agree, where cells began at the same batch."
    ]
    if stood_in:
        notes.append("pydantic was missing; tests/bench/gpu/bare.py stood in for it, which changes no arithmetic.")
    text = [
        f"# {title}, {datetime.date.today().isoformat()}",
        "",
        f"{warning}{about}",
        "",
        f"| | |\n|---|---|\n{rows}",
        "",
    ]
    text += [table.markdown(command(bench)) for table in tables]
    return "\n".join([*text, *(f"- {note}" for note in notes), ""])


def _training(bench: Any) -> Table:
    header = ("step", "batch of a rank", *(column for column, _ in COLUMNS.values()), "images/s to plain")
    table = Table("Training step", "By the batch of one rank.", header, identity=identity(bench.setting))
    plain = {(c.compiled, c.batch): c.numbers["images_per_s"] for c in bench.found if c.side == "plain" and c.numbers}
    for cell in bench.found:
        peer = plain.get((cell.compiled, cell.batch))
        ratio = f"{cell.numbers['images_per_s'] / peer:.2f}" if cell.numbers and peer else "-"
        told = [*values(cell), ratio] if not cell.told else [cell.told, *["-"] * len(COLUMNS)]
        table.add(cell.name, f"{cell.batch or '-'}", *told)
    return table


def _sampling(bench: Any) -> Table:
    table = Table("Sampler", "Ratio: seconds to ours.", ("sampler", "s", "ratio"), identity=identity(bench.setting))
    ours = next(iter(bench.samplers.values()))
    for name, seconds in bench.samplers.items():
        table.add(name, f"{seconds:.3f}", f"{seconds / ours:.2f}")
    return table
