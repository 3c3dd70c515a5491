"""The few shapes of rows that encoding compiles."""

# Tokens that a row has where it holds one sentence: each is a compilation, and the gaps are computed for nothing.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# The same where every program is compiled beforehand.
_FEW_LENGTHS = (16, 64, 256)


def padded_length(longest: int, limit: int, lengths: tuple[int, ...] = _LENGTHS) -> int:
    """Tokens that sentences of at most `longest` are padded to: one of `lengths`, or `limit`, which is the most."""
    return min(next((n for n in lengths if n >= longest), limit), limit)


def power_of_two(number: int) -> int:
    """The smallest that is no smaller than a number above 0: for arrays of few shapes, each of which is compiled."""
    return int(2 ** (number - 1).bit_length())
