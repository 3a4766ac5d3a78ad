"""What plugins answer to `surgery show`, and tables as plain text."""

import pytest

from surgery_core import ContractError, Shown, SurgeryError, format_table


@pytest.mark.parametrize("row", [("a",), ("a", "b", "c")])
def test_a_row_that_does_not_fit_the_columns_is_refused(row):
    with pytest.raises(ContractError) as caught:
        Shown(title="pears", columns=("name", "size"), rows=(("x", "y"), row), data={})

    assert str(caught.value) == (
        f"Row 1 of 'pears' does not fit: expected 2 cells, got {len(row)}. Give one for each "
        "column."
    )
    assert isinstance(caught.value, SurgeryError)
    assert (caught.value.expected, caught.value.actual) == (2, len(row))


def test_a_table_is_as_wide_as_its_widest_cells_and_no_line_ends_in_spaces():
    text = format_table(("name", "n", "unit"), [("gate", "1", "heads"), ("prompt", "1,234", "")])

    assert text == (
        "name    n      unit\n"  # the widest cell is above, below or in the middle
        "------  -----  -----\n"
        "gate    1      heads\n"
        "prompt  1,234"
    )


def test_a_table_without_rows_is_its_heading():
    assert format_table(["name", "n"], []) == "name  n\n----  -"
