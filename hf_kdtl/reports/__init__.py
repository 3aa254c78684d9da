"""Text and figures made from results.json alone."""
