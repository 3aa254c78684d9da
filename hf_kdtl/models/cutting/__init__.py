"""Students cut out of their teacher: what a family can lose, which parts go, and what the result costs."""
