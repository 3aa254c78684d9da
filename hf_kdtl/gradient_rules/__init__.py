"""How the task gradient and the transfer gradient become one. None is written yet: the sum is what Trainer does."""

GRADIENT_RULES: dict[str, type] = {}
