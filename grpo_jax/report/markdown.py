"""Model output inside Markdown pages."""


def inline(text: str) -> str:
    """Model output as one line of Markdown code: control characters escaped, so that nothing in it acts."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text).replace("`", "ˋ")
