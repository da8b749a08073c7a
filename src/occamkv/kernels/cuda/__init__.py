"""The CUDA backend in the making: its kernel, and what describes a call to it. It is not among the backends yet."""

from occamkv.formats import Format

__all__ = ["refuses_format"]


def refuses_format(format: Format) -> str | None:
    """Return why the kernel cannot read `format`, one sentence, or None."""
    if format.levels != "uniform":
        return f"it reads codes that mean code * scale + minimum, not {format.levels} levels"
    if format.k_axis != "channel":
        return "it reads K with one scale for each channel of a group of tokens, not one for each token"
    return None
