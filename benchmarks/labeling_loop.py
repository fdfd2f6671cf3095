"""Gains of the labeling loop: selected labels, a student of a larger network, self-training.

    python -m benchmarks.labeling_loop select photos/train photos/test \\
        --arch timm:tf_efficientnet_lite0 --weights weights.pth --counts 50 100 200
    python -m benchmarks.labeling_loop distill photos/train photos/test \\
        --arch timm:tf_efficientnet_lite0 --weights weights.pth --counts 500 \\
        --set model.name=mobilenet_v3_small model.image_size=64 epochs=30
    python -m benchmarks.labeling_loop self-train photos/train photos/test \\
        --counts 100 --set model.name=squeezenet1_0 model.weights=weights.pth

Each folder has one subfolder per class. The labeled images are drawn with a seed, equally many of
each class; the others count as images without a label. All accuracies are those on the test images.

    select      Head on stored embeddings (`imgcls train --data.embeddings`) of the drawn labels, of
                which every fifth is held out for validation in all rounds (--data.val). Its
                predictions (`imgcls relabel`) select the next images (`imgcls select`), up to each
                of --counts in turn. --rules: settings of `imgcls select`, each against random
                images, from the same first labels.
    distill     The teacher is a head on stored embeddings. The student is trained (`imgcls train`)
                on the labels alone, and again with --teacher and the teacher's scores of all other
                images.
    self-train  The same network as teacher and student; the student is trained on the accepted
                predictions of the teacher (--teacher.mode hard).

    --image-size N       input size of the network of the embeddings, in pixels
    --seeds N            seeds 0 to N - 1 (default: 5)
    --set KEY=VALUE      settings of `imgcls train` for every network but the head on embeddings
    --taught KEY=VALUE   settings of the student with its teacher, in addition
    --predict KEY=VALUE  settings of the teacher's `imgcls predict`, for self-train
    --output FOLDER      where runs and bundles go; embeddings there are used again

A difference is the mean over the seeds, each against the same seed, with its 95 % interval by
Student's t distribution.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.few_shot import draw_rows, run_imgcls, write_rows
from benchmarks.machine import read_cpu

RULES: dict[str, dict[str, Any]] = {
    "margin": {},
    "margin-diverse": {"diverse": True},
    "entropy": {"by": "entropy"},
    "entropy-diverse": {"by": "entropy", "diverse": True},
}
"""Settings of `imgcls select` by name."""
RANDOM = "random"
Rows = list[tuple[str, str]]
Accuracies = dict[str, list[float]]


@dataclass(frozen=True)
class Embedded:
    """Committed runs with the embeddings of all images.

    pool: the training images, without their labels
    test: the test images, with their labels
    """

    pool: Path
    test: Path


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    logging.getLogger("imgcls").setLevel(logging.ERROR)
    print(f"CPU: {read_cpu()}", flush=True)
    EXPERIMENTS[options.experiment](options)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--arch", help="network of the embeddings")
    parser.add_argument("--weights", help="its weights")
    parser.add_argument("--image-size", type=int, help="its input (default: of the network)")
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["margin", "margin-diverse"])
    for name in ("--set", "--taught", "--predict"):
        parser.add_argument(name, nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("labeling-loop"))
    options = parser.parse_args(words)
    if options.experiment != "self-train" and not (options.arch and options.weights):
        parser.error(f"{options.experiment}: needs the network of the embeddings; pass --arch and "
                     "--weights")  # fmt: skip
    return options


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Keys and values of KEY=VALUE.

    >>> parse_settings(["epochs=30", "augment=strong"])
    {'epochs': 30, 'augment': 'strong'}
    """
    pairs = (word.partition("=") for word in words)
    return {key: yaml.safe_load(value) for key, _, value in pairs}


# ------------------------------------------------------------------ selection


def measure_selection(options: argparse.Namespace) -> None:
    """Accuracy of a head by number of labels: selected by each rule, and at random."""
    embedded = embed_images(options)
    found: dict[int, Accuracies] = {count: {} for count in options.counts}
    for seed in range(options.seeds):
        for rule in (RANDOM, *options.rules):
            for count, accuracy in zip(
                options.counts, label_in_rounds(options, embedded, rule, seed), strict=True
            ):
                found[count].setdefault(rule, []).append(accuracy)
        print(f"seed {seed} done", flush=True)
    for count, accuracies in found.items():
        for rule, values in accuracies.items():
            against = None if rule == RANDOM else accuracies[RANDOM]
            print(f"{count:>6} labels  {describe(rule, values, against)}", flush=True)


