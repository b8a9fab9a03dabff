"""Which of several full names a short name means: `top` means `observation.images.top`."""

from collections.abc import Sequence


def matching_names(name: str, available: Sequence[str]) -> list[str]:
    """Names in `available` that are `name`, or else end in it.

    Parts of a name are separated by dots or slashes, and only whole parts match: `top` matches `images.top` and
    `images/top`, but not `desktop`.
    """
    if name in available:
        return [name]
    parts = _parts(name)
    return [full for full in available if _parts(full)[-len(parts) :] == parts]


def _parts(name: str) -> list[str]:
    return name.replace("/", ".").split(".")


__all__ = ["matching_names"]
