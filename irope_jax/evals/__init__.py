"""What a model can do, measured: parameters in, measurements out. Training calls it on schedule, `irope eval` alone."""
