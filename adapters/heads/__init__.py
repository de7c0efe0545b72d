"""Heads: trained modules that make something other than text of states, a file each."""
