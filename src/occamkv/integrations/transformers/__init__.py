"""occamkv inside Hugging Face transformers (5.0 or newer): no patched model, three official doors."""

from occamkv.integrations.transformers.attention import register
from occamkv.integrations.transformers.cache import Attachment, PackedCache, attach
from occamkv.integrations.transformers.folding import fold, fold_balance
from occamkv.integrations.transformers.plan import plan_for
from occamkv.integrations.transformers.shadow import Verify

__all__ = ["Attachment", "PackedCache", "Verify", "attach", "fold", "fold_balance", "plan_for", "register"]
