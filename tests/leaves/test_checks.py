"""What the rooms refuse, they refuse in these words."""

import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nurion_utils import _checks


@given(st.integers())
def test_a_whole_number_is_taken_exactly_where_it_lies_within_its_limits(value):
    if 2 <= value <= 9:
        assert _checks.whole_number(np.int64(value), "repeats", 2, 9) == value
    else:
        with pytest.raises(ValueError, match="repeats must be a whole number from 2 to 9, not"):
            _checks.whole_number(value, "repeats", 2, 9)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, math.nan])
def test_what_is_not_a_whole_number_is_refused(value):
    with pytest.raises(ValueError, match=f"ranks must be a whole number from 1 up, not {re.escape(repr(value))}"):
        _checks.whole_number(value, "ranks")


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 0, -1, 10**400, 1j, np.complex64(1)])
def test_what_is_not_a_positive_number_is_refused(value):
    with pytest.raises(ValueError, match=f"hours must be a number above 0, not {re.escape(repr(value))}"):
        _checks.positive(value, "hours")


@given(st.floats(allow_nan=True))
def test_a_number_is_taken_exactly_where_it_lies_within_its_limits(value):
    if 0 <= value <= 1:
        assert _checks.number(value, "share", least=0, most=1) == value
    else:
        with pytest.raises(KeyError, match="share must be a number from 0 up to 1, not"):
            _checks.number(value, "share", least=0, most=1, error=KeyError)


def test_a_number_without_limits_need_only_be_finite():
    assert _checks.number(-3, "shift") == -3.0
    with pytest.raises(ValueError, match="shift must be a finite number, not inf"):
        _checks.number(math.inf, "shift")


@pytest.mark.parametrize("value", ["cubic", None, ["linear"], {}])
def test_what_is_not_offered_is_refused_with_what_is(value):
    assert _checks.one_of("linear", "rule", {"linear": 1, "fixed": 2}) == "linear"
    with pytest.raises(ValueError, match="rule must be one of 'linear', 'fixed', not"):
        _checks.one_of(value, "rule", {"linear": 1, "fixed": 2})


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="the table needs the columns a, b, c; it lacks b, c"):
        _checks.require_columns(pd.DataFrame({"a": [1]}), ["a", "b", "c"])
