"""Two processes that work together, for tests: forked, so that they need not import everything again."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from ditcompress.ranks import Ranks, joined

Work = Callable[[Path, Ranks], dict[str, Any]]


def in_two(folder: Path, work: Sequence[Work]) -> dict[str, list[dict[str, Any]]]:
    """What every function gives in both processes of a gloo group, by its name; they share `folder`."""
    multiprocessing.start_processes(_one, (str(folder), list(work)), nprocs=2, start_method="fork")
    found = [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    failed = [facts["failed"] for rank in found for facts in rank.values() if "failed" in facts]
    assert not failed, "\n".join(failed)
    return {part.__name__: [rank[part.__name__] for rank in found] for part in work}


def _one(rank: int, folder: str, work: Sequence[Work]) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    facts: dict[str, Any] = {}
    for part in work:
        with joined(torch.device("cpu")) as (ranks, _):
            try:
                facts[part.__name__] = part(Path(folder), ranks)
            except Exception:
                facts[part.__name__] = {"failed": traceback.format_exc()}
    (Path(folder) / f"facts-{rank}.json").write_text(json.dumps(facts))
    distributed.barrier()
    distributed.destroy_process_group()
