"""The few shapes of rows that encoding compiles."""

# Tokens per row of one sentence. Each length is one compilation; the padding between two lengths is wasted work.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# The same for services, which compile every program beforehand.
_FEW_LENGTHS = (16, 64, 256)


def padded_length(longest: int, limit: int, lengths: tuple[int, ...] = _LENGTHS) -> int:
    """Length that sentences of at most `longest` tokens are padded to: one of `lengths`, at most `limit`."""
    return min(next((n for n in lengths if n >= longest), limit), limit)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number` (above 0): for arrays of few shapes, as each is compiled."""
    return int(2 ** (number - 1).bit_length())
