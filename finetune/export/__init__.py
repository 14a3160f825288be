"""What comes out: checkpoints that open without this framework."""
