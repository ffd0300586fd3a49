"""Random numbers that are the same on every machine, and distributions of ids drawn from them.

Uniform numbers are raw Philox output (Salmon et al. 2011), which its definition fixes. All else is integer
arithmetic and +, -, *, / and square roots, which IEEE 754 defines to the last bit; ``log`` and ``exp`` are written
out in these, as the last bit of a machine's own differs from one library to the next.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LN2 = 0.6931471805599453
# log2(e), and ln 2 in a part of 32 bits, whose multiples are exact, and the rest.
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10

# Wichura's rational approximations of the normal quantile (1988, algorithm AS 241, PPND7), good to 7 digits:
# numerator and denominator, constant term first.
_CENTRE = (3.3871327179, 50.434271938, 159.29113202, 59.109374720), (1.0, 17.895169469, 78.757757664, 67.187563600)
_SIDE = (1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (1.0, 0.73700164250, 0.12021132975)
_FAR = (6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (1.0, 0.24197894225, 0.012258202635)

# The probabilities of so many ids of a Zipf distribution are summed one by one; further ones are integrals over their
# unit intervals, off by less than 1 in 10^7.
_ZIPF_HEAD = 4096


def stream(seed: int, purpose: int, *counter: int) -> np.random.Philox:
    """Return a random stream of raw 64-bit output for one purpose.

    Args:
        seed: 0 to 2**64 - 1.
        purpose: number of the stream's use; different purposes never share output.
        counter: up to three numbers that identify a stream of the purpose, such as column, split and block.
    """
    # Arrays, because NumPy makes floats of a list with numbers from 2**63 on.
    key = np.array([seed, purpose], dtype=np.uint64)
    # The counter's lowest word counts the output.
    return np.random.Philox(key=key, counter=np.array([0, *(0,) * (3 - len(counter)), *counter], dtype=np.uint64))


def uniforms(stream: np.random.Philox, count: int) -> Floats:
    """Return multiples of 2**-52, plus half of that, in (0, 1)."""
    values = (stream.random_raw(count) >> np.uint64(12)).astype(np.float64)
    values += 0.5
    values *= 2.0**-52
    return values


def halves(stream: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """Return 32-bit integers, two of each word of output, the lower half first."""
    words = stream.random_raw(-(-count // 2))
    return np.stack([words & np.uint64(2**32 - 1), words >> np.uint64(32)], axis=1).ravel()[:count]


def integers(bits: NDArray[np.uint64], below: int) -> NDArray[np.int64]:
    """Turn 32-bit integers into 0 ... below - 1; probabilities differ by less than below / 2**32 of themselves."""
    return ((bits * np.uint64(below)) >> np.uint64(32)).astype(np.int64)


def log(x: Floats) -> Floats:
    """Return the natural logarithm of positive numbers, within 2e-16 of its size or 1e-15."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    # log m = 2 atanh(s), of which the first ten terms: s < 0.172.
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / 19.0)
    for odd in (17, 15, 13, 11, 9, 7, 5, 3, 1):
        series *= square
        series += 1.0 / odd
    s *= 2.0
    s *= series
    return s + (exponent - low) * _LN2


def exp(x: Floats) -> Floats:
    """Return e to the power of x, -700 < x < 700, within 1e-15 of its size."""
    turns = np.rint(x * _LOG2_E)
    rest = x - turns * _LN2_HIGH
    rest -= turns * _LN2_LOW
    # The rest is at most ln 2 / 2: Taylor's series to the 13th power.
    series = np.full_like(rest, 1.0 / 13.0)
    for power in range(12, 0, -1):
        series *= rest
        series += 1.0
        series /= power
    series *= rest
    series += 1.0
    return np.ldexp(series, turns.astype(np.int32))


def normal_quantile(p: Floats) -> Floats:
    """Return the standard normal value below which a share ``p`` in (0, 1) lies, within 2 in 10^7."""
    middle = p - 0.5
    square = 0.180625 - middle * middle
    values = middle * _ratio(square, _CENTRE)
    outside = np.flatnonzero(square < 0)
    if len(outside):
        tail = np.minimum(p[outside], 1.0 - p[outside])
        r = np.sqrt(-log(tail))
        sides = np.where(r <= 5.0, _ratio(r - 1.6, _SIDE), _ratio(r - 5.0, _FAR))
        values[outside] = np.where(middle[outside] < 0, -sides, sides)
    return values


