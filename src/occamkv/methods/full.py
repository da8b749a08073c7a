"""Full precision: K and V stay as the model made them. The control in every table (attention: arXiv:1706.03762)."""

from occamkv.methods.method import Method

METHOD = Method(name="full", format=None, source="Vaswani et al. 2017, arXiv:1706.03762")
