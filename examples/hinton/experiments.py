"""Temperature, few data, omitted classes and an ensemble, each with the claims of the paper that it tests.

Legend: S seeds, N training images, K test images, C classes, T temperature.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .digits import Splits
from .networks import Networks, Targets, error, train
from .report import Claim, Findings, Table, as_text

PIXELS, DIGITS = 64, 10
TEACHERS = {
    "sure": {"dropout": 0.3, "shifted": False},
    "soft": {"dropout": 0.5, "shifted": True},
}
TEMPERATURES = (1, 2, 4, 8, 20)
OMITTED = {"without threes": (3,), "of sevens and eights alone": (0, 1, 2, 3, 4, 5, 6, 9)}
BIASES = torch.linspace(0, 40, 161)
ERROR, FOUND = "test error, %", "omitted recognised, %"
ERROR_RAISED, FOUND_RAISED = "test error with the bias, %", "omitted recognised with it, %"


def widths(units: int) -> tuple[int, ...]:
    """Return the widths of a network with two hidden layers."""
    return PIXELS, units, units, DIGITS


@cache
def trained_teacher(name: str, splits: Splits) -> tuple[Tensor, Tensor]:
    """Train a teacher on all training images; returns its logits of those, ``[S, N, C]``, and of the test images."""
    torch.manual_seed(1)
    settings = TEACHERS[name]
    teacher = Networks(len(splits.labels), widths(300), settings["dropout"])
    train(teacher, splits.images, Targets(splits.labels), all_images(splits), shifted=settings["shifted"])
    return teacher.predict(splits.images), teacher.predict(splits.test_images)


def trained_student(splits: Splits, targets: Targets, share: Tensor, units: int = 100, **more: Any) -> Networks:
    """Train a student for each split, without regularisation.

    Students of the same width begin with the same weights, and draw the same batches of the same images, so that
    their differences are those of their targets.
    """
    torch.manual_seed(2)
    return train(Networks(len(splits.labels), widths(units)), splits.images, targets, share, **more)


def all_images(splits: Splits) -> Tensor:
    """Return equal shares ``[S, N]``."""
    return torch.ones(splits.labels.shape)


def test_error(networks: Networks, splits: Splits) -> Tensor:
    """Return the percentage of test images that each network gets wrong, ``[S]``."""
    return error(networks.predict(splits.test_images), splits.test_labels)


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of predictions at T = 1 in nats, ``[S]``, of logits ``[S, N, C]``."""
    return torch.special.entr(logits.double().softmax(-1)).sum(-1).mean(-1)


def temperature(
    splits: Splits,
    teachers: Sequence[str] = tuple(TEACHERS),
    temperatures: Sequence[int] = TEMPERATURES,
    units: Sequence[int] = (100, 30),
) -> Findings:
    """Compare soft targets of two teachers with hard labels, on all training images (the paper's section 3)."""
    everything = all_images(splits)
    facts = {}
    for name in teachers:
        on_training, on_test = trained_teacher(name, splits)
        facts[name] = {
            "test error, %": error(on_test, splits.test_labels),
            "entropy of its targets at T = 1, nats": entropy(on_training),
        }
    tables = [Table("Teachers, 300 units a layer", "teacher", facts)]

    difference: dict[tuple[int, str, int], Tensor] = {}  # test error with soft targets, less that with hard labels
    for n in units:
        hard = test_error(trained_student(splits, Targets(splits.labels), everything, n), splits)
        for name in teachers:
            on_training, _ = trained_teacher(name, splits)
            for t in temperatures:
                student = trained_student(splits, Targets(splits.labels, on_training, t), everything, n)
                difference[n, name, t] = test_error(student, splits) - hard
        rows = {name: {f"T = {t}": difference[n, name, t] for t in temperatures} for name in teachers}
        title = f"Students of {n} units a layer, points of test error more than with hard labels ({as_text(hard)} %)"
        tables.append(Table(title, "teacher", rows, [f"T = {t}" for t in temperatures]))

    claims = [
        Claim("§3, 146 to 74 errors", f"soft targets of the {name} teacher at T = {t} beat hard labels", values)
        for (n, name, t), values in difference.items()
        if n == 100 and t in (4, 20)
    ]
    claims += [
        Claim(
            "§3, 30 units",
            f"with 30 units and the {name} teacher T = 4 beats T = {t}",
            difference[30, name, 4] - difference[30, name, t],
        )
        for name in teachers
        for t in (1, 20)
        if {(30, name, 4), (30, name, t)} <= difference.keys()
    ]
    return Findings("Temperature", tables, claims)


