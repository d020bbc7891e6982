"""The Lua scripts of `redis.py`: each is one step for every other client of the same Redis.

Beside each value stands its group's index: a sorted set of the group's keys by the time at which they end, in
milliseconds of Redis' own clock. So a group is listed without a walk over all keys of a database that may have
millions of others. Values that are not ours to read (another type, too long) count as none.

    KEYS[1] key, KEYS[2] index of its group
"""

from __future__ import annotations

from typing import Final

__all__ = ["APPEND", "DELETE", "GET", "PUT", "PUT_NEW", "REPLACE", "SCAN"]

_NOW: Final = """
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function readable(key, max_bytes)
  return redis.call('TYPE', key).ok == 'string' and redis.call('STRLEN', key) <= tonumber(max_bytes)
end
"""
# ARGV[1] value, ARGV[2] time to live in ms.
_SET: Final = (
    _NOW
    + """
local function set()
  local now = now_ms()
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), KEYS[1])
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[2]) then
    redis.call('PEXPIRE', KEYS[2], ARGV[2])
  end
end
"""
)

PUT: Final = _SET + "set()"

# ARGV[3] longest value to read. The value that is there, or nil where this one was set.
PUT_NEW: Final = (
    _SET
    + """
if readable(KEYS[1], ARGV[3]) then
  return redis.call('GET', KEYS[1])
end
set()
return false
"""
)

# ARGV[3] longest value to read, ARGV[4] the value that must be there.
REPLACE: Final = (
    _SET
    + """
if readable(KEYS[1], ARGV[3]) and redis.call('GET', KEYS[1]) == ARGV[4] then
  set()
  return 1
end
return 0
"""
)

# ARGV[1] longest value to read. The value, nil, or a list of type and length where it is not ours to read.
GET: Final = (
    _NOW
    + """
if readable(KEYS[1], ARGV[1]) then
  return redis.call('GET', KEYS[1])
end
local kind = redis.call('TYPE', KEYS[1]).ok
if kind == 'none' then
  return false
end
return {kind, kind == 'string' and redis.call('STRLEN', KEYS[1]) or 0}
"""
)

DELETE: Final = """
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], KEYS[1])
"""

# KEYS[1] stream. ARGV: 1 event, 2 how many are kept or a few more, 3 time to live of all in ms.
APPEND: Final = """
redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], '*', 'event', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
"""

# KEYS[1] index. ARGV: 1 how keys of the group begin, 2 longest value, 3 most bytes in all, 4 most keys.
# A list: how many were left out, then keys and values in turn.
SCAN: Final = (
    _NOW
    + """
local keys = redis.call(
  'ZRANGEBYSCORE', KEYS[1], string.format('(%.0f', now_ms()), '+inf', 'LIMIT', 0, tonumber(ARGV[4]) + 1
)
local found, total, left_out = {0}, 0, 0
for place, key in ipairs(keys) do
  if place > tonumber(ARGV[4]) or string.sub(key, 1, #ARGV[1]) ~= ARGV[1] then
    left_out = left_out + 1
  elseif not readable(key, ARGV[2]) then
    if redis.call('EXISTS', key) == 1 then
      left_out = left_out + 1
    end
  elseif total + redis.call('STRLEN', key) > tonumber(ARGV[3]) then
    left_out = left_out + 1
  else
    total = total + redis.call('STRLEN', key)
    found[#found + 1] = key
    found[#found + 1] = redis.call('GET', key)
  end
end
found[1] = left_out
return found
"""
)
