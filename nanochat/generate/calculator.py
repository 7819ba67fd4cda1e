"""The calculator tool: a small evaluator for what a chat model writes between python_start and python_end.

It knows numbers (also with thousands commas), + - * / // % **, unary signs, parentheses, and of texts
"text".count("t"), len("text"), "-".join("text"), .strip() and .lower(); nothing else. The text passes two fences, a
list of allowed tokens and a list of allowed syntax nodes, and is computed by walking the tree: no eval, no names, no
attributes. Every size is bounded, so that it is quick in any thread without a timer.

It answers with the value that Python computes, written as people and GSM8K write it: a whole number without ".0" (48/2
is 24), other floats with at most DIGITS digits (0.1 + 0.2 is 0.3), a joined text as it is.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_EXPRESSION_CHARS = 500
DIGITS = 12  # of a float: what lies behind them is rounding
MAX_INT_BITS = 2048  # about 600 digits: more than any sum a small model is asked, little enough to be instant

Number = int | float

_TOKEN = re.compile(
    r"""
    (?P<space> [ \t]+ )
  | (?P<number> (?: \d{1,3}(?:,\d{3})+(?![\d,]) | \d+ ) (?:\.\d*)? (?:[eE][+-]?\d+)? | \.\d+(?:[eE][+-]?\d+)? )
  | (?P<string> "[^"\\\r\n]*" | '[^'\\\r\n]*' )
  | (?P<call> \.(?:count|join|strip|lower)\b | \blen\b )
  | (?P<operator> \*\* | // | [-+*/%()] )
    """,
    re.VERBOSE | re.ASCII,
)

_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def use_calculator(expression: str) -> str | None:
    """Compute `expression` and return the result as text, or None if it is not one the tool knows.

    Example: `use_calculator("1,200 * 3")` is "3600", `use_calculator("'berry'.count('r')")` is "2".
    """
    source = _python_source(expression)
    if source is None:
        return None
    try:
        node = ast.parse(source, mode="eval").body
        return _string(node) if _method(node) == "join" else _written(_number(node))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _written(value: Number) -> str:
    """A number as text: whole ones as integers as far as a float counts exactly, others with DIGITS digits."""
    if isinstance(value, int):
        return str(value)
    rounded = float(f"{value:.{DIGITS}g}")
    return str(int(rounded)) if rounded.is_integer() and abs(rounded) < 2**53 else str(rounded)


def _python_source(expression: str) -> str | None:
    """`expression` without thousands commas; None if it is too long or holds anything but the known tokens."""
    text = expression.strip()
    if not text or len(text) > MAX_EXPRESSION_CHARS:
        return None
    pieces, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        piece = match.group()
        pieces.append(piece.replace(",", "") if match.lastgroup == "number" else piece)
        position = match.end()
    return "".join(pieces)


def _number(node: ast.expr) -> Number:
    """The value of an expression node, an int or a finite float. Raises ValueError or ArithmeticError otherwise."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _number(node.left), _number(node.right)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "count":
            return _string(node.func.value).count(_string(node.args[0]))
        if isinstance(node.func, ast.Name) and node.func.id == "len":
            return len(_string(node.args[0]))
    raise ValueError("not an expression of the calculator")


def _method(node: ast.expr) -> str | None:
    """The name of the method that a node calls without keywords: "join" of `"-".join("ab")`; None of others."""
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords
    return node.func.attr if called else None  # type: ignore[attr-defined]


def _string(node: ast.expr) -> str:
    """The text of a literal, or of join, strip and lower, which take and give texts."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    method = _method(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = _string(node.func.value)
        if method == "join" and len(node.args) == 1:
            text = text.join(_string(node.args[0]))
            if len(text) <= MAX_EXPRESSION_CHARS:
                return text
        if method in ("strip", "lower") and not node.args:
            return text.strip() if method == "strip" else text.lower()
    raise ValueError("not a text of the calculator")


def _power(base: Number, exponent: Number) -> Number:
    """`base ** exponent`, refused before it is computed when the result would be too long."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        # |base| >= 2 ** (bits - 1): the result has at least exponent · (bits - 1) bits.
        least_bits = abs(exponent) * max(1, base.bit_length() - 1)
        if least_bits > MAX_INT_BITS:
            raise ValueError("power too large")
    value: Number | complex = base**exponent
    if isinstance(value, complex):
        raise ValueError("not a real number")
    return value


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise ValueError("number too long")
    elif not math.isfinite(value):
        raise ValueError("not a finite number")
    return value
