"""Text of others on its way out: what it may not do in Markdown, a terminal or a picture."""

import re


def cell(text: object) -> str:
    """For a line or a table's cell: no column, tag, link or line of its own. Text in `backticks` stays code."""
    plain = re.sub(r"\s*[\r\n\u2028\u2029]\s*", " ", terminal(text)).replace("|", "\\|")
    if re.fullmatch(r"`[^`]*`", plain):
        return plain
    return plain.replace("<", "&lt;").replace("](", "]\\(")


def code(text: object) -> str:
    """A code span of Markdown that the text cannot end: one backtick more than it holds in a row."""
    plain = re.sub(r"[\r\n]", " ", terminal(text))
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}"


def terminal(text: object) -> str:
    """Without escape sequences and other control characters but for the end of a line and the tabulator."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", str(text))


def plot(text: object) -> str:
    """For matplotlib: no formula, and no longer than an axis can show."""
    plain = re.sub(r"\s+", " ", terminal(text)).replace("$", r"\$")
    return plain if len(plain) <= 60 else plain[:59] + "…"


def one_line(error: BaseException) -> str:
    """What an exception says, in one line for a terminal; of one of the operating system, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return terminal(f"{error.filename}: {error.strerror}")
    return terminal(" ".join(str(error).split()))
