"""Open images, videos and sounds, within limits."""
