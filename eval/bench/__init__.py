"""Speed, side by side with the alternative: the same weights, tokens and pictures, in one run; ratios, not seconds."""
