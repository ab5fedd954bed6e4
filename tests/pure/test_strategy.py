"""Strategy text: read, printed, refused."""

from __future__ import annotations

import keyword
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.exchange.axes import AXES
from paceline.exchange.recipes import RECIPES, ddp, summaries
from paceline.exchange.strategy import DEEPEST, LONGEST, build, check, parse, show
from paceline.terms.errors import UsageError
from paceline.terms.plan import Call, Product

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(lambda n: not keyword.iskeyword(n))
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
WORDS = NAMES.filter(lambda n: n != "inf").map(lambda n: Call(n, bare=True))


def _calls(values: st.SearchStrategy[object]) -> st.SearchStrategy[Call]:
    kwargs = st.lists(st.tuples(NAMES, values), max_size=3, unique_by=lambda pair: pair[0])
    return st.builds(Call, NAMES, st.lists(values, max_size=2).map(tuple), kwargs.map(tuple))


CALLS = st.recursive(_calls(LITERALS | WORDS), lambda inner: _calls(LITERALS | WORDS | inner), max_leaves=4)
STRATEGIES = CALLS | st.lists(CALLS, min_size=2, max_size=4).map(lambda factors: Product(tuple(factors)))


@given(STRATEGIES)
@settings(max_examples=150, deadline=None)
def test_what_is_printed_is_read_back(strategy: Call | Product) -> None:
    text = str(strategy)
    if len(text) <= LONGEST:
        assert parse(text) == strategy
        assert str(parse(str(parse(text)))) == text


def refusal(text: str) -> str:
    """The code with which `check` refuses `text`, or nothing."""
    try:
        check(text)
    except UsageError as error:
        return error.code
    return ""


@given(st.text(max_size=60) | st.text("ddp()*,='\"[]{}:\\-+.# \n\0bf16 inf", max_size=60))
@settings(max_examples=300, deadline=None)
def test_junk_is_refused_and_nothing_else_happens(text: str) -> None:
    code = refusal(text)
    assert code in ("", "PL201", "PL202", "PL203", "PL204")
    if code != "PL202":
        assert parse(str(parse(text))) == parse(text)
    if not code:
        assert check(check(text)) == check(text)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000,
        "ddp(" * 1000 + ")" * 1000,
        "ddp(" * 150 + ")" * 150,
        f"ddp({'[' * 190}{']' * 190})",
        f"ddp({'-' * 1900}1)",
        f"ddp({'not ' * 450}1)",
        " * ".join(["ddp()"] * 200),
        "a*" * 990 + "a",
        f"ddp({'9' * 1990})" + " " * 5,
        "\ud800",
        "ddp(\0)",
        "ddp('\\d')",
    ],
)
def test_deep_and_huge_texts_are_refused_cleanly(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        build(text)
    assert refused.value.code in ("PL202", "PL203")
    assert len(str(refused.value)) < 3000


@pytest.mark.parametrize(
    "text",
    """__import__('os').system('x'); ddp(1 if 1 else 2); ddp(*a); ddp(**a); ddp(f'{1}'); ddp(b''); ddp(1j); ddp(x := 1)
    ddp(lambda: 1); ddp({}); ddp(-True); ddp(a=1, a=2); ddp([bf16]); ddp() + ddp(); ddp.x(); 3; ;""".replace(
        "\n", ";"
    ).split(";"),
)
def test_what_is_not_a_strategy_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="PL202"):
        parse(text)


def test_the_position_is_marked() -> None:
    with pytest.raises(UsageError) as refused:
        parse("  ddp(é='ä', codec=1+1)")
    *_, shown, caret = refused.value.message.splitlines()
    assert shown[caret.index("^") :] == "1+1)"
    with pytest.raises(UsageError) as refused:
        parse("ddp(" + "1, " * 200 + "?)")
    *_, shown, caret = refused.value.message.splitlines()
    assert shown[caret.index("^")] == "?"
    assert len(shown) < 120