def label_in_rounds(
    options: argparse.Namespace, embedded: Embedded, rule: str, seed: int
) -> list[float]:
    """The accuracy after each round; the first one has the same labels for every rule."""
    truth = dict(draw_rows(options.train, 10**9, 0))
    rows = draw_labels(options.train, options.counts[0], seed)
    val, place = rows[::5], options.output / f"first-{seed}"
    found = [fit_head(embedded, place, rows, val, seed)]
    for count in options.counts[1:]:
        wanted = count - len(rows)
        if rule == RANDOM:
            paths = draw_others(truth, rows, wanted, seed)
        else:
            paths = select_images(embedded, place, wanted, rule)
        rows = rows + [(path, truth[path]) for path in paths]
        place = options.output / f"{rule}-{seed}-{count}"
        found.append(fit_head(embedded, place, rows, val, seed))
    return found


def fit_head(embedded: Embedded, place: Path, rows: Rows, val: Rows, seed: int) -> float:
    """Fit a head to labeled images; returns its accuracy. That of the first labels is fitted once.

    rows: all labeled images
    val:  those of them that are held out
    """
    import imgcls

    write_rows(place / "labels.csv", rows)
    bundle, held = place / "bundle", set(val)
    imgcls.train(
        data={
            "train": str(write_rows(place / "train.csv", [r for r in rows if r not in held])),
            "val": str(write_rows(place / "val.csv", val)),
            "embeddings": str(embedded.pool),
        },
        output=str(bundle),
        overwrite=not place.name.startswith("first-"),
        seed=seed,
    )
    return score(embedded.test, bundle, place / "test")


def select_images(embedded: Embedded, place: Path, count: int, rule: str) -> list[str]:
    """Paths that `imgcls select` chooses by the bundle and the labels in a folder."""
    import imgcls

    run, output = place / "pool", place / f"next-{rule}"
    imgcls.relabel(
        source=str(embedded.pool),
        model=str(place / "bundle"),
        output=str(run),
        scores=True,
        embeddings=True,
        overwrite=True,
    )
    selection = imgcls.select(
        run=str(run),
        output=str(output),
        count=count,
        exclude=str(place / "labels.csv"),
        overwrite=True,
        **RULES[rule],
    )
    paths: list[str] = selection.rows["path"].to_pylist()
    if len(paths) < count:
        raise SystemExit(f"{rule}: only {len(paths)} of {count} images can be selected")
    return paths


def score(run: Path, bundle: Path, output: Path) -> float:
    """Accuracy of a head on a run with embeddings and labels."""
    import imgcls

    result = imgcls.relabel(source=str(run), model=str(bundle), output=str(output), overwrite=True)
    return result.metrics["accuracy"]


def embed_images(options: argparse.Namespace) -> Embedded:
    """Embeddings of all images, by `imgcls embed`."""
    import imgcls

    backbone, output = options.output / "backbone", options.output
    embedded = Embedded(output / "pool", output / "test")
    if all((run / "_SUCCESS").exists() for run in (embedded.pool, embedded.test)):
        return embedded
    size = options.image_size
    run_imgcls(
        *("model", "import", "--arch", options.arch, "--weights", options.weights),
        *("--output", backbone, "--overwrite"),
        *(("--resize", size, "--crop", size) if size else ()),
    )
    paths = [(path,) for path, _ in draw_rows(options.train, 10**9, 0)]
    pool = write_rows(output / "pool.csv", paths)
    for manifest, run in ((pool, embedded.pool), (options.test, embedded.test)):
        imgcls.embed(manifest=str(manifest), model=str(backbone), output=str(run))
    return embedded


# ------------------------------------------------------------------ teachers


def measure_distillation(options: argparse.Namespace) -> None:
    """Accuracy of a student with and without the scores of a head on embeddings."""
    embedded = embed_images(options)

    def teach(folder: Path, labels: Path, pool: Path, seed: int) -> tuple[float, dict[str, Any]]:
        import imgcls

        bundle, run = folder / "teacher", folder / "teacher-run"
        imgcls.train(
            data={"train": str(labels), "embeddings": str(embedded.pool)},
            output=str(bundle),
            overwrite=True,
            seed=seed,
        )
        imgcls.relabel(
            source=str(embedded.pool),
            model=str(bundle),
            output=str(run),
            scores=True,
            overwrite=True,
        )
        return score(embedded.test, bundle, folder / "teacher-test"), {"path": str(run)}

    measure_students(options, teach)


def measure_self_training(options: argparse.Namespace) -> None:
    """Accuracy of a network from its own accepted predictions and from the labels alone."""

    def teach(folder: Path, labels: Path, pool: Path, seed: int) -> tuple[float, dict[str, Any]]:
        import imgcls

        bundle, run = folder / "alone", folder / "teacher-run"
        settings = parse_settings(options.predict)
        imgcls.label(
            manifest=str(pool), model=str(bundle), output=str(run), overwrite=True, **settings
        )
        return float("nan"), {"path": str(run), "mode": "hard"}

    measure_students(options, teach)


