"""calibrate, and the cache of statistics that lets a second recipe start at once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..calibration.collect import CalibrationSettings, collect
from ..calibration.conditions import Conditions, get_conditions
from ..calibration.schedulers import load_scheduler
from ..calibration.statistics import Statistics
from ..calibration.store import VERSION, fingerprint, load_statistics, save_statistics
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import output_folder, remove_work, work_folder
from ..console import Reporter, Silent
from ..errors import DitcompressError
from ..loading import open_model
from ..models import adapter_for
from ..offload import check_offload, load_to_run
from ..quantization import needs
from ..ranks import ALONE, Ranks, joined
from ..recipe import Calibration, Recipe, data_folder, load_recipe, make_plan
from ..sharing import copies_of, tied
from . import _memory
from ._options import pick_device as pick_device
from ._options import pick_dtype as pick_dtype
from ._options import settings_of as settings_of


def calibrate(
    path: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = "w4a8",
    overrides: Sequence[str] = (),
    conditions: str | Path | None = None,
    scheduler: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    offload: str = "none",
    overwrite: bool = False,
    restart: bool = False,
    reporter: Reporter | None = None,
) -> Statistics:
    """Run `path` along its own sampling trajectories and store what quantization needs in the folder `out`.

    `recipe` says how much is gathered; with `offload` "cpu" or "disk" blocks are in memory only while they run, and
    the statistics are the same but for the order of sums. Under `accelerate launch` every process runs its part of the
    images; the first one writes and returns the statistics, the others return empty ones. Raises E205 where the model
    cannot be driven, E331 for bad statistics.
    """
    check_offload(offload)
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    with joined(pick_device(device)) as (ranks, place), ranks.together(), ExitStack() as stack:
        reporter = reporter if reporter and ranks.first else Silent()
        folder = ranks.lead(lambda: stack.enter_context(_target(out, overwrite, [Path(path)])))
        with ranks.together():
            checkpoint, meta = open_model(path, allow_compressed=False)
            settings = settings_of(chosen.calibration or Calibration(), seed)
            if ranks.first:
                layout = tied(adapter_for(checkpoint.config).layout(meta), copies_of(meta))
                predict = _memory.of_calibration
                _memory.tell(
                    reporter, lambda: predict(checkpoint, meta, layout, settings, pick_dtype(dtype), offload)
                )  # fmt: skip
        statistics = _calibrate(
            checkpoint, settings, conditions, scheduler, str(place), dtype, reporter, work_for=out, restart=restart,
            offload=offload, ranks=ranks,
        )  # fmt: skip
        if folder is not None and ranks.first:
            save_statistics(folder, statistics)
    return statistics


def _target(out: str | Path | None, overwrite: bool, inputs: list[Path]) -> Any:
    """`output_folder` for a path; nothing for None."""
    from contextlib import nullcontext

    return nullcontext(None) if out is None else output_folder(Path(out), overwrite=overwrite, inputs=inputs)


def _calibrate(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    device: str,
    dtype: str,
    reporter: Reporter,
    work_for: str | Path | None,
    restart: bool = False,
    offload: str = "none",
    ranks: Ranks = ALONE,
) -> Statistics:
    """Fresh statistics of a checkpoint, going on from an interrupted run where there is one."""
    adapter = adapter_for(checkpoint.config)
    with ranks.together():
        sampler = load_scheduler(
            checkpoint.config, Path(scheduler) if scheduler else checkpoint.scheduler_folder, adapter, reporter
        )
    given = ranks.lead(lambda: conditions_for(checkpoint, adapter, settings, conditions, reporter))

    def started() -> tuple[dict[str, Any], Path | None]:
        marks = {**fingerprint(checkpoint.fingerprint, sampler, given, settings), "dtype": dtype}
        if work_for is None:
            return marks, None
        return marks, work_folder(Path(work_for).with_name(Path(work_for).name + ".calibration"), marks, restart)

    marks, journal = ranks.lead(started)
    with ranks.together():  # after the conditions: text encoders are gone by now
        model, _ = load_to_run(checkpoint.path, dtype=pick_dtype(dtype), device=pick_device(device), offload=offload)
        layout = tied(adapter.layout(model), copies_of(model))
    abreast = None
    if offload != "none" and ranks.count == 1:  # several processes save after every batch
        abreast = _memory.abreast(checkpoint, model, layout, settings, pick_dtype(dtype))
    statistics = collect(
        model, adapter, checkpoint.config, layout, sampler, given, settings, journal=journal, reporter=reporter,
        ranks=ranks, abreast=abreast,
    )  # fmt: skip
    statistics.meta.update(marks)
    if journal is not None and ranks.first:
        remove_work(journal)
    return statistics


def read_prompts(path: str | Path | None = None) -> list[str]:
    """Prompts of a text file, one a line, `#` for comments; the package's own without one. E330 for none."""
    file = Path(path) if path else data_folder("calib_data") / "prompts.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DitcompressError("E330", file, f"cannot be read ({type(error).__name__})", "give a text file") from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise DitcompressError("E330", file, "holds no prompt", "write one prompt a line")
    return found


