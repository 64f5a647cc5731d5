"""The embedded digit classifier: features (n, 32) before its head, for the embedded model."""

from __future__ import annotations

from ...errors import DitcompressError
from ..digits import classifier_accuracy, load_digit_classifier
from . import Extractor, Request, failed, module_digest

LABEL = "embedded digit classifier"


def open_extractor(request: Request) -> Extractor:
    """E337 for images that are not 8x8 grey; E335 where its accuracy is below the asked-for floor."""
    if request.shape != (1, 8, 8):
        raise failed("--extractor digits", f"the model makes {request.shape}, not 8x8 grey images", "choose another")
    accuracy = classifier_accuracy()
    if accuracy < request.floor:
        raise DitcompressError(
            "E335", LABEL, f"held-out accuracy {accuracy:.3f} is below {request.floor:g}", "lower --extractor-floor"
        )
    model = load_digit_classifier()
    return Extractor(LABEL, module_digest(model), model.features, model, 10, accuracy)
