"""A teacher's layer, compressed: fitting, exporting and reading it."""
