"""The words, commands and units that answers are written with."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GREEK = _words(
    """
    alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon
    phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar
    """
)
"""Names of symbols."""
FUNCTIONS = _words(
    """
    sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc arcsinh arccosh arctanh sinh cosh tanh coth
    sech csch ln log lg exp gcd lcm max min det Re Im arg deg
    """
)
TEXT = _words(
    """
    text textbf textit textrm textsf texttt textnormal textup mathrm mathit mathsf mathtt mbox hbox rm bf
    """
)
"""Commands that set words."""
TRANSPARENT = _words(
    """
    mathbf boldsymbol bm vec overrightarrow hat widehat tilde boxed fbox mathbb mathcal emph pmb overline underline bar
    ensuremath
    """
)
"""Commands that change the looks of mathematics only."""
PROSE = _words(
    """
    is it its the so we as no yes all odd even ten one two three four five six nine not are was has of for to be an at by
    if on any but can get let our per that then there this with you do he she they my me us
    """
)
"""Short words that are no products of letters."""
HEDGES = _words(
    """
    or and not any other others maybe perhaps either neither nor possibly to is are but if then than
    """
)
"""Words that stand in no unit."""
ARITHMETIC = _words(
    """
    squared cubed doubled tripled halved times factorial half halves third thirds fourth fourths fifth fifths sixth sixths
    seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths tens hundreds
    thousands millions billions true false yes no none zero one two three four five six seven eight nine ten eleven twelve
    """
)
"""Words behind a number that make it another one, or are another answer."""
ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "cosec": "csc", "arsinh": "arcsinh", "infty": "oo",
    "infinity": "oo", "inf": "oo", "leq": "le", "geq": "ge", "leqslant": "le", "geqslant": "ge", "lt": "<", "gt": ">",
    "neq": "ne", "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom",
    "varnothing": "emptyset", "lbrace": "{", "rbrace": "}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen":
    ")", "div": "/", "ast": "*", "times": "*", "cdot": "*", "bullet": "*", "lvert": "|", "rvert": "|", "vert": "|",
    "mid": "|", "colon": ":", "backslash": "setminus", "simeq": "approx", "sim": "approx", "texteuro": "euro",
    "textdollar": "$", "degree": "circ", "degrees": "circ", "percent": "%",
}  # fmt: skip
"""Commands and words, and the name or sign that they mean."""
RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "le": "<=", "ge": ">=", "ne": "!=",
    "approx": "~", "equiv": "=", "in": "in",
}  # fmt: skip
PLAIN = frozenset({"sqrt", "pi", "oo", "binom", "emptyset", "abs"}) | FUNCTIONS | GREEK
"""Names that need no backslash."""
CURRENCIES = {"$": "dollar", "euro": "euro", "pounds": "sterling"}
PHRASES = {
    "no solution": r"\emptyset", "no solutions": r"\emptyset", "empty set": r"\emptyset", "the empty set": r"\emptyset",
    "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}",
}  # fmt: skip
"""Whole answers in words, and the set that they mean."""
MAGNITUDES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SPELLINGS = {
    "degree": "deg degs degree degrees",
    "%": "% percent pct percentage percents",
    "dollar": "dollar dollars usd $ bucks",
    "cent": "cent cents ¢",
    "m": "m meter meters metre metres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "km": "km kilometer kilometers kilometre kilometres kms",
    "in": "inch inches in",
    "ft": "ft foot feet",
    "yd": "yd yds yard yards",
    "mi": "mi mile miles",
    "kg": "kg kgs kilogram kilograms",
    "g": "g gram grams gm gms",
    "mg": "mg milligram milligrams",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "year": "year years yr yrs",
    "mi per h": "mph",
    "unit": "unit units",
    "rad": "rad rads radian radians",
}
UNITS = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
"""Every spelling of a unit, and its name."""
NUMERALS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
"""Bases in words."""