def conditions_for(
    checkpoint: Any, adapter: Any, settings: CalibrationSettings, file: str | Path | None, reporter: Reporter
) -> Conditions:
    return get_conditions(
        checkpoint,
        adapter,
        settings.samples,
        settings.seed,
        file=Path(file) if file else None,
        prompts=read_prompts(),
        labels=settings.labels,
        reporter=reporter,
    )


def cache_folder(kind: str = "statistics") -> Path:
    """Where statistics and trained extractors are kept between runs; a temporary folder where the home folder cannot
    be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = base / "ditcompress" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"ditcompress-{os.getuid()}" / kind
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def cached_statistics(
    checkpoint: Checkpoint,
    settings: CalibrationSettings,
    conditions: str | Path | None,
    scheduler: str | Path | None,
    device: str,
    dtype: str,
    reporter: Reporter,
    restart: bool = False,
    offload: str = "none",
    ranks: Ranks = ALONE,
) -> Statistics:
    """Statistics from the cache when this checkpoint was calibrated in this way before, else fresh ones. Of several
    processes the first one has them."""
    asked = {
        "version": VERSION,
        "model": checkpoint.fingerprint,
        "settings": asdict(settings),
        "dtype": dtype,
        **given_files(conditions, scheduler, checkpoint),
        **({"text": _text_files(checkpoint.pipeline)} if checkpoint.pipeline and conditions is None else {}),
    }
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / key
    found = _cached(folder, reporter) if ranks.first else None
    if ranks.agree(found is not None):
        return found or Statistics({})
    statistics = _calibrate(
        checkpoint, settings, conditions, scheduler, device, dtype, reporter, work_for=folder, restart=restart,
        offload=offload, ranks=ranks,
    )  # fmt: skip
    if ranks.first:
        with output_folder(folder, overwrite=True) as partial:
            save_statistics(partial, statistics)
    return statistics


def _text_files(pipeline: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of what prompts are encoded with: too large to be read for a digest."""
    parts = [part for name in ("text_encoder*", "tokenizer*") for part in pipeline.glob(name)]
    files = sorted(file for part in parts for file in part.rglob("*") if file.is_file())
    return [(str(file.relative_to(pipeline)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _cached(folder: Path, reporter: Reporter) -> Statistics | None:
    if not folder.is_dir():
        return None
    try:
        found = load_statistics(folder)
    except DitcompressError:
        reporter.note("the cached statistics are damaged: calibrating again")
        return None
    reporter.note(f"statistics of an earlier run are used ({folder})")
    return found


def scheduler_digest(folder: Path | None) -> str:
    """Of the file that `load_scheduler` reads: the checkpoint's fingerprint covers its weights, not its scheduler."""
    if folder is None:
        return ""
    file = folder / "scheduler_config.json"
    return _digest(file if file.is_file() else folder / "scheduler" / "scheduler_config.json")


def given_files(conditions: str | Path | None, scheduler: str | Path | None, checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of what a run reads beside the weights of its model: earlier work serves it only where they are equal."""
    folder = Path(scheduler) if scheduler else checkpoint.scheduler_folder
    return {"conditions": _digest(conditions), "scheduler": scheduler_digest(folder)}


def _digest(path: str | Path | None) -> str:
    if path is None or not Path(path).is_file():
        return str(path or "")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def calibration_plan(
    path: str | Path, recipe: str, overrides: Sequence[str] = (), *, dtype: str = "float32", offload: str = "none"
) -> dict[str, Any]:
    """What `calibrate` would do, from the headers alone."""
    check_offload(offload)
    chosen = load_recipe(recipe, overrides)
    checkpoint, meta = open_model(path, allow_compressed=False)
    layout = tied(adapter_for(checkpoint.config).layout(meta), copies_of(meta))
    settings = settings_of(chosen.calibration or Calibration(), 0)
    memory = _memory.attempt(
        lambda: _memory.of_calibration(checkpoint, meta, layout, settings, pick_dtype(dtype), offload)
    )
    plan = make_plan(chosen, layout)
    inputs = {site.input_key: site.in_features for site in layout.sites}
    return {
        **(chosen.calibration or Calibration()).model_dump(),
        "needs": ", ".join(sorted(needs(plan))) or "nothing",
        "inputs": len(inputs),
        "gram_bytes": sum(4 * k * k for k in inputs.values()),
        "offload": offload,
        "memory_bytes": None if memory is None else memory.total,
    }
