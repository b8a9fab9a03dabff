"""Optional packages."""

from __future__ import annotations


def install_hint(extra: str) -> str:
    """How to install an extra, from an index or in a clone."""
    return f"pip install 'vla-adapter-hf[{extra}]', or in a clone pip install -e '.[{extra}]'"
