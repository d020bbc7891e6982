"""The transfer plan: which rank sends which pages to which rank, as a pure function of two layouts.

Ranks of an instance are numbered `pipeline_rank * tensor_parallel + tensor_rank`. Pipeline stages split the layers,
tensor ranks split the KV heads, both into contiguous ranges: balanced ones, unless the layout names the layers of each
stage. Where there are more tensor ranks than KV heads,
each head is held by several ranks (replicas). Block sizes do not enter the plan except as alignment: a payload is
`[layers, 2, heads, tokens, head_dim]`, contiguous, and each side maps token ranges to its own blocks (`block_spans`).

Every byte that a destination rank holds is sent to it once, by one source rank. Source replicas share the load: each
serves a part of the destination's replicas, or of the tokens where there are fewer destinations than replicas.

Which ranks have to do with each other (`transfer_pairs`) depends on the layouts alone; which pages a pair carries
(`pair_pages`) also on the tokens, and may be none for a short prompt. The driver of the source is always paired with
the driver of the destination.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from baton.engine.kv_layout import DTYPE_BYTES, KvLayout
from baton.errors import IncompatibleError

__all__ = [
    "BlockSpan",
    "PageRange",
    "Piece",
    "block_spans",
    "cell_bytes",
    "driver_rank",
    "head_range",
    "layer_groups",
    "layer_range",
    "pair_pages",
    "plan_transfer",
    "rank_pages",
    "split_range",
    "taper_range",
    "transfer_pairs",
]


@dataclass(frozen=True, slots=True)
class PageRange:
    """A box of KV cells: half-open ranges of layers, KV heads and tokens (positions in the prompt)."""

    layer_begin: int
    layer_end: int
    head_begin: int
    head_end: int
    token_begin: int
    token_end: int

    @property
    def num_cells(self) -> int:
        """Number of (layer, head, token) cells; each holds `cell_bytes` bytes of K and V."""
        return (
            (self.layer_end - self.layer_begin)
            * (self.head_end - self.head_begin)
            * (self.token_end - self.token_begin)
        )

    @property
    def layers(self) -> tuple[int, int]:
        """`[begin, end)`"""
        return self.layer_begin, self.layer_end

    @property
    def heads(self) -> tuple[int, int]:
        """`[begin, end)`"""
        return self.head_begin, self.head_end

    @property
    def tokens(self) -> tuple[int, int]:
        """`[begin, end)`"""
        return self.token_begin, self.token_end

    def overlaps(self, other: PageRange) -> bool:
        """True when both boxes share a cell."""
        return (
            self.layer_begin < other.layer_end
            and other.layer_begin < self.layer_end
            and self.head_begin < other.head_end
            and other.head_begin < self.head_end
            and self.token_begin < other.token_end
            and other.token_begin < self.token_end
        )

    def within(self, outer: PageRange) -> bool:
        """True when this box is not empty and lies inside `outer`."""
        return (
            outer.layer_begin <= self.layer_begin < self.layer_end <= outer.layer_end
            and outer.head_begin <= self.head_begin < self.head_end <= outer.head_end
            and outer.token_begin <= self.token_begin < self.token_end <= outer.token_end
        )

    def intersection(self, other: PageRange) -> PageRange | None:
        """The box that both share; None when they share no cell."""
        if not self.overlaps(other):
            return None
        return PageRange(
            max(self.layer_begin, other.layer_begin),
            min(self.layer_end, other.layer_end),
            max(self.head_begin, other.head_begin),
            min(self.head_end, other.head_end),
            max(self.token_begin, other.token_begin),
            min(self.token_end, other.token_end),
        )

    def shifted(self, num_layers: int, num_heads: int) -> PageRange:
        """The same box, counted from an origin that lies `num_layers` and `num_heads` before."""
        return replace(
            self,
            layer_begin=self.layer_begin + num_layers,
            layer_end=self.layer_end + num_layers,
            head_begin=self.head_begin + num_heads,
            head_end=self.head_end + num_heads,
        )

    def __str__(self) -> str:
        return (
            f"layers {self.layer_begin}:{self.layer_end} heads {self.head_begin}:{self.head_end} "
            f"tokens {self.token_begin}:{self.token_end}"
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of a plan: `pages` go from a rank of the source to a rank of the destination."""

    source_rank: int
    destination_rank: int
    pages: PageRange


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Tokens that lie in one block: `slot_begin:slot_end` of the request's block number `block_index`."""

    block_index: int
    slot_begin: int
    slot_end: int
    token_begin: int


def cell_bytes(layout: KvLayout) -> int:
    """Bytes of K and V of one token in one layer and one head."""
    return 2 * layout.head_dim * DTYPE_BYTES[layout.dtype]


