"""Run the library from the command line."""
