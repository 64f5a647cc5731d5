"""The original that compressed models are judged against: its images, held-out states and states to train on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn

from ditcompress.api._training import Driven, driven
from ditcompress.calibration.trajectory import Sampling
from ditcompress.console import Silent
from ditcompress.distill.data import Trajectories
from ditcompress.distill.losses import output_loss
from ditcompress.distill.noising import Noising
from ditcompress.evaluation.digits import digits_folder
from ditcompress.evaluation.distribution.frechet import frechet
from ditcompress.evaluation.extractors import extract
from ditcompress.evaluation.quality import Sources, find_tools
from ditcompress.evaluation.settings import EvaluateSettings
from ditcompress.evaluation.subject import open_subject
from ditcompress.loading import open_model
from ditcompress.measures import ratio_db
from ditcompress.recipe import Calibration

Judge = Callable[[Tensor], tuple[np.ndarray, np.ndarray]]  # images -> features, guessed classes
AT_A_TIME = 64  # images or states


def scenes_judge(folder: Path) -> Judge:
    sys.path.insert(0, str(folder))
    import classifier  # type: ignore[import-not-found]

    net = classifier.load()

    def judge(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            return net.features(images).numpy(), net(images)["color"].argmax(1).numpy()

    return judge


@dataclass
class Bench:
    """The original with `images` of its own images, and training states for each seed, of trajectories of `steps`."""

    path: Path
    images: int
    scenes: Path | None
    steps: int = 25
    held: int = 256  # held-out states
    trained: int = 128  # trajectories of the training states
    by: Driven = field(init=False)
    known: dict[int, Trajectories] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        guidance = 2.0 if self.scenes else 1.5
        settings = EvaluateSettings(pairs=self.images, images=self.images, steps=self.steps, guidance=guidance)
        self.subject = open_subject(self.path, self.path, settings, reporter=Silent())
        if self.scenes:
            self.judge = scenes_judge(self.scenes)
        else:
            extractor: Any = find_tools(self.subject, Sources(), Silent()).extractor
            self.judge = lambda x: (extract(extractor, [x]), extractor.logits(x).argmax(1).numpy())
        labels = self.subject.conditions.labels
        assert labels is not None
        self.labels = labels[: self.images].numpy() % (8 if self.scenes else 10**9)
        self.features, guessed = self.judge(self.drawn(self.subject.original))
        self.accuracy = float((guessed == self.labels).mean())
        checkpoint, _ = open_model(self.path)
        self.by = driven(checkpoint, Calibration(samples=128), None, None, 0, "cpu", Silent())
        self.clean_weights = Noising(self.by.scheduler, self.by.adapter, self.by.config).clean_weights
        self.held_out = self.states(104_729, 16).batch(0, self.held)
        self.wanted = self._predicted(self.by.model)

    def drawn(self, model: nn.Module) -> Tensor:
        return torch.cat([
            self.subject.images(model, list(range(start, min(start + AT_A_TIME, self.images))))
            for start in range(0, self.images, AT_A_TIME)
        ])  # fmt: skip

    def states(self, seed: int, images: int | None = None) -> Trajectories:
        """The training states of a seed (or other ones), which know their trajectories once they were asked for."""
        if seed in self.known:
            return self.known[seed]
        by = self.by
        sampling = Sampling(self.steps, by.guidance, seed, batch=32)
        self.known[seed] = Trajectories(by.model, by.adapter, by.config, by.scheduler, by.conditions, sampling,
                                        images=images or self.trained, refresh=10**9, null=0.15)  # fmt: skip
        return self.known[seed]

    def _predicted(self, model: nn.Module) -> Tensor:
        """For the held-out states."""
        held, predict = self.held_out, self.by.adapter.predict
        with torch.no_grad():
            return torch.cat([
                predict(model, held.latents[at], held.timestep[at], {k: v[at] for k, v in held.cond.items()}).float()
                for at in (slice(start, start + AT_A_TIME) for start in range(0, self.held, AT_A_TIME))
            ])  # fmt: skip

    def judged(self, model: nn.Module) -> dict[str, float]:
        """SQNR of the prediction in dB, class accuracy in %, Fréchet distance to the original's own images."""
        features, guessed = self.judge(self.drawn(model))
        return {
            "db": ratio_db(float(output_loss(self._predicted(model), self.wanted))),
            "accuracy": 100 * float((guessed == self.labels).mean()),
            "fd": frechet(self.features, features),
        }


def bench_options(parser: argparse.ArgumentParser) -> None:
    """What makes a `Bench`."""
    parser.add_argument("--model", type=Path, default=digits_folder())
    parser.add_argument("--scenes", type=Path, help="folder with classifier.py, for a scenes checkpoint")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--sampling", type=int, default=25, help="steps of every trajectory")
    parser.add_argument("--held", type=int, default=256, help="held-out states")
    parser.add_argument("--trained", type=int, default=128, help="trajectories of the training states")


def bench_of(options: argparse.Namespace) -> Bench:
    """As `bench_options` were given."""
    return Bench(options.model, options.images, options.scenes, options.sampling, options.held, options.trained)


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"
