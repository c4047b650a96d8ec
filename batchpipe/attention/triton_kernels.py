"""Paged attention for GPUs, in Triton: flash attention over the blocks of a pool (Dao, arXiv 2307.08691).

A sequence's KV is read in chunks with fixed edges (flash decoding: one program a chunk), so what a row sums, and in
which order, depends on the row alone and not on what else is in its step.

An entry of a block table is a block's number, or ~slot where the block is staged: its even layers pass through this
layer slot of the pool and its odd ones through the next. See `AttentionInputs`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_address(entry, layer, num_layers, layer_stride):
    """Where one layer of a table's entry begins in the pool, in numbers."""
    entry = entry.to(tl.int64)
    slot = tl.where(entry >= 0, entry * num_layers + layer, ~entry + layer % 2)
    return slot * layer_stride


@triton.jit
def _attend_range(
    pool, table, query, best, total, summed, begin, end, first_seen, positions,
    scale, softcap, layer, num_layers, layer_stride, value_offset,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, KEYS: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Takes keys [begin, end) in; MASKED: some are behind a query, before `first_seen`, or beyond `end`."""
    log2e: tl.constexpr = 1.4426950408889634
    columns = tl.arange(0, WIDTH)
    column_ok = columns < D
    for start in range(begin, end, KEYS):
        keys_at = start + tl.arange(0, KEYS)
        if MASKED:
            entry = tl.load(table + keys_at // BLOCK_TOKENS, mask=keys_at < end, other=0)
        else:
            entry = tl.load(table + keys_at // BLOCK_TOKENS)
        place = layer_address(entry, layer, num_layers, layer_stride) + (keys_at % BLOCK_TOKENS) * D
        key_at = pool + place[None, :] + columns[:, None]
        value_at = pool + value_offset + place[:, None] + columns[None, :]
        if MASKED:
            key = tl.load(key_at, mask=column_ok[:, None] & (keys_at < end)[None, :], other=0.0)
        elif WIDTH != D:
            key = tl.load(key_at, mask=column_ok[:, None], other=0.0)
        else:
            key = tl.load(key_at)
        if EXACT:
            scores = tl.dot(query, key, input_precision="ieee")
        else:
            scores = tl.dot(query, key)
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scale * scores / softcap) - 1.0)
            factor = log2e
        else:
            factor = scale * log2e  # by one multiply-add, below
        if MASKED:
            seen = (keys_at[None, :] <= positions[:, None]) & (keys_at < end)[None, :]
            seen = seen & (keys_at >= first_seen)[None, :]
            if WINDOW > 0:
                seen = seen & (keys_at[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1) * factor)
        if MASKED:  # a row that sees no key yet
            finite_best = tl.where(new_best == -float("inf"), 0.0, new_best)
        else:
            finite_best = new_best
        weights = tl.exp2(scores * factor - finite_best[:, None])
        shrink = tl.exp2(best - finite_best)
        total = total * shrink + tl.sum(weights, 1)
        if MASKED:
            value = tl.load(value_at, mask=column_ok[None, :] & (keys_at < end)[:, None], other=0.0)
        elif WIDTH != D:
            value = tl.load(value_at, mask=column_ok[None, :], other=0.0)
        else:
            value = tl.load(value_at)
        if EXACT:
            summed = summed * shrink[:, None] + tl.dot(weights, value.to(tl.float32), input_precision="ieee")
        else:
            summed = tl.dot(weights.to(value.dtype), value, summed * shrink[:, None])
        best = new_best
    return best, total, summed


@triton.jit(do_not_specialize=["layer"])
def decode_kernel(
    output, partial, partial_sums, query, pool, item_sequences, item_chunks, first_items, query_starts,
    context_lengths, tables, table_starts, sinks, scale, softcap,
    query_token_stride, query_head_stride, layer, num_layers, layer_stride, head_stride, value_offset,
    GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence's KV for the query heads of one KV head, of a sequence with one new token.

    Grid: (KV heads, items). Item i is chunk item_chunks[i] of sequence item_sequences[i]; -1: nothing to do. A
    sequence of one chunk is done with it; otherwise `combine_kernel` adds the chunks up.
    """
    head, item = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(item_sequences + item)
    if sequence >= 0:
        chunk = tl.load(item_chunks + item)
        length = tl.load(context_lengths + sequence) + 1
        token = tl.load(query_starts + sequence).to(tl.int64)
        num_chunks = tl.load(first_items + sequence + 1) - tl.load(first_items + sequence)
        table = tables + tl.load(table_starts + sequence)
        rows = tl.arange(0, ROWS)
        row_ok = rows < GROUP
        columns = tl.arange(0, WIDTH)
        shown = row_ok[:, None] & (columns < D)[None, :]
        heads = head * GROUP + rows
        query_at = query + token * query_token_stride + heads[:, None] * query_head_stride + columns[None, :]
        queries = tl.load(query_at, mask=shown, other=0.0)
        best = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        summed = tl.zeros([ROWS, WIDTH], tl.float32)
        if HAS_SINKS:
            if chunk == 0:
                best = tl.load(sinks + heads, mask=row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
                total += 1.0
        begin = chunk * CHUNK
        end = tl.minimum(length, begin + CHUNK)
        positions = tl.full([ROWS], 0, tl.int32) + (length - 1)
        first_seen = begin
        if WINDOW > 0:
            first_seen = tl.maximum(begin, length - WINDOW)
        masked_begin = tl.maximum(begin, first_seen // KEYS * KEYS)
        whole_end = masked_begin
        if WINDOW == 0:
            whole_end = begin + (end - begin) // KEYS * KEYS
            best, total, summed = _attend_range(
                pool + head * head_stride, table, queries, best, total, summed, begin, whole_end, 0, positions,
                scale, softcap, layer, num_layers, layer_stride, value_offset, D, WIDTH, BLOCK_TOKENS, KEYS,
                False, 0, HAS_SOFTCAP, EXACT,
            )  # fmt: skip
        best, total, summed = _attend_range(
            pool + head * head_stride, table, queries, best, total, summed, whole_end, end, first_seen, positions,
            scale, softcap, layer, num_layers, layer_stride, value_offset, D, WIDTH, BLOCK_TOKENS, KEYS,
            True, WINDOW, HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        num_heads = tl.num_programs(0) * GROUP
        if num_chunks == 1:
            result = summed / tl.where(total == 0.0, 1.0, total)[:, None]
            output_at = output + (token * num_heads + heads[:, None]) * D + columns[None, :]
            tl.store(output_at, result.to(output.dtype.element_ty), mask=shown)
        else:
            part = item.to(tl.int64) * num_heads + heads
            tl.store(partial + part[:, None] * D + columns[None, :], summed, mask=shown)
            tl.store(partial_sums + part * 2, best, mask=row_ok)
            tl.store(partial_sums + part * 2 + 1, total, mask=row_ok)


@triton.jit
def combine_kernel(
    output, partial, partial_sums, first_items, query_starts, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Adds up the chunks of a sequence with more than one. Grid: (query heads, sequences)."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    first, end = tl.load(first_items + sequence), tl.load(first_items + sequence + 1)
    if end - first > 1:
        columns = tl.arange(0, WIDTH)
        column_ok = columns < D
        best = -float("inf")
        total = 0.0
        summed = tl.zeros([WIDTH], tl.float32)
        for number in range(end - first):
            part = (first + number).to(tl.int64) * num_heads + head
            part_best, part_total = tl.load(partial_sums + part * 2), tl.load(partial_sums + part * 2 + 1)
            part_summed = tl.load(partial + part * D + columns, mask=column_ok, other=0.0)
            new_best = tl.maximum(best, part_best)
            finite_best = tl.where(new_best == -float("inf"), 0.0, new_best)
            shrink, part_shrink = tl.exp2(best - finite_best), tl.exp2(part_best - finite_best)
            total = total * shrink + part_total * part_shrink
            summed = summed * shrink + part_summed * part_shrink
            best = new_best
        token = tl.load(query_starts + sequence).to(tl.int64)
        result = summed / tl.where(total == 0.0, 1.0, total)
        tl.store(output + (token * num_heads + head) * D + columns, result.to(output.dtype.element_ty), mask=column_ok)


@triton.jit(do_not_specialize=["layer"])
def prefill_kernel(
    output, query, pool, tile_sequences, tile_firsts, query_starts, query_lengths, context_lengths, tables,
    table_starts, sinks, scale, softcap,
    query_token_stride, query_head_stride, layer, num_layers, layer_stride, head_stride, value_offset,
    GROUP: tl.constexpr, HEADS: tl.constexpr, NUM_HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """QUERIES new tokens of one sequence for HEADS query heads of one KV head.

    Grid: (parts of KV heads' groups, tiles); a group of GROUP query heads has as many parts as it takes. Tile i begins
    with new token tile_firsts[i] of sequence tile_sequences[i]; -1: nothing to do.
    """
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    head, tile = tl.program_id(0) // PARTS, tl.program_id(1)
    sequence = tl.load(tile_sequences + tile)
    if sequence >= 0:
        first = tl.load(tile_firsts + tile)
        num_queries = tl.load(query_lengths + sequence)
        context = tl.load(context_lengths + sequence)
        query_start = tl.load(query_starts + sequence)
        table = tables + tl.load(table_starts + sequence)
        rows = tl.arange(0, ROWS)
        own = first + rows // HEADS
        member = tl.program_id(0) % PARTS * HEADS + rows % HEADS
        heads = head * GROUP + member
        row_ok = (rows < QUERIES * HEADS) & (own < num_queries) & (member < GROUP)
        columns = tl.arange(0, WIDTH)
        shown = row_ok[:, None] & (columns < D)[None, :]
        tokens = (query_start + own).to(tl.int64)
        query_at = query + tokens[:, None] * query_token_stride + heads[:, None] * query_head_stride + columns[None, :]
        queries = tl.load(query_at, mask=shown, other=0.0)
        best = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        summed = tl.zeros([ROWS, WIDTH], tl.float32)
        if HAS_SINKS:
            best = tl.load(sinks + heads, mask=row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0
        positions = context + own
        end = tl.minimum(context + first + QUERIES, context + num_queries)
        begin = 0
        whole_end = 0
        if WINDOW > 0:
            begin = tl.maximum(0, context + first - WINDOW + 1) // KEYS * KEYS
            whole_end = begin
        else:
            whole_end = (context + first + 1) // KEYS * KEYS
            best, total, summed = _attend_range(
                pool + head * head_stride, table, queries, best, total, summed, 0, whole_end, 0, positions,
                scale, softcap, layer, num_layers, layer_stride, value_offset, D, WIDTH, BLOCK_TOKENS, KEYS,
                False, 0, HAS_SOFTCAP, EXACT,
            )  # fmt: skip
        best, total, summed = _attend_range(
            pool + head * head_stride, table, queries, best, total, summed, whole_end, end, 0, positions,
            scale, softcap, layer, num_layers, layer_stride, value_offset, D, WIDTH, BLOCK_TOKENS, KEYS,
            True, WINDOW, HAS_SOFTCAP, EXACT,
        )  # fmt: skip
        result = summed / tl.where(total == 0.0, 1.0, total)[:, None]
        output_at = output + (tokens[:, None] * NUM_HEADS + heads[:, None]) * D + columns[None, :]
        tl.store(output_at, result.to(output.dtype.element_ty), mask=shown)


@triton.jit(do_not_specialize=["layer"])
def write_kernel(
    pool, key, value, token_entries, token_rows, layer, num_layers, layer_stride, head_stride, value_offset,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes one token's key and value to its row of its block. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_rows + token)
    if row >= 0:
        heads, columns = tl.arange(0, HEADS_UP), tl.arange(0, WIDTH)
        shown = (heads < HEADS)[:, None] & (columns < D)[None, :]
        place = layer_address(tl.load(token_entries + token), layer, num_layers, layer_stride) + row * D
        target = pool + place + heads[:, None] * head_stride + columns[None, :]
        from_key = key + token * key_token_stride + heads[:, None] * key_head_stride + columns[None, :]
        from_value = value + token * value_token_stride + heads[:, None] * value_head_stride + columns[None, :]
        tl.store(target, tl.load(from_key, mask=shown), mask=shown)
        tl.store(target + value_offset, tl.load(from_value, mask=shown), mask=shown)


def rounded_up(number: int) -> int:
    """The next power of two, at least 16: what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(number))
