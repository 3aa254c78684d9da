"""One forward of one model, and what is captured of it."""
