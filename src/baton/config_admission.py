"""`admission:` of `cluster.yaml`: who is let in, in which order, and who is refused early. Pure values."""

from __future__ import annotations

from baton.config_section import Section

__all__ = ["AdmissionConfig"]


class AdmissionConfig(Section):
    """Priority classes, tenants' shares, and early refusal."""

    reject_early: bool = True
    """Refuse a request at once where its predicted time to the first token misses what it asks for."""
