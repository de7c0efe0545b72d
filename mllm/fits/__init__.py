"""Fit parts in closed form, without a gradient. Each class is found by the type of the part that it fits."""
