"""DSA's functions as text: what is written is read back, and mistakes are found where they are."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocation.dsa.expression import Expression
from secateur.allocation.dsa.operators import POST, PRE, REDUCE, REFUSED
from secateur.allocation.dsa.presets import PRESETS, find_preset, save_preset
from secateur.errors import UsageError

expressions = st.builds(
    lambda pre, reduce, post, lam, m: Expression(
        tuple(pre), reduce, tuple(post), lam, m if reduce == "OUTLIER" else None
    ),
    st.lists(st.sampled_from([p for p in PRE if p != "NO_OP"]), max_size=2),
    st.sampled_from(list(REDUCE)),
    st.lists(st.sampled_from(list(POST)), min_size=1, max_size=2),
    st.none() | st.integers(0, 50),
    st.sampled_from([2.0, 3.0, 5.0, 7.5]),
)


@given(expressions)
def test_round_trip(expression):
    assert Expression.parse(str(expression)) == expression


@given(expressions, st.randoms())
def test_spaces_and_case_do_not_matter(expression, random):
    text = str(expression)
    text = "".join((" " if c in "(),-:" and random.random() < 0.5 else "") + c for c in text)
    text = "".join(c.lower() if random.random() < 0.5 else c for c in text)
    text = text.replace(" :", ":") if expression.parameter else text
    assert Expression.parse(text) == expression


def test_the_published_form():
    e = Expression.parse("W:(ABSLOG)-(VAR)-(ATAN,ASIN)-(7)")
    assert e == Expression(("ABSLOG",), "VAR", ("ATAN", "ASIN"), 7)
    assert Expression.parse("W:(NO_OP)-(OUTLIER)-(NEG)").parameter == 5.0


MISTAKES = [
    ("", 1, "expected 'W:'"),
    ("X:(ABS)-(VAR)-(SIN)", 1, "expected 'W:'"),
    ("W(ABS)-(VAR)-(SIN)", 2, "expected ':'"),
    ("W:ABS-(VAR)-(SIN)", 3, "expected '('"),
    ("W:(ABSLGO)-(VAR)-(SIN)", 4, "did you mean 'ABSLOG'"),
    ("W:(ABS,LOG,EXP)-(VAR)-(SIN)", 12, "at most 2 pre operators"),
    ("W:(ABS)-(VRA)-(SIN)", 10, "did you mean 'VAR'"),
    ("W:(ABS)-(VAR,MEAN)-(SIN)", 14, "at most 1 reduction"),
    ("W:(ABS)-(CORREF)-(SIN)", 10, "of one vector is 1 for every block"),
    ("W:(ABS)-(DETERMINANT)-(SIN)", 10, "needs a matrix"),
    ("W:(ABS)-(VAR)-(9)", 16, "lambda is the fourth part"),
    ("W:(ABS)-(VAR)-(SIN", 19, "expected ',' or ')'"),
    ("W:(ABS)-(VAR)-()", 16, "expected a post operator"),
    ("W:(ABS)-(VAR)-(SIN)-(70)", 22, "hundredths"),
    ("W:(ABS)-(VAR)-(SIN)-(0.07)", 22, "hundredths"),
    ("W:(ABS)-(VAR)-(SIN)-(7) more", 25, "expected the end"),
    ("W:(ABS)-(OUTLIER:-1)-(NEG)", 18, "positive"),
    ("W:(ABS)-(VAR:3)-(NEG)", 13, "takes no parameter"),
    ("W:(ABS)-(VAR)", 14, "expected '-'"),
]


@pytest.mark.parametrize(("text", "at", "words"), MISTAKES, ids=[m[0] or "empty" for m in MISTAKES])
def test_mistakes_are_found_where_they_are(text, at, words):
    with pytest.raises(UsageError) as caught:
        Expression.parse(text)
    assert f"character {at}" in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.field == "expression"


@given(st.text("W:()-,ABSVRLOGINE 0579", max_size=30))
def test_any_text_parses_or_is_refused_in_words(text):
    with contextlib.suppress(UsageError):
        again = str(Expression.parse(text))
        assert str(Expression.parse(again)) == again


def test_no_operator_is_both_known_and_refused():
    assert not set(REDUCE) & set(REFUSED)


def test_presets_parse_and_files_are_found(tmp_path):
    for name in PRESETS:
        assert str(find_preset(name)[0]) == PRESETS[name]
    one = Expression.parse("W:(TANH)-(STD)-(SIN)-(4)")
    save_preset(tmp_path / "found.json", one, "magnitude", {"value": float("nan")})
    assert find_preset(str(tmp_path / "found.json")) == (one, "magnitude")


@pytest.mark.parametrize("content", ["", "{}", '{"format": "other", "expression": "W:"}', "[1]"])
def test_other_files_are_no_presets(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match="not a DSA function's file"):
        find_preset(str(path))
    with pytest.raises(UsageError, match="no preset of that name"):
        find_preset("publshed")
