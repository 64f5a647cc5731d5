"""How fast models run, side by side: linears, a block, a forward pass and a whole sampling, in every way that the
device has of running them, with the error of the forward pass beside each time.

Arms run in turns, so that a busy machine slows all of them; a row gives median, p10 and p90 over its repeats, and the
ratio to the best arm that is not quantized at the same level. Weights are decoded as each arm says. Compiling is done
block by block (all blocks share one graph) and is not part of the times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..console import Reporter
from ..measures import output_sqnr_db
from ..runtime.fused import fused
from ..runtime.fusion import fusible, set_fusion
from ..runtime.kernels import set_decode
from ..runtime.linear import PackedLinear
from . import peers
from .cost import one_forward, resident_bytes
from .latency import has, timed, wait
from .subject import Subject

LEAST, MOST = 5, 50  # repeats
LEVELS = ("linear", "block", "forward", "sampling")
MODES = ("eager", "graph", "compiled")  # in the order in which they run: compiled blocks stay compiled


@dataclass(frozen=True)
class Bench:
    """`batch` of a forward pass; `modes` of MODES; `seconds` that an arm may take at each level; `steps` of the
    sampling, 0 for none; `peers` quantize the first model too."""

    batch: int = 8
    modes: tuple[str, ...] = ("eager",)
    seconds: float = 5.0
    steps: int = 0
    peers: bool = True


@dataclass
class Arm:
    """One model that is timed; `plain` ones are what ratios are to."""

    name: str
    model: nn.Module
    plain: bool = False
    mode: str = "eager"
    fused: bool = False  # linears are computed with what follows them, so they have no times of their own
    times: dict[str, list[float]] = field(default_factory=dict)
    sqnr: float | None = None

    @property
    def bytes(self) -> int:
        """Of the weights in memory, those that were kept decoded included."""
        packed = [m for m in self.model.modules() if isinstance(m, PackedLinear)]
        return resident_bytes(self.model) + sum(m.made_bytes for m in packed)


def measure(subject: Subject, models: Mapping[str, nn.Module], bench: Bench, reporter: Reporter) -> dict[str, Any]:
    """The table. `models`: by name, all runnable on the subject's inputs; the first is the plain one."""
    names = linears(subject, next(iter(models.values())))
    with torch.no_grad(), fused():
        reference = one_forward(subject, copy.deepcopy(next(iter(models.values()))).float(), bench.batch)()
        arms = list(_arms(models, names, bench, reporter))
        skipped = []
        with reporter.task("arms", len(bench.modes) * len(LEVELS)) as advance:
            for mode in bench.modes:
                skipped += _in_mode(mode, subject, arms, names, bench, reference, advance)
    return _table(subject, arms, bench, skipped)


def linears(subject: Subject, model: nn.Module) -> list[str]:
    """Names of the linears inside blocks."""
    blocks = tuple(f"{block}." for block in subject.adapter.layout(model).blocks)
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, PackedLinear)) and n.startswith(blocks)]


def _arms(models: Mapping[str, nn.Module], names: Sequence[str], bench: Bench, reporter: Reporter) -> Iterator[Arm]:
    first, plain = next(iter(models.items()))
    for name, model in models.items():
        yield Arm(name, model, plain=name == first)
        if any(isinstance(m, PackedLinear) and m.decodes for m in model.modules()):
            yield Arm(f"{name}, kept decoded", set_decode(copy.deepcopy(model), "load"))
        if fusible(model):
            yield Arm(f"{name}, fused", set_fusion(set_decode(copy.deepcopy(model), "load")), fused=True)
    for peer in peers.PEERS if bench.peers else ():
        if not peers.installed(peer):
            reporter.note(f"{peer}: not installed, left out")
            continue
        try:
            yield Arm(peer, peers.apply(peer, copy.deepcopy(plain), names))
        except Exception as error:  # a peer's fault is a row less, not the end of ours
            reporter.note(f"{peer}: left out ({type(error).__name__}: {error})")


