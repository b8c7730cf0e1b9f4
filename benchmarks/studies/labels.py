"""Wrong labels: drawn from all classes alike, or from those that people take for the right one."""

import numpy as np


# Classes of CIFAR-10 that look like the key, after CIFAR-10N's confusions (Wei et al. 2022, arXiv 2110.12088).
LOOKS_LIKE = {0: (2, 8), 1: (9,), 2: (0, 4), 3: (5,), 4: (7, 2), 5: (3,), 6: (2, 3), 7: (4, 5), 8: (0,), 9: (1,)}
KINDS = ("uniform", "human")


def with_wrong_labels(labels: np.ndarray, percent: int, classes: int, seed: int, kind: str = "uniform") -> np.ndarray:
    """
    A copy of `labels` in which `percent` of them are wrong.

    Args:
        kind: "uniform": any other class; "human": for half of the wrong ones a class of CIFAR-10 that looks alike.
    """
    generator = np.random.default_rng(seed)
    labels = np.array(labels)
    wrong = generator.permutation(len(labels))[: len(labels) * percent // 100]
    others = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    if kind == "human":
        alike = np.array([generator.choice(LOOKS_LIKE[label]) for label in labels[wrong]], dtype=labels.dtype)
        others = np.where(generator.random(len(wrong)) < 0.5, alike, others)
    labels[wrong] = others
    return labels
