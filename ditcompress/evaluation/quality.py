"""T4 and T5: class accuracy, distribution metrics on an extractor's features, external metrics.

What the user asked for and cannot be measured is skipped with its reason and the error's code; everything else is
still measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..console import Reporter
from ..errors import DitcompressError
from ..result import Measurement, Skipped
from . import accuracy, external
from .digits import digits_folder
from .distribution import FeatureSets, frechet, measure_all, why_not
from .extractors import Extractor, Request, choose, extract
from .images import ImageSet
from .reference import Reference, open_reference
from .subject import Subject

DISTRIBUTION = "distribution metrics (Fréchet distance, MMD, precision, recall, density, coverage)"
TO_REFERENCE = "distance to reference images"


@dataclass(frozen=True)
class Sources:
    """What T4 and T5 may use: real images, a folder of local weights, a folder that keeps trained extractors."""

    reference: Path | None = None
    weights: Path | None = None
    cache: Path | None = None


@dataclass
class Findings:
    """Rows, skipped metrics, and what goes into the report's `pairs` and provenance."""

    rows: list[Measurement] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def skip(self, name: str, error: DitcompressError | str) -> None:
        if isinstance(error, DitcompressError):
            self.skipped.append(Skipped(name, f"{error.where}: {error.what}; {error.remedy}", error.code))
        else:
            self.skipped.append(Skipped(name, error))


@dataclass(frozen=True)
class Tools:
    """The reference and the extractor that were found, and the findings so far (why one was not)."""

    reference: Reference | None
    extractor: Extractor | None
    findings: Findings


def is_digits(subject: Subject) -> bool:
    """Whether the original has the shape of the embedded model: 8x8 grey images and ten classes."""
    shape = subject.adapter.latent_shape(subject.config)
    return tuple(shape) == (1, 8, 8) and subject.config.get("num_embeds_ada_norm") == 10


def find_tools(subject: Subject, sources: Sources, reporter: Reporter) -> Tools:
    """Reference and extractor as asked for; the embedded model brings its own."""
    found, settings = Findings(), subject.settings
    if subject.other_scheduler:
        what = f"differs from the original's in {subject.other_scheduler}; both models run on the original's"
        found.skip(
            "the compressed model's own scheduler", DitcompressError("E341", "scheduler", what, "give --scheduler")
        )
    if not subject.makes_images:
        if sources.reference is not None or settings.extractor not in ("auto", "none"):
            reason = "the model makes latents and the folder has no VAE: give the pipeline folder"
            found.skip(DISTRIBUTION, DitcompressError("E205", subject.source.path, reason, "or leave T4 out"))
        else:
            found.skip(DISTRIBUTION, "latents, not images: give the pipeline folder with its VAE")
        return Tools(None, None, found)
    shape, reference, extractor = subject.image_shape(), None, None
    path = sources.reference
    if path is None and is_digits(subject):
        path = digits_folder() / "reference.safetensors"
    try:
        reference = None if path is None else open_reference(path, shape)
    except DitcompressError as error:
        found.skip(TO_REFERENCE, error)

    def request(argument: str) -> Request:
        return Request(
            argument, shape, reference, sources.weights, sources.cache, settings.extractor_floor, settings.seed,
            settings.device, reporter,
        )  # fmt: skip

    try:
        extractor = choose(settings.extractor, request, is_digits(subject))
    except DitcompressError as error:
        if error.code.startswith("E2"):
            raise
        found.skip(DISTRIBUTION, error)
    else:
        if extractor is None:
            why = "not asked for" if settings.extractor == "none" else "give --reference or --extractor"
            found.skip(DISTRIBUTION, why)
        elif reference is None and path is None:
            found.skip(TO_REFERENCE, "no reference images: give --reference")
    return Tools(reference, extractor, found)


def measure_quality(
    subject: Subject, sets: dict[str, ImageSet], tools: Tools, sources: Sources, reporter: Reporter
) -> Findings:
    """Every T4 and T5 row that can be had from the image sets."""
    found = tools.findings
    if tools.extractor is not None:
        _distribution(subject, sets, tools, reporter)
    _accuracy(subject, sets, tools)
    _external(subject, sets, tools, sources)
    if tools.extractor is not None:
        x = tools.extractor
        found.provenance["extractor"] = {
            "name": x.name, "title": x.title, "sha256": x.sha256, "accuracy": x.accuracy
        }  # fmt: skip
    if tools.reference is not None:
        found.provenance["reference"] = {"name": tools.reference.path.name, "images": len(tools.reference)}
    found.provenance["images"] = len(sets["original"])
    return found


def _distribution(subject: Subject, sets: dict[str, ImageSet], tools: Tools, reporter: Reporter) -> None:
    found, extractor = tools.findings, tools.extractor
    assert extractor is not None
    images = {name: (made, len(made)) for name, made in sets.items()}
    reference, real = tools.reference, None
    with reporter.task("features (T4)", sum(n for _, n in images.values()) + len(reference or ())) as advance:
        features = {name: extract(extractor, made.chunks(), advance) for name, (made, _) in images.items()}
        if reference is not None:
            try:
                real = extract(extractor, reference.chunks(), advance)
            except DitcompressError as error:  # a corrupt image: everything else is still measured
                found.skip(TO_REFERENCE, error)
    table = FeatureSets(
        features["original"], features["compressed"], real, features.get("fresh"),
        subject.settings.seed,
    )  # fmt: skip
    rows, skipped = measure_all(table)
    found.rows += rows
    found.skipped += skipped
    if not why_not(frechet, table):
        found.extra["frechet_curve"] = frechet.curves(table)


def _accuracy(subject: Subject, sets: dict[str, ImageSet], tools: Tools) -> None:
    found = tools.findings
    try:
        classifier = accuracy.find_classifier(subject, tools.extractor)
        if subject.conditions.labels is None or classifier is None:
            why = "no class labels" if subject.conditions.labels is None else "no classifier: give --classifier"
            found.skip("class accuracy", why)
            return
        judged = accuracy.judge(subject, sets, classifier[0])
    except DitcompressError as error:
        if error.code.startswith("E2"):
            raise
        found.skip("class accuracy", error)
        return
    found.rows += accuracy.measurements(judged, classifier[1])
    found.extra["per_class"] = accuracy.per_class(judged)


def _external(subject: Subject, sets: dict[str, ImageSet], tools: Tools, sources: Sources) -> None:
    """Rows of the external metrics that were asked for; what is missing is skipped with its reason."""
    found, asked = tools.findings, subject.settings.external
    if not asked:
        found.skip("external metrics (Inception FID, LPIPS, CLIPScore ...)", "not asked for: give --external")
        return
    if not subject.makes_images:
        found.skip("external metrics", "latents, not images: give the pipeline folder with its VAE")
        return
    names = external.registry.names() if "all" in asked else list(dict.fromkeys(asked))
    samples = external.Samples(
        sets["original"], sets["compressed"], tools.reference, subject.conditions.texts(len(sets["original"])),
        sources.weights, subject.settings.device, subject.settings.seed,
    )  # fmt: skip
    rows, skipped = external.run_external(names, samples)
    found.rows += rows
    found.skipped += skipped
