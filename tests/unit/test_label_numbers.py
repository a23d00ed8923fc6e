"""Labels of a table that are numbers: in the order of the numbers, however they are written."""

from __future__ import annotations

from pathlib import Path

import pytest

from unbackdoor.data.sources.label_table import Entry, numbered
from unbackdoor.errors import InputError


def entries(labels: list[str]) -> list[Entry]:
    return [Entry(line, Path("x.png"), label) for line, label in enumerate(labels, 2)]


TABLE = Path("labels.csv")


@pytest.mark.parametrize("form", ["{}", "{}.0", "{}.", "{}.000", "0{}"])
def test_numbers_are_in_the_order_of_numbers(form: str) -> None:
    labels = [form.format(k) for k in (10, 2, 0, 9, 1)]
    numbers, names = numbered(entries(labels), None, TABLE)
    assert numbers == [10, 2, 0, 9, 1]
    assert names == [str(k) for k in range(11)]
    numbers, names = numbered(entries(labels), [f"class {k}" for k in range(11)], TABLE)
    assert numbers == [10, 2, 0, 9, 1]


def test_numbers_that_are_names_are_names() -> None:
    numbers, names = numbered(entries(["2.0", "10.0"]), ["10.0", "2.0"], TABLE)
    assert numbers == [1, 0] and names == ["10.0", "2.0"]


@pytest.mark.parametrize("odd", ["0.5", "-1", "-1.0", "1e3", "+.5", "12345678901"])
def test_numbers_of_no_class_are_not_sorted_as_text(odd: str) -> None:
    with pytest.raises(InputError, match="no number of a class") as caught:
        numbered(entries(["0", "1.0", odd]), None, TABLE)
    assert "line 4" in str(caught.value)


def test_words_are_sorted() -> None:
    assert numbered(entries(["dog", "cat", "1"]), None, TABLE) == ([2, 1, 0], ["1", "cat", "dog"])
