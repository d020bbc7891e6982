"""What several processes of a cluster share: see `base.py` for the interface, `memory.py` and `redis.py` for the two."""
