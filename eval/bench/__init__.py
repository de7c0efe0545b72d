"""Measure speed next to the alternative: the same weights, tokens and images in one run; ratios, not seconds."""
