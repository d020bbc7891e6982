"""Baton: a serving cluster for large language models with prefill and decode on separate pools."""

__version__ = "0.1.0"
