"""distill: train a smaller model to imitate the one it was made from, and write its folder again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..calibration.schedulers import load_scheduler
from ..calibration.trajectory import Sampling
from ..checkpoint.reader import Checkpoint, check_finite
from ..checkpoint.source import ModuleSource
from ..checkpoint.writer import ShardWriter, copy_rest, output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..distill.data import Batch, Data, Trajectories
from ..distill.latents import Latents
from ..distill.losses import parse_loss
from ..distill.matching import Pairs, check_student, origins, pairs_of, read_kept
from ..distill.noising import Noising
from ..distill.settings import TRAJECTORIES, Options
from ..distill.sharded import asked
from ..distill.student import Student
from ..distill.trainer import History, train
from ..errors import DitcompressError
from ..loading import load_model, open_model
from ..models import adapter_for
from ..ranks import Ranks, joined
from ..recipe import Calibration
from ..report.card import distilled_card
from ._images import encoded, is_images, listing
from ._logs import divergences, lowered, note_divergence, open_log
from .calibration import conditions_for, given_files, pick_device, settings_of

REPORT = "distill.json"
HELD_OUT = 16  # images whose trajectories the student is judged on before and after


def options_of(given: Mapping[str, Any]) -> Options:
    """E203 naming the first option that is out of range, E201 or E203 for a bad loss."""
    try:
        options = Options(**given)
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + ".".join(str(part) for part in first["loc"]).replace("_", "-")
        raise DitcompressError("E203", f"{where} {first['input']}", first["msg"], "see --help") from None
    if "task" in parse_loss(options.loss) and options.data == TRAJECTORIES:
        raise DitcompressError("E203", "--loss task", "needs real latents", "give --data FOLDER")
    return options


def check_data(checkpoint: Checkpoint | ModuleSource, data: str, scheduler: str | Path | None) -> None:
    """Refuse cached latents that do not fit a model before anything is computed: E301, E330 or E338 as in training.
    Images are first looked at when they are encoded."""
    if data == TRAJECTORIES or is_images(Path(data)):
        return
    adapter = adapter_for(checkpoint.config)
    folder = Path(scheduler) if scheduler else checkpoint.scheduler_folder
    Latents(Path(data), adapter, checkpoint.config, load_scheduler(checkpoint.config, folder, adapter, Silent()))


@dataclass(frozen=True)
class DistillResult:
    """`path` (None for a dry run), the loss of every step, and the facts of distill.json."""

    path: Path | None
    history: History
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Pair:
    """Teacher and student on disk, checked against each other, and what drives them."""

    teacher: Checkpoint
    student: Checkpoint
    adapter: ModuleType
    blocks: tuple[str, ...]
    pairs: Pairs
    matched_by: str


def distill(
    teacher: str | Path,
    student: str | Path,
    out: str | Path,
    *,
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int = 5 * 2**30,
    reporter: Reporter | None = None,
    **options: Any,
) -> DistillResult:
    """Train `student` (a model or pipeline folder: the teacher's class, fewer blocks or narrower ones) to predict what
    `teacher` predicts, and write its folder again as `out`, with names, shapes and dtypes as they were.

    `options` are the fields of `Options` (steps, batch, learning_rate, loss, data, lora, ema, seed, dtype ...). Killed
    runs go on when called again. Under `accelerate launch` all processes train together and the first one writes.
    Raises E340 for a student that is no sub-model, E338 for data that do not fit, E703 when training diverges.
    """
    chosen, reporter = options_of(options), reporter or Silent()
    pair = _opened(Path(teacher), Path(student))
    facts = _facts(pair, chosen)
    check_data(pair.teacher, chosen.data, scheduler)
    pick_device(device)
    if dry_run:
        return DistillResult(None, History(()), facts)
    target = Path(out)
    with joined(pick_device(device)) as (ranks, place):
        if chosen.batch % ranks.count:
            what = f"does not divide among {ranks.count} processes"
            raise DitcompressError("E203", f"--batch {chosen.batch}", what, f"give a multiple of {ranks.count}")
        run = _Run(pair, chosen, conditions, scheduler, place, ranks, reporter if ranks.first else Silent())
        with _places(run, target, overwrite, restart, facts) as (partial, journal):
            history, trained, measured = run.train(target, journal)
            facts |= measured | {"losses": list(history.losses)}
            if partial is not None:
                _write(pair, trained, partial, facts, target.name, max_shard_bytes)
        if ranks.first:
            remove_work(journal)
        ranks.share(None)
    return DistillResult(target, history, facts)


def _opened(teacher: Path, student: Path) -> _Pair:
    big, big_meta = open_model(teacher)
    small, small_meta = open_model(student, allow_compressed=False)
    adapter = adapter_for(big.config)
    if big.class_name != small.class_name:
        what = f"is of another class than the teacher's {big.class_name}"
        raise DitcompressError("E340", small.class_name, what, "give a model made from this teacher")
    layouts = adapter.layout(small_meta), adapter.layout(big_meta)
    latents = adapter.latent_shape(small.config), adapter.latent_shape(big.config)
    names = layouts[0].blocks, layouts[1].blocks
    kept = read_kept(small.folder, names[1])
    was = origins(*names, kept)
    check_student(small_meta, big_meta, layouts, latents, was)
    by = "prune.json" if kept is not None and was == kept else "position"
    return _Pair(big, small, adapter, layouts[0].blocks, pairs_of(*names, kept), by)


def _facts(pair: _Pair, options: Options) -> dict[str, Any]:
    """What distill.json says beside the losses."""
    return {
        "teacher": pair.teacher.path.name,
        "student": pair.student.path.name,
        "fingerprints": {"teacher": pair.teacher.fingerprint, "student": pair.student.fingerprint},
        "class": pair.student.class_name,
        "options": options.model_dump(),
        "blocks": [list(match) for match in pair.pairs],
        "matched_by": pair.matched_by,
    }


@contextmanager
def _places(
    run: _Run, target: Path, overwrite: bool, restart: bool, facts: Mapping[str, Any]
) -> Iterator[tuple[Path | None, Path]]:
    """Where the first process builds the result (None for others), and where all find the states of the training."""
    pair, partial = run.pair, None
    with ExitStack() as stack:

        def begun() -> Path:
            nonlocal partial
            partial = stack.enter_context(output_folder(
                target, overwrite=overwrite, inputs=[pair.teacher.path, pair.student.path],
                planned_bytes=pair.student.total_bytes,
                manifest={"distill": run.options.model_dump(), "seed": run.options.seed,
                          "input": facts["fingerprints"]},
            ))  # fmt: skip
            for checkpoint in (pair.teacher, pair.student):
                check_finite(checkpoint, run.reporter)
            return work_folder(target, lowered(target, run.marks(facts)), restart)

        found = run.ranks.lead(begun)
        try:
            yield partial, found
        except BaseException:
            if run.ranks.first and not (found / "training.pt").exists():
                remove_work(found)  # there is nothing to go on from
            raise


class _Run:
    """One training: models on their device, data, states."""

    def __init__(
        self, pair: _Pair, options: Options, conditions: str | Path | None, scheduler: str | Path | None,
        device: torch.device, ranks: Ranks, reporter: Reporter,
    ) -> None:  # fmt: skip
        self.pair, self.options, self.device, self.ranks, self.reporter = pair, options, device, ranks, reporter
        self.conditions, self.scheduler = conditions, scheduler
        self.sharded = asked(ranks)
        if self.sharded and options.optimizer != "adamw":
            what = "does not divide its moments among processes"
            raise DitcompressError("E205", f"--optimizer {options.optimizer}", what, "use adamw with --use_fsdp")
        self.scheduler_folder = Path(scheduler) if scheduler else pair.teacher.scheduler_folder

    def marks(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What an interrupted run must have in common with this one."""
        return {
            **facts["fingerprints"],
            **self.options.model_dump(exclude={"save_every"}),
            "blocks": facts["blocks"],
            "files": "" if self.options.data == TRAJECTORIES else listing(Path(self.options.data)),
            **given_files(self.conditions, self.scheduler, self.pair.teacher),
            "torch": torch.__version__,
        }

    def train(self, target: Path, journal: Path) -> tuple[History, dict[str, Tensor], dict[str, Any]]:
        """The losses, the trained tensors by name, and the errors on held-out states before and after."""
        options = self.options
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        teacher, _ = load_model(self.pair.teacher.path, dtype=dtype, device=self.device)
        model, _ = load_model(self.pair.student.path, dtype=torch.float32, device=self.device)
        data, held_out = self._data(teacher)
        task = Student(
            model, teacher, data, parse_loss(options.loss), self.pair.pairs, blocks=self.pair.blocks,
            batch=options.batch, steps=options.steps, lora=options.lora, decay=options.decay_features,
            seed=options.seed, autocast=dtype != torch.float32, checkpointing=options.checkpointing, ranks=self.ranks,
            clean_weights=self._noising().clean_weights if "clean" in parse_loss(options.loss) else None,
            sharded=self.sharded,
        )  # fmt: skip
        before = task.measure(held_out)
        if not all(torch.tensor(value).isfinite() for value in before.values()):
            what = "the models differ by NaN or infinity before any training"
            raise DitcompressError("E701", "teacher or student", what, "use --dtype float32, or look at `evaluate`")
        with open_log(target, self.ranks.first, self.reporter) as log:
            try:
                history = train(task, options, journal=journal, reporter=self.reporter, ranks=self.ranks, log=log)
            except DitcompressError as error:
                if error.code == "E703" and self.ranks.first:
                    note_divergence(journal, error.where, options.learning_rate)
                raise
        count = sum(tensor.numel() for tensor in task.parameters().values())
        trained = task.finish()
        _as_stored(trained, self.pair.student)
        after = task.measure(held_out)
        task.release()
        self._say(before, after)
        found = {"before": before, "after": after, "trained_parameters": count, "diverged": divergences(journal)}
        return history, trained, found

    def _say(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        where = "held-out states" if self.options.data == TRAJECTORIES else "other noise of the data"
        for name, value in after.items():
            self.reporter.note(f"{name} loss on {where}: {before[name]:.3g} -> {value:.3g}")
        if not all(torch.tensor(value).isfinite() for value in after.values()):
            raise DitcompressError("E703", "the trained student", "its loss is not finite", "lower the learning rate")

    def _noising(self) -> Noising:
        config = self.pair.teacher.config
        sampler = load_scheduler(config, self.scheduler_folder, self.pair.adapter, Silent())
        return Noising(sampler, self.pair.adapter, config, "leave clean out of --loss")

    def _data(self, teacher: nn.Module) -> tuple[Data, Batch]:
        """The training data, and a batch that is no part of it: of other images, or of given data with other noise."""
        pair, options = self.pair, self.options
        config = pair.teacher.config
        sampler = load_scheduler(config, self.scheduler_folder, pair.adapter, self.reporter)
        if options.data != TRAJECTORIES:
            folder = Path(options.data)
            if is_images(folder):
                made = (
                    encoded(folder, pair.teacher, pair.adapter, self.device, self.reporter)
                    if self.ranks.first
                    else None
                )
                folder = Path(self.ranks.share(made))
            latents = Latents(
                folder, pair.adapter, config, sampler, seed=options.seed, null=options.null,
                parts=options.accumulate, device=self.device,
            )  # fmt: skip
            return latents, latents.batch(options.steps, max(options.batch, 64))
        settings = settings_of(Calibration(samples=options.images), options.seed)
        given = conditions_for(pair.teacher, pair.adapter, settings, self.conditions, self.reporter)
        guidance = pair.adapter.default_guidance(config) if options.guidance is None else options.guidance

        def states(seed: int, images: int, ranks: Ranks) -> Trajectories:
            sampling = Sampling(options.sample_steps, float(guidance), seed, batch=min(options.images, 32))
            return Trajectories(
                teacher, pair.adapter, config, sampler, given, sampling, images=images, refresh=options.refresh,
                null=options.null, reporter=self.reporter, ranks=ranks,
            )  # fmt: skip

        held_out = states(options.seed + 104729, min(options.images, HELD_OUT), Ranks()).batch(0, 64)
        return states(options.seed + 7919, options.images, self.ranks), held_out


def _as_stored(trained: Mapping[str, Tensor], student: Checkpoint) -> None:
    """Round the model's trained tensors to the types that they are written in: what is measured is what will be."""
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(tensor.to(student.tensors[name].dtype))


def _write(
    pair: _Pair, trained: Mapping[str, Tensor], partial: Path, facts: Mapping[str, Any], name: str, most: int
) -> None:
    """The student's folder with the trained tensors in their old dtypes, and what was not trained as it was."""
    source = pair.student
    folder = partial / (source.component if source.pipeline else "")
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, max_shard_bytes=most)
    for tensor, entry in source.tensors.items():
        writer.add(tensor, trained[tensor].to(entry.dtype) if tensor in trained else source.read(tensor))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(source.config, indent=2, sort_keys=True) + "\n")
    if (source.folder / "prune.json").is_file():
        (folder / "prune.json").write_bytes((source.folder / "prune.json").read_bytes())
    copy_rest(source, partial)
    (folder / REPORT).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    card = distilled_card(name, source.class_name, facts, source.pipeline is not None)
    (partial / "README.md").write_text(card, encoding="utf-8")
    source.verify_unchanged()
    pair.teacher.verify_unchanged()
