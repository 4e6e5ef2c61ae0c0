"""Throughput and memory: recurrence, layer, training step, prefill, decoding, each against sequence length."""
