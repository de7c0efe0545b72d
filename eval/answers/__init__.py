"""The ways a suite is answered."""
