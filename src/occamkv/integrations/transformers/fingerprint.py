"""A short hash of a model's configuration, to tell whether a cache or plan belongs to a model."""

import hashlib
import json
from typing import Any

_IGNORED = (
    "name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
    "use_cache",
    "attn",
    "token_id",
    "output_",
)


def fingerprint(config: Any) -> str:
    """Return 16 hex digits that depend on the shape-giving fields of a configuration, not on paths or dtypes."""
    fields = {k: v for k, v in config.to_dict().items() if not any(word in k for word in _IGNORED)}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
