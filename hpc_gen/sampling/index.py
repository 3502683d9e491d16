"""A finished set of samples on disk: `plan.json`, `units/BLOCK/{ID.png, block.json}`, and `index.json` written last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_gen.methods.protocol import Curve
from hpc_gen.runtime import commit
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.sampling.images import pixel_sha256, read_png
from hpc_gen.sampling.plan import Block, SamplePlan, read_plan

FORMAT = "hpc-gen-samples-1"
INDEX_NAME = "index.json"
BLOCK_NAME = "block.json"


@dataclass(frozen=True)
class BlockFacts:
    """What a block holds: consecutive image ids from `first_id`, their shape [3, H, W] and the hash of their pixels."""

    name: str
    first_id: int
    count: int
    image_shape: tuple[int, ...]
    pixel_sha256: str


def block_folder(folder: Path, name: str) -> Path:
    """Where the images of a block lie below samples/TAG."""
    return folder / "units" / name


def image_name(image_id: int) -> str:
    """File name of an image."""
    return f"{image_id:06d}.png"


def describe_block(block: Block, images: Tensor) -> BlockFacts:
    """Facts of a block from its images uint8 [N, 3, H, W]."""
    assert len(images) == len(block.ids), f"block {block.name} has {len(block.ids)} images, not {len(images)}"
    return BlockFacts(block.name, block.ids.start, len(images), tuple(images.shape[1:]), pixel_sha256(images))


def block_json(plan: SamplePlan, facts: BlockFacts, curves: Mapping[str, Curve] | None = None) -> dict[str, Any]:
    """The JSON object of `block.json`: the facts, the plan they belong to, the labels, what the sampler measured."""
    ids = torch.arange(facts.first_id, facts.first_id + facts.count)
    document = {"plan_hash": plan.hash, **asdict(facts), "labels": plan.labels(ids).tolist()}
    return {**document, "curves": _curves_json(curves)} if curves else document


def _curves_json(curves: Mapping[str, Curve]) -> dict[str, Any]:
    return {name: {"sums": list(curve.sums), "counts": list(curve.counts)} for name, curve in sorted(curves.items())}


def _curves(document: Mapping[str, Any]) -> dict[str, Curve]:
    return {
        str(name): Curve(tuple(float(v) for v in curve["sums"]), tuple(float(v) for v in curve["counts"]))
        for name, curve in document.get("curves", {}).items()
    }


def _facts(document: Mapping[str, Any]) -> BlockFacts:
    shape = tuple(int(size) for size in document["image_shape"])
    first_id, count = int(document["first_id"]), int(document["count"])
    return BlockFacts(str(document["name"]), first_id, count, shape, str(document["pixel_sha256"]))


@dataclass(frozen=True)
class SampleIndex:
    """All blocks of a finished set of samples, in order, with the plan that defines them."""

    folder: Path
    plan: SamplePlan
    blocks: tuple[BlockFacts, ...]
    sha256: str  # of index.json: names this very set of images
    curves: Mapping[str, Curve] = field(default_factory=dict)  # what the sampler measured, over all images
    has_images: bool = True  # False: features only were kept (sample.output)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape [3, H, W] of every image."""
        return self.blocks[0].image_shape

    @property
    def num_images(self) -> int:
        """Images in all blocks."""
        return sum(block.count for block in self.blocks)

    def path(self, image_id: int) -> Path:
        """The file of one image."""
        name = self.blocks[image_id // self.plan.block_images].name
        return block_folder(self.folder, name) / image_name(image_id)

    def read(self, ids: Sequence[int], kept: dict[str, Tensor] | None = None) -> Tensor:
        """Images uint8 [N, 3, H, W] of consecutive ids, each block checked against its hash.

        `kept` holds the last block read, by name, for the next call: a block is always read whole. Raises DataError
        for a file that is missing, truncated or not the one that was sampled, UserError where no images were kept.
        """
        if not self.has_images:
            raise UserError(f"{self.folder} holds features only (sample.output = features); sample with output=png")
        parts = []
        for block in self.blocks:
            wanted = range(max(block.first_id, ids[0]), min(block.first_id + block.count, ids[-1] + 1))
            if len(wanted):
                images = kept[block.name] if kept is not None and block.name in kept else read_block(self.folder, block)
                if kept is not None and block.name not in kept:
                    kept.clear()
                    kept[block.name] = images
                parts.append(images[wanted.start - block.first_id : wanted.stop - block.first_id])
        return torch.cat(parts)


def read_some(index: SampleIndex, ids: Sequence[int]) -> Tensor:
    """Images uint8 [N, 3, H, W] of any ids, in their order; each block is read and checked once. Raises as `read`."""
    found: dict[int, Tensor] = {}
    size = index.plan.block_images
    for number in sorted({i // size for i in ids}):
        block = range(number * size, min((number + 1) * size, index.num_images))
        images = index.read(block)
        found.update({i: images[i - block.start].clone() for i in ids if i in block})
    return torch.stack([found[i] for i in ids])


def read_block(folder: Path, block: BlockFacts) -> Tensor:
    """All images uint8 [N, 3, H, W] of a block. Raises DataError when they are not those that were sampled."""
    here = block_folder(folder, block.name)
    images = [read_png(here / image_name(i)) for i in range(block.first_id, block.first_id + block.count)]
    wrong = [image for image in images if tuple(image.shape) != block.image_shape]
    if wrong or pixel_sha256(torch.stack(images)) != block.pixel_sha256:
        raise DataError(f"{here} does not hold the images that were sampled; remove it and run the sample stage again")
    return torch.stack(images)


def write_index(folder: Path, plan: SamplePlan, has_images: bool = True) -> None:
    """Write `index.json` from the blocks' own files; call it when all blocks are committed.

    Raises DataError when a block is missing, belongs to another plan or has images of another size.
    """
    found: list[BlockFacts] = []
    curves: dict[str, Curve] = {}
    for block in plan.blocks():
        path = block_folder(folder, block.name) / BLOCK_NAME
        try:
            document = json.loads(path.read_text())
            facts, measured = _facts(document), _curves(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); run the sample stage again") from error
        if document["plan_hash"] != plan.hash or (facts.first_id, facts.count) != (block.ids.start, len(block.ids)):
            raise DataError(f"{path} belongs to another plan; remove {folder} and sample again")
        if found and facts.image_shape != found[0].image_shape:
            raise DataError(
                f"{path} has images {facts.image_shape}, the first block {found[0].image_shape}; sample again"
            )
        found.append(facts)
        for name, curve in measured.items():
            curves[name] = curves[name].added(curve) if name in curves else curve
    document = {
        "format": FORMAT,
        "plan_hash": plan.hash,
        "num_images": plan.num_images,
        "image_shape": list(found[0].image_shape),
        "blocks": [asdict(facts) for facts in found],
    }
    if curves:
        document["curves"] = _curves_json(curves)
    if not has_images:
        document["has_images"] = False
    commit.write_json(folder / INDEX_NAME, document)


def read_index(folder: Path) -> SampleIndex:
    """The finished set of samples in `folder`. Raises UserError when unfinished, DataError when damaged."""
    path = folder / INDEX_NAME
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no finished samples (no {INDEX_NAME}); run the sample stage to its end"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a sample index ({error}); run the sample stage again") from error
    plan = read_plan(folder)
    try:
        if document["format"] != FORMAT or document["plan_hash"] != plan.hash:
            raise ValueError("it belongs to another plan or format")
        blocks = tuple(_facts(block) for block in document["blocks"])
        if [(b.name, b.first_id, b.count) for b in blocks] != [
            (b.name, b.ids.start, len(b.ids)) for b in plan.blocks()
        ]:
            raise ValueError("its blocks are not those of the plan")
        curves = _curves(document)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a sample index ({error}); remove {folder} and sample again") from error
    has_images = bool(document.get("has_images", True))
    return SampleIndex(folder, plan, blocks, commit.sha256_file(path), curves, has_images)
