"""What a checkpoint holds, whether it is complete, and which one to resume from."""
