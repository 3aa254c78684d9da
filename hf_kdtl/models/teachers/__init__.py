"""Where the teacher's signals come from."""
