"""A generalist, and specialists for the classes that it confuses (the paper's section 5).

Legend: S seeds, P specialists of each generalist, N training images, K test images, C classes.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtune_kd.kernels import linear_sparse_kd_loss

from .digits import Splits, in_four_rotations
from .experiments import DIGITS, PIXELS, all_images
from .networks import STEPS, Networks, Targets, error, pick, train
from .report import Claim, Findings, Table

CLASSES, SPECIALISTS = 40, 8
HIDDEN = (PIXELS, 200, 200)
DROPOUT = 0.5
IMPOSSIBLE = -1e9  # a bias with which a class has probability 0, and no gradient


@dataclass(frozen=True, kw_only=True)
class SpecialistTargets(Targets):
    """Learn of a generalist, and of a specialist that knows its own classes and all others as one dustbin.

    The specialist's part is forward KL of k + 1 cells: its classes, and the rest, whose probability in the student is
    a sum. Both parts are equation 5, with the student's own prediction for q.

    Attributes:
        answer (Tensor): the specialist's probabilities, the dustbin's last, ``[M, N, C + 1]``.
        own (Tensor): whether a class is one of the specialist's, ``[M, N, C]``.
    """

    answer: Tensor
    own: Tensor

    def loss(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the sum over networks of each one's mean of both parts."""
        answer, own = pick(self.answer, rows).flatten(0, 1), pick(self.own, rows).flatten(0, 1)
        classes = logits.shape[-1]
        cells = linear_sparse_kd_loss(
            logits.flatten(0, 1),
            torch.eye(classes, dtype=logits.dtype),  # a head that leaves the logits as they are
            torch.arange(classes).where(own, -1),  # -1 is no cell
            answer[:, :-1].log(),
            answer[:, -1].log(),
            self.labels.gather(1, rows).flatten(),
            divergence="forward_kl",
            reduction="sum",
        )
        return super().loss(logits, rows) + cells / rows.shape[1]


def specialists(splits: Splits, most_seeds: int = 5, steps: int = STEPS) -> Findings:
    """Compare a generalist with what it becomes with eight specialists, and distil both into one network.

    Controls are another generalist, the generalist trained on, and a student of the generalist alone.
    """
    splits = in_four_rotations(splits, most_seeds)
    torch.manual_seed(3)
    everything = splits.images, Targets(splits.labels), all_images(splits), steps
    generalist, another = (
        train(Networks(len(splits.labels), (*HIDDEN, CLASSES), DROPOUT), *everything) for _ in range(2)
    )
    trained_on = train(copy.deepcopy(generalist), *everything)  # for as many more steps as the specialists
    groups = torch.stack([confusable_groups(logits) for logits in generalist.predict(splits.images)])
    special = trained_specialists(generalist, groups, splits, steps)

    p, p_another, p_trained_on = (
        networks.predict(splits.test_images).softmax(-1) for networks in (generalist, another, trained_on)
    )
    answer, own = answers(p, special, groups, splits.test_images)
    alone = error(p, splits.test_labels)
    others = {
        "the generalist": p,
        f"it and its {SPECIALISTS} specialists": combined(p, answer, own),
        "it and another generalist": (p + p_another) / 2,
        "it and itself trained on": (p + p_trained_on) / 2,
    }
    others |= students(generalist, special, groups, splits, steps)
    errors = {name: error(q, splits.test_labels) for name, q in others.items()}
    rows = {name: {"test error, %": wrong, "less the generalist": wrong - alone} for name, wrong in errors.items()}
    _, helped, control, longer, student, of_both = errors.values()
    claims = [
        Claim("§5, 25.0 to 26.1 % right", "specialists lower the error of their generalist", helped - alone),
        Claim("§5, without controls", "specialists help more than another generalist (a control)", helped - control),
        Claim(
            "§5, without controls", "specialists help more than training the generalist on (a control)", helped - longer
        ),
        Claim("§5, left open", "specialists help the student that they and the generalist teach", of_both - student),
    ]
    title = f"Digits in four rotations, {CLASSES} classes, networks of 200 units a layer"
    tables = [
        Table(title, "predictions by", rows, ["less the generalist"]),
        Table("Classes of the specialists of seed 0", "specialist", named(groups[0])),
    ]
    return Findings("Specialists", tables, claims)


def confusable_groups(logits: Tensor) -> Tensor:
    """Group the classes that are predicted together, by K-means on the columns of their covariance; returns ``[C]``.

    The predictions are those at T = 20. At T = 1 the generalist is sure of nearly all its training images, and most
    groups hold one class; the paper's generalist was right in one case of four.

    Args:
        logits (Tensor): the generalist's of the training images, ``[N, C]``.
    """
    from sklearn.cluster import KMeans

    covariance = (logits / 20).softmax(-1).T.cov()
    return torch.from_numpy(KMeans(SPECIALISTS, n_init=10, random_state=0).fit_predict(covariance.numpy())).long()


