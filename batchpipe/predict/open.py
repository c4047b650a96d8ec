"""Opens the predictor that a job asks for."""

from __future__ import annotations

from pathlib import Path

from batchpipe.errors import JobError
from batchpipe.job.shipped import shipped_folder
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.predict.base import Classifier, LengthPredictor
from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.quantile import QuantileClassifier
from batchpipe.predict.trained_file import load_classifier, tokenizer_fingerprint


def open_predictor(method: str, tokenizer: Tokenizer, max_tokens: int) -> LengthPredictor | None:
    """The predictor of `method`: auto, quantile, classifier or the file of a trained one; None if it is "none".

    max_tokens: the longest completion that the job allows. Raises JobError for a file that cannot be used here.
    """
    if method == "none":
        return None
    return OnlinePredictor(_classifier(method, tokenizer), max_tokens)


def _classifier(method: str, tokenizer: Tokenizer) -> Classifier:
    if method in ("auto", "quantile"):
        return QuantileClassifier.shipped()
    fingerprint = tokenizer_fingerprint(tokenizer)
    if method != "classifier":
        return load_classifier(Path(method).expanduser(), fingerprint)
    path = shipped_folder("predictors") / f"{fingerprint[:16]}.safetensors"
    if not path.is_file():
        raise JobError(
            "predict.method: no trained predictor is installed for this model's tokenizer; make one of past outputs "
            "with `batchpipe predictor train` and give its file, or use quantile, which needs no training"
        )
    return load_classifier(path, fingerprint)
