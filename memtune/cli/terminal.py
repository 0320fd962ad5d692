"""What is shown to people."""

from __future__ import annotations


def visible(text: str, keep: str = "") -> str:
    """Text that may be a stranger's, for a terminal: what is no printable character is shown by its escape."""
    return "".join(each if each.isprintable() or each in keep else ascii(each)[1:-1] for each in text)