def trained_specialists(generalist: Networks, groups: Tensor, splits: Splits, steps: int) -> Networks:
    """Train P copies of each generalist, half on images of their own classes, half on the rest as one dustbin class.

    Args:
        generalist (Networks): S of them.
        groups (Tensor): the specialist of each class, ``[S, C]``.
        splits (Splits): what the generalists were trained on.
        steps (int): batches.

    Returns:
        Networks: S·P of them with C + 1 classes, of which the last is the dustbin; only it and a specialist's own
        classes have a probability.
    """
    own = (groups[:, None] == torch.arange(SPECIALISTS)[:, None]).flatten(0, 1)  # [S·P, C]
    special = Networks(len(own), (*HIDDEN, CLASSES + 1), DROPOUT)
    with torch.no_grad():
        for new, old in zip(special.parameters(), generalist.parameters(), strict=True):
            new.zero_()[..., : old.shape[-1]] = old.repeat_interleave(SPECIALISTS, 0)
        special.biases[-1][:, 0, :CLASSES][~own] = IMPOSSIBLE

    images, labels = (part.repeat_interleave(SPECIALISTS, 0) for part in (splits.images, splits.labels))
    belongs = own.gather(1, labels)  # [S·P, N]
    inside = belongs.sum(1, keepdim=True)
    outside = labels.shape[1] - inside
    share = torch.where(belongs, 1 / inside, 1 / outside)
    train(special, images, Targets(labels.where(belongs, CLASSES)), share, steps)
    with torch.no_grad():  # the dustbin was drawn less often than it occurs
        special.biases[-1][:, 0, CLASSES:] += (outside / inside).log()
    return special


def students(generalist: Networks, special: Networks, groups: Tensor, splits: Splits, steps: int) -> dict[str, Tensor]:
    """Train a student of each generalist, and one of it and its specialists.

    Both begin with the same weights and draw the same batches.

    Returns:
        dict[str, Tensor]: their probabilities of the test images, ``[S, K, C]``, by name.
    """
    logits = generalist.predict(splits.images)
    answer, own = answers(logits.softmax(-1), special, groups, splits.images)
    targets = {
        "a student of the generalist": Targets(splits.labels, logits),
        "a student of it and its specialists": SpecialistTargets(splits.labels, logits, answer=answer, own=own),
    }
    found = {}
    for name, of in targets.items():
        torch.manual_seed(4)
        student = Networks(len(splits.labels), (*HIDDEN, CLASSES), DROPOUT)
        train(student, splits.images, of, all_images(splits), steps)
        found[name] = student.predict(splits.test_images).softmax(-1)
    return found


def answers(p: Tensor, special: Networks, groups: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ask the specialist of the generalist's likeliest class.

    Args:
        p (Tensor): the generalist's probabilities, ``[S, K, C]``.
        special (Networks): S·P specialists.
        groups (Tensor): the specialist of each class, ``[S, C]``.
        images (Tensor): ``[S, K, D]``.

    Returns:
        tuple[Tensor, Tensor]: its probabilities, the dustbin's last, ``[S, K, C + 1]``, and whether a class is one of
        its own, ``[S, K, C]``.
    """
    asked = groups.gather(1, p.argmax(-1))  # [S, K]
    said = special.predict(images.repeat_interleave(SPECIALISTS, 0)).softmax(-1).unflatten(0, (-1, SPECIALISTS))
    answer = said.gather(1, asked[:, None, :, None].expand(-1, -1, -1, CLASSES + 1)).squeeze(1)
    return answer, groups[:, None] == asked[..., None]


def combined(p: Tensor, answer: Tensor, own: Tensor) -> Tensor:
    """Return the q that minimises KL(p ‖ q) + KL(answer ‖ q), ``[..., C]``: equation 5 with one specialist.

    The answer knows q's classes outside of the specialist's own only as their sum. The paper searches for q by gradient
    descent, since several specialists may know a class. With one the gradient is 0 where each own class has the mean of
    both probabilities and the others share the rest as p does.

    Args:
        p (Tensor): the generalist's probabilities, ``[..., C]``.
        answer (Tensor): the specialist's, the dustbin's last, ``[..., C + 1]``.
        own (Tensor): whether a class is one of the specialist's, ``[..., C]``.
    """
    known = torch.where(own, (p + answer[..., :-1]) / 2, 0)
    rest = torch.where(own, 0, p)
    return known + rest * (1 - known.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True).clamp(min=1e-30)


def named(groups: Tensor) -> dict[str, dict[str, str]]:
    """Name the classes of each specialist: the digit, and how far it is turned."""
    names = [f"{c % DIGITS} ({90 * (c // DIGITS)}°)" for c in range(CLASSES)]
    return {
        str(s + 1): {"classes": ", ".join(names[c] for c in range(CLASSES) if groups[c] == s)}
        for s in range(SPECIALISTS)
    }
