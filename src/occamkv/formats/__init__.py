"""What is stored: formats, pages, records, and how many bits a value takes."""

from occamkv.formats.format import MAX_HEAD_DIM, PAGE_TOKENS, Format, Sections, channel_groups, check_head_dim, padded

__all__ = ["MAX_HEAD_DIM", "PAGE_TOKENS", "Format", "Sections", "channel_groups", "check_head_dim", "padded"]
