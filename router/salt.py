"""One salt from a tenant and a client's own `cache_salt`: pure. Different pairs give different salts.

    tenant ""    the client's salt as it is
    tenant "a"   NUL, length of the name, ":", the name, the client's salt

A client that sends what looks like another tenant's salt is a tenant without a name to us, and is written out as such.
"""

from __future__ import annotations

__all__ = ["salt_of"]

_MARK = "\0"


def salt_of(tenant: str, cache_salt: str) -> str:
    """What enters the names of blocks; "" where neither is given."""
    if not tenant and not cache_salt.startswith(_MARK):
        return cache_salt
    return f"{_MARK}{len(tenant)}:{tenant}{cache_salt}"
