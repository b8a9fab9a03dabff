"""Which full column name a short one means: `top` means `observation.images.top`. Datasets follow the same rule."""

from collections.abc import Sequence


def matching_names(name: str, available: Sequence[str]) -> list[str]:
    """Names in `available` that are `name`, or else end in it.

    Parts of a name are separated by dots or slashes, and only whole parts match: `top` matches `images.top` and
    `images/top`, but not `desktop`.
    """
    if name in available:
        return [name]
    parts = name_parts(name)
    return [full for full in available if name_parts(full)[-len(parts) :] == parts]


def name_parts(name: str) -> list[str]:
    """`images/top` and `images.top` -> `["images", "top"]`."""
    return name.replace("/", ".").split(".")


__all__ = ["matching_names", "name_parts"]
