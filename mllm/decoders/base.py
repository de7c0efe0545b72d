"""What image decoders have in common, and whether a head makes what one takes."""

from __future__ import annotations