def _in_mode(
    mode: str, subject: Subject, arms: list[Arm], names: Sequence[str], bench: Bench, reference: Tensor,
    advance: Callable[[int], None],
) -> list[str]:  # fmt: skip
    """Times of every arm in one mode, added to `arms`; gives what could not run, in words."""
    failed, runs = [], {}
    current = [a for a in arms if a.mode == "eager"]
    if mode != "eager":
        current = [Arm(a.name, a.model, a.plain, mode, a.fused) for a in current]
    if mode == "compiled":  # where it does nothing
        current = [a for a in current if not a.fused]
    for arm in current:
        try:
            if mode == "compiled":
                _compile(subject, arm)
            make = _graphed if mode == "graph" else one_forward
            run = make(subject, arm.model, bench.batch)
            arm.sqnr = output_sqnr_db(reference, run())
            runs[arm.name] = run
        except Exception as error:
            failed.append(f"{arm.name}, {mode}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    kept = [arm for arm in current if arm.name in runs]
    if mode != "eager":
        arms += kept
    _alternate(subject, kept, runs, "forward", bench.seconds)
    advance(1)
    if mode == "eager":
        _inside(subject, kept, names, bench)
    advance(2)
    if bench.steps:
        _sampling(subject, kept, bench)
    advance(1)
    return failed


def _compile(subject: Subject, arm: Arm) -> None:
    """Compile the arm's blocks in place, after one pass that makes what is made once."""
    one_forward(subject, arm.model, 1)()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in subject.adapter.layout(arm.model).blocks:
        arm.model.get_submodule(block).compile(dynamic=False)


def _graphed(subject: Subject, model: nn.Module, batch: int) -> Callable[[], Tensor]:
    """A CUDA graph of the forward pass."""
    run = one_forward(subject, model, batch)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _alternate(
    subject: Subject, arms: Sequence[Arm], runs: Mapping[str, Callable[[], Any]], level: str, seconds: float
) -> None:
    """Seconds of each arm's run, in turns, after one warm-up of all."""
    began = time.perf_counter()
    for repeat in range(MOST + 1):
        for arm in arms:
            wait(subject.settings.device)
            start = time.perf_counter()
            runs[arm.name]()
            wait(subject.settings.device)
            if repeat:
                arm.times.setdefault(level, []).append(time.perf_counter() - start)
        if repeat >= LEAST and time.perf_counter() - began > seconds * max(1, len(arms)):
            break


def _inside(subject: Subject, arms: Sequence[Arm], names: Sequence[str], bench: Bench) -> None:
    """Seconds of all linears of the blocks, and of a block (the mean), within forward passes, in turns."""
    blocks = list(subject.adapter.layout(arms[0].model).blocks) if arms else []
    began = time.perf_counter()
    for repeat in range(MOST):
        for arm in arms:
            for level, modules in (("linear", [] if arm.fused else names), ("block", blocks)):
                if not modules:
                    continue
                with timed(arm.model, [n for n in modules if has(arm.model, n)], subject.settings.device) as times:
                    one_forward(subject, arm.model, bench.batch)()
                spent = [seconds for calls in times.values() for seconds in calls]
                arm.times.setdefault(level, []).append(sum(spent) / (len(spent) if level == "block" else 1))
        if repeat + 1 >= LEAST and time.perf_counter() - began > bench.seconds * max(1, len(arms)):
            break


def _sampling(subject: Subject, arms: Sequence[Arm], bench: Bench) -> None:
    """One whole sampling of a batch by each arm, in turns, twice after a warm-up (which compiles for its shapes)."""
    indices = [i % subject.conditions.count for i in range(bench.batch)]
    for repeat in range(3):
        for arm in arms if arms and arms[0].mode != "graph" else ():
            start = time.perf_counter()
            subject.sample(arm.model, indices, batch=bench.batch)
            wait(subject.settings.device)
            if repeat:
                arm.times.setdefault("sampling", []).append(time.perf_counter() - start)


def _table(subject: Subject, arms: Sequence[Arm], bench: Bench, skipped: list[str]) -> dict[str, Any]:
    rows = []
    for level in LEVELS:
        timed = [arm for arm in arms if level in arm.times]
        best = min((float(np.median(a.times[level])) for a in timed if a.plain), default=None)
        for arm in timed:
            low, middle, high = (float(np.quantile(arm.times[level], q)) for q in (0.1, 0.5, 0.9))
            rows.append({
                "level": level, "arm": arm.name, "mode": arm.mode, "seconds": middle, "p10": low, "p90": high,
                "n": len(arm.times[level]), "ratio": None if best is None else best / middle,
                "bytes": arm.bytes, "sqnr_db": arm.sqnr,
            })  # fmt: skip
    return {
        "device": subject.settings.device,
        "dtype": subject.settings.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": bench.batch,
        "steps": bench.steps,
        "rows": rows,
        "skipped": skipped,
    }
