"""Reward sampled answers: by a guide's similarity, fluency, repetition, or a metric."""
