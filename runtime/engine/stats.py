"""`EngineStats`: counts of an engine, read by doors and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of an engine; those of tokens and steps are since its start."""

    waiting: int  # choices in the queue
    running: int  # choices that hold KV cache
    free_blocks: int
    num_blocks: int
    steps: int
    tokens: int  # sampled
    prompt_tokens: int  # of all sequences (views) whose answer has begun
    cached_tokens: int  # of these, found in the prefix cache
    drafted_tokens: int  # verified; counted once per group, not per sequence
    preemptions: int
    restarts: int  # of the loop, after a fault
    accepted_tokens: int  # of the drafted ones, those that were drawn
    waiting_tokens: int  # of the prompts in the queue
    block_size: int  # positions of a block
