"""CLIP's image towers as extractors: torch-fidelity's network, filled from a local file that is read without pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpc_gen.metrics import fidelity
from hpc_gen.metrics.extractors import Extractor, ExtractorSpec, NetworkExtractor, weights_sha256
from hpc_gen.runtime.errors import DataError, UserError
from hpc_gen.runtime.tensor_files import is_program, read_program_tensors, read_tensors

NAMES = (
    *("clip-vit-b-32", "clip-vit-b-16", "clip-vit-l-14", "clip-vit-l-14-336px"),
    *("clip-rn50", "clip-rn101", "clip-rn50x4", "clip-rn50x16", "clip-rn50x64"),
)
_SIZE_KEYS = {"clip-vit": "visual.proj", "clip-rn": "visual.attnpool.c_proj.weight"}


def spec_of(name: str) -> Callable[[str | None, str | None, Path], ExtractorSpec]:
    """What `EXTRACTORS` holds for a CLIP network."""

    def spec(weights: str | None, sha256: str | None, workspace: Path) -> ExtractorSpec:
        if weights is None:
            raise UserError(f"extractor '{name}' has no weights; set 'weights' beside its name to OpenAI's file")
        path = (workspace / weights).resolve()
        found = weights_sha256(path, name, "get OpenAI's file of this network")
        expected = sha256 or fidelity.clip_sha256(name)
        if found != expected:
            raise DataError(
                f"{path} has SHA-256 {found}, not {expected}{'' if sha256 else ', the published one'}; set the key "
                "'sha256' beside its name to the hash of the file you mean, or get the right file"
            )

        def build() -> Extractor:
            state = read_program_tensors(path) if is_program(path) else read_tensors(path)
            # the embedding's length stands in the text tower, of which files that were cut down have nothing
            key = _SIZE_KEYS[next(kind for kind in _SIZE_KEYS if name.startswith(kind))]
            if "text_projection" not in state and key in state:
                state["text_projection"] = state[key] if key == "visual.proj" else state[key].T
            return NetworkExtractor(name, fidelity.clip(name, state), description, has_logits=False)

        description = {
            "name": name,
            "network": f"torch-fidelity {name}",
            "layer": "clip",
            "weights_sha256": found,
            "resize": "bilinear as TensorFlow 1, to the network's size",
            "dtype": "float32",
        }
        return ExtractorSpec(name, description, False, build)

    return spec
