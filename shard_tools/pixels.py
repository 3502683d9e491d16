"""Images of a source as the squares that are tokenized, decoded by a thread while the network works."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

from PIL import Image
from torch import Tensor

from hpc_gen.config.experiment import EncodeConfig
from hpc_gen.data import decode
from hpc_gen.data.crops import crop
from hpc_gen.data.images import resize, to_pixels
from hpc_gen.runtime.errors import DataError
from shard_tools.split import Split

DECODED_TOGETHER = 8  # handed to DALI at once
AHEAD = 32  # images decoded ahead of the network
POLL_S = 0.1  # how often a waiting side looks whether the other has ended

Item = TypeVar("Item")


def squares(
    split: Split, items: list[int], encode: EncodeConfig, device_id: int = 0
) -> Iterator[tuple[int, Tensor | DataError]]:
    """Each item with its square, uint8 [C, H, W], or with what is wrong with its image."""
    for item, image in _images(split, items, encode, device_id):
        yield item, image if isinstance(image, DataError) else cut(image, encode)


def cut(image: Image.Image, encode: EncodeConfig) -> Tensor:
    """The square of an image that is stored or tokenized, uint8 [C, H, W]."""
    image = crop(encode.crop or "adm", image, encode.crop_size or encode.image_size, encode.short_side)
    if image.size != (encode.image_size, encode.image_size):
        image = resize(image, encode.image_size)
    return to_pixels(image, encode.channels)


def _images(
    split: Split, items: list[int], encode: EncodeConfig, device_id: int
) -> Iterator[tuple[int, Image.Image | DataError]]:
    """Each item with its image, or with what is wrong with it."""
    if split.read is None or encode.decode in (None, "pillow"):
        for item in items:
            try:
                yield item, split.load(item)
            except DataError as error:
                yield item, error
        return
    decoder = decode.build(encode.decode, encode.background, encode.threads, device_id)  # one for this thread
    for begin in range(0, len(items), DECODED_TOGETHER):
        group: list[tuple[int, bytes | DataError]] = []
        for item in items[begin : begin + DECODED_TOGETHER]:
            try:
                group.append((item, split.read(item)))
            except DataError as error:
                group.append((item, error))
        decoded = iter(decoder.decode([data for _, data in group if isinstance(data, bytes)]))
        for item, data in group:
            yield item, next(decoded) if isinstance(data, bytes) else data


def ahead(source: Iterator[Item], limit: int = AHEAD) -> Iterator[Item]:
    """The same items, drawn from `source` by a thread up to `limit` ahead; what it raises is raised here, in its place.

    Close the iterator (contextlib.closing) when it is left early: the thread ends within POLL_S of its next item.
    """
    waiting: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(limit)
    closing = threading.Event()

    def put(item: Item | None, error: BaseException | None = None, last: bool = False) -> None:
        while not closing.is_set():
            try:
                waiting.put((item, error, last), timeout=POLL_S)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in source:
                put(item)
                if closing.is_set():
                    return
            put(None, last=True)
        except BaseException as error:  # handed to the caller, who re-raises it
            put(None, error, last=True)

    thread = threading.Thread(target=work, name="decode", daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]
    finally:
        closing.set()
        thread.join()
