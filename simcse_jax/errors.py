"""The one exception that means: what was given cannot be used."""


class InputError(ValueError):
    """Bad input. The message says what was given, what was expected and what to do."""
