"""The one exception that means: what was given cannot be used; and what its messages say of others."""


class InputError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do."""


def reason(error: BaseException) -> str:
    """What another library's exception says, on one line: the system's words, its first line, or its type."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]
