"""What a run leaves for people: results as numbers, curves and videos on one page."""
