"""What several processes of a cluster share: the interface in `base.py`, and `memory.py` and `redis.py` behind it."""
