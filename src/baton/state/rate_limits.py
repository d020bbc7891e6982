"""Token buckets in the shared state: the arithmetic, in Python for memory and in Lua for Redis.

    take    gives what is there, at most `most`, if that is `least` or more; a full bucket gives `least` however much
            that is, and is in debt then
    return  puts back what was not used

A bucket that nobody touches for as long as it takes to fill is full, and need not be kept.
"""

from __future__ import annotations

from typing import Final

__all__ = ["RETURN", "TAKE", "take"]


def take(
    level: float, elapsed_s: float, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
) -> tuple[float, float, float]:
    """(new level, tokens granted, seconds to wait where none were) of a bucket that was at `level` a while ago."""
    assert 0 <= least <= most, (least, most)
    level = min(level + max(elapsed_s, 0.0) * tokens_per_s, burst_tokens)
    missing = min(least, burst_tokens) - level
    # Rounding must not make the last crumb be waited for.
    if missing > 1e-6 * burst_tokens:
        return level, 0.0, missing / tokens_per_s
    granted = max(least, min(most, level))
    return level - granted, granted, 0.0


_READ: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local held = redis.call('HMGET', KEYS[1], 'level', 'at')
"""

# KEYS[1] bucket. ARGV: 1 least, 2 most, 3 tokens per second, 4 burst. Granted, and how long to wait, as text.
TAKE: Final = (
    _READ
    + """
local least, most, rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local level = tonumber(held[1]) or burst
level = math.min(level + math.max(now - (tonumber(held[2]) or now), 0) * rate, burst)
local missing = math.min(least, burst) - level
local granted, wait = 0, 0
if missing > 1e-6 * burst then
  wait = missing / rate
else
  granted = math.max(least, math.min(most, level))
  level = level - granted
end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.min(math.ceil((burst - level) / rate * 1000) + 1000, 86400000))
return {string.format('%.6f', granted), string.format('%.6f', wait)}
"""
)

# KEYS[1] bucket. ARGV: 1 tokens, 2 burst. One that is not there is full already.
RETURN: Final = (
    _READ
    + """
local level = tonumber(held[1])
if level then
  level = math.min(level + tonumber(ARGV[1]), tonumber(ARGV[2]))
  redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level))
end
"""
)
