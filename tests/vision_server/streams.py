"""CUDA's streams without a GPU: everything is computed at once, and what only an order of streams allows is checked.

Every stream, and the host, knows how far each other stream is known to be (a vector clock). An operation may read what
another stream wrote, and write what it read, only if that is known to be over. Memory that was used on another stream
than the one it was made on must be kept for it, or the allocator would hand it out too early.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Clock(dict[int, int]):
    """For each stream, how many of its operations are over."""

    def __missing__(self, stream: int) -> int:
        return 0

    def learn(self, other: "Clock") -> None:
        for stream, count in other.items():
            self[stream] = max(self[stream], count)


class Stream:
    def __init__(self, number: int, priority: int) -> None:
        self.number = number
        self.priority = priority
        self.known = Clock()
        self.has_run: list[str] = []  # names of operations


class Event:
    def __init__(self, streams: "CheckedStreams", known: Clock) -> None:
        self._streams = streams
        self.known = Clock(known)
        self.has_happened = False

    def synchronize(self) -> None:
        self.has_happened = True
        self._streams.host.learn(self.known)

    def query(self) -> bool:
        if self.has_happened:
            self._streams.host.learn(self.known)
        return self.has_happened


class Memory:
    """Who did what with a storage."""

    def __init__(self, storage: Any, maker: int | None) -> None:
        self.storage = storage  # so that its address is nobody else's
        self.maker = maker  # None: it was there before
        self.kept_for: set[int] = set()
        self.users: set[int] = set()
        self.written: tuple[int, int] | None = None  # stream and number of the operation
        self.read: dict[int, int] = {}


class CheckedStreams(TorchDispatchMode):
    """While entered, operations of this thread are checked. ``faults``: what was found."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Clock()
        self.events: list[Event] = []
        self.faults: list[str] = []
        self._streams = [Stream(0, 0)]
        self._current = [self._streams[0]]
        self._memory: dict[int, Memory] = {}

    # --- what a link needs

    def make(self, priority: int = 0) -> Stream:
        self._streams.append(Stream(len(self._streams), priority))
        return self._streams[-1]

    def current(self) -> Stream:
        return self._current[-1]

    @contextmanager
    def use(self, stream: Stream):
        self._current.append(stream)
        yield
        self._current.pop()

    def record(self) -> Event:
        self.events.append(Event(self, self.current().known))
        return self.events[-1]

    def wait(self, stream: Stream, event: Event) -> None:
        stream.known.learn(event.known)

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        self._of(tensor).kept_for.add(stream.number)

    def to_device(self, host: Tensor) -> Tensor:
        for number, count in self._of(host).read.items():
            if self.host[number] < count:
                self.faults.append("pinned memory was written before it had left")
        return host.clone()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.empty(shape, dtype=dtype)
        self._of(memory).maker = None
        return memory

    # --- what is checked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = func._schema
        if any(result.alias_info and not result.alias_info.is_write for result in schema.returns):
            return out  # a view
        stream = self.current()
        stream.known.learn(self.host)
        stream.known[stream.number] += 1
        stream.has_run.append(schema.name)
        for argument, value in zip(schema.arguments, self._in_order(schema, args, kwargs), strict=True):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                self._access(tensor, stream, is_written, schema.name)
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in self._memory:
                self._remember(tensor, stream.number)
            if "empty" not in schema.name:
                self._access(tensor, stream, True, schema.name)
        return out

    def all_stays(self) -> None:
        """What is in memory now will not be freed: weights, and what graphs compute in."""
        for memory in self._memory.values():
            memory.maker = None

    def check_read_by_host(self, tensor: Tensor) -> None:
        written = self._of(tensor).written
        if written is not None and self.host[written[0]] < written[1]:
            self.faults.append("the host reads what the device may still be writing")

    def check_memory(self) -> None:
        for memory in self._memory.values():
            if memory.maker is not None and memory.users - memory.kept_for - {memory.maker}:
                self.faults.append("memory was used on another stream and not kept for it")

    def _in_order(self, schema: Any, args: Any, kwargs: Any) -> list[Any]:
        return [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(schema.arguments)
        ]

    def _access(self, tensor: Tensor, stream: Stream, is_written: bool, name: str) -> None:
        memory = self._of(tensor)
        memory.users.add(stream.number)
        others = dict([memory.written] if memory.written else [])
        if is_written:
            others |= {number: max(count, others.get(number, 0)) for number, count in memory.read.items()}
        for number, count in others.items():
            if stream.known[number] < count:
                self.faults.append(f"{name} on stream {stream.number} does not wait for stream {number}")
        if is_written:
            memory.written, memory.read = (stream.number, stream.known[stream.number]), {}
        else:
            memory.read[stream.number] = stream.known[stream.number]

    def _of(self, tensor: Tensor) -> Memory:
        address = tensor.untyped_storage().data_ptr()
        return self._memory[address] if address in self._memory else self._remember(tensor, None)

    def _remember(self, tensor: Tensor, maker: int | None) -> Memory:
        storage = tensor.untyped_storage()
        return self._memory.setdefault(storage.data_ptr(), Memory(storage, maker))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel()]
