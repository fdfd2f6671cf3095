"""Agreement from integer-coded labels equals that of scikit-learn; the progress is kept."""

from __future__ import annotations

import datetime
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from imgcls.serving.labeling.agreement import AnnotatorLabels
from imgcls.serving.labeling.decisions import AnnotatorRecord, Decision
from imgcls.serving.labeling.progress import ProgressMeter
from imgcls.serving.labeling.queue import LabelingQueue

PATHS = tuple(f"{i}.jpg" for i in range(60))
NOW = datetime.datetime.now(datetime.UTC)
CLASSES = ("red", "green", "blue", "none")


def build_record(name: str, labels: dict[str, tuple[str, ...] | None]) -> AnnotatorRecord:
    decisions = (
        Decision(path, chosen, NOW, f"{i:032x}") for i, (path, chosen) in enumerate(labels.items())
    )
    return AnnotatorRecord(name, tuple(decisions), version=1)


@pytest.mark.parametrize("several", [False, True])
def test_agreement_equals_scikit_learn(several: bool) -> None:
    chance = random.Random(0)

    def choose() -> tuple[str, ...] | None:
        if chance.random() < 0.1:
            return None
        return tuple(chance.sample(CLASSES[:3], chance.randrange(4) if several else 1))

    labels = {
        name: {path: choose() for path in (*PATHS, "gone.jpg") if chance.random() < 0.7}
        for name in ("ana", "ben", "cem")
    }
    matrix = AnnotatorLabels(PATHS)
    matrix.update({name: build_record(name, each) for name, each in labels.items()})
    found = matrix.compute_agreements(CLASSES, several=several)
    pairs = list(itertools.combinations(labels, 2))
    assert [(each.first, each.second) for each in found] == pairs
    for each in found:
        a, b = labels[each.first], labels[each.second]
        shared = [p for p in a if a[p] is not None and b.get(p) is not None]
        x, y = ([set(side[path] or ()) for path in shared] for side in (a, b))
        assert each.images == len(shared)
        assert each.equal == pytest.approx(np.mean([p == q for p, q in zip(x, y, strict=True)]))
        flat = [
            [name in chosen for chosen in side for name in CLASSES] if several
            else [next(iter(chosen)) for chosen in side]
            for side in (x, y)
        ]  # fmt: skip
        assert each.kappa == pytest.approx(cohen_kappa_score(*flat))
    counts = [sum(each.get(path) is not None for each in labels.values()) for path in PATHS]
    assert matrix.count_complete(2) == sum(count >= 2 for count in counts)
    disagreements = dict(matrix.iter_disagreements())
    for path in PATHS:
        chosen = [tuple(sorted(each[path] or ())) for each in labels.values()
                  if each.get(path) is not None]  # fmt: skip
        is_majority = any(chosen.count(each) * 2 > len(chosen) for each in chosen)
        assert (path in disagreements) == (len(chosen) > 1 and not is_majority)
        assert sorted(disagreements.get(path, {}).values()) in ([], sorted(chosen))


def test_progress_is_computed_again_only_for_changed_records() -> None:
    meter = ProgressMeter(LabelingQueue(PATHS, PATHS), 2, several=False)
    records = {name: build_record(name, {PATHS[0]: ("red",)}) for name in ("ana", "ben")}
    first = meter.measure(records, CLASSES)
    assert (first.complete, first.disagreements) == (1, [])
    assert meter.measure(dict(records), CLASSES) is first
    changed = records["ben"].add(Decision(PATHS[0], ("blue",), NOW, "f" * 32))
    second = meter.measure({**records, "ben": replace(changed, version=2)}, CLASSES)
    assert second.disagreements == [(PATHS[0], {"ana": ("red",), "ben": ("blue",)})]
    assert second.agreements[0].equal == 0
    assert meter.measure({}, CLASSES).complete == 0
