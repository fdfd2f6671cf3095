"""The result of a training: what `imgcls.train` returns, and how a notebook shows it."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from imgcls.data.encode_image import build_data_uri
from imgcls.training.epoch_metrics import EpochMetrics
from imgcls.training.optim.lr_finder import find_steepest_lr


@dataclass(frozen=True, repr=False)
class TrainResult:
    """Result of a training, as `imgcls.train` returns it.

    Attributes
    ----------
    bundle : str
        URL of the bundle folder. It holds the weights of the epoch `best`.
    history : list of EpochMetrics
        Metrics of every epoch, in order. Epoch 0 is the linear probe.
    best : EpochMetrics or None
        Epoch with the best validation metric (`best_by`); None after an LR range test, which
        writes no bundle.
    failed : int
        Number of images that could not be decoded and were left out.
    lr_curve : tuple of (float, float)
        (learning rate, loss in nats) pairs of an LR range test; empty otherwise.

    Examples
    --------
    >>> import imgcls
    >>> result = imgcls.train(data="photos/", model="resnet18", output="bundle")  # doctest: +SKIP
    >>> result.best.val_accuracy  # doctest: +SKIP
    0.9312
    """

    bundle: str
    history: list[EpochMetrics]
    best: EpochMetrics | None
    failed: int
    lr_curve: tuple[tuple[float, float], ...] = ()

    def __repr__(self) -> str:
        if self.best is None:
            return f"TrainResult(bundle={self.bundle!r}, lr_curve={len(self.lr_curve)} steps)"
        name = "val_mean_average_precision" if self._is_multilabel else "val_accuracy"
        return (
            f"TrainResult(bundle={self.bundle!r}, epochs={len(self.history)}, "
            f"best={self.best.name!r}, {name}={getattr(self.best, name):.4f}, "
            f"val_loss={self.best.val_loss:.4f}, failed={self.failed})"
        )

    @property
    def _is_multilabel(self) -> bool:
        return self.best is not None and self.best.val_mean_average_precision is not None

    def _repr_html_(self) -> str:
        """HTML for notebooks: a table of the best epoch, and the curves."""
        rows = {"bundle": self.bundle}
        if self.best is not None:
            rows["best epoch"] = f"{self.best.name} of {self.history[-1].epoch}"
            accuracy = "validation accuracy"
            if self._is_multilabel:
                rows["validation mAP"] = f"{self.best.val_mean_average_precision:.2%}"
                accuracy = "correct decisions"
            rows |= {
                accuracy: f"{self.best.val_accuracy:.2%}",
                "balanced accuracy": f"{self.best.val_balanced_accuracy:.2%}",
                "validation loss": f"{self.best.val_loss:.4f}",
            }
        if self.failed:
            rows["images left out"] = f"{self.failed:,}"
        cells = "".join(
            f'<tr><th style="text-align:left">{name}</th>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for name, value in rows.items()
        )
        picture = self._draw()
        drawn = ""
        if picture is not None:
            source = build_data_uri(picture, "image/png")
            drawn = f'<img src="{source}" alt="training curves" style="max-width:100%">'
        return f"<table>{cells}</table>{drawn}"

    def _draw(self) -> bytes | None:
        """PNG of the curves; None without epochs."""
        from imgcls.training import plots  # imports matplotlib

        if self.best is not None:
            table = pd.DataFrame([asdict(epoch) for epoch in self.history])
            return plots.draw_curves(table, self.best.epoch)["curves.png"]
        if len(self.lr_curve) < 2:
            return None
        lrs, losses = zip(*self.lr_curve, strict=True)
        suggestion = find_steepest_lr(lrs, plots.smooth_curve(np.asarray(losses)))
        return plots.draw_lr_range(lrs, losses, suggestion)["lr_range.png"]