class Uniform:
    """Ids 0 ... rows - 1, all with the same probability.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, uniform: Floats) -> NDArray[np.int32]:
        return np.minimum(uniform * self.rows, self.rows - 1).astype(np.int32)


class Gaussian:
    """Ids 0 ... rows - 1 of a normal distribution that is truncated at both ends of the table.

    Args:
        rows: of the table.
        mean, deviation: of the normal distribution before truncation, as shares of the table's rows.
    """

    def __init__(self, rows: int, mean: float, deviation: float) -> None:
        self.rows, self.mean, self.deviation = rows, mean, deviation
        self.low, self.high = _normal_share(-mean / deviation), _normal_share((1.0 - mean) / deviation)

    def __call__(self, uniform: Floats) -> NDArray[np.int32]:
        p = uniform * (self.high - self.low)
        p += self.low
        place = normal_quantile(np.clip(p, 2.0**-60, 1.0 - 2.0**-53, out=p))
        place *= self.deviation
        place += self.mean
        place *= self.rows
        return np.clip(place, 0, self.rows - 1, out=place).astype(np.int32)


class Zipf:
    """Ids 0 ... rows - 1, id k with a probability proportional to (k + 1) ** -exponent.

    Args:
        rows: of the table.
        exponent: above 0, at most 10; a larger exponent prefers the first ids more.
    """

    def __init__(self, rows: int, exponent: float) -> None:
        self.rows = rows
        ranks = np.arange(1, min(rows, _ZIPF_HEAD) + 1, dtype=np.float64)
        # cumsum adds one by one, in the same order everywhere.
        self.head = np.cumsum(exp(-exponent * log(ranks)))
        """Mass of the first ids, 0 ... k together, while each id's is summed by itself."""
        # The mass of the ids beyond, up to the point x, is the integral of t ** -exponent from start to x, which is
        # scale * log(x / start), or with power = 1 - exponent, scale * ((x / start) ** power - 1) / power.
        # If the exponent is so close to 1 that the division loses digits, the power makes no difference.
        self.power = 0.0 if abs(1.0 - exponent) < 1e-6 else 1.0 - exponent
        self.start = len(ranks) + 0.5
        self.scale = _scalar(exp, self.power * _scalar(log, self.start))
        self.span = _scalar(log, (rows + 0.5) / self.start)
        self.end = _scalar(exp, self.power * self.span)
        self.tail = self.scale * ((self.end - 1.0) / self.power if self.power else self.span)

    def __call__(self, uniform: Floats) -> NDArray[np.int32]:
        mass = uniform * (self.head[-1] + self.tail)
        ids = np.searchsorted(self.head, mass, side="right").astype(np.int32)
        beyond = np.flatnonzero(ids == len(self.head))
        part = (mass[beyond] - self.head[-1]) / self.scale
        if self.power:
            low, high = sorted((1.0, self.end))
            part = log(np.clip(1.0 + self.power * part, low, high)) / self.power
        place = exp(np.clip(part, 0.0, self.span)) * self.start
        ids[beyond] = np.clip(place - 0.5, len(self.head), self.rows - 1) if self.tail else self.rows - 1
        return ids


def _ratio(x: Floats, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    """Return the quotient of two polynomials, constant terms first."""
    above, below = (np.full_like(x, terms[-1]) for terms in coefficients)
    for value, terms in zip((above, below), coefficients, strict=True):
        for term in terms[-2::-1]:
            value *= x
            value += term
    return np.divide(above, below, out=above)


def _scalar(function: Callable[[Floats], Floats], x: float) -> float:
    return float(function(np.array([x]))[0])


def _normal_share(value: float) -> float:
    """Return the share of a standard normal distribution below a value: the inverse of ``normal_quantile``, by
    bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _scalar(normal_quantile, middle) < value else (low, middle)
    return low