def test_depth_has_a_limit_that_real_strategies_do_not_meet() -> None:
    inner = "1"
    for _ in range(DEEPEST - 1):
        inner = f"f({inner})"
    assert str(parse(f"ddp({inner})")) == f"ddp({inner})"
    with pytest.raises(UsageError):
        parse(f"ddp(f({inner}))")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ddp", "ddp()"),
        (" ddp ( ) ", "ddp()"),
        ("ddp(None, algorithm='auto')", "ddp()"),
        ("ddp(bf16)", "ddp(codec=bf16)"),
        ("ddp('bf16')", "ddp(codec=bf16)"),
        ("ddp(codec=bf16())", "ddp(codec=bf16)"),
        ("ddp(params=shared, codec=fp16)", "ddp(codec=fp16, params=shared)"),
        ("ddp(bucket_mb=4,\n  algorithm=ring)", "ddp(algorithm=ring, bucket_mb=4)"),
        ("ddp(bucket_mb=0.5)", "ddp(bucket_mb=0.5)"),
    ],
)
def test_canonical_text_says_the_same(text: str, canonical: str) -> None:
    assert check(text) == canonical
    assert check(canonical) == canonical
    assert build(text) == build(canonical) == build(parse(text))
    assert build(build(text)) is not None
    assert show(build(text)) == show(parse(text)) == canonical


def test_text_and_python_are_the_same_thing() -> None:
    assert build("ddp(codec=fp16, bucket_mb=2)") == ddp("fp16", bucket_mb=2)
    assert build(ddp(params="shared")) == ddp(params="shared")
    assert ddp(codec="bf16").text == "ddp(codec=bf16)"


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("dpp()", "PL201", "did you mean 'ddp'"),
        ("ddp() * fsdq()", "PL201", "'fsdq'"),
        ("ddp(codek=bf16)", "PL203", "codec=None, *, ranks=None, algorithm='auto'"),
        ("ddp(None, ring)", "PL203", "takes"),
        ("ddp(codec=bf61)", "PL203", "did you mean 'bf16'"),
        ("ddp(codec=3.5)", "PL203", "bf16, fp16"),
        ("ddp(codec=[1])", "PL203", "bf16, fp16"),
        ("ddp(codec=topk(0.01))", "PL203", "no value 'topk'"),
        ("ddp(codec=bf16(3))", "PL203", "bf16()"),
        ("ddp(algorithm=rign)", "PL203", "did you mean 'ring'"),
        ("ddp(algorithm=ring, codec=bf16)", "PL203", "leave one of them out"),
        ("ddp(params=sharded)", "PL203", "private, shared"),
        ("ddp(bucket_mb=0)", "PL203", "bucket_mb"),
        ("ddp(bucket_mb=inf)", "PL203", "bucket_mb"),
        ("ddp(bucket_mb=True)", "PL203", "bucket_mb"),
        ("ddp(bucket_mb='4')", "PL203", "bucket_mb"),
        ("ddp() * ddp()", "PL204", "one ddp"),
    ],
)
def test_refusals_name_what_would_work(text: str, code: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check(text)
    assert refused.value.code == code
    assert said in str(refused.value)


def test_numbers_keep_their_kind() -> None:
    read = parse("f(1, 1.0, -2, -inf, inf, True, None, (1, [2.5, 'x']), 'a b', word, g())")
    assert isinstance(read, Call)
    assert read.args[:5] == (1, 1.0, -2, -math.inf, math.inf)
    assert [type(a) for a in read.args[:3]] == [int, float, int]
    assert read.args[7:] == ((1, [2.5, "x"]), "a b", Call("word", bare=True), Call("g"))


def test_every_recipe_has_its_line() -> None:
    lines = summaries()
    assert lines.keys() == {*RECIPES, *AXES}
    assert all(line.endswith(".") and len(line) < 100 for line in lines.values())


def test_the_door_checks_and_describes_before_torch_is_imported() -> None:
    program = (
        "import sys\n"
        "from paceline.exchange.strategy import build, check\n"
        "check('ddp(codec=fp16, params=shared)'); build('ddp(algorithm=ring)').describe()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