def measure_students(
    options: argparse.Namespace,
    teach: Callable[[Path, Path, Path, int], tuple[float, dict[str, Any]]],
) -> None:
    """Train each student without and with its teacher, and print the accuracies.

    teach: makes a teacher from the folder of the seed, the labels and the other images; returns its
        accuracy (NaN if it is the student itself) and the settings `teacher`
    """
    for count in options.counts:
        alone, teachers, taught = [], [], []
        for seed in range(options.seeds):
            folder = options.output / f"{options.experiment}-{count}-{seed}"
            rows = draw_labels(options.train, count, seed)
            labels = write_rows(folder / "labels.csv", rows)
            known = {path for path, _ in rows}
            others = [path for path, _ in draw_rows(options.train, 10**9, 0) if path not in known]
            pool = write_rows(folder / "pool.csv", [(path,) for path in others])
            settings = parse_settings(options.set)
            alone.append(train_and_test(options, folder / "alone", labels, seed, settings))
            accuracy, teacher = teach(folder, labels, pool, seed)
            teachers.append(accuracy)
            settings |= {f"teacher.{key}": value for key, value in teacher.items()}
            settings |= parse_settings(options.taught)
            taught.append(train_and_test(options, folder / "taught", labels, seed, settings))
            print(f"seed {seed}: {alone[-1]:.3f}, {accuracy:.3f}, {taught[-1]:.3f}", flush=True)
        print(f"{count:>6} labels  {describe('labels only', alone)}")
        if np.isfinite(teachers).all():
            print(f"{count:>6} labels  {describe('teacher', teachers)}")
        print(f"{count:>6} labels  {describe('student', taught, alone)}")
        if np.isfinite(teachers).all():
            gaps = (np.array(taught) - alone) / (np.array(teachers) - alone)
            print(f"{count:>6} labels  gap closed: {', '.join(f'{gap:.0%}' for gap in gaps)}")


def train_and_test(
    options: argparse.Namespace, bundle: Path, labels: Path, seed: int, settings: Mapping[str, Any]
) -> float:
    import imgcls

    request: dict[str, Any] = {"data.train": str(labels), "output": str(bundle), **settings}
    imgcls.train(**request, overwrite=True, seed=seed)
    test = imgcls.label(
        manifest=str(options.test),
        model=str(bundle),
        output=str(bundle.with_name(f"{bundle.name}-test")),
        overwrite=True,
    )
    return test.metrics["accuracy"]


# ------------------------------------------------------------------ rows and numbers


def draw_labels(folder: Path, count: int, seed: int) -> Rows:
    """`count` labeled images, equally many of each class."""
    classes = sum(place.is_dir() for place in folder.iterdir())
    if count % classes:
        raise SystemExit(f"--counts {count}: is not a multiple of the {classes} classes")
    return draw_rows(folder, count // classes, seed)


def draw_others(truth: Mapping[str, str], rows: Rows, count: int, seed: int) -> list[str]:
    """Paths of random images that are not among the labeled rows."""
    known = {path for path, _ in rows}
    others = [path for path in truth if path not in known]
    return random.Random(f"{seed} {len(rows)}").sample(others, count)


def describe(name: str, values: Sequence[float], against: Sequence[float] | None = None) -> str:
    """A line: mean, the value of each seed, and the difference with its interval."""
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    line = f"{name:<16} {100 * np.mean(values):5.1f} %  ({each})"
    if against is None:
        return line
    mean, margin = compare_pairs(values, against)
    low, high = 100 * (mean - margin), 100 * (mean + margin)
    return f"{line}  {100 * mean:+.2f} points (95%: {low:+.2f} to {high:+.2f})"


def compare_pairs(values: Sequence[float], against: Sequence[float]) -> tuple[float, float]:
    """Mean of the paired differences, and half the width of its 95 % interval.

    The width is that of Student's t distribution; NaN for one pair.

    >>> mean, margin = compare_pairs([0.9, 0.8, 0.9], [0.8, 0.7, 0.6])
    >>> round(mean, 4), round(margin, 4)
    (0.1667, 0.2869)
    """
    from scipy.stats import t

    differences = np.array(values) - against
    if len(differences) < 2:
        return float(differences.mean()), float("nan")
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean()), float(error * t.ppf(0.975, len(differences) - 1))


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "select": measure_selection,
    "distill": measure_distillation,
    "self-train": measure_self_training,
}

if __name__ == "__main__":
    main()