def layer_range(layout: KvLayout, pipeline_rank: int) -> tuple[int, int]:
    """Layers `[begin, end)` of a pipeline stage."""
    num_stages = layout.pipeline_parallel
    if layout.layers_per_stage:
        begin = sum(layout.layers_per_stage[:pipeline_rank])
        return begin, begin + layout.layers_per_stage[pipeline_rank]
    return pipeline_rank * layout.num_layers // num_stages, (pipeline_rank + 1) * layout.num_layers // num_stages


def head_range(layout: KvLayout, tensor_rank: int) -> tuple[int, int]:
    """KV heads `[begin, end)` of a tensor rank; one head, shared with its replicas, when ranks outnumber heads."""
    num_ranks, num_heads = layout.tensor_parallel, layout.num_kv_heads
    begin = tensor_rank * num_heads // num_ranks
    if num_ranks > num_heads:
        return begin, begin + 1
    return begin, (tensor_rank + 1) * num_heads // num_ranks


def driver_rank(layout: KvLayout) -> int:
    """The rank that samples and plans for its instance: the first of the last stage, where logits come out."""
    return (layout.pipeline_parallel - 1) * layout.tensor_parallel


def rank_pages(layout: KvLayout, rank: int, token_begin: int, token_end: int) -> PageRange:
    """What a rank holds of some tokens: its layers and its heads, counted over the whole model."""
    stage, tensor_rank = divmod(rank, layout.tensor_parallel)
    return PageRange(*layer_range(layout, stage), *head_range(layout, tensor_rank), token_begin, token_end)


def block_spans(block_size: int, token_begin: int, token_end: int) -> Iterator[BlockSpan]:
    """Cut tokens `[token_begin, token_end)` at block borders, in order."""
    token = token_begin
    while token < token_end:
        index, slot = divmod(token, block_size)
        num_tokens = min(block_size - slot, token_end - token)
        yield BlockSpan(block_index=index, slot_begin=slot, slot_end=slot + num_tokens, token_begin=token)
        token += num_tokens


