"""Several passes through an offloaded model side by side: what is read of a block serves all of them.

Every pass is a job with a thread of its own, and one thread runs at a time. A job that is about to enter a block waits
there with its hidden states; the others that want the block in memory run through it first, and only when there are
none is the next block read. So n passes read the weights once instead of n times, and memory holds one block and n
hidden states. Each job does what it would do alone: its values are the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .offload import ATTRIBUTE, holding
from .runtime.blocks import routes_blocks

T = TypeVar("T")


def together(model: nn.Module, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The result of every job; those of a resident model, and of one whose blocks are chosen by a router, run one
    after another.

    A job sees its caller's grad mode. What it shares with the others it must not leave changed where it calls a block.
    """
    parts: Any = getattr(model, ATTRIBUTE, None)
    apart = parts is None or torch.is_autocast_enabled(parts.device.type)  # autocast is one thread's own
    if apart or len(jobs) < 2 or routes_blocks(model):
        return [job() for job in jobs]
    with holding(model):
        return _Lockstep(parts.modules, jobs).run()


class _Stopped(BaseException):
    """Unwinds a job whose result nobody waits for."""


class _Job(threading.Thread, Generic[T]):
    """`wants`: the block that it waits to enter ("" before its start); `entered`: how many it has asked for."""

    def __init__(self, task: Callable[[], T], back: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.task, self.back, self.go = task, back, threading.Semaphore(0)
        self.graded = torch.is_grad_enabled()
        self.wants, self.entered, self.stopping = "", 0, False
        self.results: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._wait()
            with torch.set_grad_enabled(self.graded):
                self.results.append(self.task())
        except BaseException as error:  # told by the thread that asked
            self.error = error
        finally:
            self.back.release()

    def pause(self, block: str) -> None:
        """Let others run until it is this job's turn to enter a block."""
        self.wants, self.entered = block, self.entered + 1
        self.back.release()
        self._wait()

    def _wait(self) -> None:
        self.go.acquire()
        if self.stopping:
            raise _Stopped

    @property
    def ended(self) -> bool:
        return bool(self.results) or self.error is not None


class _Lockstep(Generic[T]):
    def __init__(self, blocks: Mapping[str, nn.Module], tasks: Sequence[Callable[[], T]]) -> None:
        self.blocks = blocks
        self.back = threading.Semaphore(0)  # released by a job that gives its turn back
        self.jobs = [_Job(task, self.back) for task in tasks]

    def run(self) -> list[T]:
        handles = [
            module.register_forward_pre_hook(self._gate(block), prepend=True) for block, module in self.blocks.items()
        ]
        try:
            for job in self.jobs:
                job.start()
            self._turns()
        finally:
            for job in self.jobs:
                job.stopping = True
                job.go.release()
            for job in self.jobs:
                if job.ident is not None:
                    job.join()
            for handle in handles:
                handle.remove()
        return [job.results[0] for job in self.jobs]

    def _gate(self, block: str) -> Callable[..., None]:
        def gate(module: nn.Module, args: tuple[Any, ...]) -> None:
            job = threading.current_thread()
            if isinstance(job, _Job) and job.back is self.back:
                job.pause(block)

        return gate

    def _turns(self) -> None:
        """Whoever wants the block in memory goes first, then the one that has come least far."""
        block = ""
        while waiting := [job for job in self.jobs if not job.ended]:
            job = next((job for job in waiting if job.wants == block), None)
            job = job or min(waiting, key=lambda job: job.entered)
            block = job.wants
            job.go.release()
            self.back.acquire()
            if job.error is not None:
                raise job.error
