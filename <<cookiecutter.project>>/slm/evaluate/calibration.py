"""Calibration: how sure a model was of its label, and whether it was right as often as it was sure."""

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate

from slm.contract import Contract

BINS = 10  # of equal width


def label_confidence(contract: Contract, answer, value: dict | None) -> float | None:
    """The probability that the model gave its label, from the log probabilities of the pieces that overlap the label's
    value in the text, its closing quote included ("bill" is no "billing"). None without pieces or without a label."""
    label = contract.label(value)
    said = json.dumps(label, ensure_ascii=False).removeprefix('"')
    places = re.finditer(rf'"{re.escape(contract.label_field or "")}"\s*:\s*"?', answer.text)
    start = next((m.end() for m in places if answer.text.startswith(said, m.end())), None)
    if label is None or start is None or not answer.pieces:
        return None
    ends = accumulate(len(text) for text, _ in answer.pieces)
    pieces = ((end - len(text), end, logprob) for (text, logprob), end in zip(answer.pieces, ends, strict=True))
    return min(1.0, math.exp(sum(p for begin, end, p in pieces if begin < start + len(said) and end > start)))


def sureness(scores: Sequence, contract: Contract):
    """Two arrays: the confidence of the answers that carry one, and whether their label was right."""
    import numpy as np

    sure = [s for s in scores if s.confidence is not None]
    right = [contract.label(s.lenient_parsed) == contract.label(s.expected) for s in sure]
    return np.array([s.confidence for s in sure], dtype=float), np.array(right, dtype=float)


def ece_statistic(sure, right) -> Callable:
    """A function from row numbers (draws, n) to the expected calibration error of each draw (draws,): the gap between
    mean confidence and accuracy in ten bins of equal width, weighted by their rows (Naeini et al. 2015)."""
    import numpy as np

    gap, bins = sure - right, bins_of(sure)
    return lambda rows: sum(abs((gap[rows] * (bins[rows] == b)).sum(1)) for b in np.unique(bins)) / rows.shape[1]


def reliability(scores: Sequence, contract: Contract) -> dict:
    """{"ece", "brier", "n", "bins": [{"low", "high", "confidence", "accuracy", "n"}]} of the bins that hold
    answers; {} without confidences. Brier: the mean squared gap between confidence and right or wrong (Brier 1950)."""
    import numpy as np

    sure, right = sureness(scores, contract)
    if not len(sure):
        return {}
    own, found = bins_of(sure), []
    for b in np.unique(own).tolist():
        here = own == b
        mean, hit = float(sure[here].mean()), float(right[here].mean())
        found.append({"low": b / BINS, "high": (b + 1) / BINS, "confidence": mean, "accuracy": hit, "n": int(here.sum())})
    ece = float(ece_statistic(sure, right)(np.arange(len(sure))[None])[0])
    return {"ece": ece, "brier": float(((sure - right) ** 2).mean()), "n": len(sure), "bins": found}


def bins_of(sure):
    """The number of each confidence's bin; 1.0 belongs to the last."""
    return (sure * BINS).astype(int).clip(max=BINS - 1)
