"""The embedded data set: scenes of emoji."""