def few_data(
    splits: Splits, percentages: Sequence[int] = (3, 10, 30, 100), temperatures: Sequence[int] = (1, 4, 20)
) -> Findings:
    """Compare hard labels with the soft teacher's targets on a part of the training images (section 6)."""
    on_training, _ = trained_teacher("soft", splits)
    hard, best, soft = {}, {}, {}
    for percent in percentages:
        share = all_images(splits)
        share[:, round(share.shape[1] * percent / 100) :] = 0
        history: list[Tensor] = []

        def watch(student: Networks, step: int, history: list[Tensor] = history) -> None:
            if step % 50 == 0:
                history.append(test_error(student, splits))

        student = trained_student(splits, Targets(splits.labels), share, watch=watch)
        hard[percent] = test_error(student, splits)
        best[percent] = torch.stack([*history, hard[percent]]).amin(0)
        for t in temperatures:
            student = trained_student(splits, Targets(splits.labels, on_training, t), share)
            soft[percent, t] = test_error(student, splits)

    rows = {
        f"{percent} %, {round(splits.labels.shape[1] * percent / 100)} images": {
            "hard": hard[percent],
            "hard, its best step on the test images": best[percent],
            **{f"soft, T = {t}": soft[percent, t] for t in temperatures},
        }
        for percent in percentages
    }
    claims = []
    for percent in percentages[:2]:
        beats = f"with {percent} % of the images soft targets at T = 4 beat hard labels"
        claims.append(Claim("§6, 57.0 against 44.5 %", beats, soft[percent, 4] - hard[percent]))
        oracle = f"{beats} that stop at their best step on the test images"
        claims.append(Claim("§6, with early stopping", oracle, soft[percent, 4] - best[percent]))
    first, last = percentages[0], percentages[-1]
    if first < last:
        halfway = (hard[first] + hard[last]) / 2
        closes = f"soft targets at T = 4 and {first} % of the images close more than half of the gap to {last} %"
        claims.append(Claim("§6, 87 % of the gap", closes, soft[first, 4] - halfway))
    return Findings("Few data", [Table("Test error in %, students of 100 units a layer", "images", rows)], claims)


def omitted(splits: Splits, temperatures: Sequence[int] = (1, 4, 20)) -> Findings:
    """Leave classes out of the transfer set, and raise their bias afterwards (section 3)."""
    on_training, _ = trained_teacher("soft", splits)
    tables, tested = [], []
    for name, classes in OMITTED.items():
        rows = {"hard": _students_omitting(splits, Targets(splits.labels), classes)}
        for t in temperatures:
            rows[f"soft, T = {t}"] = _students_omitting(splits, Targets(splits.labels, on_training, t), classes)
        tables.append(Table(f"Transfer set {name}, students of 100 units a layer", "targets", rows))
        tested.append(rows["soft, T = 4"])

    threes, others = tested  # more than 50 points: most of the omitted images are recognised
    never, two = "a student that never saw a three", "a student that saw sevens and eights alone"
    claims = [
        Claim("§3, 86.8 %", f"{never} recognises most of them (T = 4)", threes[FOUND] - 50, 1),
        Claim("§3, 98.6 %", f"with the bias raised {never} recognises most (T = 4)", threes[FOUND_RAISED] - 50, 1),
        Claim("§3, 206 to 109 errors", f"the bias lowers the error of {never}", threes[ERROR_RAISED] - threes[ERROR]),
        Claim(
            "§3, error of 13.2 %",
            f"with the biases raised {two} recognises most of the others (T = 4)",
            others[FOUND_RAISED] - 50,
            1,
        ),
        Claim("§3, 47.3 to 13.2 %", f"the biases lower the error of {two}", others[ERROR_RAISED] - others[ERROR]),
    ]
    return Findings("Omitted classes", tables, claims)


