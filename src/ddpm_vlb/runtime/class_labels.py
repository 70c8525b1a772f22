"""The column of class labels beside the images: integers from 0, none of them missing."""

from typing import Any

import datasets

MOST_CLASSES = 2**20  # a column of larger numbers, ids say, holds no classes


def columns_with_labels(data: datasets.Dataset, image_column: str, label_column: str) -> list[str]:
    """The columns to read of a data set whose network is told classes.

    Args:
        data: of one split.
        image_column: where its images are.
        label_column: where their labels are.

    Raises:
        ValueError: there is no such column of labels, or it is that of the images.
    """
    if label_column == image_column:
        raise ValueError(f"`--image_column` and `--label_column` are both {image_column!r}.")
    if label_column not in data.column_names:
        raise ValueError(
            f"The network is class-conditional, but the data set has no column {label_column!r}; it has "
            f"{data.column_names}. Name its labels with `--label_column`."
        )
    return [image_column, label_column]


def check_labels(labels: list[Any], column: str, classes: int, image: str = "image", whose: str = "the network's "):
    """Refuse labels that are no class.

    Args:
        labels: of the images.
        column: where they are, for messages.
        classes: number of classes.
        image: what an image is called, for messages.
        whose: the classes are, for messages.

    Raises:
        ValueError: a label that is missing, no integer, or outside 0 .. classes - 1.
    """
    for index, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < classes:
            raise ValueError(
                f"Label {label!r} of {image} number {index} (column {column!r}) is none of {whose}classes 0 .. "
                f"{classes - 1}."
            )


def trained_classes(train: datasets.Dataset, others: dict[str, datasets.Dataset], column: str) -> int:
    """The number of classes of a data set: that of a `ClassLabel` column, else the largest training label and 1.

    Args:
        train: the training images.
        others: the other splits by name.
        column: of the labels.

    Raises:
        ValueError: labels that are no class, or of which no training image has one.
    """
    labels = train[column][:]
    named = getattr(train.features[column], "num_classes", None)
    check_labels(labels, column, named or MOST_CLASSES, "training image", "the ")
    classes, seen = named or max(labels) + 1, set(labels)
    for name, data in others.items():
        own = data[column][:]
        check_labels(own, column, classes, f"{name} image", "the training images' ")
        unseen = next((index for index, label in enumerate(own) if label not in seen), None)
        if unseen is not None:
            raise ValueError(
                f"Label {own[unseen]} of {name} image number {unseen} (column {column!r}) is of no training image, so "
                "that no network learns it. Give the class images to train on, or leave it out."
            )
    return classes