def layer_groups(
    num_layers: int, num_tokens: int, *, single_message_tokens: int = 256, num_groups: int = 4
) -> tuple[tuple[int, int], ...]:
    """How to cut a forward pass of `num_tokens` tokens into messages: layer ranges `[begin, end)`, in order.

    Below `single_message_tokens` the pass is too short to hide anything behind, and one message carries all layers;
    otherwise `num_groups` balanced groups ship while later layers are computed.
    """
    if num_tokens < single_message_tokens:
        return ((0, num_layers),)
    count = max(1, min(num_groups, num_layers))
    return tuple((i * num_layers // count, (i + 1) * num_layers // count) for i in range(count))


def split_range(pages: PageRange, *, cell_num_bytes: int, max_bytes: int) -> tuple[PageRange, ...]:
    """Cut a box into boxes of at most `max_bytes` payload bytes: by tokens first, then by layers, then by heads.

    Raises:
        ValueError: when not even one cell fits.
    """
    if cell_num_bytes > max_bytes:
        raise ValueError(f"one KV cell takes {cell_num_bytes} bytes, more than the payload limit of {max_bytes}")
    num_tokens = pages.token_end - pages.token_begin
    if pages.num_cells * cell_num_bytes <= max_bytes:
        return (pages,)
    row_bytes = pages.num_cells // num_tokens * cell_num_bytes
    if row_bytes <= max_bytes:
        step = max_bytes // row_bytes
        return tuple(
            replace(pages, token_begin=token, token_end=min(token + step, pages.token_end))
            for token in range(pages.token_begin, pages.token_end, step)
        )
    if pages.layer_end - pages.layer_begin > 1:
        middle = (pages.layer_begin + pages.layer_end) // 2
        halves = (replace(pages, layer_end=middle), replace(pages, layer_begin=middle))
    else:
        middle = (pages.head_begin + pages.head_end) // 2
        halves = (replace(pages, head_end=middle), replace(pages, head_begin=middle))
    return tuple(
        part for half in halves for part in split_range(half, cell_num_bytes=cell_num_bytes, max_bytes=max_bytes)
    )


def taper_range(pages: PageRange, *, cell_num_bytes: int, max_bytes: int) -> tuple[PageRange, ...]:
    """As `split_range`, with a first and a last box of about half the size of the others.

    What is cut so is gathered box by box while the boxes before are copied: the copying begins sooner behind a short
    first one, and ends sooner behind a short last one.

    Raises:
        ValueError: when not even one cell fits.
    """
    num_tokens = pages.token_end - pages.token_begin
    max_tokens = max_bytes // (pages.num_cells // num_tokens * cell_num_bytes)
    if num_tokens <= 2 * max_tokens or max_tokens == 0:
        return split_range(pages, cell_num_bytes=cell_num_bytes, max_bytes=max_bytes)
    num_halves = 2 * -(-num_tokens // max_tokens)
    cuts = [pages.token_begin + num_tokens * half // num_halves for half in (0, *range(1, num_halves, 2), num_halves)]
    return tuple(
        replace(pages, token_begin=begin, token_end=end) for begin, end in itertools.pairwise(cuts) if begin < end
    )


def plan_transfer(source: KvLayout, destination: KvLayout, token_begin: int, token_end: int) -> tuple[Piece, ...]:
    """Plan the transfer of tokens `[token_begin, token_end)` of one request from any layout to any other.

    Raises:
        IncompatibleError: the layouts differ in more than tensor parallelism, pipeline parallelism and block size.
    """
    _expect_same_model(source, destination)
    return tuple(
        piece
        for rank in range(destination.tensor_parallel * destination.pipeline_parallel)
        for piece in _pieces_for(source, destination, rank, token_begin, token_end)
    )


def pair_pages(
    source: KvLayout, source_rank: int, destination: KvLayout, destination_rank: int, token_begin: int, token_end: int
) -> tuple[PageRange, ...]:
    """What one rank sends to one other by the plan: disjoint boxes, possibly none. Raises like `plan_transfer`."""
    _expect_same_model(source, destination)
    return tuple(
        piece.pages
        for piece in _pieces_for(source, destination, destination_rank, token_begin, token_end)
        if piece.source_rank == source_rank
    )


@functools.lru_cache(maxsize=64)
def transfer_pairs(source: KvLayout, destination: KvLayout) -> frozenset[tuple[int, int]]:
    """The (source rank, destination rank) pairs that carry pages of a prompt that is long enough for all of them.

    Raises like `plan_transfer`.
    """
    # One destination block for each replica: no share of the tokens is empty.
    num_tokens = source.tensor_parallel * destination.block_size
    return frozenset(
        (piece.source_rank, piece.destination_rank) for piece in plan_transfer(source, destination, 0, num_tokens)
    )


def _expect_same_model(source: KvLayout, destination: KvLayout) -> None:
    if source.fingerprint() != destination.fingerprint():
        raise IncompatibleError(f"KV layouts cannot be mapped: {source} to {destination}")


def _pieces_for(
    source: KvLayout, destination: KvLayout, rank: int, token_begin: int, token_end: int
) -> Iterator[Piece]:
    """What one destination rank gets."""
    stage, tensor_rank = divmod(rank, destination.tensor_parallel)
    wanted = layer_range(destination, stage)
    shares = _shares(source, destination, tensor_rank, token_begin, token_end)
    for source_stage in range(source.pipeline_parallel):
        held = layer_range(source, source_stage)
        layers = max(wanted[0], held[0]), min(wanted[1], held[1])
        if layers[0] >= layers[1]:
            continue
        for source_tensor_rank, heads, tokens in shares:
            yield Piece(
                source_rank=source_stage * source.tensor_parallel + source_tensor_rank,
                destination_rank=rank,
                pages=PageRange(*layers, *heads, *tokens),
            )


def _shares(
    source: KvLayout, destination: KvLayout, tensor_rank: int, token_begin: int, token_end: int
) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """What one destination tensor rank gets from whom: (source tensor rank, heads, tokens)."""
    shares: list[tuple[int, tuple[int, int], tuple[int, int]]] = []
    for head in range(*head_range(destination, tensor_rank)):
        holders = _holders(source, head)
        takers = _holders(destination, head)
        place = takers.index(tensor_rank)
        if len(holders) > len(takers):
            mine = [holder for i, holder in enumerate(holders) if i * len(takers) // len(holders) == place]
        else:
            mine = [holders[place * len(holders) // len(takers)]]
        for holder, tokens in zip(
            mine, _cut_tokens(token_begin, token_end, len(mine), destination.block_size), strict=True
        ):
            if tokens[0] >= tokens[1]:
                continue
            previous = next((i for i, s in enumerate(shares) if s[0] == holder and s[2] == tokens), None)
            if previous is not None and shares[previous][1][1] == head:
                shares[previous] = (holder, (shares[previous][1][0], head + 1), tokens)
            else:
                shares.append((holder, (head, head + 1), tokens))
    return shares


def _holders(layout: KvLayout, head: int) -> list[int]:
    """Tensor ranks that hold a KV head, ascending."""
    ranges = (head_range(layout, rank) for rank in range(layout.tensor_parallel))
    return [rank for rank, (begin, end) in enumerate(ranges) if begin <= head < end]


def _cut_tokens(token_begin: int, token_end: int, num_parts: int, block_size: int) -> list[tuple[int, int]]:
    """Cut a token range into parts that meet at block borders where that is possible; parts may be empty."""
    cuts = [token_begin]
    for i in range(1, num_parts):
        cut = token_begin + i * (token_end - token_begin) // num_parts
        cuts.append(min(max(cut // block_size * block_size, cuts[-1]), token_end))
    cuts.append(token_end)
    return list(itertools.pairwise(cuts))
