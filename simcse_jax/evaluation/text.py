"""Lines and fields of SentEval's files, read as SentEval reads them."""

from pathlib import Path

from simcse_jax.errors import InputError, reason


def read_lines(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Lines of a file, blank ones too.

    Raises:
      InputError: the file does not exist, has another encoding, or cannot be read.
    """
    try:
        return path.read_text(encoding).removesuffix("\n").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"no file {path}; SentEval's layout has STS/ and SICK/, MR/ ... in the data folder") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it with iconv -t utf-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from error


def fields(path: Path, number: int, line: str, columns: int) -> list[str]:
    """The fields of a line, at least `columns` of them; quotes are ordinary characters.

    Raises:
      InputError: the line has fewer.
    """
    row = line.split("\t")
    if len(row) < columns:
        raise InputError(f"{path}, line {number} has {len(row)} columns; expected {columns}, separated by tabs")
    return row


def normal(sentence: str) -> str:
    """A sentence's words joined with single spaces, as SentEval hands them to a model."""
    return " ".join(sentence.split())
