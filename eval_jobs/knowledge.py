"""New knowledge without training: pictures from images that no training saw, and from between two images.

Facts: specs/gmem.md section 5.4. Snippets are made by the run's own DINOv2; pictures by the checkpoint, average and
sampler of the run's sample section, guided as the reference does unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hpc_gen.config.experiment import Experiment
from hpc_gen.data.crops import crop
from hpc_gen.data.images import decode_image, images_below, to_pixels
from hpc_gen.methods.gmem.bank import Interpolation, as_condition, interpolated
from hpc_gen.methods.protocol import Method
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import UserError, nearest
from hpc_gen.runtime.progress import Progress
from hpc_gen.runtime.randomness import Draw, Draws, Stream, Uniform
from hpc_gen.runtime.run_folder import RunFolder
from hpc_gen.sampling.generate import Decoder, sampling_mode
from hpc_gen.sampling.images import grid, png_bytes
from hpc_gen.stages.build import open_decoder, open_table, settings_of, snippet_encoder
from hpc_gen.stages.generation import trained_method
from hpc_gen.stages.run_setup import load_run
from hpc_gen.tokenizers.dinov2 import Dinov2Tokenizer
from hpc_gen.training.checkpoint import read as checkpoints

GUIDED = {"guidance": {"scale": 7.75, "start": 0.89}}
METHODS: tuple[Interpolation, ...] = ("linear", "spherical", "concat", "mask")
SNIPPETS = "cls_tokens"
Say = Callable[[str], None]


def nothing() -> None:
    """A poll that never stops: these are commands that a person waits for."""


@dataclass
class Studio:
    """A run's network, decoder and snippet encoder, opened once."""

    experiment: Experiment
    method: Method
    decoder: Decoder
    encoder: Dinov2Tokenizer
    settings: Any
    side: int
    seed: int

    def snippets(self, images: Sequence[Tensor], legacy_range: bool = False) -> Tensor:
        """Of length 1, float32 [N, E], of uint8 images [3, S, S]."""
        return as_condition(self.encoder.snippets(torch.stack(list(images)), legacy_range=legacy_range))

    @torch.no_grad()
    def pictures(self, snippets: Tensor, purpose: str, first_id: int, batch: int) -> Tensor:
        """One uint8 picture [N, 3, H, W] per snippet; the noise of picture i is that of id first_id + i."""
        found = []
        with sampling_mode(self.method):
            for begin in range(0, len(snippets), batch):
                part = snippets[begin : begin + batch]
                ids = list(range(first_id + begin, first_id + begin + len(part)))
                draws = Draws(self.seed, f"knowledge/{purpose}", ids)
                latents = self.method.generate({SNIPPETS: part}, draws, self.settings, nothing)
                found.append(self.decoder.decode(latents).cpu())
        return torch.cat(found)


def open_studio(run: RunFolder, workspace: Path, settings: Mapping[str, Any], seed: int) -> Studio:
    """Raises UserError for a run that is not of GMem, or names no DINOv2; CheckpointError without weights."""
    resolved = load_run(run)
    experiment = resolved.experiment
    if experiment.method["name"] != "gmem" or experiment.method.get("condition", "snippet") != "snippet":
        raise UserError(f"run '{run.name}' is no GMem on snippets; knowledge is in snippets only")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = open_table(workspace, experiment.data.table, experiment)
    decoder = open_decoder(experiment, table, workspace, device)
    if decoder is None:
        raise UserError(f"run '{run.name}' names no tokenizer that decodes its latents; set data.tokenizer")
    sample = experiment.sample
    info = checkpoints.newest(run)
    ema = sample.ema if sample is not None else next(iter(experiment.train.ema), None) if experiment.train else None
    method = trained_method(experiment, table, info.path, ema, device)
    own = dict(sample.settings) if sample is not None else {}
    typed = settings_of(experiment, {**own, **GUIDED, **settings})
    encoder = snippet_encoder(experiment, workspace, device)
    side = experiment.encode.image_size if experiment.encode is not None else int(experiment.method["image_size"])
    return Studio(experiment, method, decoder, encoder, typed, side, seed)


def cropped(path: Path, side: int) -> Tensor:
    """uint8 [3, S, S]: the shorter side scaled to S (bilinear, antialiased), the middle cut out."""
    return to_pixels(crop("short_bilinear", decode_image(path.read_bytes()), side))


def squeezed(path: Path, side: int) -> Tensor:
    """uint8 [3, S, S]: the whole image, its aspect ratio ignored, as the reference shows originals."""
    return to_pixels(decode_image(path.read_bytes()).resize((side, side), Image.Resampling.BILINEAR))


def external(
    studio: Studio, folder: Path, out: Path, say: Say, each: int = 14, legacy_range: bool = False, batch: int = 16
) -> None:
    """One row per novel image: the original and `each` pictures from its snippet."""
    paths = images_below(folder)
    rows: list[Tensor] = []
    with Progress(len(paths), "external knowledge", unit="images") as progress:
        for number, path in enumerate(paths):
            snippet = studio.snippets([cropped(path, studio.side)], legacy_range)
            made = studio.pictures(snippet.expand(each, -1), "external", number * each, batch)
            rows.append(torch.cat([squeezed(path, made.shape[-1])[None], made]))
            progress.update(number + 1)
    _write(out, torch.cat(rows), each + 1, say)


def internal(
    studio: Studio, first: Path, second: Path, out: Path, say: Say, method: str = "mask", steps: int = 6, batch: int = 8
) -> None:
    """One row per pair of images of the same name: the first, `steps` pictures between, the second."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'{nearest(method, METHODS)}; there are: {', '.join(METHODS)}")
    pairs = _pairs(images_below(first), images_below(second), first, second)
    alphas, rows = torch.linspace(0, 1, steps), []
    with Progress(len(pairs), "internal knowledge", unit="pairs") as progress:
        for number, (a, b) in enumerate(pairs):
            ends = [cropped(path, studio.side) for path in (a, b)]
            one, other = studio.snippets(ends)
            ids = range(number * steps, (number + 1) * steps)
            coins = Stream(studio.seed, "knowledge/mask").batch(Draw((len(one),), Uniform()), list(ids)) < 0.5
            between = as_condition(interpolated(one, other, alphas, method, coins))  # type: ignore[arg-type]
            made = studio.pictures(between, "internal", ids.start, batch)
            shown = [_fitted(image, made.shape[-1]) for image in ends]
            rows.append(torch.cat([shown[0][None], made, shown[1][None]]))
            progress.update(number + 1)
    _write(out, torch.cat(rows), steps + 2, say)


def _pairs(ours: list[Path], theirs: list[Path], first: Path, second: Path) -> list[tuple[Path, Path]]:
    if len(ours) != len(theirs):
        raise UserError(f"{first} has {len(ours)} images and {second} has {len(theirs)}; pairs need as many in both")
    if [path.stem for path in ours] != [path.stem for path in theirs]:
        odd = next(a for a, b in zip(ours, theirs, strict=True) if a.stem != b.stem)
        raise UserError(f"{first / odd.name} has no partner of the same name in {second}; name pairs alike")
    return list(zip(ours, theirs, strict=True))


def _fitted(image: Tensor, side: int) -> Tensor:
    """As large as the pictures."""
    if image.shape[-1] == side:
        return image
    shown = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return to_pixels(shown.resize((side, side), Image.Resampling.BILINEAR))


def _write(out: Path, images: Tensor, columns: int, say: Say) -> None:
    commit.make_folder(out.parent)
    commit.write_bytes(out, png_bytes(grid(images, columns)))
    say(f"{out}: {len(images) // columns} rows of {columns}")
