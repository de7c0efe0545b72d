"""Compute training losses: the built-in objectives. The contract is `mllm.slots.Objective`."""
