"""Task streams that go along with the trunk: each reads a block's keys and values as soon as the trunk has them.

What is read at once need not be kept. So a pass over many tasks needs hardly more memory than one of the backbone
alone, which also makes it faster: the system takes long to hand out new memory at each pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context

from torch import Tensor

from .passes import Pass, TrunkBlock
from .task_stream import TaskStream


class Follower:
    """One pass of a task stream that goes along with the trunk.

    Args:
        stream: The stream, the tasks chosen that the pass is for.
        class_tokens: The class tokens of the tasks, (1 or batch, tasks, width); None in a stream without tokens.
        images: The images that it is for, (number,); None for all.
    """

    def __init__(self, stream: TaskStream, class_tokens: Tensor | None, images: Tensor | None) -> None:
        self._stream = stream
        self._class_tokens = class_tokens
        self._images = images
        self._tokens: Tensor | None = None
        self._pass = Pass()

    def read(self, index: int, block: TrunkBlock) -> None:
        """Run the stream through the block whose keys and values the trunk has just made."""
        # Transformers collects the hidden states of a pass by a context variable; the stream's are not the trunk's.
        Context().run(self._read, index, block)

    def _read(self, index: int, block: TrunkBlock) -> None:
        if self._images is not None:
            block = block.images(self._images)
        if self._tokens is None:
            self._tokens = self._stream.start(self._class_tokens, batch=block.key.shape[0])
        self._pass.present = block
        self._tokens = self._stream.step(index, self._tokens, self._pass)

    def features(self) -> Tensor | None:
        """The features (batch, tasks, width) once the trunk has run; None if it gave nothing to read."""
        return None if self._tokens is None else self._stream.finish(self._tokens, self._pass)


class Followers:
    """The streams that go along with a trunk; each thread has its own."""

    def __init__(self) -> None:
        self._own = threading.local()

    @contextmanager
    def along(self, followers: Sequence[Follower], *, keep: bool) -> Iterator[None]:
        """Let streams go along with the pass within this context.

        Args:
            followers: The streams.
            keep: Whether others will read the trunk after the pass, so that it has to be kept as well.
        """
        self._own.followers, self._own.keep = followers, keep
        try:
            yield
        finally:
            del self._own.followers, self._own.keep

    def read(self, index: int, block: TrunkBlock) -> bool:
        """Let all streams read a block; gives whether it has to be kept."""
        for follower in getattr(self._own, "followers", ()):
            follower.read(index, block)
        return getattr(self._own, "keep", True)
