"""Answer a suite's items: the answer modes, the registry group ``answers``."""
