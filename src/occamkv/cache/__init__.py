"""Where the tokens are: layer cache, page pool, plan and report."""

from occamkv.cache.layer import LayerCache
from occamkv.cache.plan import LayerPlan, Plan
from occamkv.cache.report import CacheReport, LayerReport
from occamkv.cache.verification import LayerVerification, Verification

__all__ = [
    "CacheReport",
    "LayerCache",
    "LayerPlan",
    "LayerReport",
    "LayerVerification",
    "Plan",
    "Verification",
]
