"""A learned world driven by hand, from a page on this machine."""
