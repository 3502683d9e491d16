"""Encoded images to Pillow images, a few at a time: by Pillow, or JPEGs by DALI on CPU threads or on a GPU.

Whichever decodes, Pillow crops and resizes: DALI's own resize differs by up to 12 levels. DALI on a CPU uses the same
library as Pillow does and gives the same pixels (a test compares them); a GPU's decoder rounds otherwise, which is why
it has a name of its own. What DALI does not take as it is (other formats, CMYK, a file that it cannot read) goes to
Pillow, so a bad image is refused by the same sentence everywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image

from hpc_gen.data.images import WHITE, decode_image
from hpc_gen.runtime.errors import DataError, UserError, reason

DecoderName = Literal["pillow", "dali", "dali_gpu"]
DECODERS: tuple[DecoderName, ...] = get_args(DecoderName)
JPEG = b"\xff\xd8"
DIRECT_MODES = ("RGB", "L")
GPU_FAILED = re.compile(r"CUDA (runtime|driver) API error|CUDA allocation failed|out of memory|NVML")  # texts of DALI


class ImageDecoder(Protocol):
    """Decodes a few images at once."""

    def decode(self, encoded: Sequence[bytes]) -> list[Image.Image | DataError]:
        """An RGB image, or what is wrong with it, for each."""
        ...


def build(name: DecoderName, background: Sequence[int] = WHITE, threads: int = 1, device_id: int = 0) -> ImageDecoder:
    """The decoder of this name; transparency is composited on `background`.

    `threads`: of DALI; `device_id`: GPU of dali_gpu. Raises UserError when the package DALI or the GPU is not there.
    """
    if name == "pillow":
        return PillowDecoder(background)
    return DaliDecoder(background, threads, device_id if name == "dali_gpu" else None)


class PillowDecoder:
    """One after the other, in this thread."""

    def __init__(self, background: Sequence[int] = WHITE) -> None:
        self._background = background

    def decode(self, encoded: Sequence[bytes]) -> list[Image.Image | DataError]:
        """See `ImageDecoder`."""
        return [self._one(data) for data in encoded]

    def _one(self, data: bytes) -> Image.Image | DataError:
        try:
            return decode_image(data, self._background)
        except DataError as error:
            return error


class DaliDecoder:
    """JPEGs by a DALI pipeline, all else by Pillow. An instance belongs to one thread."""

    def __init__(self, background: Sequence[int], threads: int, device_id: int | None) -> None:
        """`device_id` None: on CPU threads."""
        self._pillow = PillowDecoder(background)
        self._threads, self._device_id = threads, device_id
        self._waiting: list[np.ndarray[Any, Any]] = []
        self._pipeline: Any = None
        self._dali = import_dali()

    def decode(self, encoded: Sequence[bytes]) -> list[Image.Image | DataError]:
        """See `ImageDecoder`."""
        direct = [i for i, data in enumerate(encoded) if _is_plain_jpeg(data)]
        decoded = self._decode_all([encoded[i] for i in direct])
        found: list[Image.Image | DataError | None] = [None] * len(encoded)
        for i, pixels in zip(direct, decoded, strict=True):
            found[i] = pixels
        return [
            each if each is not None else self._pillow.decode([data])[0]
            for each, data in zip(found, encoded, strict=True)
        ]

    def _decode_all(self, encoded: list[bytes]) -> list[Image.Image | None]:
        """None for those that DALI cannot read. One of them ends a pipeline, so then each gets its own turn."""
        if not encoded:
            return []
        try:
            return list(self._run(encoded))
        except RuntimeError as error:
            self._pipeline = None  # not usable after an error; building one takes milliseconds
            if self._device_id is not None and GPU_FAILED.search(str(error)):  # not the image's fault: Pillow's pixels
                raise UserError(  # in its place would depend on how full a GPU was
                    f"DALI failed on GPU {self._device_id} ({reason(error)}); start again, or set encode.decode=dali"
                ) from error
            return [None] if len(encoded) == 1 else [self._decode_all([data])[0] for data in encoded]

    def _run(self, encoded: list[bytes]) -> list[Image.Image]:
        if self._pipeline is None or self._pipeline.max_batch_size < len(encoded):
            self._pipeline = self._build(len(encoded))
        self._waiting = [np.frombuffer(data, np.uint8) for data in encoded]
        (output,) = self._pipeline.run()
        output = output.as_cpu() if self._device_id is not None else output
        return [Image.fromarray(np.array(output[i])) for i in range(len(encoded))]

    def _build(self, batch: int) -> Any:
        from nvidia.dali import fn, types

        options = {"batch_size": batch, "num_threads": self._threads, "device_id": self._device_id}
        pipeline = self._dali.Pipeline(**options, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(source=lambda: self._waiting, batch=True)
            device = "cpu" if self._device_id is None else "mixed"
            pixels = fn.decoders.image(encoded, device=device, output_type=types.RGB, adjust_orientation=False)
            pipeline.set_outputs(pixels)
        try:
            pipeline.build()
        except RuntimeError as error:
            raise UserError(f"DALI cannot start ({str(error).splitlines()[0]}); set encode.decode=pillow") from error
        return pipeline


def import_dali() -> Any:
    """The package nvidia.dali. Raises UserError when it is not installed."""
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(
            "there is no package nvidia.dali; run: pip install 'hpc-gen[dali]', or choose another way"
        ) from error
    return nvidia.dali


def _is_plain_jpeg(data: bytes) -> bool:
    """A JPEG in a colour space that needs no conversion of Pillow's."""
    if data[:2] != JPEG:
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.mode in DIRECT_MODES
    except (OSError, SyntaxError, ValueError):
        return False