def _students_omitting(splits: Splits, targets: Targets, classes: Sequence[int]) -> dict[str, Tensor]:
    """Train students on the images of all other classes; returns errors in %, with and without the raised bias."""
    omitted = torch.tensor(classes)
    student = trained_student(splits, targets, (~torch.isin(splits.labels, omitted)).float())
    bias = chosen_bias(student.predict(splits.images), splits.labels, classes)
    before = student.predict(splits.test_images)
    after = raised(before, classes, bias)
    there = torch.isin(splits.test_labels, omitted)

    def found(logits: Tensor) -> Tensor:
        return 100 * ((logits.argmax(-1) == splits.test_labels) & there).double().sum(-1) / there.sum(-1)

    return {
        ERROR: error(before, splits.test_labels),
        FOUND: found(before),
        "bias": bias,
        ERROR_RAISED: error(after, splits.test_labels),
        FOUND_RAISED: found(after),
    }


def raised(logits: Tensor, classes: Sequence[int], bias: Tensor) -> Tensor:
    """Add each network's bias ``[S]`` to the logits ``[S, N, C]`` of these classes."""
    logits = logits.clone()
    logits[..., list(classes)] += bias[:, None, None]
    return logits


def chosen_bias(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Choose the bias of these classes with the fewest errors, for each network, ``[S]``.

    Where several are equally good it is the middle one. The paper chose it on its test images; here it is chosen on the
    training images, of which the student has not seen those of these classes.

    Args:
        logits (Tensor): ``[S, N, C]`` of the images to choose it on.
        labels (Tensor): ``[S, N]``.
        classes (Sequence[int]): whose bias it is.
    """
    errors = torch.stack([error(raised(logits, classes, b.expand(len(logits))), labels) for b in BIASES])  # [biases, S]
    best = errors == errors.amin(0)
    return torch.stack([BIASES[chosen].median() for chosen in best.T])


def ensemble(splits: Splits, temperatures: Sequence[int] = (1, 2, 4), members: int = 5) -> Findings:
    """Average five networks, and distil them into one (section 4)."""
    torch.manual_seed(4)
    repeated = Splits(*(part.repeat_interleave(members, 0) for part in vars(splits).values()))
    networks = Networks(len(repeated.labels), widths(100))
    train(networks, repeated.images, Targets(repeated.labels), all_images(repeated))
    on_training, on_test = (
        networks.predict(images).unflatten(0, (-1, members)) for images in (repeated.images, repeated.test_images)
    )
    single = test_error(networks, repeated).unflatten(0, (-1, members)).mean(1)
    together = error(averaged(on_test, 1), splits.test_labels)
    distilled = {}
    for t in temperatures:
        targets = Targets(splits.labels, averaged(on_training, t), t)
        distilled[t] = test_error(trained_student(splits, targets, all_images(splits)), splits)
    rows = {f"one network, mean of {members}": single, f"{members} networks, averaged": together}
    rows |= {f"distilled into one, T = {t}": values for t, values in distilled.items()}
    table = {name: {"test error, %": values, "less one network": values - single} for name, values in rows.items()}
    claims = [
        Claim("§4, 58.9 to 61.1 % of frames right", f"{members} networks beat one", together - single),
        Claim("§4, 60.8 %", "the network distilled from them at T = 2 beats one", distilled[2] - single),
    ]
    tables = [Table("Networks of 100 units a layer", "predictions by", table, ["less one network"])]
    return Findings("Ensemble", tables, claims)


def averaged(logits: Tensor, t: float) -> Tensor:
    """Return logits whose softmax at T is the mean of the members' softmax at T, of ``[S, members, N, C]``."""
    return t * (logits / t).softmax(-1).mean(1).log()
